"""The fused layer as operators for torch.compile. Imports triton, so it is itself imported where the kernels run.

What the backward needs of the forward are outputs of the operator, so that nothing but them and its inputs is kept.
The routed rows are sorted again there, which costs less than keeping the tables in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import Factor
from ..model.packed import Codec, PackedWeight
from .kernels.interface import HeldProjection, Nonlinearity, on_device, padded_rank
from .kernels.layer import Passed, Projection, backward_pass, forward_pass, fused_experts, routing

__all__ = ["experts"]


# What all three take: the base, of packed stacks their bytes; the tensors of the factors, and what else is in each; the
# other tensors of packed stacks, and what else is in those; the fields of `Nonlinearity`.
_OTHERS = PackedWeight._fields[5:]
_TENSORS = (
    "Tensor hidden, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "Tensor? up_A, Tensor? up_B, Tensor? down_A, Tensor? down_B, "
) + ", ".join(f"Tensor? {of}_{name}" for of in ("up", "down") for name in _OTHERS)
_SCALARS = (
    "SymInt[] places, float[] scalings, int[] up_form, int[] down_form, ScalarType dtype, "
    "str name, bool gated, bool interleaved, float alpha, float limit"
)
_FACTORS, _PACKED, _NO_OTHERS = slice(7, 11), 11, (None,) * len(_OTHERS)
_NUM_TENSORS = _PACKED + 2 * len(_OTHERS)


def _form(weight: Tensor | PackedWeight) -> list[int]:
    """What is no tensor of a packed stack, its dtype aside; nothing of a plain one."""
    if not isinstance(weight, PackedWeight):
        return []
    return [int(number) for number in (*weight.codec, *weight.stored, weight.rows_are_in)]


def _weight(data: Tensor, others: tuple[Any, ...], form: list[int], dtype: torch.dtype) -> Any:
    """The inverse of `_form`, with the tensors."""
    if not form:
        return data
    fields, (E, rows, columns, rows_are_in) = form[:-4], form[-4:]
    return PackedWeight(Codec._make(fields), dtype, (E, rows, columns), bool(rows_are_in), data, *others)


def _parts(inputs: tuple[Any, ...]) -> tuple[Nonlinearity, Tensor, Tensor, Tensor, Any, Any]:
    """The nonlinearity, hidden, index, weights, and `Projection` up and down."""
    hidden, index, weights, of_up, up_bias, of_down, down_bias = inputs[:7]
    places, scalings, up_form, down_form, dtype, *nonlinearity = inputs[_NUM_TENSORS:]
    factors: list[Any] = [
        None if tensor is None else Factor(tensor, *places[4 * i : 4 * i + 4], scalings[i])  # type: ignore[call-arg]
        for i, tensor in enumerate(inputs[_FACTORS])
    ]
    between = _PACKED + len(_OTHERS)
    up_stack = _weight(of_up, inputs[_PACKED:between], up_form, dtype)
    down_stack = _weight(of_down, inputs[between:_NUM_TENSORS], down_form, dtype)
    up, down = Projection(up_stack, up_bias, *factors[:2]), Projection(down_stack, down_bias, *factors[2:])
    return Nonlinearity(*nonlinearity), hidden.contiguous(), index, weights.contiguous(), up, down


@torch.library.custom_op(
    "peft_moe_compat::experts_inference", mutates_args=(), schema=f"({_TENSORS}, {_SCALARS}) -> Tensor"
)
def _inference(*inputs: Any) -> Tensor:
    nonlinearity, hidden, index, weights, up, down = _parts(inputs)
    with torch.no_grad(), on_device(hidden.device):
        return fused_experts(nonlinearity, hidden, index, weights, up, lambda: down)


@_inference.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "peft_moe_compat::experts_training",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _training(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, and `Passed`: the up projection's rows, and its and the down projection's products with lora_A)."""
    nonlinearity, hidden, index, weights, up, down = _parts(inputs)
    with on_device(hidden.device):
        where = routing(index, up.weight.shape[0])
        out, passed, _, _ = forward_pass(nonlinearity, hidden, weights, where, up, lambda: down)
    low_up, low_down = (hidden.new_empty(0) if low is None else low for low in passed[1:])
    return out, passed.up, low_up, low_down


