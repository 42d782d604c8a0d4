"""Adapters merged into checkpoints of every stored form: against float64 loops, and everything that must be refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import (
    FAMILIES,
    GPT_OSS,
    MIXTRAL,
    NEMOTRON,
    QWEN,
    Family,
    Spec,
    load,
    read_config,
    save,
    save_fused,
    save_per_expert,
    save_stacked,
)
from support.tensor_files import allocating_at_most
from typer.testing import CliRunner

import peft_moe_compat
from peft_moe_compat.adapters.merge import merge_adapter
from peft_moe_compat.adapters.verify_merge import verify_merge
from peft_moe_compat.cli.main import app
from peft_moe_compat.errors import AdapterError, AdapterFileError, AmbiguousAdapterError

_PATH = "model.language_model.layers.{}.mlp.experts"
VISION = Family("qwen3_vl_moe", fused=_PATH, apart=_PATH)
SPEC = Spec(E=4, H=64, I=32, r=2, attention=True)
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24]}
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclass(frozen=True)
class Base:
    """A checkpoint to be: its tensors, what they mean, and its config.

    Attributes:
        tensors: As stored.
        numbers: (layer, role) -> "E out in" with gate and up apart, and (layer, "q_proj") -> "out in"; float64.
    """

    tensors: dict
    numbers: dict
    config: dict


def to_fp8(matrix, scale_dtype):
    """By transformers' recipe, block by block: (float8, scales, their product in float64)."""
    height, width = FP8["weight_block_size"]
    rows, columns = matrix.shape[-2:]
    weight, value = torch.zeros(matrix.shape, dtype=torch.float8_e4m3fn), torch.zeros(matrix.shape, dtype=torch.float64)
    scales = torch.zeros(*matrix.shape[:-2], -(-rows // height), -(-columns // width), dtype=scale_dtype)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            here = (..., slice(row, row + height), slice(column, column + width))
            scale = (matrix[here].abs().amax((-2, -1)) / 448).to(scale_dtype)
            scales[..., row // height, column // width] = scale
            spread = scale.float()[..., None, None]
            weight[here] = (matrix[here] / spread).clamp(-448, 448).to(weight.dtype)
            value[here] = weight[here].double() * spread.double()
    return weight, scales, value


def random_mxfp4(*shape):
    """(blocks, scales, the numbers "E out in" they stand for)."""
    E, out, fan_in = shape
    blocks = torch.randint(0, 256, (E, out, fan_in // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 123, (E, out, fan_in // 32), dtype=torch.uint8)
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    value = NUMBERS[codes].double() * 2.0 ** (scales.double() - 127)[..., None]
    return blocks, scales, value.flatten(2)


def base_of(spec, stored, dtype=torch.float32, prefix="model.", scale_dtype=torch.float32):
    """A base with random weights. `stored`: "apart", "fused", "transposed", "mxfp4", "fp8 apart", "fp8 fused"."""
    torch.manual_seed(3)
    tensors, numbers, family = {}, {}, spec.family

    def put(name, matrix, fp8):
        if not fp8:
            tensors[name] = matrix.to(dtype)
            return tensors[name].double()
        tensors[name], tensors[f"{name}_scale_inv"], value = to_fp8(matrix, scale_dtype)
        return value

    for layer in spec.layers:
        name = f"model.layers.{layer}.self_attn.q_proj.weight".replace("model.", prefix, 1)
        numbers[layer, "q_proj"] = put(name, torch.randn(spec.H, spec.H) * 0.1, stored.startswith("fp8"))
        tensors[name.replace("self_attn.q_proj", "input_layernorm")] = torch.randn(spec.H).to(dtype)
        for role in spec.linear_roles() if stored.endswith("apart") else spec.fused_roles():
            fan_in, out = spec.size(role)
            stack = torch.randn(spec.E, out, fan_in) * 0.1
            if stored.endswith("apart"):
                path = family.apart.format(layer).replace("model.", prefix, 1)
                of_expert = f"{path}.{{}}.{family.linear(role)}.weight"
                made = [put(of_expert.format(e), stack[e], stored.startswith("fp8")) for e in range(spec.E)]
                numbers[layer, role] = torch.stack(made)
                continue
            path = family.fused.format(layer).replace("model.", prefix, 1)
            name = f"{path}.{'gate_up' if role == 'gate_up' else role}_proj"
            if stored == "mxfp4":
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"], value = random_mxfp4(*stack.shape)
            elif stored == "transposed":
                tensors[name] = stack.transpose(1, 2).to(dtype).contiguous()
                value = tensors[name].double().transpose(1, 2)
            else:
                value = put(name, stack, stored == "fp8 fused")
            rows = family.rows(out) if role == "gate_up" else {role: slice(None)}
            numbers |= {(layer, part): value[:, some] for part, some in rows.items()}
    tensors[f"{prefix}embed_tokens.weight"] = torch.randn(7, spec.H).to(dtype)
    config = dict(spec.model())
    if stored.startswith("fp8"):
        config["quantization_config"] = FP8
    elif stored == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4"}
    return Base(tensors, numbers, config)


def write(folder, base, shards=1, **more):
    """The checkpoint folder; `shards` deals its tensors out one by one, so that what belongs together lies apart."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(base.config | more))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    plain = {name: tensor.contiguous() for name, tensor in base.tensors.items()}
    if shards == 1:
        save_file(plain, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(plain))}
    for file in files:
        save_file({n: t for n, t in plain.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def read(folder, spec, stored, prefix="model."):
    """The numbers of a checkpoint, as `Base.numbers`: what is stored, by definition."""
    tensors, found, family = tensors_of(folder), {}, spec.family

    def get(name):
        if name not in tensors:
            blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
            codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
            return (NUMBERS[codes].double() * 2.0 ** (scales.double() - 127)[..., None]).flatten(2)
        weight, scale = tensors[name].double(), tensors.get(f"{name}_scale_inv")
        if scale is not None:
            height, width = FP8["weight_block_size"]
            scale = scale.double().repeat_interleave(height, -2).repeat_interleave(width, -1)
            weight *= scale[..., : weight.shape[-2], : weight.shape[-1]]
        return weight.transpose(1, 2) if stored == "transposed" and weight.ndim == 3 else weight

    for layer in spec.layers:
        found[layer, "q_proj"] = get(f"model.layers.{layer}.self_attn.q_proj.weight".replace("model.", prefix, 1))
        for role in spec.linear_roles() if stored.endswith("apart") else spec.fused_roles():
            if stored.endswith("apart"):
                path = family.apart.format(layer).replace("model.", prefix, 1)
                names = [f"{path}.{e}.{family.linear(role)}.weight" for e in range(spec.E)]
                found[layer, role] = torch.stack([get(name) for name in names])
                continue
            value = get(f"{family.fused.format(layer)}.{role}_proj".replace("model.", prefix, 1))
            rows = family.rows(value.shape[1]) if role == "gate_up" else {role: slice(None)}
            found |= {(layer, part): value[:, some] for part, some in rows.items()}
    return found


def updates(spec, factors, folder):
    """What the adapter adds, from its factors, and from its file for attention."""
    found, tensors = spec.updates(factors), load(folder)
    for layer in spec.layers:
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        stem = next(name for name in tensors if f"layers.{layer}.self_attn.q_proj.lora_A" in name).partition("lora_A")[
            0
        ]
        A, B = tensors[f"{stem}lora_A.weight"].double(), tensors[f"{stem}lora_B.weight"].double()
        found[layer, "q_proj"] = B @ A * (spec.alpha / spec.r)
    return found


def adapter(folder, spec, form="fused", scale=0.02, **how):
    """(folder, factors) of an adapter whose updates are a tenth of the base or so."""
    roles = spec.linear_roles() if form == "per_expert" else spec.fused_roles()
    factors = {key: (A, B * scale) for key, (A, B) in spec.factors(roles).items()}
    write_it = {"fused": save_fused, "per_expert": save_per_expert, "stacked": save_stacked}[form]
    how = ({"peft_version": "0.21.2"} if form == "fused" else {}) | how
    save_at = write_it(folder, spec, factors, **how)
    tensors = {n: t * scale if "q_proj.lora_B" in n else t for n, t in load(save_at).items()}
    return save(folder, tensors, read_config(save_at)), factors


# How far a merged number may be from the exact one, relative to the largest in its matrix.
TOLERANCE = {"apart": 1e-7, "fused": 1e-7, "transposed": 1e-7, "mxfp4": 0.26, "fp8 apart": 0.07, "fp8 fused": 0.07}
CASES = [
    *[(family, "apart") for family in FAMILIES],
    *[(family, "fused") for family in FAMILIES if family is not GPT_OSS],
    *[(family, "transposed") for family in (GPT_OSS, VISION)],
    (VISION, "fused"),
    (GPT_OSS, "mxfp4"),
    *[(family, stored) for family in (QWEN, MIXTRAL, NEMOTRON) for stored in ("fp8 apart", "fp8 fused")],
]


@pytest.mark.parametrize("form", ["fused", "per_expert", "stacked"])
@pytest.mark.parametrize(("family", "stored"), CASES, ids=lambda value: getattr(value, "model_type", value))
def test_every_stored_form_and_every_form_of_adapter(tmp_path, family, stored, form):
    spec = replace(SPEC, family=family, I=48 if family is VISION else SPEC.I)
    base = base_of(spec, stored)
    folder = write(tmp_path / "base", base, shards=3)
    source, factors = adapter(tmp_path / "in", spec, form)
    how = {"orientation": "linear"} if form == "fused" and family is VISION else {}
    done = merge_adapter(folder, source, tmp_path / "out", **how)
    added, found = updates(spec, factors, source), read(tmp_path / "out", spec, stored)
    assert found.keys() == base.numbers.keys() == added.keys()
    for key, value in found.items():
        expected = base.numbers[key] + added[key]
        bound = TOLERANCE[stored if key[1] != "q_proj" or stored.startswith("fp8") else "fused"]
        assert ((value - expected).abs() <= bound * expected.abs().amax((-2, -1), keepdim=True)).all(), key
        assert added[key].norm() > 0.02 * base.numbers[key].norm()  # that it would be missed
    before, after = base.tensors, tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    same = {name for name in before if torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))}
    assert same == {name for name in before if "layernorm" in name or "embed" in name}
    assert {row.projection for row in done.rows} >= {"down_proj" if form != "per_expert" else family.linear("down")}
    checked = verify_merge(folder, source, tmp_path / "out", **how)
    assert checked.same, [row for row in checked.rows if not row.same]
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (folder / index).read_bytes()


@pytest.mark.parametrize("stored", ["apart", "fp8 fused", "fp8 apart"])
def test_what_rounding_changed_is_said_of_each_projection(tmp_path, stored):
    base = base_of(SPEC, stored, torch.bfloat16, scale_dtype=torch.bfloat16)
    source, factors = adapter(tmp_path / "in", SPEC)
    done = merge_adapter(write(tmp_path / "base", base, shards=5), source, tmp_path / "out")
    added, found = updates(SPEC, factors, source), read(tmp_path / "out", SPEC, stored)
    for row in done.rows:
        layer = int(row.path.split(".")[2])
        keys = [
            (layer, r)
            for r in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(row.projection, ("q_proj",))
        ]
        update = sum(added[key].square().sum() for key in keys) ** 0.5
        error = sum((found[key] - base.numbers[key] - added[key]).square().sum() for key in keys) ** 0.5
        assert row.update == pytest.approx(float(update), rel=1e-5)
        assert row.relative == pytest.approx(float(error / update), rel=1e-2)
        assert 0 < row.relative < 1
    assert len(done.rows) == 3 * len(SPEC.layers)


@pytest.mark.parametrize("stored", ["fused", "mxfp4", "fp8 apart"])
def test_what_the_adapter_does_not_update_stays_bit_for_bit(tmp_path, stored):
    spec = replace(SPEC, family=GPT_OSS if stored == "mxfp4" else QWEN)
    base = base_of(spec, stored)
    factors = spec.factors(spec.fused_roles())
    for _, B in factors.values():
        B[1:] = 0
    source = save_fused(tmp_path / "in", spec, factors, peft_version="0.21.2")
    merge_adapter(write(tmp_path / "base", base), source, tmp_path / "out")
    before, after = base.tensors, tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        ours, theirs = tensor.view(torch.uint8), after[name].view(torch.uint8)
        if "experts.gate" in name or "experts.down" in name:
            assert torch.equal(ours[1:], theirs[1:])
            assert not torch.equal(ours[0], theirs[0])
        elif "experts.1." in name or "experts.2." in name:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prefix", ["model.language_model.", "backbone.", "language_model.model.", ""])
def test_a_checkpoint_whose_names_begin_otherwise(tmp_path, prefix):
    base = base_of(SPEC, "apart", prefix=prefix)
    source, factors = adapter(tmp_path / "in", SPEC)
    merge_adapter(write(tmp_path / "base", base), source, tmp_path / "out")
    added, found = updates(SPEC, factors, source), read(tmp_path / "out", SPEC, "apart", prefix)
    for key, value in found.items():
        torch.testing.assert_close(value, base.numbers[key] + added[key], rtol=0, atol=1e-6)


def test_a_tower_beside_the_text_is_not_taken_for_it(tmp_path):
    base = base_of(SPEC, "apart", prefix="model.language_model.")
    tower = {n.replace("language_model", "vision_tower"): t + 1 for n, t in base.tensors.items() if "q_proj" in n}
    base.tensors.update(tower)
    source, _ = adapter(tmp_path / "in", SPEC)
    only = {n: t for n, t in load(source).items() if "q_proj" in n}
    alone = save(tmp_path / "alone", only, read_config(source) | {"target_parameters": None})
    refused(tmp_path, write(tmp_path / "base", base), alone, "may be")
    merge_adapter(tmp_path / "base", source, tmp_path / "out")  # the experts say which
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in tower.items())


def merged(tmp_path, spec=SPEC, stored="apart", dtype=torch.float32):
    base = base_of(spec, stored, dtype)
    folder = write(tmp_path / "base", base)
    source, _ = adapter(tmp_path / "in", spec)
    merge_adapter(folder, source, tmp_path / "out")
    return folder, source, tmp_path / "out"


def edited(out, change):
    tensors = tensors_of(out)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("stored", "dtype"), [("fused", torch.float32), ("fused", torch.bfloat16), ("fp8 fused", torch.float32)]
)
def test_verify_sees_experts_rows_and_other_tensors_that_are_lost(tmp_path, stored, dtype):
    folder, source, out = merged(tmp_path, stored=stored, dtype=dtype)
    assert verify_merge(folder, source, out).same
    whole, before = tensors_of(out), tensors_of(folder)
    name = "model.layers.1.mlp.experts.down_proj"
    beside = [n for n in whole if n.startswith(name)]

    def lose_experts(tensors):
        for n in beside:
            tensors[n].view(torch.uint8)[1:] = before[n].view(torch.uint8)[1:]

    def lose_one(tensors):
        for n in beside:
            tensors[n].view(torch.uint8)[2] = before[n].view(torch.uint8)[2]

    def lose_rows(tensors):
        for n in beside:
            tensors[n].view(torch.uint8)[:, 32 if n == name else 2 :] = before[n].view(torch.uint8)[
                :, 32 if n == name else 2 :
            ]

    for change in (lose_experts, lose_one, lose_rows):
        edited(out, change)
        found = verify_merge(folder, source, out)
        assert [(row.name, row.projection) for row in found.rows if not row.same] == [
            ("model.layers.1.mlp.experts", "down_proj")
        ], change
        assert not found.absent
        edited(out, lambda tensors: tensors.update({n: t.clone() for n, t in whole.items()}))
    edited(out, lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    assert [row.name for row in verify_merge(folder, source, out).rows if row.note] == ["model.embed_tokens.weight"]
    edited(out, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert not verify_merge(folder, source, out).same
    assert not verify_merge(folder, source, folder).same
    assert verify_merge(folder, source, folder).absent


@pytest.mark.parametrize("stored", ["fp8 fused", "mxfp4"])
def test_verify_tells_scales_of_other_rows_from_rounding(tmp_path, stored):
    """Of weights so alike that the scales of neighbouring blocks differ by a tenth, or one in ten by a factor of 2."""
    spec = replace(SPEC, family=GPT_OSS if stored == "mxfp4" else QWEN, H=96, I=96)
    base = base_of(spec, stored)
    at = "scale_inv" if stored == "fp8 fused" else "scales"
    name = next(n for n in base.tensors if "layers.1" in n and "down" in n and n.endswith(at))
    steps = torch.arange(base.tensors[name].shape[1])[None, :, None]
    base.tensors[name] = base.tensors[name][:, :1].expand_as(base.tensors[name]).clone()
    base.tensors[name] += (
        (steps % 10 == 0).to(torch.uint8) if at == "scales" else base.tensors[name] * 0.1 * (steps % 2)
    )
    folder = write(tmp_path / "base", base)
    source, _ = adapter(tmp_path / "in", spec, form="per_expert", scale=0.1)
    merge_adapter(folder, source, tmp_path / "out")
    assert verify_merge(folder, source, tmp_path / "out").same
    edited(tmp_path / "out", lambda tensors: tensors.update({name: tensors[name].roll(1, -2)}))
    found = [(row.name, row.projection) for row in verify_merge(folder, source, tmp_path / "out").rows if not row.same]
    assert found == [("model.layers.1.mlp.experts", "down_proj")]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", ["apart", "fused", "transposed", "fp8 apart", "fp8 fused"])
def test_verify_sees_numbers_that_are_not_finite(tmp_path, stored, number):
    """In one row or expert, or in all, in weights and scales: the experts after it do not make up for it."""
    family = GPT_OSS if stored == "transposed" else QWEN
    folder, source, out = merged(tmp_path, replace(SPEC, family=family), stored)
    whole = {n: t.clone() for n, t in tensors_of(out).items()}
    for name in (n for n in whole if "layers.1.mlp.experts" in n and "down" in n):
        if whole[name].dtype == torch.float8_e4m3fn and math.isinf(number):
            continue  # has no infinity
        for at in (0, -1, slice(None)):
            spoiled = whole[name].clone()
            spoiled[at] = torch.tensor(number).to(spoiled.dtype)
            edited(out, lambda tensors, n=name, t=spoiled: tensors.update({**whole, n: t}))
            found = verify_merge(folder, source, out)
            assert [(row.name, row.projection) for row in found.rows if not row.same] == [
                ("model.layers.1.mlp.experts", "down_proj")
            ]
            json.dumps(found.to_dict(), allow_nan=False)


def test_an_update_of_zero_that_rounding_moves_is_no_number_in_json(tmp_path):
    """Gate has no update, and shares blocks of FP8 with up, whose scale a large update changes."""
    folder = write(tmp_path / "base", base_of(replace(SPEC, I=20), "fp8 fused"))
    source, _ = adapter(tmp_path / "in", replace(SPEC, I=20), form="per_expert", scale=3.0)
    tensors = {n: t * 0 if "gate_proj.lora_B" in n else t for n, t in load(source).items()}
    done = merge_adapter(folder, save(tmp_path / "half", tensors, read_config(source)), tmp_path / "out")
    gate = [row for row in done.rows if row.projection == "gate_proj"]
    assert gate
    assert all(row.update == 0 and row.relative == torch.inf for row in gate)
    assert all(row["relative"] is None for row in done.to_dict()["rows"] if row["projection"] == "gate_proj")
    json.dumps(done.to_dict(), allow_nan=False)


def refused(tmp_path, folder, source, match, error=AdapterError, **how):
    with pytest.raises(error, match=match):
        merge_adapter(folder, source, tmp_path / "out", **how)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_what_finds_no_weight_is_an_error_before_anything_is_written(tmp_path):
    base = base_of(SPEC, "apart")
    source, _ = adapter(tmp_path / "in", SPEC)
    for i, lost in enumerate(
        ["layers.1.mlp.experts.0.gate_proj", "layers.1.mlp.experts.3.up_proj", "layers.0.self_attn"]
    ):
        less = Base({n: t for n, t in base.tensors.items() if lost not in n}, {}, base.config)
        refused(tmp_path, write(tmp_path / f"less{i}", less), source, "finds no weight|lacks")
    extra = {"base_model.model.lm_head.weight": torch.ones(3, 3)}
    whole, _ = adapter(tmp_path / "whole", SPEC, extra=extra)
    folder = write(tmp_path / "base", base)
    refused(tmp_path, folder, whole, "lm_head")
    dora, _ = adapter(tmp_path / "dora", SPEC, use_dora=True)
    refused(tmp_path, folder, dora, "DoRA")
    pissa, _ = adapter(tmp_path / "pissa", SPEC, init_lora_weights="pissa")
    refused(tmp_path, folder, pissa, "pissa")
    other = Spec(E=4, H=64, I=16, r=2)
    refused(tmp_path, folder, adapter(tmp_path / "other", other)[0], "fits no stack", AdapterFileError)
    unsure = Spec(E=4, H=64, I=64, r=2)
    of_64 = write(tmp_path / "square", base_of(unsure, "apart"))
    down = save_fused(tmp_path / "unsure", unsure, unsure.factors(("down",)))
    refused(tmp_path, of_64, down, "orientation", AmbiguousAdapterError)


def test_square_stacks_that_releases_of_transformers_read_differently_are_refused(tmp_path):
    """The `Transpose(check_dims=True)` of transformers 5 leaves them as they are; 4.57 reads them as "E in out"."""
    for i, size in enumerate((32, 64)):  # gate_up 64 x 64, and down
        spec = replace(SPEC, family=VISION, I=size)
        folder = write(tmp_path / f"base{i}", base_of(spec, "transposed"))
        source, _ = adapter(tmp_path / f"in{i}", spec, "stacked")
        refused(tmp_path, folder, source, "square")


def test_a_tied_head_is_refused(tmp_path):
    base = base_of(SPEC, "apart")
    base.tensors["lm_head.weight"] = torch.randn(7, SPEC.H)
    source, _ = adapter(tmp_path / "in", SPEC)
    stem = "base_model.model.lm_head.lora_{}.weight"
    head = {stem.format("A"): torch.randn(2, SPEC.H), stem.format("B"): torch.randn(7, 2)}
    source = save(tmp_path / "head", load(source) | head, read_config(source))
    refused(tmp_path, write(tmp_path / "base", base, tie_word_embeddings=True), source, "tie_word_embeddings")
    merge_adapter(write(tmp_path / "untied", base, tie_word_embeddings=False), source, tmp_path / "out")
    extra = {"base_model.model.model.embed_tokens.weight": torch.randn(7, SPEC.H)}
    whole, _ = adapter(tmp_path / "whole", SPEC, extra=extra)
    shutil.rmtree(tmp_path / "out")
    refused(tmp_path, tmp_path / "base", whole, "tie_word_embeddings")
    del base.tensors["lm_head.weight"]  # as transformers saves it
    refused(tmp_path, write(tmp_path / "shared", base, tie_word_embeddings=True), source, "tie_word_embeddings")
    merge_adapter(tmp_path / "untied", whole, tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[name], extra[f"base_model.model.{name}"])


QUANTISED = [
    ("bitsandbytes", {"quant_method": "bitsandbytes"}, None, None),
    ("gptq", {"quant_method": "gptq"}, None, None),
    ("awq", {"quant_method": "awq"}, None, None),
    ("compressed-tensors", {"quant_method": "compressed-tensors"}, None, None),
    ("bitsandbytes 4-bit", None, "{}.weight.absmax", torch.uint8),
    ("bitsandbytes int8", None, "{}.SCB", torch.int8),
    ("GPTQ or AWQ", None, "{}.qweight", None),
    ("FP8 with a weight_scale", None, "{}.weight_scale", torch.float8_e4m3fn),
    ("without .*_scale_inv", None, None, torch.float8_e4m3fn),
    ("int8", None, None, torch.int8),
]


@pytest.mark.parametrize(("said", "config", "beside", "dtype"), QUANTISED, ids=[case[0] for case in QUANTISED])
def test_formats_that_are_not_known_are_refused_by_name(tmp_path, said, config, beside, dtype):
    base = base_of(SPEC, "apart")
    stem = "model.layers.0.mlp.experts.1.up_proj"
    if dtype is not None:
        base.tensors[f"{stem}.weight"] = torch.zeros(SPEC.I, SPEC.H).to(dtype)
    elif beside is not None:
        base.tensors.pop(f"{stem}.weight")
    if beside is not None:
        base.tensors[beside.format(stem)] = torch.zeros(4)
    more = {} if config is None else {"quantization_config": config}
    source, _ = adapter(tmp_path / "in", SPEC)
    refused(tmp_path, write(tmp_path / "base", base, **more), source, said)


def test_hostile_bases(tmp_path):
    source, _ = adapter(tmp_path / "in", SPEC)
    base = base_of(SPEC, "fp8 apart")
    folder = write(tmp_path / "base", base, shards=3)
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "away")
    refused(tmp_path, folder, source, "no such file", AdapterFileError)
    (tmp_path / "away").rename(folder / "model-00002-of-00003.safetensors")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"\xff" * 64)
    refused(tmp_path, folder, source, "no complete safetensors", AdapterFileError)
    turned = base_of(SPEC, "apart")
    turned.tensors["model.layers.1.mlp.experts.1.down_proj.weight"] = torch.zeros(SPEC.I, SPEC.H)
    refused(tmp_path, write(tmp_path / "turned", turned), source, r"\(64, 32\) was needed", AdapterFileError)
    name = "model.layers.1.mlp.experts.1.down_proj.weight_scale_inv"
    wrong = base_of(SPEC, "fp8 apart")
    wrong.tensors[name] = torch.ones(1, 1)
    refused(tmp_path, write(tmp_path / "scale", wrong), source, r"blocks of \(16, 24\)", AdapterFileError)
    wrong.config["quantization_config"] = FP8 | {"weight_block_size": [0, "x"]}
    refused(tmp_path, write(tmp_path / "block", wrong), source, "weight_block_size", AdapterFileError)
    huge = base_of(SPEC, "fp8 apart")
    huge.config["quantization_config"] = FP8 | {"weight_block_size": [10**9, 10**9]}
    refused(tmp_path, write(tmp_path / "huge", huge), source, "blocks of", AdapterFileError)
    for name in [name for name in huge.tensors if name.endswith("_scale_inv")]:
        huge.tensors[name] = torch.ones(1, 1)
    with allocating_at_most(2**28):
        merge_adapter(write(tmp_path / "one", huge), source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    nan = base_of(SPEC, "apart")
    nan.tensors["model.layers.1.mlp.experts.1.down_proj.weight"][0, 0] = torch.nan
    refused(tmp_path, write(tmp_path / "nan", nan), source, "not finite", AdapterFileError)
    whole = base_of(SPEC, "fp8 apart")
    for number, said in enumerate(("fp8", ["fp8"], 1, {"quant_method": ["fp8"]})):
        folder = write(tmp_path / f"said{number}", whole, quantization_config=said)
        refused(tmp_path, folder, source, r"quantization_config|quantised by \['fp8'\]")
    said_nothing = write(tmp_path / "null", whole, quantization_config=None)
    refused(tmp_path, said_nothing, source, "blocks of", AdapterFileError)
    for number, dtype in enumerate((torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64)):
        name = "model.layers.1.mlp.experts.1.down_proj.weight_scale_inv"
        of_dtype = {**whole.tensors, name: whole.tensors[name].to(dtype)}
        folder = write(tmp_path / f"dtype{number}", replace(whole, tensors=of_dtype))
        refused(tmp_path, folder, source, "scales of FP8", AdapterFileError)
    name = "model.layers.1.self_attn.q_proj.weight"
    flat = replace(whole, tensors={**whole.tensors, name: whole.tensors[name].reshape(-1)})
    refused(tmp_path, write(tmp_path / "flat", flat), source, "without .*_scale_inv|was needed")
    for bad in (tmp_path / "nothing", tmp_path / "away", source):
        refused(tmp_path, bad, source, "config.json|no folder|was needed", AdapterFileError)
    half = base_of(SPEC, "apart", torch.float16)
    half.tensors["model.layers.1.mlp.experts.1.down_proj.weight"][:] = 65504
    large, _ = adapter(tmp_path / "large", SPEC, scale=1000)
    refused(tmp_path, write(tmp_path / "half", half), large, "wider dtype")


def test_an_adapter_beside_the_base_is_left_out_and_said(tmp_path):
    folder, (source, _) = write(tmp_path / "base", base_of(SPEC, "apart")), adapter(tmp_path / "in", SPEC)
    assert not merge_adapter(folder, source, tmp_path / "alone").left_adapter
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shown = CliRunner().invoke(app, ["merge", str(folder), str(source), str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert "An adapter lay beside the base" in shown.output
    ours, alone = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("out", "alone"))
    assert ours == alone
    with pytest.raises(AdapterFileError, match="BASE comes first"):
        merge_adapter(source, folder, tmp_path / "exchanged")


def test_nothing_is_overwritten_and_weights_in_other_forms_are_left_out(tmp_path):
    folder = write(tmp_path / "base", base_of(SPEC, "apart"))
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "old.safetensors"):
        (folder / name).write_bytes(b"weights")
    source, _ = adapter(tmp_path / "in", SPEC)
    calls = []
    merge_adapter(folder, source, tmp_path / "out", progress=lambda *numbers: calls.append(numbers))
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == {"config.json", "tokenizer.json", "model.safetensors", "original/params.json"}
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    for out in (tmp_path / "out", folder, folder / "inside"):
        with pytest.raises(AdapterError, match="exists already|lies inside|is the input"):
            merge_adapter(folder, source, out)


@pytest.mark.parametrize("name", ["tokenizer.json", "original/params.json", "model.safetensors", "config.json"])
def test_a_link_to_outside_of_the_base_is_not_followed(tmp_path, name):
    """As a shard is not, and as those into the blobs of a Hub cache are."""
    source, _ = adapter(tmp_path / "in", SPEC)
    snapshot, blobs = tmp_path / "models--X" / "snapshots" / "abc", tmp_path / "models--X" / "blobs"
    snapshot.parent.mkdir(parents=True)
    folder = write(snapshot, base_of(SPEC, "apart"))
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    content = link.read_bytes() if link.exists() else b"{}"
    for place in (blobs, tmp_path / "secrets"):
        place.mkdir()
        (place / "file").write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(os.path.relpath(place / "file", link.parent)))
        if place == blobs:
            merge_adapter(folder, source, tmp_path / "fine")
            assert not (tmp_path / "fine" / name).is_symlink()
            assert name == "model.safetensors" or (tmp_path / "fine" / name).read_bytes() == content
    refused(tmp_path, folder, source, "is a link to .*secrets.file, outside of", AdapterFileError)


# VmHWM, not ru_maxrss: that one starts at the parent's own size, across fork and exec, and so may never rise.
MERGE = """
import sys
import torch
torch.set_num_threads(1)
import peft_moe_compat.adapters.merge as m
def high():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = high() if sys.platform == "linux" else 0
m.merge_adapter(*sys.argv[1:4], progress=lambda done, total: print(done, total, flush=True))
print("peak", (high() - before) // 1024 if sys.platform == "linux" else 0, flush=True)
"""


def child(folder, source, out):
    paths = os.pathsep.join([str(Path(peft_moe_compat.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PEFT_MOE_COMPAT": "0"}
    command = [sys.executable, "-c", MERGE, str(folder), str(source), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_half_way_there_is_no_output_and_the_base_is_whole(tmp_path):
    spec = replace(SPEC, H=256, I=256, E=8, layers=tuple(range(8)))
    folder = write(tmp_path / "base", base_of(spec, "apart"), shards=6)
    source, _ = adapter(tmp_path / "in", spec)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with child(folder, source, tmp_path / "out") as process:
        for line in process.stdout:
            done, total = map(int, line.split())
            if done * 2 > total:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    child(folder, source, tmp_path / "out").communicate()
    assert verify_merge(folder, source, tmp_path / "out").same


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_stays_that_of_a_few_tensors(tmp_path):
    spec = replace(SPEC, H=512, I=512, E=16, layers=tuple(range(12)))
    folder = write(tmp_path / "base", base_of(spec, "fused", torch.bfloat16))
    assert (folder / "model.safetensors").stat().st_size > 280 * 2**20
    source, _ = adapter(tmp_path / "in", spec)
    output, _ = child(folder, source, tmp_path / "out").communicate()
    assert 0 < int(output.splitlines()[-1].removeprefix("peak ")) < 100  # one tensor has 16 MiB


@pytest.mark.skipif(sys.platform != "linux", reason="names of a file there are text")
def test_paths_that_are_not_utf8(tmp_path):
    folder, out = write(tmp_path / "base", base_of(SPEC, "apart")), os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    source, _ = adapter(tmp_path / "in", SPEC)
    for command in (["merge", folder, source, out], ["verify", source, out, "--base", folder]):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output


def test_paths_may_be_text(tmp_path):
    folder = write(tmp_path / "base", base_of(SPEC, "apart"))
    source, _ = adapter(tmp_path / "in", SPEC)
    done = merge_adapter(str(folder), str(source), str(tmp_path / "out"))
    assert done.out == Path(tmp_path / "out")
    assert json.loads(json.dumps(done.to_dict()))["schema_version"] == 1
