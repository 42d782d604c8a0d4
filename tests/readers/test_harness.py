"""The harness reads adapters with known factors as FACTS.md says: right, refused, or silently wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from . import llama_cpp_reader, sglang_reader, vllm_reader
from . import tiny as t

MLP = "model.layers.0.mlp.experts"
SPARSE = "model.layers.0.block_sparse_moe.experts"
VL = "model.language_model.layers.0.mlp.experts"
MIXER = "backbone.layers.0.mixer.experts"
GGUF = "blk.0.ffn_{}_exps"

# (base, path of the experts, names of the projections, roles)
PER_EXPERT = [
    pytest.param(t.qwen3_moe, MLP, t.HF, t.ROLES, id="qwen3_moe"),
    pytest.param(t.deepseek_v3, MLP, t.HF, t.ROLES, id="deepseek_v3"),
    pytest.param(t.mixtral, SPARSE, t.W123, t.ROLES, id="mixtral"),
]
# What vLLM and llama.cpp name otherwise than SGLang.
EXACT = [pytest.param(t.nemotron_h, MIXER, t.HF, ("up", "down"), id="nemotron_h")]


@pytest.mark.parametrize(
    ("base", "path", "names", "roles"),
    [
        *PER_EXPERT,
        *EXACT,
        pytest.param(t.granitemoe, SPARSE, t.HF, t.ROLES, id="granitemoe"),
        pytest.param(t.llama4, "language_model.model.layers.0.feed_forward.experts", t.HF, t.ROLES, id="llama4"),
    ],
)
def test_vllm_reads_per_expert(tmp_path: Path, base, path, names, roles) -> None:
    factors = t.lora(*roles)
    folder = t.write(tmp_path, t.per_expert(factors, path, names))
    t.assert_updates(vllm_reader.read(folder, base()), factors.updates())


@pytest.mark.parametrize(
    ("base", "path", "interleaved"),
    [
        pytest.param(t.gpt_oss, MLP, True, id="gpt_oss"),
        pytest.param(t.qwen3_vl_moe, VL, False, id="qwen3_vl_moe"),
        pytest.param(t.qwen3_vl_moe, MLP, False, id="qwen3_vl_moe-text_names"),
        pytest.param(t.qwen3_5_moe, VL, False, id="qwen3_5_moe"),
    ],
)
def test_vllm_reads_flat_pairs(tmp_path: Path, base, path, interleaved) -> None:
    factors = t.lora("gate_up", "down")
    folder = t.write(tmp_path, t.flat(factors, path), target_modules=[])
    t.assert_updates(vllm_reader.read(folder, base()), factors.updates(interleaved=interleaved))


def test_vllm_flat_pairs_wrong(tmp_path: Path) -> None:
    factors, base = t.lora("gate_up", "down"), t.qwen3_vl_moe()
    right = t.flat(factors, VL)
    grouped = t.write(tmp_path / "grouped", t.flat(factors, VL, packing="grouped"))
    assert t.differs(vllm_reader.read(grouped, base), factors.updates())
    with pytest.raises(RuntimeError, match="must match the size"):
        vllm_reader.read(t.write(tmp_path / "reversed", t.flat(factors, VL, orientation="reversed")), base)
    with pytest.raises(AssertionError):
        vllm_reader.read(t.write(tmp_path / "down", t.without(right, "base_layer")), base)
    gate_up = {name: tensor for name, tensor in right.items() if "base_layer" in name}
    assert vllm_reader.read(t.write(tmp_path / "gate_up", gate_up), base) == {}
    halves = t.write(tmp_path / "halves", t.flat(factors, MLP))
    assert t.differs(vllm_reader.read(halves, t.gpt_oss()), factors.updates(interleaved=False))


def test_vllm_form_must_fit_the_class(tmp_path: Path) -> None:
    fused, split = t.lora("gate_up", "down"), t.lora()
    flat_on_2d = t.write(tmp_path / "flat", t.flat(fused, MLP))
    with pytest.raises(ValueError, match="fused 3D MoE weights"):
        vllm_reader.read(flat_on_2d, t.qwen3_moe())
    split_on_3d = t.write(tmp_path / "split", t.per_expert(split, VL))
    with pytest.raises(ValueError, match="expected target modules"):
        vllm_reader.read(split_on_3d, t.qwen3_vl_moe())
    t.assert_updates(vllm_reader.read(flat_on_2d, t.qwen3_moe(), mixed_format=True, is_3d=True), fused.updates())
    t.assert_updates(vllm_reader.read(split_on_3d, t.qwen3_vl_moe(), mixed_format=True), split.updates())
    named = t.write(tmp_path / "named", t.stacked(fused, MLP + ".{}_proj"))
    with pytest.raises(ValueError, match="expected target modules"):
        vllm_reader.read(named, t.qwen3_moe())


def test_vllm_wants_everything(tmp_path: Path) -> None:
    right = t.per_expert(t.lora(), MLP)
    for name, missing in (("expert", "experts.1."), ("projection", "up_proj"), ("one", "experts.1.up_proj")):
        with pytest.raises(AssertionError):
            vllm_reader.read(t.write(tmp_path / name, t.without(right, missing)), t.qwen3_moe())
    odd = {**right, **{k: v for k, v in t.per_expert(t.lora(rank=3), MLP).items() if "experts.1.up_proj" in k}}
    with pytest.raises(ValueError, match="different LoRA ranks"):
        vllm_reader.read(t.write(tmp_path / "rank", odd), t.qwen3_moe())


def test_vllm_wrong_path_is_silent(tmp_path: Path) -> None:
    """mixtral's mapper renames the projections, so only the path is wrong."""
    assert vllm_reader.read(t.write(tmp_path, t.per_expert(t.lora(), MLP)), t.mixtral()) == {}


