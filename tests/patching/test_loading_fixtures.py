"""Loading what every release wrote: read as what it is, or refused where the file cannot tell.

The oracle is the truth each writing release recorded beside its file (`fixtures/write.py`), and PEFT's own deltas.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors.torch import load_file
from support import zoo

import peft_moe_compat
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError
from peft_moe_compat.patching.opening import written_by

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
import base_weights

FIXTURES = Path(__file__).parent.parent / "fixtures" / "peft"
TRUTHS = {path.parent: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/*/truth.json"))}
FUSED = [folder for folder, truth in TRUTHS.items() if truth["kind"] == "fused"]
FAMILY = zoo.FAMILIES[0]


def name_of(folder):
    return f"{folder.parent.name}/{folder.name}"


def written_here(folder):
    """A fixture of the same model written beside the installed transformers, of the same case if there is one."""
    truth = TRUTHS[folder]
    alike = [f for f, t in TRUTHS.items() if t["model_class"] == truth["model_class"] and t["kind"] == truth["kind"]]
    here = [f for f in alike if TRUTHS[f]["transformers"] == transformers.__version__]
    return sorted(here, key=lambda f: TRUTHS[f]["case"] != truth["case"])


def is_base(model, truth):
    """Whether the model has stacks of the sizes that the fixture was written for; their axes may have been swapped."""
    parameters = {n: p.shape for n, p in model.named_parameters()}
    wanted = {n: entry.get("stored_shape", ()) for n, entry in truth["parameters"].items() if n in parameters}
    names = {name.rpartition(".")[2] for name in wanted} - {"weight"}
    extra = [n for n in parameters if ".experts." in n and n.rpartition(".")[2] in names and n not in wanted]
    return not extra and all(sorted(parameters[n]) == sorted(shape) for n, shape in wanted.items() if shape)


def for_any_release(sizes):
    """A config under the names that the releases of transformers give the number of experts."""
    count = {sizes[n] for n in ("num_experts", "num_local_experts") if sizes.get(n)}
    sizes |= dict.fromkeys(("num_experts", "num_local_experts"), next(iter(count))) if len(count) == 1 else {}
    return {k: v for k, v in sizes.items() if k not in ("transformers_version", "dtype", "torch_dtype")}


def base_of(folder):
    """The base model of a fixture, as the installed transformers builds it; skips where it has no such model.

    From the fixture's own config, or from that of another fixture where it means something else to this release.
    """
    truth = TRUTHS[folder]
    cls = getattr(transformers, truth["model_class"], None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {truth['model_class']}")
    reasons = []
    for source in (folder, *written_here(folder)):
        sizes = json.loads((source / "base_config.json").read_text(), object_hook=for_any_release)
        try:
            config = cls.config_class.from_dict(sizes)
            for part in (config, getattr(config, "text_config", config)):
                part._attn_implementation = part._experts_implementation = "eager"
            model = cls(config).eval()
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
            reasons.append(str(error))
            continue
        if is_base(model, truth):
            return base_weights.fill(model).to(getattr(torch, truth["dtype"])).requires_grad_(False)
        reasons.append(f"{name_of(source)} gives other sizes")
    raise AssertionError(f"{name_of(folder)} could not be built: {reasons}")


def stored_transposed(base, folder):
    """Whether this base stores its experts "E in out", from the fixture written for a base of the same shapes."""
    truth, checksum = TRUTHS[folder], base_weights.describe(base)
    alike = [t for t in TRUTHS.values() if t["model_class"] == truth["model_class"] and t["kind"] == "fused"]
    by_shapes = [t for t in alike if t["base_checksum"] == checksum]
    here = [t for t in alike if t["transformers"] == transformers.__version__]
    return (by_shapes or here or [truth])[0]["stored_transposed"]


def deltas(model, transposed):
    """PEFT's own update of every expert parameter, "E out in"."""
    found = {}
    for name, module in model.named_modules():
        if module in zoo.wrappers(model):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            delta = module.get_delta_weight("default").detach().float()
            found[f"{path}.{module.parameter_name}"] = delta.transpose(1, 2) if transposed else delta
    return found


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "peft_moe_compat"]


def attempt(load, *args, **kwargs):
    """(result, None), or (None, the error)."""
    try:
        return load(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001  the tests look at it
        return None, error


def saying(truth):
    """What its writer would say of a fixture. The release says nothing where transformers had rewritten PEFT."""
    said = {"release": f"peft=={truth['peft']},transformers=={truth['transformers']}"}
    if isinstance(truth["nesting"], list):
        said["nesting"] = truth["nesting"]
    if truth["case"].endswith("_tf_patched"):
        said["orientation"] = truth["orientation"]
    return said


def turns_round(base, truth):
    """Whether the stacks fit each other's LoRA or, being square, their own turned round."""
    parameters = dict(base.named_parameters())
    shapes = {tuple(parameters[name].shape[1:]) for name in truth["parameters"]}
    return shapes == {shape[::-1] for shape in shapes}


def assert_true_updates(model, folder, transposed):
    truth, recorded = TRUTHS[folder], load_file(folder / "truth.safetensors")
    near = {"rtol": 1e-4, "atol": 1e-5} if truth["dtype"] == "float32" else {"rtol": 3e-2, "atol": 3e-2}
    found = deltas(model, transposed)
    assert found.keys() == truth["parameters"].keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, recorded[name], **near)


