"""LoRA of which all experts share the outer side, as the readers take it: lora_A of gate and up, lora_B of down."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from . import sglang_reader, vllm_reader
from . import tiny as t

MLP = "model.layers.0.mlp.experts"
VL = "model.language_model.layers.0.mlp.experts"
SPARSE = "model.layers.0.block_sparse_moe.experts"
MIXER = "backbone.layers.0.mixer.experts"
REFUSALS = (AssertionError, IndexError, RuntimeError, ValueError)


def shared(factors: t.Lora, path: str, names=t.W123) -> dict:
    """Its tensors, the shared ones with a first axis of 1."""
    small = t.Lora(
        {role: A if role == "down" else A[:1] for role, A in factors.A.items()},
        {role: B[:1] if role == "down" else B for role, B in factors.B.items()},
    )
    return t.stacked(small, f"{path}.{{}}", names)


def outer(factors: t.Lora) -> t.Lora:
    """The factors of single experts that it stands for."""
    return t.Lora(
        {role: A if role == "down" else A[:1].expand_as(A) for role, A in factors.A.items()},
        {role: B[:1].expand_as(B) if role == "down" else B for role, B in factors.B.items()},
    )


@pytest.mark.parametrize("release", vllm_reader.RELEASES)
@pytest.mark.parametrize(("base", "path"), [(t.qwen3_moe, MLP), (t.mixtral, SPARSE), (t.deepseek_v3, MLP)])
def test_vllm_reads_it_under_its_flag(tmp_path: Path, base, path, release) -> None:
    factors = t.lora()
    folder = t.write(tmp_path, shared(factors, path))
    t.assert_updates(vllm_reader.read(folder, base(), release=release, shared=True), outer(factors).updates())
    with pytest.raises(ValueError, match="expected target modules"):
        vllm_reader.read(folder, base(), release=release)


@pytest.mark.parametrize(("base", "path"), [(t.gpt_oss, MLP), (t.qwen3_vl_moe, VL), (t.qwen3_5_moe, VL)])
def test_vllm_reads_it_for_natively_stacked_models_since_0_32(tmp_path: Path, base, path) -> None:
    factors = t.lora()
    folder = t.write(tmp_path, shared(factors, path))
    for release in ("0.32.0", "0.33.0"):
        t.assert_updates(vllm_reader.read(folder, base(), release=release, shared=True), outer(factors).updates())
    for release in ("0.28.0", "0.30.0"):
        with pytest.raises(AssertionError):
            vllm_reader.read(folder, base(), release=release, shared=True)


@pytest.mark.parametrize("release", vllm_reader.RELEASES)
def test_vllm_refuses_everything_else_under_its_flag(tmp_path: Path, release) -> None:
    factors, base = t.lora(), t.qwen3_moe()
    right = shared(factors, MLP)
    files = {
        "per_expert": t.per_expert(factors, MLP),
        "names": shared(factors, MLP, t.HF),
        "no_up": t.without(right, ".w3."),
        "down": shared(t.lora("down"), MLP),
        "2-D": {name: x[0] if x.shape[0] == 1 else x for name, x in right.items()},
    }
    for name, tensors in files.items():
        with pytest.raises(REFUSALS):
            vllm_reader.read(t.write(tmp_path / name, tensors), base, release=release, shared=True)
    up = shared(t.lora("up", "down"), MIXER, {"up": "w1", "down": "w2"})
    with pytest.raises(AssertionError):
        vllm_reader.read(t.write(tmp_path / "no_gate", up), t.nemotron_h(), release=release, shared=True)
    whole = t.write(tmp_path / "whole", t.stacked(factors, f"{MLP}.{{}}", t.W123))
    assert t.differs(vllm_reader.read(whole, base, release=release, shared=True), factors.updates())


@pytest.mark.parametrize("release", sglang_reader.RELEASES)
@pytest.mark.parametrize(
    ("base", "path", "names", "roles"),
    [
        pytest.param(t.qwen3_moe, MLP, t.HF, t.ROLES, id="qwen3_moe"),
        pytest.param(t.qwen3_moe, MLP, t.W123, t.ROLES, id="qwen3_moe-w123"),
        pytest.param(t.mixtral, MLP, t.HF, t.ROLES, id="mixtral-any_path"),
        pytest.param(t.qwen3_vl_moe, VL, t.HF, t.ROLES, id="qwen3_vl_moe"),
        pytest.param(t.qwen3_moe, MLP, {"gate_up": "gate_up_proj", "down": "down_proj"}, ("gate_up", "down"), id="two"),
        pytest.param(t.nemotron_h, MIXER, {"up": "gate_proj", "down": "down_proj"}, ("up", "down"), id="nemotron_h"),
    ],
)
def test_sglang_reads_it(tmp_path: Path, base, path, names, roles, release) -> None:
    factors = t.lora(*roles)
    folder = t.write(tmp_path, shared(factors, path, names))
    t.assert_updates(sglang_reader.read(folder, base(), release=release), outer(factors).updates())


@pytest.mark.parametrize("release", sglang_reader.RELEASES)
def test_sglang_reads_nothing_else_of_it(tmp_path: Path, release) -> None:
    factors, base = t.lora(), t.qwen3_moe()
    right = shared(factors, MLP, t.HF)
    wide = t.stacked(factors, f"{MLP}.{{}}", t.HF)
    down = {name: x for name, x in right.items() if "down_proj" in name}
    half = {**right, **{name: wide[name] for name in down}}
    with pytest.raises(ValueError, match="expected 1"):
        sglang_reader.read(t.write(tmp_path / "half", half), base, release=release)
    flat = t.write(tmp_path / "flat", {name: x[0] if x.shape[0] == 1 else x for name, x in right.items()})
    assert t.differs(sglang_reader.read(flat, base, release=release), outer(factors).updates())
    found = sglang_reader.read(t.write(tmp_path / "down", down), base, release=release)
    assert not found[0, 1, "down"].any()
    own = t.write(tmp_path / "own", shared(factors, MLP, t.HF))
    assert t.differs(sglang_reader.read(own, t.gpt_oss(), release=release), outer(factors).updates())
    one = t.shared_A(factors)
    folder = t.write(tmp_path / "one", shared(one, MLP, t.HF))
    t.assert_updates(sglang_reader.read(folder, t.gpt_oss(), release=release), outer(one).updates())


def test_scaling(tmp_path: Path) -> None:
    factors = t.lora()
    folder = t.write(tmp_path, shared(factors, MLP), use_rslora=True, alpha_pattern={"experts.w2": 8})
    t.assert_updates(sglang_reader.read(folder, t.qwen3_moe()), outer(factors).updates())
    wanted = outer(factors).updates(t.ALPHA / math.sqrt(t.RANK))
    wanted = {key: update * (8 / t.ALPHA if key[2] == "down" else 1) for key, update in wanted.items()}
    t.assert_updates(vllm_reader.read(folder, t.qwen3_moe(), shared=True), wanted)
