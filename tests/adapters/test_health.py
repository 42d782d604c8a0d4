"""What inspect says of the numbers: every kind of loss by name, and nothing of an ordinary adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_files import (
    FAMILIES,
    GPT_OSS,
    QWEN,
    Spec,
    load,
    lora_config,
    read_config,
    save,
    save_fused,
    save_per_expert,
    save_stacked,
)

from peft_moe_compat.adapters.conclusions import FINDINGS
from peft_moe_compat.adapters.health import examine, far, gaps
from peft_moe_compat.adapters.inspect import inspect_adapter
from peft_moe_compat.layout import ExpertLora

SPEC = Spec(E=8, H=16, I=12, r=4, layers=tuple(range(6)), attention=True)
ROLES = ("gate_up", "down")
VERSIONS = {"linear": "0.21.2", "reversed": "0.18.1"}


def found(folder: Path, spec: Spec = SPEC, **more):
    return inspect_adapter(folder, model=spec.model(), **more).content


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("write", [save_fused, save_per_expert, save_stacked])
@pytest.mark.parametrize("orientation", ["linear", "reversed"])
def test_of_an_ordinary_adapter_nothing_is_said(tmp_path, family, write, orientation):
    spec = replace(SPEC, family=family)
    roles = spec.linear_roles() if write is save_per_expert else spec.fused_roles()
    how = {"orientation": orientation, "peft_version": VERSIONS[orientation]} if write is save_fused else {}
    assert found(write(tmp_path / "in", spec, spec.factors(roles), **how), spec) == ()


@pytest.mark.parametrize("orientation", ["linear", "reversed"])
def test_a_fresh_adapter_is_not_trained_and_nothing_else(tmp_path, orientation):
    """lora_B is what starts at zero, whichever axis it spans."""
    factors = SPEC.factors(ROLES)
    for A, B in factors.values():
        (B if orientation == "linear" else A).zero_()
    folder = save_fused(tmp_path / "in", SPEC, factors, orientation=orientation, peft_version=VERSIONS[orientation])
    tensors = load(folder)
    tensors |= {n: t * 0 for n, t in tensors.items() if "q_proj.lora_B" in n}
    folder = save(tmp_path / "fresh", tensors, read_config(folder))
    said = found(folder)
    assert {finding.code for finding in said} == {"not_trained"}
    assert {finding.level for finding in said} == {"note"}
    assert len(said) == 3 * len(SPEC.layers)


def as_peft_has_them(factors, orientation):
    """lora_A "E r p" and lora_B "E q r" of layer 2's down_proj, to be changed in place."""
    A, B = factors[2, "down"]
    return (A, B) if orientation == "linear" else (B.transpose(1, 2), A.transpose(1, 2))


def lose_seven_of_eight_experts(factors, orientation):
    for factor in factors[2, "down"]:
        factor[1:] = 0


def lose_experts_of_lora_B(factors, orientation):
    as_peft_has_them(factors, orientation)[1][5:] = 0


def lose_experts_of_lora_A(factors, orientation):
    as_peft_has_them(factors, orientation)[0][5:] = 0


def lose_gate(factors, orientation):
    factors[2, "gate_up"][1][:, : SPEC.I] = 0


def lose_seven_of_eight_rows(factors, orientation):
    factors[2, "down"][1][:, 2:] = 0


def lose_rows_of_some_experts(factors, orientation):
    for expert in range(1, 8):
        factors[2, "down"][1][expert, expert : expert + 6] = 0


def lose_columns(factors, orientation):
    factors[2, "down"][0][:, :, 6:] = 0


def lose_ranks(factors, orientation):
    as_peft_has_them(factors, orientation)[0][3:, 2] = 0


def lose_ranks_of_lora_B(factors, orientation):
    as_peft_has_them(factors, orientation)[1][3:, :, 2] = 0


def scale_one_expert(factors, orientation):
    factors[2, "down"][1][6] *= 1000


def shrink_one_expert(factors, orientation):
    factors[2, "down"][1][6] *= 1e-6


def copy_an_expert(factors, orientation):
    for factor in factors[2, "down"]:
        factor[3] = factor[6] = factor[1]


def scale_a_layer(factors, orientation):
    factors[2, "down"][1].mul_(1000)


def spoil(factors, orientation):
    factors[2, "down"][1][0, 0, 0] = torch.nan
    factors[2, "down"][0][0, 0, :2] = torch.inf


def one_number(factors, orientation):
    as_peft_has_them(factors, orientation)[1][:] = 0.01


def one_number_in_some(factors, orientation):
    as_peft_has_them(factors, orientation)[0][5:] = -2.0