def test_vllm_scaling(tmp_path: Path) -> None:
    factors = t.lora()
    tensors = t.per_expert(factors, MLP)
    folder = t.write(tmp_path / "rslora", tensors, use_rslora=True)
    t.assert_updates(vllm_reader.read(folder, t.qwen3_moe()), factors.updates(t.ALPHA / math.sqrt(t.RANK)))
    found = vllm_reader.read(t.write(tmp_path / "alpha", tensors, alpha_pattern={"down_proj": 8}), t.qwen3_moe())
    wanted = {key: (4 / 1.5 if key[2] == "down" else 1) * value for key, value in factors.updates().items()}
    t.assert_updates(found, wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"r": 128},
    ],
    ids=str,
)
def test_vllm_refuses_configs(tmp_path: Path, config) -> None:
    folder = t.write(tmp_path, t.per_expert(t.lora(), MLP), **config)
    with pytest.raises(ValueError, match="vLLM|bias|max_lora_rank"):
        vllm_reader.read(folder, t.qwen3_moe())


@pytest.mark.parametrize(
    ("base", "path", "names", "roles"),
    [
        *PER_EXPERT,
        pytest.param(t.mixtral, MLP, t.HF, t.ROLES, id="mixtral-any_path"),
        pytest.param(t.qwen3_vl_moe, VL, t.HF, t.ROLES, id="qwen3_vl_moe"),
        pytest.param(t.qwen3_5_moe, VL, t.HF, t.ROLES, id="qwen3_5_moe"),
        pytest.param(t.nemotron_h, MIXER, {**t.HF, "up": "gate_proj"}, ("up", "down"), id="nemotron_h"),
    ],
)
def test_sglang_reads_per_expert(tmp_path: Path, base, path, names, roles) -> None:
    factors = t.lora(*roles)
    folder = t.write(tmp_path, t.per_expert(factors, path, names))
    t.assert_updates(sglang_reader.read(folder, base()), factors.updates())


@pytest.mark.parametrize("base", [t.qwen3_moe, t.gpt_oss, t.qwen3_vl_moe])
def test_sglang_reads_stacks(tmp_path: Path, base) -> None:
    factors = t.lora("gate_up", "down")
    folder = t.write(tmp_path, t.stacked(factors, MLP + ".{}_proj"))
    t.assert_updates(sglang_reader.read(folder, base()), factors.updates())


def test_sglang_gpt_oss_shares_lora_a(tmp_path: Path) -> None:
    own, shared = t.lora(), t.shared_A(t.lora())
    found = sglang_reader.read(t.write(tmp_path / "shared", t.per_expert(shared, MLP)), t.gpt_oss())
    t.assert_updates(found, shared.updates())
    assert t.differs(sglang_reader.read(t.write(tmp_path / "own", t.per_expert(own, MLP)), t.gpt_oss()), own.updates())


def test_sglang_fills_with_zeros(tmp_path: Path) -> None:
    factors = t.lora()
    right = t.per_expert(factors, MLP)
    wanted = {key: value * (key[1] != 1) for key, value in factors.updates().items()}
    found = sglang_reader.read(t.write(tmp_path / "expert", t.without(right, "experts.1.")), t.qwen3_moe())
    t.assert_updates(found, wanted)
    wanted = {key: value * (key[2] == "down") for key, value in factors.updates().items()}
    found = sglang_reader.read(t.write(tmp_path / "down", t.without(right, "gate_proj", "up_proj")), t.qwen3_moe())
    t.assert_updates(found, wanted)
    with pytest.raises(ValueError, match="Cannot find target module name"):
        sglang_reader.read(t.write(tmp_path / "up", t.without(right, "gate_proj")), t.qwen3_moe())


