"""The fused forward as one operator for torch.compile; apart, because registering it imports triton where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .fused import Activation

__all__ = ["experts_inference"]


@torch.library.custom_op("peft_moe_compat::experts_inference", mutates_args=())
def experts_inference(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up_A: Tensor | None,
    up_B: Tensor | None,
    down_A: Tensor | None,
    down_B: Tensor | None,
    up_scaling: float,
    down_scaling: float,
    name: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    from .kernels.layer import Layer, Loras, Weights, fused_experts

    layer = Layer(Activation(name, gated, interleaved, alpha, limit), up_scaling, down_scaling)
    base, loras = Weights(up, up_bias, down, down_bias), Loras(up_A, up_B, down_A, down_B)
    with torch.no_grad(), backends.on_device(hidden.device):
        return fused_experts(layer, hidden, index, weights, base, loras)


@experts_inference.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)
