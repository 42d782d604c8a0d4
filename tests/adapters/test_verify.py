"""What `verify` sees beside the experts' updates, and what it does not take for a difference."""

from __future__ import annotations

import pytest
import torch
from support.adapter_files import PREFIX, QWEN, Spec, load, lora_config, save, save_fused, save_per_expert

from peft_moe_compat import AdapterFileError, verify_adapters

SPEC = Spec(attention=True)
BY_PEFT = {"peft_version": "0.21.2"}


def both(tmp_path, first, second):
    factors = SPEC.factors(("gate_up", "down"))
    one = save_fused(tmp_path / "one", SPEC, factors, extra=first, **BY_PEFT)
    other = save_fused(tmp_path / "other", SPEC, factors, extra=second, **BY_PEFT)
    return verify_adapters(one, other, model=SPEC.model())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
        (torch.tensor([2**53]), torch.tensor([2**53 + 1])),
        (torch.tensor([2**62], dtype=torch.int64), torch.tensor([2**62 + 1], dtype=torch.int64)),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([1.0]), torch.tensor([1.0 + 1e-5])),
    ],
    ids=["imaginary part", "above 2**53", "above 2**62", "bool", "float"],
)
def test_every_difference_of_another_tensor_is_seen(tmp_path, one, other):
    name = f"{PREFIX}model.embed_tokens.weight"
    assert both(tmp_path / "same", {name: one}, {name: one}).same
    assert not both(tmp_path / "not", {name: one}, {name: other}).same


def test_a_tensor_of_another_dtype_is_compared_by_value(tmp_path):
    name, value = f"{PREFIX}model.embed_tokens.weight", torch.randn(8)
    low = value.bfloat16()
    assert both(tmp_path / "same", {name: low}, {name: low.double()}).same
    assert not both(tmp_path / "not", {name: value}, {name: low}).same


@pytest.mark.parametrize(
    ("before", "after"),
    [("model.layers", "model.language_model.layers"), ("model.layers", "backbone.layers"), ("model.", "transformer.")],
)
def test_another_path_of_the_layers_is_no_difference(tmp_path, before, after):
    name = f"{PREFIX}model.layers.0.mlp.gate.modules_to_save.weight"
    one = save_fused(tmp_path / "one", SPEC, SPEC.factors(("gate_up", "down")), extra={name: torch.ones(3)}, **BY_PEFT)
    tensors = {n.replace(before, after, 2 if before == "model." else 1): t for n, t in load(one).items()}
    tensors = {n.replace("base_transformer.transformer.", PREFIX + "transformer."): t for n, t in tensors.items()}
    targets = BY_PEFT | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    other = save(tmp_path / "other", tensors, lora_config(SPEC, **targets))
    found = verify_adapters(one, other, model=SPEC.model())
    assert found.same, [row for row in found.rows if row.note or row.relative_difference]
    assert len(found.rows) == 2 * 2 + 2 + 1
    changed = {n: t * 1.1 if "q_proj.lora_B" in n else t for n, t in tensors.items()}
    assert not verify_adapters(
        one, save(tmp_path / "changed", changed, lora_config(SPEC, **targets)), model=SPEC.model()
    ).same


def test_two_layers_alike_in_one_file_are_not_taken_for_each_other(tmp_path):
    stem = "layers.0.self_attn.q_proj.lora_{}.weight"
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    factors = SPEC.factors(("gate_up", "down"))

    def file(folder, *prefixes):
        extra = {
            f"{PREFIX}{p}.{stem.format(x)}": f * (i + 1)
            for i, p in enumerate(prefixes)
            for x, f in (("A", A), ("B", B))
        }
        return save_fused(tmp_path / folder, Spec(QWEN), factors, extra=extra, **BY_PEFT)

    one, other = file("one", "model.text", "model.vision"), file("other", "model.vision", "model.text")
    assert not verify_adapters(one, other, model=SPEC.model()).same


def test_a_whole_model_is_said_to_be_one(tmp_path):
    one = save_fused(tmp_path / "one", SPEC, SPEC.factors(("gate_up", "down")), **BY_PEFT)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="--base BASE"):
        verify_adapters(one, tmp_path / "merged", model=SPEC.model())


def test_which_of_the_two_does_not_fit_the_model_is_said(tmp_path):
    wide = Spec(I=SPEC.I + 8)
    one = save_per_expert(tmp_path / "one", SPEC, SPEC.factors(("gate", "up", "down")))
    other = save_per_expert(tmp_path / "other", wide, wide.factors(("gate", "up", "down")))
    for pair in ((one, other), (other, one)):
        with pytest.raises(AdapterFileError, match=r"^\S*other: .*none of these sizes"):
            verify_adapters(*pair, model=SPEC.model())