CASES = [
    (one_number, "constant_experts", {"experts": [*range(8)], "count": 8, "of": 8}),
    (one_number_in_some, "constant_experts", {"experts": [5, 6, 7], "count": 3, "of": 8}),
    (lose_seven_of_eight_experts, "zero_experts", {"experts": [1, 2, 3, 4, 5, 6, 7], "count": 7, "of": 8}),
    (lose_experts_of_lora_B, "untrained_experts", {"experts": [5, 6, 7], "count": 3, "of": 8}),
    (lose_experts_of_lora_A, "zero_experts", {"experts": [5, 6, 7], "count": 3, "of": 8}),
    (lose_gate, "zero_half", {"half": "gate"}),
    (lose_seven_of_eight_rows, "zero_rows", {"count": 14, "of": 16}),
    (lose_rows_of_some_experts, "sparse_experts", {"experts": [1, 2, 3, 4, 5, 6, 7], "count": 7, "of": 8}),
    (lose_columns, "zero_columns", {"count": 6, "of": 12}),
    (lose_ranks, "lost_ranks", {"experts": [3, 4, 5, 6, 7], "count": 5, "of": 8}),
    (lose_ranks_of_lora_B, "unused_ranks", {"experts": [3, 4, 5, 6, 7], "count": 5, "of": 8}),
    (copy_an_expert, "same_experts", {"experts": [1, 3, 6], "count": 3, "of": 8}),
    (scale_one_expert, "far_experts", None),
    (shrink_one_expert, "far_experts", None),
    (scale_a_layer, "far_layers", {"layers": [2]}),
    (spoil, "not_finite", {"nan": 1, "infinite": 2}),
]


