"""The fused layer as operators for torch.compile; apart, because registering them imports triton where it is.

What the backward needs of the forward are outputs of the operator, so that nothing but them and its inputs is kept.
The routed rows are sorted again there, which costs less than keeping the tables in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .fused import Activation

__all__ = ["experts"]


def _padded(rank: int) -> int:
    """As `kernels.common.padded_rank`, which is not imported to trace a graph."""
    return max(16, 1 << (rank - 1).bit_length())


def _parts(tensors: Any, scalars: Any) -> tuple[Any, Any, Any]:
    from .kernels.layer import Layer, Loras, Weights

    up_scaling, down_scaling, *activation = scalars
    return Layer(Activation(*activation), up_scaling, down_scaling), Weights(*tensors[:4]), Loras(*tensors[4:])


@torch.library.custom_op("peft_moe_compat::experts_inference", mutates_args=())
def _inference(
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
    from .kernels.layer import fused_experts

    tensors = up, up_bias, down, down_bias, up_A, up_B, down_A, down_B
    parts = _parts(tensors, (up_scaling, down_scaling, name, gated, interleaved, alpha, limit))
    with torch.no_grad(), backends.on_device(hidden.device):
        return fused_experts(parts[0], hidden, index, weights, *parts[1:])


@_inference.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("peft_moe_compat::experts_training", mutates_args=())
def _training(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, and `Passed`: the up projection's rows, and its and the down projection's products with lora_A)."""
    from .kernels.layer import forward_pass, routing

    tensors = up, up_bias, down, down_bias, up_A, up_B, down_A, down_B
    layer, W, loras = _parts(tensors, (up_scaling, down_scaling, name, gated, interleaved, alpha, limit))
    hidden, weights = hidden.contiguous(), weights.contiguous()
    with backends.on_device(hidden.device):
        out, passed, _ = forward_pass(layer, hidden, weights, routing(index, W), W, loras)
    low_up, low_down = (hidden.new_empty(0) if low is None else low for low in passed[1:])
    return out, passed.up, low_up, low_down


@_training.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, up, S = inputs[0], inputs[3], inputs[1].numel()
    low_up, low_down = (up.new_empty(0) if A is None else up.new_empty(S, _padded(A.shape[1])) for A in inputs[7:11:2])
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return out, up.new_empty(S, up.shape[2]), low_up, low_down


@torch.library.custom_op("peft_moe_compat::experts_training_backward", mutates_args=())
def _backward(
    dout: Tensor,
    passed_up: Tensor,
    low_up: Tensor,
    low_down: Tensor,
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
) -> list[Tensor]:
    """Gradients of the hidden states, the routing weights and the factors that are there."""
    from .kernels.factors import packed
    from .kernels.layer import Passed, backward_pass, routing

    tensors = up, up_bias, down, down_bias, up_A, up_B, down_A, down_B
    layer, W, loras = _parts(tensors, (up_scaling, down_scaling, name, gated, interleaved, alpha, limit))
    hidden, weights = hidden.contiguous(), weights.contiguous()
    # The backward overwrites the up projection's rows, which the graph may still hold.
    passed = Passed(passed_up.clone(), None if up_A is None else low_up, None if down_A is None else low_down)
    with torch.no_grad(), backends.on_device(hidden.device):
        wanted = loras.factors(layer)
        factors = tuple(packed(f, up.dtype, index.numel()) if i in (1, 3) else f for i, f in enumerate(wanted))
        found = backward_pass(layer, dout, hidden, weights, routing(index, W), passed, factors, W, wanted, True)
    return [gradient.contiguous() for gradient in found if gradient is not None]


@_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    hidden, weights = inputs[4], inputs[6]
    of = [hidden, weights, *(factor for factor in inputs[11:15] if factor is not None)]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in of]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:11], *output[1:])
    ctx.scalars = inputs[11:]


def _differentiate(ctx: Any, dout: Tensor, *_: object) -> tuple[Any, ...]:
    *inputs, passed_up, low_up, low_down = ctx.saved_tensors
    dhidden, dweights, *found = _backward(dout, passed_up, low_up, low_down, *inputs, *ctx.scalars)
    of_factors = iter(found)
    factors = [None if factor is None else next(of_factors) for factor in inputs[7:]]
    return dhidden, None, dweights, None, None, None, None, *factors, *[None] * len(ctx.scalars)


_training.register_autograd(_differentiate, setup_context=_setup)


def experts(trains: bool, *arguments: Any) -> Tensor:
    """The layer's output, differentiable in hidden states, routing weights and LoRA factors where it `trains`.

    Args:
        arguments: hidden "T H", index and weights "T k"; up weight and bias, down weight and bias; lora_A and lora_B of
            both; their scalings; the fields of an `Activation`.
    """
    if not trains:
        return _inference(*arguments)  # type: ignore[no-any-return]
    out: Tensor = _training(*arguments)[0]
    return out
