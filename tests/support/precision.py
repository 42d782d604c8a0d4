"""How far the output and the effect of LoRA are from float64, ours and stock PEFT's."""

from __future__ import annotations

import copy

import torch
from torch import nn

import peft_moe_compat
from support import zoo


def low_precision(dtype, lora_std, found, stock, projections=slice(None), device="cpu"):
    """(output error, effect error) against float64, ours and stock: norms relative to the exact ones."""
    E, T, H, I, r = 8, 256, 256, 128, 16
    experts = resized(found, E, H, I).to(dtype)
    targets = [f"experts.{n}" for n in peft_moe_compat.model.experts.projections(experts)][projections]
    holder = zoo.wrap(experts, targets, r=r)
    for name, parameter in holder.named_parameters():
        if "lora_" in name:  # PEFT keeps trainable LoRA in float32 over a bfloat16 base
            parameter.data = parameter.data.float()
            nn.init.normal_(parameter, std=lora_std if "lora_B" in name else H**-0.5)
    index, weights = zoo.routing(E, T, 2)
    given = {"hidden_states": torch.randn(T, H), "top_k_index": index, "top_k_weights": weights}
    given = {n: (v.to(dtype) if v.is_floating_point() else v).to(device) for n, v in given.items()}
    holder.to(device)

    def run(module, values):
        return module(*values.values()).detach().double()

    base = run(experts, given)
    ours, theirs = run(holder["experts"], given), stock(run, holder["experts"], given)
    exact = copy.deepcopy(holder["experts"]).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    in_double = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    reference = stock(run, exact, in_double)
    effect = reference - run(exact.get_base_layer(), in_double)

    def relative(found, expected):
        return ((found - expected).norm() / expected.norm()).item()

    return [(relative(o, reference), relative(o - base, effect)) for o in (ours, theirs)]


def resized(found, E, H, I):
    sizes = zoo.E, zoo.H
    zoo.E, zoo.H = E, H
    try:
        experts = zoo.build(found, I)
    finally:
        zoo.E, zoo.H = sizes
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


LOW = [c for c in zoo.DECORATED if c.package in ("qwen3_moe", "nemotron_h", "gpt_oss")]