def assert_true_logits(model, folder):
    truth, recorded = TRUTHS[folder], load_file(folder / "truth.safetensors")
    if "logits" not in recorded:
        return  # the writer's own forward failed
    near = 1e-3 if truth["dtype"] == "float32" else 0.1
    with torch.no_grad():
        logits = model(input_ids=base_weights.TOKEN_IDS, use_cache=False).logits.float()
    torch.testing.assert_close(logits, recorded["logits"], rtol=near, atol=near)


@pytest.mark.parametrize("folder", FUSED, ids=name_of)
def test_a_file_of_any_release_is_read_as_what_it_is(folder, caplog):
    """Right, or refused; refused only where nothing in the file can tell, and then right once somebody says it."""
    truth, base = TRUTHS[folder], base_of(folder)
    same_base = base_weights.describe(base) == truth["base_checksum"]
    transposed = stored_transposed(base, folder)
    caplog.set_level(logging.INFO, "peft_moe_compat")
    model, error = attempt(PeftModel.from_pretrained, base, folder)
    if not truth["parameters"].keys() <= dict(base.named_parameters()).keys() and error is not None:
        assert isinstance(error, AdapterError), error
        assert re.search(r"another transformers release built it.*peft-moe-compat convert", str(error))
        assert not zoo.wrappers(base)
        return
    if error is not None:
        assert isinstance(error, AmbiguousAdapterError), error
        assert turns_round(base, truth), error
        assert "peft_moe_compat.written_by(" in str(error)
        assert not zoo.wrappers(base), "a refusal must leave the model as it was"
        with written_by(**saying(truth)):
            model = PeftModel.from_pretrained(base, folder)
    assert len(told(caplog)) <= 1
    assert_true_updates(model, folder, transposed)
    if same_base:
        assert_true_logits(model, folder)


@pytest.mark.parametrize("folder", [f for f, t in TRUTHS.items() if t["kind"] == "per_expert"], ids=name_of)
def test_a_per_expert_file_comes_out_right_or_not_at_all(folder):
    """Upstream drops some of them, and scales others wrongly, without an error."""
    base = base_of(folder)
    if any(p.ndim == 3 and "experts" in n for n, p in base.named_parameters()):
        base_weights.fill(base, base_weights.per_expert_values(TRUTHS[folder]["model_type"]))
    model, error = attempt(PeftModel.from_pretrained, base, folder)
    if error is None:
        assert_true_logits(model, folder)
    elif isinstance(error, peft_moe_compat.PeftMoeCompatError):
        assert re.search(r"\d% off.*peft-moe-compat convert .* --to peft", str(error))


TRANSFORMERS_SCRIPT = """
import json, sys
import pytest
import patching.test_loading_fixtures as t
from peft_moe_compat.errors import AdapterError, AmbiguousAdapterError, LayoutError

def outcome(folder):
    base, truth = t.base_of(folder), t.TRUTHS[folder]
    transposed = t.stored_transposed(base, folder)
    _, error = t.attempt(base.load_adapter, str(folder))
    if isinstance(error, AmbiguousAdapterError) and t.turns_round(base, truth):
        with t.written_by(**t.saying(truth)):
            _, error = t.attempt(base.load_adapter, str(folder))
    if error is None:
        t.assert_true_updates(base, folder, transposed)
        return "right"
    if isinstance(error, LayoutError) and "model.load_adapter" in str(error):
        return "upstream: " + str(error)
    if isinstance(error, AdapterError) and not truth["parameters"].keys() <= dict(base.named_parameters()).keys():
        return "other names"
    t.peft_moe_compat.deactivate()
    for source in (folder, *t.written_here(folder)[:1]):  # the same file, and one of this very release
        _, upstream = t.attempt(t.base_of(source).load_adapter, str(source))
        if type(upstream) is type(error):
            break
    t.peft_moe_compat.activate()
    assert type(upstream) is type(error), (folder, error)
    return f"upstream: {type(upstream).__name__}: {upstream}"

found = {}
for folder in t.FUSED:
    try:
        found[t.name_of(folder)] = outcome(folder)
    except pytest.skip.Exception as reason:
        pass
print("RESULT" + json.dumps(found))
"""


def test_transformers_own_loader_reads_them_too():
    """In a process of its own: transformers 5.0 to 5.12 rewrite PEFT when this is called."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRANSFORMERS_SCRIPT],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PEFT_MOE_COMPAT": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    found = json.loads(line.removeprefix("RESULT"))
    faults = {outcome for outcome in found.values() if outcome.startswith("upstream: ")}
    if "right" not in found.values():
        assert faults
        pytest.skip(sorted(faults)[0])