@pytest.mark.parametrize(("change", "code", "detail"), CASES, ids=[case[0].__name__ for case in CASES])
@pytest.mark.parametrize("orientation", ["linear", "reversed"])
def test_every_loss_is_said_by_name(tmp_path, change, code, detail, orientation):
    factors = SPEC.factors(ROLES)
    change(factors, orientation)
    how = {"orientation": orientation, "peft_version": VERSIONS[orientation]}
    said = found(save_fused(tmp_path / "in", SPEC, factors, **how))
    where = "gate_up_proj" if code == "zero_half" else "down_proj"
    assert [(finding.code, finding.projection) for finding in said] == [(code, where)]
    assert said[0].path == f"model.layers.{'*' if code == 'far_layers' else 2}.mlp.experts"
    if detail is not None:
        assert said[0].detail == detail
    else:
        assert said[0].detail["experts"] == [6]
    assert ", ".join(map(str, said[0].detail.get("experts", []))) in str(said[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("write", [save_fused, save_per_expert, save_stacked])
def test_numbers_that_are_huge_everywhere(tmp_path, write, dtype):
    roles = SPEC.linear_roles() if write is save_per_expert else ROLES
    factors = {key: tuple((factor * 1e30).to(dtype) for factor in pair) for key, pair in SPEC.factors(roles).items()}
    how = {"peft_version": "0.21.2"} if write is save_fused else {}
    said = found(write(tmp_path / "in", SPEC, factors, **how))
    assert {finding.code for finding in said} == {"huge"}
    assert len(said) == len(roles) * len(SPEC.layers)
    assert all(1e30 < finding.detail["largest"] < 1e32 for finding in said)


@pytest.mark.parametrize("largest", [1e-30, 1e-6, 1.0, 300.0])
def test_a_scale_that_is_in_use_is_not_huge(largest):
    A, B = torch.randn(4, 3, 20), torch.randn(4, 12, 3) * largest
    assert examine(ExpertLora(A, B, 64.0)).largest < 1e6


def test_what_is_tiny_is_not_zero(tmp_path):
    """Its squares are, in float32."""
    factors = {key: (A * 1e-30, B * 1e-30) for key, (A, B) in SPEC.factors(ROLES).items()}
    assert found(save_fused(tmp_path / "in", SPEC, factors, peft_version="0.21.2")) == ()


def test_one_step_of_adam_is_not_one_number():
    """It moves every entry of lora_B by the learning rate, one way or the other; a few may all go one way."""
    A, B = torch.randn(8, 4, 20), torch.randn(8, 12, 4).sign() * 1e-4
    assert not examine(ExpertLora(A, B, 2.0)).constant.any()
    assert not examine(ExpertLora(torch.randn(8, 1, 20), torch.full((8, 4, 1), 1e-4), 2.0)).constant.any()


def test_an_alpha_of_zero(tmp_path):
    how = {"peft_version": "0.21.2", "alpha_pattern": {"layers.2.mlp.experts.down_proj": 0}}
    (said,) = found(save_fused(tmp_path / "in", SPEC, SPEC.factors(ROLES), **how))
    assert (said.code, said.path, said.projection) == ("no_scaling", "model.layers.2.mlp.experts", "down_proj")


def test_the_half_of_alternating_rows(tmp_path):
    spec = replace(SPEC, family=GPT_OSS)
    factors = spec.factors(ROLES)
    factors[1, "gate_up"][1][:, 1::2] = 0
    folder = save_fused(tmp_path / "in", spec, factors, peft_version="0.21.2")
    for model in (spec.model(), None):
        (said,) = inspect_adapter(folder, model=model, orientation="linear").content
        assert (said.code, said.detail) == ("zero_half", {"half": "up"})


def test_missing_layers(tmp_path):
    spec = replace(SPEC, layers=(0, 1, 2, 5, 6, 7, 8, 9, 10))
    folder = save_fused(tmp_path / "in", spec, spec.factors(ROLES), peft_version="0.21.2")
    said = {(f.projection, f.path): f.detail["layers"] for f in found(folder) if f.code == "missing_layers"}
    assert said == {
        ("gate_up_proj", "model.layers.*.mlp.experts"): [3, 4],
        ("down_proj", "model.layers.*.mlp.experts"): [3, 4],
        ("q_proj", "model.layers.*.self_attn.q_proj"): [3, 4],
    }
    config = read_config(folder) | {"layers_to_transform": list(spec.layers)}
    assert found(save(tmp_path / "chosen", load(folder), config)) == ()
    linears = {key: pair for key, pair in SPEC.factors(SPEC.linear_roles()).items() if key != (5, "up")}
    (said,) = found(save_per_expert(tmp_path / "up", SPEC, linears))
    assert (said.code, said.projection, said.detail) == ("missing_layers", "up_proj", {"layers": [5]})


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ([], []),
        ([4], []),
        ([0, 2], [1]),
        ([1, 3, 5], []),
        ([2, 9], []),
        (range(8), []),
        (range(1, 40, 2), []),
        ([0, 1, 2, 4, 5, 6, 7], [3]),
        ([0, 1, 3], [2]),
        ([1, 5, 7], [3]),
        ([3, 7, 11, 19, 23, 27], [15]),
        ([1, 3, 6, 8, 10, 13, 15], []),  # the model's own pattern, as in nemotron_h
        ([0, 1, 9, 30], []),
    ],
)
def test_gaps(layers, missing):
    assert gaps(list(layers)) == missing


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_norms_are_those_of_the_updates(E, r, fan_in, fan_out, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(E, r, fan_in, generator=generator)
    B = torch.randn(E, fan_out, r, generator=generator)
    expected = torch.stack([torch.linalg.matrix_norm(B[e].double() @ A[e].double()) * 0.3 for e in range(E)])
    # Products may cancel; what is lost goes by the size of the factors.
    size = float(A.norm() * B.norm())
    torch.testing.assert_close(examine(ExpertLora(A, B, 0.3)).norms, expected, rtol=1e-6, atol=1e-6 * size)


@given(st.lists(st.floats(-0.4, 0.4), min_size=8, max_size=64), st.floats(0.1, 10))
def test_of_norms_within_a_power_of_ten_none_is_far(exponents, scale):
    norms = [scale * 10**exponent for exponent in exponents]
    assert far(norms) == []
    assert far([*norms, max(norms) * 1e9]) == [len(norms)]


def test_what_is_not_settled_is_looked_at_as_far_as_it_goes(tmp_path):
    square = Spec(E=4, H=8, I=8)
    factors = square.factors(("down",))
    factors[0, "down"][0][0, 0, 0] = torch.nan
    said = inspect_adapter(save_fused(tmp_path / "in", square, factors)).content
    assert {(f.code, f.projection) for f in said} == {("not_finite", None), ("not_settled", None)}


def test_other_tensors_are_looked_at_for_what_is_not_finite(tmp_path):
    head = torch.full((3,), torch.inf)
    folder = save_fused(
        tmp_path / "in",
        SPEC,
        SPEC.factors(ROLES),
        extra={"base_model.model.lm_head.weight": head},
        peft_version="0.21.2",
    )
    assert [(f.code, f.path, f.detail["infinite"]) for f in found(folder)] == [
        ("not_finite", "base_model.model.lm_head.weight", 3)
    ]


def test_headers_alone(tmp_path):
    folder = save_fused(tmp_path / "in", SPEC, SPEC.factors(ROLES), peft_version="0.21.2")
    calls = []
    whole = inspect_adapter(folder, model=SPEC.model(), progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (whole.total_bytes, whole.total_bytes)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    alone = inspect_adapter(folder, model=SPEC.model(), content=False)
    assert alone.content is None
    assert replace(alone, content=()) == whole


def test_every_code_has_a_case_and_a_level(tmp_path):
    said = {case[1] for case in CASES} | {"huge", "not_trained", "no_scaling", "missing_layers", "not_settled"}
    assert said == set(FINDINGS)
    factors = SPEC.factors(ROLES)
    spoil(factors, "linear")
    folder = save_fused(tmp_path / "in", SPEC, factors, peft_version="0.21.2")
    document = json.loads(inspect_adapter(folder, model=SPEC.model()).to_json())
    assert [(entry["code"], entry["level"], entry["text"]) for entry in document["content"]] == [
        ("not_finite", "error", "1 NaN and 2 infinite entries")
    ]


def test_a_config_of_lora_on_linears_alone(tmp_path):
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {stem.format(layer, "A"): torch.randn(2, 8) for layer in range(6)}
    tensors |= {stem.format(layer, "B"): torch.randn(8, 2) for layer in range(6)}
    tensors[stem.format(3, "B")] *= 0
    config = lora_config(Spec(family=QWEN), target_modules=["q_proj"])
    (said,) = inspect_adapter(save(tmp_path / "in", tensors, config)).content
    assert (said.code, said.path) == ("not_trained", "model.layers.3.self_attn.q_proj")
