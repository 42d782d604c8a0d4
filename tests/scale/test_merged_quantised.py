"""Checkpoints in FP8 blocks and MXFP4, merged and loaded by transformers, which dequantises both on a CPU."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import zoo
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import peft_moe_compat

BLOCK = (8, 8)


def fp8_checkpoint(folder, family):
    """Every linear but the router and the head by transformers' own quantiser, under the names of the Hub."""
    zoo.tiny_model(family).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if tensors[name].ndim == 2 and name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            tensors |= fp8_of(name, tensors[name])
    assert any(".experts.0." in name and name.endswith("_scale_inv") for name in tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = FineGrainedFP8Config(weight_block_size=BLOCK, modules_to_not_convert=["lm_head", "gate"]).to_dict()
    write_config(folder, {**said, "weight_block_size": list(BLOCK)})


def fp8_of(name, tensor):
    config = FineGrainedFP8Config(weight_block_size=BLOCK)
    quantiser = finegrained_fp8.Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    return quantiser.convert({name: tensor})


def mxfp4_checkpoint(folder, family):
    """Random bytes and exponents in the place of gpt_oss's experts: they are what they are."""
    zoo.tiny_model(family, hidden_size=64, intermediate_size=32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, fan_in, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, out, fan_in // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, (E, out, fan_in // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": others})


def write_config(folder, quantised):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))


def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    experts = [p for n, p in model.named_parameters() if "experts.down_proj" in n]
    assert experts
    assert {p.dtype for p in experts} == {torch.float32}
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()


def merged(tmp_path, family, write):
    """(base, PEFT's model of it, merged) as transformers loads them, and what the merge said."""
    torch.manual_seed(0)
    write(tmp_path / "base", family)
    model = zoo.peft_model(loaded(tmp_path / "base"), target_modules=["o_proj"])
    model.save_pretrained(tmp_path / "adapter")
    done = peft_moe_compat.merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    checked = peft_moe_compat.verify_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert checked.same, [row for row in checked.rows if not row.same]
    return loaded(tmp_path / "base"), model, loaded(tmp_path / "out"), done


def errors(model, expected, ids, outputs):
    """(of all weights, of the outputs), relative."""
    found = model.state_dict()
    weights = sum(float((found[name] - exact).square().sum()) for name, exact in expected.items())
    return weights**0.5, float((logits(model, ids) - outputs).norm())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral", "nemotron_h"])
def test_fp8_in_blocks_is_as_near_as_transformers_own_quantiser_comes(tmp_path, family):
    base, model, out, done = merged(tmp_path, family, fp8_checkpoint)
    ids = zoo.token_ids()
    outputs = logits(model, ids)
    expected = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    ours = errors(out, expected, ids, outputs)
    # What they make of the exact weights of every matrix that is stored so.
    usual = loaded(tmp_path / "base")
    convert = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
    updated = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, expected[name])}
    assert len(updated) == len({(row.path, row.projection) for row in done.rows})
    with torch.no_grad():
        for name, parameter in usual.named_parameters():
            if name in updated:
                weight, scale = fp8_of("a.weight", expected[name]).values()
                parameter.copy_(convert(weight, scale, torch.float32))
    theirs = errors(usual, expected, ids, outputs)
    assert ours[0] <= theirs[0] * 1.01
    assert ours[1] <= theirs[1] * 1.5
    assert ours[1] < errors(base, expected, ids, outputs)[1] / 2
    assert {row.format for row in done.rows} == {"FP8 in blocks"}


def test_mxfp4(tmp_path):
    base, model, out, done = merged(tmp_path, "gpt_oss", mxfp4_checkpoint)
    ids = zoo.token_ids()
    outputs = logits(model, ids)
    expected = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    found = out.state_dict()
    for name, exact in expected.items():
        if "experts.gate_up_proj" in name or "experts.down_proj" in name:
            if name.endswith("bias"):
                continue
            blocks = exact.transpose(1, 2).unflatten(2, (-1, 32))  # along the in-features
            error = (found[name].transpose(1, 2).unflatten(2, (-1, 32)) - blocks).abs()
            # The widest half step of a block is a quarter of its largest number.
            assert (error <= blocks.abs().amax(3, keepdim=True) / 4 * (1 + 1e-5)).all()
        else:
            torch.testing.assert_close(found[name], exact, rtol=0, atol=1e-6)
    assert {row.format for row in done.rows} == {"MXFP4", "float32"}
    assert errors(out, expected, ids, outputs)[1] < errors(base, expected, ids, outputs)[1] / 2
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    read = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    torch.testing.assert_close(read, found[name], rtol=0, atol=0)
