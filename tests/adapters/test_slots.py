"""Opening an adapter gives every LoRA as a typed slot with its numbers, and refuses what has none."""

from __future__ import annotations

import json

import pytest
import torch
from support.adapter_files import Spec, read_config, save_fused, save_per_expert, save_stacked

from peft_moe_compat.adapters.ranks import Numbers
from peft_moe_compat.adapters.source import open_adapter
from peft_moe_compat.adapters.stated import Stated
from peft_moe_compat.errors import AdapterError, AdapterFileError, UnsupportedPeftError

SPEC = Spec(attention=True)


def opened(source, **config):
    (source / "adapter_config.json").write_text(json.dumps({**read_config(source), **config}))
    return open_adapter(source, Stated())


def test_a_fused_slot_has_the_numbers_of_every_parameter_it_may_be_on(tmp_path):
    source = save_fused(tmp_path / "in", SPEC, SPEC.factors(("gate_up", "down")))
    found = opened(source, rank_pattern={"down_proj": 5}, alpha_pattern={r"experts\.gate_up_proj": 7}, use_rslora=True)
    module = found.modules[0]
    assert (found.form, module.form, len(module.slots)) == ("fused", "fused", 2)
    for slot in module.slots:
        assert dict(slot.candidates) == {
            "gate_up_proj": Numbers(SPEC.r, 7, True),
            "down_proj": Numbers(5, SPEC.alpha, True),
        }
        assert slot.candidates["gate_up_proj"].scaling == 7 / SPEC.r**0.5
        assert (slot.num_experts("gate_up_proj"), slot.num_experts("down_proj")) == (SPEC.E, None)
        assert slot.lora_A.shape[0] == slot.lora_B.shape[1] == slot.rows == SPEC.E * SPEC.r
        assert slot.lora_A.dtype == torch.float32
    assert module.slots[0].names[0].count("base_layer") == 1  # the innermost one first
    assert module.slots[1].names[0].count("base_layer") == 0


def test_the_other_forms_and_linears_have_theirs(tmp_path):
    factors = SPEC.factors(("gate", "up", "down"))
    found = opened(save_per_expert(tmp_path / "per", SPEC, factors), alpha_pattern={r"1\.up_proj": 11})
    numbers = {(slot.expert, slot.linear): slot.numbers for slot in found.modules[0].experts}
    assert len(numbers) == 3 * SPEC.E
    assert {key for key, value in numbers.items() if value.alpha == 11} == {(1, "up_proj")}
    assert {value.rank for value in numbers.values()} == {SPEC.r}
    assert {slot.path.rpartition(".")[2] for slot in found.linears} == {"q_proj"}
    assert {slot.numbers for slot in found.linears} == {Numbers(SPEC.r, SPEC.alpha, False)}
    assert found.rest == {}
    found = opened(save_stacked(tmp_path / "stacked", SPEC, SPEC.factors(("gate_up", "down"))))
    assert {slot.layout for module in found.modules for slot in module.stacks} == {"stacked"}


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": "2"}, {"rank_pattern": {"down_proj": -1}}, {"rank_pattern": {"(": 2}}, {"lora_alpha": "x"}],
)
def test_bad_numbers_are_refused_at_opening(tmp_path, config):
    source = save_fused(tmp_path / "in", SPEC, SPEC.factors(("gate_up", "down")))
    with pytest.raises(AdapterFileError, match="adapter_config.json"):
        opened(source, **config)


def test_what_the_caller_says_is_checked_where_it_is_said():
    assert Stated(nesting="a,b").nesting == Stated(nesting=["a", "b"]).nesting == ("a", "b")
    assert Stated(written_by="peft==0.18.1,transformers==5.0.0").releases == ("0.18.1", "5.0.0")
    for said in ({"orientation": "both"}, {"packing": "mixed"}):
        with pytest.raises(AdapterError, match="was expected"):
            Stated(**said)
    with pytest.raises(UnsupportedPeftError):
        Stated(written_by="peft==0.16.0")
