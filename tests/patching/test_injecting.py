"""Adapters that PEFT cannot take as they are, refused before the model has any LoRA, with the command that mends it."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel
from support import zoo
from support.saved_adapters import HERE, LINEARS, SHARED, change_file, one_by_one, rewrite, save

from peft_moe_compat.errors import LayoutError
from peft_moe_compat.patching.opening import written_by

CONVERT = r"`peft-moe-compat convert .* OUT --to peft --model BASE`"
CONFIGS = {
    "no peft_type": ({"peft_type": None}, "has no peft_type"),
    "no target": ({"target_parameters": None}, "which no target in its config reaches"),
    "the module": (
        {"target_modules": ["q_proj", "experts"]},
        "target_modules names .*experts', a .*, which PEFT has no LoRA for",
    ),
    "a pattern": (
        {"target_modules": r".*\.(q_proj|experts)"},
        "target_modules names .*experts', a .*, which PEFT has no LoRA for",
    ),
}


def has_lora(model):
    return any(hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize("how", CONFIGS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_config_that_makes_other_lora_than_the_file_has(family, how, tmp_path):
    said, words = CONFIGS[how]
    _, fresh = save(tmp_path, family, target_modules=["q_proj"])
    rewrite(tmp_path, **said)
    model = fresh()
    with written_by(HERE), pytest.raises(LayoutError, match=f"{words}.*{CONVERT}"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not has_lora(model)


def test_a_second_adapter_is_refused_and_the_first_one_stays(tmp_path):
    _, fresh = save(tmp_path / "first")
    save(tmp_path / "second")
    change_file(tmp_path / "second", lambda tensors: tensors, target_modules=["experts"])
    model = PeftModel.from_pretrained(fresh(), tmp_path / "first")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LayoutError, match="which PEFT has no LoRA for"):
        model.load_adapter(tmp_path / "second", "second")
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == state.keys()


def of_another_rank(tensors):
    name = next(name for name in sorted(tensors) if ".experts.1.down_proj.lora_A." in name)
    other = name.replace("lora_A", "lora_B")
    A, B = tensors[name], tensors[other]
    return tensors | {name: torch.cat([A, A]), other: torch.cat([B, B], dim=1)}


EXPERTS = {
    "of another rank": (of_another_rank, LINEARS),
    "missing": (lambda tensors: {n: t for n, t in tensors.items() if ".experts.2." not in n}, LINEARS),
    "gate alone": (lambda tensors: {n: t for n, t in tensors.items() if "up_proj" not in n}, LINEARS[::2]),
    "listed": (
        lambda tensors: {re.sub(r"(\d+)\.down_proj", r"down_projs.\1", n): t for n, t in tensors.items()},
        LINEARS,
    ),
}


GATED = [family for family in SHARED if family != "nemotron_h"]


@pytest.mark.skipif(not GATED, reason="this transformers fuses no gated experts beside shared ones")
@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("which", EXPERTS)
def test_experts_one_by_one_that_no_release_fuses(which, family, tmp_path):
    change, targets = EXPERTS[which]
    one_by_one(zoo.tiny_model(family), tmp_path / "file", shared=False)
    change_file(tmp_path / "file", change, target_modules=targets)
    model = zoo.tiny_model(family)
    with pytest.raises(LayoutError, match=CONVERT):
        PeftModel.from_pretrained(model, tmp_path / "file")
    assert not has_lora(model)
