"""The files that every release wrote (`fixtures/peft`), the base models they are for, and what they should do there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from support import zoo

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))
import base_weights

FIXTURES = Path(__file__).parent.parent / "fixtures" / "peft"
TRUTHS = {path.parent: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/*/truth.json"))}
FUSED = [folder for folder, truth in TRUTHS.items() if truth["kind"] == "fused"]


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
        assert truth["forward"] != "ok", "the writer's forward ran, and its logits are not in the file"
        return
    near = 1e-3 if truth["dtype"] == "float32" else 0.1
    with torch.no_grad():
        logits = model(input_ids=base_weights.TOKEN_IDS, use_cache=False).logits.float()
    torch.testing.assert_close(logits, recorded["logits"], rtol=near, atol=near)


_LINEARS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STACK = re.compile(r"layers\.(\d+)\..*\.experts\.(?:(\d+)\.)?(\w+?)(?:\.weight)?$")


def matrices(weights, model_type, transposed):
    """(layer, role, expert) -> "out in", of weights or updates of experts, as stacks or one by one."""
    found = {}
    for name, weight in weights.items():
        inside = _STACK.search(name)
        if inside is None or inside[3] not in {*_LINEARS, "gate_up_proj"}:
            continue
        layer, expert, linear = int(inside[1]), inside[2], inside[3]
        stack = weight[None] if expert else weight.transpose(1, 2) if transposed else weight
        parts = {_LINEARS.get(linear): stack}
        if linear == "gate_up_proj":
            halves = (stack[:, 0::2], stack[:, 1::2]) if model_type == "gpt_oss" else stack.chunk(2, dim=1)
            parts = dict(zip(("gate", "up"), halves, strict=True))
        for role, part in parts.items():
            found |= {(layer, role, int(expert or e)): matrix for e, matrix in enumerate(part)}
    return found