@_training.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, hidden, index, _, up, down = _parts(inputs)
    S, dtype = index.numel(), up.weight.dtype
    low_up, low_down = (
        hidden.new_empty(0) if of.A is None else hidden.new_empty(S, padded_rank(of.A.rank), dtype=dtype)
        for of in (up, down)
    )
    out = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
    return out, hidden.new_empty(S, up.weight.shape[2], dtype=dtype), low_up, low_down


@torch.library.custom_op(
    "peft_moe_compat::experts_training_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor passed_up, Tensor low_up, Tensor low_down, {_TENSORS}, {_SCALARS}) -> Tensor[]",
)
def _backward(dout: Tensor, passed_up: Tensor, low_up: Tensor, low_down: Tensor, *inputs: Any) -> list[Tensor]:
    """Gradients of the hidden states, the routing weights and the factors that are there."""
    nonlinearity, hidden, index, weights, up, down = _parts(inputs)
    # The backward overwrites the up projection's rows, which the graph may still hold.
    passed = Passed(passed_up.clone(), None if up.A is None else low_up, None if down.A is None else low_down)
    wanted = up.A, up.B, down.A, down.B
    with torch.no_grad(), on_device(hidden.device):
        where, (up, down) = routing(index, up.weight.shape[0]), (p.ready(index.numel()) for p in (up, down))
        found = backward_pass(nonlinearity, dout, hidden, weights, where, passed, up, down, wanted, True)
    return [gradient.contiguous() for gradient in found if gradient is not None]


@_backward.register_fake
def _(_dout: Tensor, _up: Tensor, _low_up: Tensor, _low_down: Tensor, *inputs: Any) -> list[Tensor]:
    of = [inputs[0], inputs[2], *(factor for factor in inputs[_FACTORS] if factor is not None)]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in of]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output[1:])
    ctx.scalars = inputs[_NUM_TENSORS:]


def _differentiate(ctx: Any, dout: Tensor, *_: object) -> tuple[Any, ...]:
    *inputs, passed_up, low_up, low_down = ctx.saved_tensors
    dhidden, dweights, *found = _backward(dout, passed_up, low_up, low_down, *inputs, *ctx.scalars)
    of_factors = iter(found)
    factors = [None if factor is None else next(of_factors) for factor in inputs[_FACTORS]]
    others = [None] * (_NUM_TENSORS - _PACKED + len(ctx.scalars))
    return dhidden, None, dweights, None, None, None, None, *factors, *others


_training.register_autograd(_differentiate, setup_context=_setup)


def experts(nonlinearity: Nonlinearity, routed: tuple[Tensor, ...], up: HeldProjection, down: HeldProjection) -> Tensor:
    """The layer's output, differentiable in hidden states, routing weights and LoRA factors where one of them trains.

    Args:
        routed: hidden "T H", index and weights "T k".
    """
    factors = [factor for _, _, lora in (up, down) for factor in (lora.factors() if lora else (None, None))]
    tensors = [None if factor is None else factor.tensor for factor in factors]
    places = [size for factor in factors for size in ((0, 0, 0, 0) if factor is None else factor[1:5])]
    scalings = [1.0 if factor is None else factor.scaling for factor in factors]
    stacks, biases = (up[0], down[0]), (up[1], down[1])
    bases = [each.data if isinstance(each, PackedWeight) else each for each in stacks]
    others = [tensor for each in stacks for tensor in (each[5:] if isinstance(each, PackedWeight) else _NO_OTHERS)]
    forms = _form(stacks[0]), _form(stacks[1]), stacks[0].dtype
    arguments = (
        *routed, bases[0], biases[0], bases[1], biases[1], *tensors, *others, places, scalings, *forms, *nonlinearity,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (routed[0], routed[2], *tensors)):
        out: Tensor = _training(*arguments)[0]
        return out
    return _inference(*arguments)  # type: ignore[no-any-return]