def test_sglang_refuses(tmp_path: Path) -> None:
    right = t.per_expert(t.lora(), MLP)
    flat = t.write(tmp_path / "flat", t.flat(t.lora("gate_up", "down"), MLP))
    with pytest.raises(ValueError, match="Cannot find target module name"):
        sglang_reader.read(flat, t.qwen3_moe())
    up = t.write(tmp_path / "up", t.per_expert(t.lora("up", "down"), MIXER))
    with pytest.raises(ValueError, match="Cannot find target module name"):
        sglang_reader.read(up, t.nemotron_h())
    with pytest.raises(AssertionError, match="LoRA buffer shape"):
        sglang_reader.read(t.write(tmp_path / "r", right, r=3), t.qwen3_moe())
    with pytest.raises(RuntimeError, match="DoRA"):
        sglang_reader.read(t.write(tmp_path / "dora", right, use_dora=True), t.qwen3_moe())
    for index, targets in enumerate(([], ["down_proj"], ["experts"], ".*experts.*", None)):
        folder = t.write(tmp_path / f"targets{index}", right, target_modules=targets)
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            sglang_reader.read(folder, t.qwen3_moe())
    llama4 = t.write(tmp_path / "llama4", t.per_expert(t.lora(), "language_model.model.layers.0.feed_forward.experts"))
    with pytest.raises(NotImplementedError):
        sglang_reader.read(llama4, t.llama4())


def test_sglang_knows_one_scaling(tmp_path: Path) -> None:
    """rsLoRA and patterns are ignored without a word."""
    factors = t.lora()
    ignored = {"use_rslora": True, "alpha_pattern": {"down_proj": 8}, "rank_pattern": {"down_proj": 4}}
    folder = t.write(tmp_path, t.per_expert(factors, MLP), **ignored)
    t.assert_updates(sglang_reader.read(folder, t.qwen3_moe()), factors.updates())


@pytest.mark.parametrize(("base", "path", "names", "roles"), [*PER_EXPERT, *EXACT])
def test_llama_cpp_reads_per_expert(tmp_path: Path, base, path, names, roles) -> None:
    factors = t.lora(*roles)
    folder = t.write(tmp_path, t.per_expert(factors, path, names))
    t.assert_updates(llama_cpp_reader.read(folder, base()), factors.updates())


@pytest.mark.parametrize(
    ("base", "roles"),
    [
        pytest.param(t.gpt_oss, t.ROLES, id="gpt_oss"),
        pytest.param(t.llama4, ("down",), id="llama4-down_only"),
        pytest.param(lambda: t.qwen3_5_moe(mtp_num_hidden_layers=1), t.ROLES, id="qwen3_5_moe"),
    ],
)
def test_llama_cpp_reads_gguf_names(tmp_path: Path, base, roles) -> None:
    factors = t.lora(*roles)
    folder = t.write(tmp_path, t.stacked(factors, GGUF))
    t.assert_updates(llama_cpp_reader.read(folder, base()), factors.updates())


def test_llama_cpp_knows_one_scaling(tmp_path: Path) -> None:
    """alpha over this tensor's own rank; `r`, rsLoRA and patterns are ignored without a word."""
    factors = t.lora()
    ignored = {"r": 64, "use_rslora": True, "alpha_pattern": {"down_proj": 8}}
    folder = t.write(tmp_path / "ignored", t.stacked(factors, GGUF), **ignored)
    t.assert_updates(llama_cpp_reader.read(folder, t.qwen3_moe()), factors.updates())


@pytest.mark.parametrize(
    ("base", "tensors", "message"),
    [
        pytest.param(t.qwen3_moe, lambda: t.without(t.per_expert(t.lora(), MLP), ".1."), "Unprocessed", id="expert"),
        pytest.param(t.qwen3_moe, lambda: t.per_expert(t.lora("down"), MLP), "Unprocessed", id="projection"),
        pytest.param(t.qwen3_moe, lambda: t.flat(t.lora("gate_up", "down"), MLP), "Unprocessed", id="flat"),
        pytest.param(t.qwen3_moe, lambda: t.stacked(t.lora("gate_up"), MLP + ".{}_proj"), "ndim", id="stack"),
        pytest.param(t.gpt_oss, lambda: t.per_expert(t.lora(), MLP), "Can not map", id="gpt_oss"),
        pytest.param(t.mixtral, lambda: t.per_expert(t.lora(), MLP), "Can not map", id="path"),
    ],
)
def test_llama_cpp_refuses(tmp_path: Path, base, tensors, message) -> None:
    with pytest.raises(llama_cpp_reader.ConversionError, match=message):
        llama_cpp_reader.read(t.write(tmp_path, tensors()), base())


def test_updates_have_the_weight_shape(tmp_path: Path) -> None:
    found = vllm_reader.read(t.write(tmp_path, t.per_expert(t.lora(), MLP)), t.qwen3_moe())
    assert found[0, 0, "gate"].shape == (t.INTERMEDIATE, t.HIDDEN)
    assert found[0, 0, "down"].shape == (t.HIDDEN, t.INTERMEDIATE)
    assert found[0, 0, "down"].dtype == torch.float64
