"""Models whose experts are quantised as bitsandbytes, torchao and transformers do it."""

from __future__ import annotations

import types
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from support import zoo
from torch import nn
from torch.nn.utils import parametrize
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8

import peft_moe_compat
from peft_moe_compat.quantising.mxfp4 import hold_packed

from . import models

H, I = 64, 128  # bitsandbytes' blocks: with AVX-512 it dequantises rows of 16, 32 or 48 wrongly
BLOCK = (32, 32)
PROJECTIONS = ("gate_up_proj", "down_proj")


class Int8(nn.Module):
    """bitsandbytes' row-wise int8 as a parametrization; bitsandbytes has none of its own for 8 bits."""

    def __init__(self, scales):
        super().__init__()
        self.register_buffer("scales", scales)

    def forward(self, packed):
        rows = packed.reshape(-1, packed.shape[-1])
        return bnb.int8_vectorwise_dequant(rows, self.scales).view(packed.shape)


def to_bnb4(quant_type):
    def quantise(model):
        for experts in experts_of(model):
            for name in PROJECTIONS:
                replace_parameter_4bit(experts, name, quant_type=quant_type)

    return quantise


def to_int8(model):
    for experts in experts_of(model):
        for name in PROJECTIONS:
            weight = experts._parameters[name].detach()
            packed, scales, _ = bnb.int8_vectorwise_quant(weight.reshape(-1, weight.shape[-1]).half())
            setattr(experts, name, nn.Parameter(packed.view(weight.shape), requires_grad=False))
            parametrize.register_parametrization(experts, name, Int8(scales), unsafe=True)


def to_packed(experts, **options):
    return lambda model: peft_moe_compat.quantize_experts(model, experts, **options)


def to_torchao(config):
    def quantise(model):
        for experts in experts_of(model):
            quantize_(experts, FqnToConfig({name: config() for name in PROJECTIONS}), filter_fn=None)

    return quantise


def to_fp8(model):
    """As the loader does it: the experts replaced on the meta device, then filled with what it computes of a weight."""
    plain = {n: m for n, m in model.named_modules() if n.endswith(".experts")}
    config = FineGrainedFP8Config(weight_block_size=BLOCK)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    finegrained_fp8.replace_with_fp8_linear(model, others, config)
    quantiser = finegrained_fp8.Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    for path, experts in plain.items():
        fp8 = model.get_submodule(path)
        assert isinstance(fp8, finegrained_fp8.FP8Experts)
        for name in PROJECTIONS:
            for key, value in quantiser.convert({name: experts._parameters[name].detach()}).items():
                assert fp8._parameters[key].shape == value.shape
                fp8._parameters[key] = nn.Parameter(value, requires_grad=False)


def to_mxfp4(model):
    """Every weight to the nearest of 16 numbers, times the least power of two that reaches a block's largest."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for experts in experts_of(model):
        for name in PROJECTIONS:
            weight = experts._parameters[name].detach().transpose(1, 2)
            rows = weight.unflatten(-1, (-1, 32))
            power = (rows.abs().amax(-1) / 6).log2().ceil()
            codes = (rows.unsqueeze(-1) / 2 ** power[..., None, None] - numbers).abs().argmin(-1).to(torch.uint8)
            hold_packed(experts, name)
            held = experts.parametrizations[name]
            held.original.data.copy_(codes[..., ::2] | codes[..., 1::2] << 4)
            held[0].scales.copy_(power + 127)


QUANTISE = {
    "bnb nf4": to_bnb4("nf4"),
    "bnb fp4": to_packed("fp4", double_quant=True),
    "bnb int8": to_packed("int8"),
    "parametrised by Int8": to_int8,
    "torchao Int8Tensor": to_torchao(Int8WeightOnlyConfig),
    "torchao Float8Tensor": to_torchao(Float8WeightOnlyConfig),
    "fp8 (fine-grained)": to_fp8,
    "mxfp4": to_mxfp4,
}


def family_of(stored: str) -> str:
    """What a format is tried on: nothing but gpt-oss is published in MXFP4."""
    return "gpt_oss" if stored == "mxfp4" else "qwen3_moe"


def experts_of(model):
    """By name; at least one."""
    found = [m for n, m in model.named_modules() if n.endswith(".experts") and not hasattr(m, "lora_A")]
    assert found
    return found


def experts_at_the_bottom(model):
    """Below their wrappers, if there are any; at least one."""
    found = [
        m for m in model.modules() if not hasattr(m, "lora_A") and hasattr(m, "down_proj") and hasattr(m, "_apply_gate")
    ]
    assert found
    return found


def base_model(stored: str) -> Any:
    family = family_of(stored)
    sizes = {"intermediate_size": I} if family == "gpt_oss" else {"moe_intermediate_size": I}
    model = models.base_model(family, hidden_size=H, **sizes)
    if stored:
        QUANTISE[stored](model)
    return model


def lora_model(stored: str) -> Any:
    return zoo.peft_model(base_model(stored), target_modules=["q_proj", "v_proj"])
