"""Names of experts' linears in `target_modules`, which newer releases take for the experts' stacks when they load.

Oracles: the model that stock PEFT saved, and a base model with the updates added by a loop.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from support import zoo
from support.processes import result_of
from support.saved_adapters import (
    HERE,
    LINEARS,
    SHARED,
    E,
    assert_equal,
    assert_same_logits,
    change_file,
    flipped,
    mlp_linears,
    one_by_one,
    save,
    written_otherwise,
)

import peft_moe_compat
from peft_moe_compat.errors import AdapterError, LayoutError
from peft_moe_compat.families import is_rewritten
from peft_moe_compat.patching.opening import written_by

NAMES = {
    "linears": ["q_proj", *LINEARS],
    "mixtral": ["q_proj", "w1", "w2", "w3", "gate_proj"],
    "half": ["q_proj", "down_proj", "gate_proj"],
    "full": ["q_proj", *(f"model.layers.0.mlp.experts.3.{name}" for name in LINEARS)],
    "pattern": r".*\.(q_proj|gate_proj|up_proj|down_proj|w1|w2|w3)",
}
none_shared = pytest.mark.skip(reason="this transformers fuses no experts beside shared ones")
TAKEN = [family for family in SHARED if is_rewritten(family, Version(transformers.__version__))]
has_shared = pytest.mark.parametrize("family", SHARED or [pytest.param(None, marks=none_shared)])


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_fused_experts_that_are_targeted_keep_their_targets(family, names, tmp_path):
    expected, fresh = save(tmp_path, family, target_modules=["q_proj"])
    change_file(tmp_path, lambda tensors: tensors, target_modules=names)
    with written_by(HERE):
        model = PeftModel.from_pretrained(fresh(), tmp_path)
    assert_equal(model, expected)
    config = model.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(PeftModel.from_pretrained(fresh(), tmp_path / "again"), expected)


@pytest.mark.parametrize("family", [family for family in zoo.FAMILIES if family != "nemotron_h"])
def test_so_do_those_of_another_layout(family, tmp_path):
    """nemotron_h: what is said of its writer would be wrong for a file that is only turned round."""
    expected, fresh = save(tmp_path, family, target_modules=["q_proj"])

    def turned(tensors):
        for name in [name for name in tensors if "experts" in name and ".lora_A." in name]:
            other = name.replace(".lora_A.", ".lora_B.")
            tensors[name], tensors[other] = flipped(tensors[name], tensors[other], E)
        return tensors

    change_file(tmp_path, turned, target_modules=NAMES["linears"], peft_version=written_otherwise(family))
    assert_equal(PeftModel.from_pretrained(fresh(), tmp_path), expected)


@has_shared
@pytest.mark.parametrize("names", [LINEARS, r".*\.(gate|up|down)_proj"], ids=["list", "pattern"])
def test_shared_experts_and_dense_layers_beside_fused_ones_keep_their_lora(family, names, tmp_path, stock):
    base = zoo.tiny_model(family)
    stacks, linears = peft_moe_compat.expert_parameters(base), mlp_linears(base)
    targets = [*stacks, *(f"{name}.weight" for name in linears)]
    numbers = {"rank_pattern": 3, "alpha_pattern": 5}
    patterns = {table: {"gate_proj.weight": value} for table, value in numbers.items()}
    expected, fresh = save(tmp_path, family, target_parameters=targets, **patterns)
    patterns = {table: {"gate_proj": value} for table, value in numbers.items()}
    change_file(tmp_path, lambda tensors: tensors, target_modules=names, target_parameters=stacks, **patterns)
    with written_by(HERE):
        model = PeftModel.from_pretrained(fresh(), tmp_path)
    assert_same_logits(model, expected)
    for name in linears:  # linears, as they were trained, and not wrapped as parameters
        assert model.get_base_model().get_submodule(name) not in zoo.wrappers(model)
        assert "default" in model.get_base_model().get_submodule(name).lora_A
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(PeftModel.from_pretrained(fresh(), tmp_path / "again"), expected)
    assert_same_logits(stock(PeftModel.from_pretrained, fresh(), tmp_path / "again"), expected)


@has_shared
@pytest.mark.parametrize("names", [LINEARS, r".*\.(gate|up|down)_proj"], ids=["list", "pattern"])
def test_shared_experts_beside_experts_one_by_one_keep_their_lora(family, names, tmp_path, stock):
    """Wherever stock PEFT fuses the same file rightly without them; elsewhere an error, and never wrong logits."""
    state = {name: tensor.clone() for name, tensor in zoo.tiny_model(family).state_dict().items()}

    def fresh():
        model = zoo.tiny_model(family)
        model.load_state_dict(state)
        return model

    torch.manual_seed(3)
    plain, whole = fresh(), fresh()
    one_by_one(plain, tmp_path / "plain", shared=False)
    one_by_one(whole, tmp_path / "whole", shared=True)
    for folder in ("plain", "whole"):
        change_file(tmp_path / folder, lambda tensors: tensors, target_modules=names)
    try:
        assert_same_logits(stock(PeftModel.from_pretrained, fresh(), tmp_path / "plain"), plain)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        with pytest.raises((LayoutError, AdapterError, RuntimeError, TypeError, ValueError)):
            PeftModel.from_pretrained(fresh(), tmp_path / "whole")
        return
    model = PeftModel.from_pretrained(fresh(), tmp_path / "whole")
    assert_same_logits(model, whole)
    config = model.peft_config["default"]
    before = (config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern)
    model.save_pretrained(tmp_path / "again")
    assert before == (config.target_modules, config.target_parameters, config.rank_pattern, config.alpha_pattern)
    assert_same_logits(stock(PeftModel.from_pretrained, fresh(), tmp_path / "again"), whole)
    again = PeftModel.from_pretrained(fresh(), tmp_path / "again")
    assert_same_logits(again, whole)
    again.save_pretrained(tmp_path / "third")
    assert_same_logits(stock(PeftModel.from_pretrained, fresh(), tmp_path / "third"), whole)


@pytest.mark.parametrize("family", TAKEN or [pytest.param(None, marks=none_shared)])
def test_a_packed_linear_keeps_its_name_and_saving_says_so(family, tmp_path):
    base = zoo.tiny_model(family)
    stacks, linears = peft_moe_compat.expert_parameters(base), mlp_linears(base)
    _, fresh = save(tmp_path, family, target_parameters=[*stacks, *(f"{name}.weight" for name in linears)])
    change_file(tmp_path, lambda tensors: tensors, target_modules=LINEARS, target_parameters=stacks)
    with written_by(HERE):
        model = PeftModel.from_pretrained(fresh(), tmp_path)
    held = model.get_base_model().get_submodule(linears[0]).get_base_layer()
    held.weight = torch.nn.Parameter(held.weight.to(torch.int8), requires_grad=False)
    with pytest.warns(peft_moe_compat.CompatWarning, match=linears[0]):
        model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert set(LINEARS) <= set(written["target_modules"])


@pytest.mark.skipif(
    not find_spec("peft.utils.transformers_weight_conversion"), reason="PEFT before 0.19 takes no linears for experts"
)
@pytest.mark.parametrize("family", TAKEN or [pytest.param(None, marks=none_shared)])
def test_lora_on_linears_alone_has_a_form_that_stock_peft_reads(family, tmp_path, stock):
    """PEFT puts LoRA on the experts for their names, of which the file knows nothing, and none on the linears."""
    targets = [f"{name}.weight" for name in LINEARS]
    expected, fresh = save(tmp_path / "in", family, target_modules=["o_proj"], target_parameters=targets)
    said = {"target_modules": ["o_proj", *LINEARS], "target_parameters": None, "peft_version": "0.18.1"}
    change_file(tmp_path / "in", lambda tensors: tensors, **said)
    config = expected.get_base_model().config.to_dict()
    found = peft_moe_compat.inspect_adapter(tmp_path / "in", model=config)
    assert [verdict.verdict for name, verdict in found.readers.items() if name.startswith("PEFT")] == [
        "reads",
        "wrong",
        "wrong",
    ]
    peft_moe_compat.convert_adapter(tmp_path / "in", tmp_path / "out", to=HERE, model=config)
    assert all(
        verdict.verdict == "reads"
        for verdict in peft_moe_compat.inspect_adapter(tmp_path / "out", model=config).readers.values()
    )
    model = stock(PeftModel.from_pretrained, fresh(), tmp_path / "out")
    assert_same_logits(model, expected)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("lora_" in name for name, _ in model.named_parameters()) == len(tensors)
    with pytest.raises(AdapterError, match="nothing to convert"):
        peft_moe_compat.convert_adapter(tmp_path / "out", tmp_path / "again", to=HERE, model=config)


OWN_LOADER_SCRIPT = """
import json, pathlib, tempfile
import peft_moe_compat
from support import zoo
from support.saved_adapters import assert_same_logits, change_file, save

def outcome(folder, fresh, expected):
    model = fresh()
    try:
        model.load_adapter(str(folder))
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__
    assert_same_logits(model, expected)
    return "right"

folder, found = pathlib.Path(tempfile.mkdtemp()), []
for family in [family for family in zoo.FAMILIES if family != "nemotron_h"]:
    expected, fresh = save(folder / family, family, target_modules=["q_proj"])
    plain = outcome(folder / family, fresh, expected)
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    change_file(folder / family, lambda tensors: tensors, target_modules=names)
    found.append((family, plain, outcome(folder / family, fresh, expected)))
print("RESULT" + json.dumps(found))
"""


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.5") and Version(peft.__version__) < Version("0.19"),
    reason="transformers 5.5 loads by peft.utils.transformers_weight_conversion, which PEFT 0.19 brought",
)
def test_transformers_own_loader_keeps_them_too():
    """In a process of its own: transformers 5.0 to 5.12 rewrite PEFT when this is called."""
    for family, plain, named in result_of(OWN_LOADER_SCRIPT):
        assert named == plain, family
