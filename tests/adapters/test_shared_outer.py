"""LoRA whose outer side all experts share, written small: found by its values, whatever form it was in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.adapter_files import (
    FAMILIES,
    QWEN,
    Spec,
    assert_identical,
    assert_updates,
    load,
    read_adapter,
    read_config,
    save_fused,
    save_per_expert,
    save_stacked,
)

from peft_moe_compat import convert_adapter, verify_adapters
from peft_moe_compat.errors import AdapterError

HANDMADE = Path(__file__).parent.parent / "fixtures" / "handmade"
NEW = "peft==0.21.2,transformers==5.24.0"


def shared(spec, roles, one_A=True):
    """Factors of equal outer sides; gate and up have one A."""
    factors = spec.factors(roles)
    for (layer, role), (A, B) in factors.items():
        outer = factors[layer, "gate"][0] if one_A and role == "up" and (layer, "gate") in factors else A
        factors[layer, role] = (A, B[:1].expand_as(B)) if role == "down" else (outer[:1].expand_as(A), B)
    return factors


WRITERS = {
    "fused": (save_fused, Spec.fused_roles, {"peft_version": "0.21.2"}),
    "per expert": (save_per_expert, Spec.linear_roles, {}),
    "stacked": (save_stacked, Spec.linear_roles, {}),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("writer", WRITERS)
def test_equal_sides_are_found_and_written_once(tmp_path, family, writer):
    spec = Spec(family, attention=True)
    save, roles, more = WRITERS[writer]
    factors = shared(spec, roles(spec))
    source = save(tmp_path / "in", spec, factors, **more)
    done = convert_adapter(source, tmp_path / "small", to="shared-outer", model=spec.model())
    assert done.proof.by == "rules", str(done.proof)
    assert done.exactness == "bits"
    sizes = {name.split("experts.")[1]: tensor.shape[0] for name, tensor in load(done.out).items() if "experts" in name}
    expected = {"w1.lora_A.weight": 1, "w1.lora_B.weight": 4, "w2.lora_A.weight": 4, "w2.lora_B.weight": 1}
    assert sizes == expected | ({"w3.lora_A.weight": 1, "w3.lora_B.weight": 4} if family.gated else {})
    found = read_adapter(done.out, family, spec.E).experts
    if not family.gated:
        found = {(layer, {"gate": "up"}.get(role, role)): update for (layer, role), update in found.items()}
    assert_updates(found, spec.updates(factors))
    assert verify_adapters(source, done.out, model=spec.model()).same
    wanted = {"q_proj", "down_proj", "gate_proj", *(["up_proj"] if family.gated else [])}
    assert set(read_config(done.out)["target_modules"]) == wanted
    convert_adapter(done.out, tmp_path / "back", to=NEW, model=spec.model())
    back = read_adapter(tmp_path / "back", family, spec.E, orientation="linear", nesting=family.parameters)
    assert_updates(back.experts, spec.updates(factors))


@pytest.mark.parametrize("case", ["tinker", "tinker_two_A", "tinker_gpt_oss", "tinker_nemotron_h"])
def test_what_tinker_writes_survives_peft(tmp_path, case):
    """Expanded, joined and flat, and small again: the same tensors, bit for bit."""
    source = HANDMADE / case
    base = json.loads((source / "base_config.json").read_text())
    convert_adapter(source, tmp_path / "peft", to=NEW, model=base)
    convert_adapter(tmp_path / "peft", tmp_path / "small", to="shared-outer", model=base)
    assert verify_adapters(source, tmp_path / "small", model=base).same
    if case == "tinker_gpt_oss":  # SGLang mixes two lora_A up there: gate and up got those of both
        return
    given = {name: tensor for name, tensor in load_file(source / "adapter_model.safetensors").items() if tensor.numel()}
    assert_identical(load(tmp_path / "small"), given)


@pytest.mark.parametrize(("role", "side"), [("gate", "A"), ("up", "A"), ("down", "B")])
def test_a_side_that_differs_is_refused(tmp_path, role, side):
    spec = Spec(layers=(0,))
    factors = shared(spec, ("gate", "up", "down"))
    A, B = (factor.clone() for factor in factors[0, role])
    (A if side == "A" else B)[2, 1, 1] += 2**-20
    source = save_per_expert(tmp_path / "in", spec, {**factors, (0, role): (A, B)})
    with pytest.raises(AdapterError, match=rf"lora_{side} of 'model.layers.0.mlp.experts', {role}.* for expert 2 than"):
        convert_adapter(source, tmp_path / "small", to="shared-outer", model=spec.model())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ranks_and_scalings_become_one(tmp_path):
    spec = Spec(QWEN, ranks={"down": 3}, alphas={"gate_up": 5}, rslora=True)
    factors = shared(spec, ("gate_up", "down"))
    source = save_fused(tmp_path / "in", spec, factors, peft_version="0.21.2")
    convert_adapter(source, tmp_path / "small", to="shared-outer", model=spec.model())
    assert {tensor.shape[-2] for name, tensor in load(tmp_path / "small").items() if "lora_A" in name} == {3}
    assert_updates(read_adapter(tmp_path / "small", QWEN, spec.E).experts, spec.updates(factors))


def test_stacks_under_tinkers_names_lie_in_one_way(tmp_path):
    """Where in, out and the rank are one number, shapes and config allow both ways; the names allow Tinker's alone."""
    spec = Spec(QWEN, H=8, I=8, r=8)
    factors = shared(spec, spec.linear_roles())
    source = save_per_expert(tmp_path / "in", spec, factors)
    convert_adapter(source, tmp_path / "small", to="shared-outer", model=spec.model())
    assert verify_adapters(source, tmp_path / "small", model=spec.model()).same
    convert_adapter(tmp_path / "small", tmp_path / "back", to="per-expert", model=spec.model())
    assert_updates(read_adapter(tmp_path / "back", QWEN, spec.E).experts, spec.updates(factors))
