"""Quantised expert weights: the format a stack is held in, and how it is read.

A quantised stack is dequantised where it is used, once in the forward and once in the backward, and never kept in
between: only its packed form outlives a product. The LoRA factors never go through it.

| format                | held as                                         | read by               |
|-----------------------|-------------------------------------------------|-----------------------|
| bitsandbytes 4-bit    | uint8 under `torch.nn.utils.parametrize`        | its parametrization   |
| other parametrization | whatever it wants                               | itself                |
| torchao               | a tensor subclass, "E d1 d2" in the model dtype | its `dequantize()`    |
| fine-grained FP8      | float8 "E out in" and a `_scale_inv` per block  | `_dequantised_fp8`    |
| MXFP4 (gpt-oss)       | objects of a kernel library                     | nobody: no parameters |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftMoeCompatError
from ..families import PACKED_CLASSES

__all__ = [
    "held_as",
    "is_plain",
    "peft_caveat",
    "read",
    "refuse_leftovers",
    "stored_format",
    "stored_shape",
    "unreadable_reason",
]

FP8_MODULE = "transformers.integrations.finegrained_fp8"
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MXFP4 = "mxfp4 weights cannot be wrapped by PEFT; load the model with Mxfp4Config(dequantize=True)"


def _parametrizations(module: nn.Module, name: str) -> Any | None:
    """The `ParametrizationList` of a parametrised weight."""
    lists: Any = module._modules.get("parametrizations")
    return lists[name] if lists is not None and name in lists else None


def _descends_from(cls: type, module: str, name: str) -> bool:
    """By name, since a lookup in `sys.modules` would let torch.compile start over whenever something is imported."""
    return any(base.__name__ == name and base.__module__ == module for base in cls.__mro__)


def _is_fp8_experts(module: nn.Module) -> bool:
    return _descends_from(type(module), FP8_MODULE, "FP8Experts")


def _is_torchao(weight: Any) -> bool:
    return type(weight) is not nn.Parameter and _descends_from(type(weight), "torchao.utils", "TorchAOBaseTensor")


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a weight is an ordinary floating-point parameter, as most are: one quick answer to all questions here."""
    weight = module._parameters.get(name)
    return type(weight) is nn.Parameter and weight.dtype in _PLAIN and type(module).__name__ not in PACKED_CLASSES


def stored_format(module: nn.Module, name: str) -> str:
    """What a weight is quantised to: "bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)"; empty where it is not.

    Args:
        module: The experts module, not a PEFT wrapper around it.
        name: Of the parameter.
    """
    if is_plain(module, name):
        return ""
    if type(module).__name__ in PACKED_CLASSES:
        return "mxfp4"
    if (parametrized := _parametrizations(module, name)) is not None:
        state = getattr(parametrized[0], "quant_state", None)
        quant_type = getattr(state, "quant_type", None)
        return f"bnb {quant_type}" if quant_type else f"parametrised by {type(parametrized[0]).__name__}"
    weight = module._parameters.get(name)
    if weight is None:
        return ""
    if _is_torchao(weight):
        return f"torchao {type(weight).__name__}"
    if _is_fp8_experts(module) and weight.dtype.itemsize == 1:
        return "fp8 (fine-grained)" if weight.dtype.is_floating_point else "fp4 (fine-grained)"
    return "" if weight.dtype.is_floating_point and weight.dtype.itemsize >= 2 else str(weight.dtype)[len("torch.") :]


def unreadable_reason(module: nn.Module, name: str) -> str:
    """Why a weight cannot be read by this library; empty where it can be."""
    if is_plain(module, name):
        return ""
    if type(module).__name__ in PACKED_CLASSES:
        return _MXFP4
    weight = module._parameters.get(name)
    if weight is None or _is_torchao(weight) or (weight.dtype.is_floating_point and weight.dtype.itemsize >= 2):
        return ""
    if not _is_fp8_experts(module):
        return f"base weight is stored as {weight.dtype}"
    if not weight.dtype.is_floating_point:
        return "fp4 weights are packed two to a byte, and PEFT sizes its LoRA by the packed axis"
    expected = _scale_shape(weight, module.block_size)
    scale = module._parameters.get(f"{name}_scale_inv")
    if scale is None or tuple(scale.shape) != expected:
        found = None if scale is None else tuple(scale.shape)
        return f"{name}_scale_inv is {found}; {expected} were expected of blocks of {module.block_size}"
    return ""


def peft_caveat(stored: str) -> str:
    """What is wrong with PEFT's own forward on a format, as measured on PEFT 0.20.0 and 0.21.2; empty for none."""
    if stored.startswith(("bnb ", "parametrised ")):
        return "PEFT's own forward loses or accumulates LoRA on parametrised weights"
    if stored.startswith("fp8 "):
        return "PEFT's own forward adds the update to the float8 values, before their scales"
    return ""


def stored_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Shape of a bitsandbytes 4-bit weight, without dequantising it; None for any other."""
    parametrized = _parametrizations(module, name)
    shape = getattr(getattr(parametrized[0] if parametrized else None, "quant_state", None), "shape", None)
    return None if shape is None else tuple(shape)


def held_as(module: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The parameters that a weight is made of: itself, or what its parametrization keeps in its place."""
    parametrized = _parametrizations(module, name)
    held = (module._parameters.get(name),) if parametrized is None else tuple(parametrized._parameters.values())
    return tuple(parameter for parameter in held if parameter is not None)


def refuse_leftovers(module: nn.Module, name: str) -> None:
    """Raises where PEFT's own forward has left its update on a parametrised weight, which would then count twice.

    PEFT 0.21.0 to 0.21.2 do so (`ParamWrapper._remove_parametrizations` knows one of its two proxies).
    """
    left = [type(p).__name__ for p in _parametrizations(module, name) or () if type(p).__module__.startswith("peft.")]
    if left:
        raise PeftMoeCompatError(
            f"PEFT's own forward left {len(left)} {left[0]} on {type(module).__name__}.{name}, so its update would be "
            "added at every forward. Load the model again, and keep peft_moe_compat active from its first forward on."
        )


def _scale_shape(weight: Tensor, block_size: Any) -> tuple[int, int, int]:
    """Of the scales of an FP8 stack: one per block, or per expert where there are no blocks."""
    E, rows, columns = weight.shape
    return (E, 1, 1) if block_size is None else (E, -(-rows // block_size[0]), -(-columns // block_size[1]))


def _dequantised_fp8(weight: Tensor, scale: Tensor, block_size: Any, dtype: torch.dtype) -> Tensor:
    """weight "E out in" in float8, scale "E out/b in/b": their product, rounded once to `dtype`."""
    out, scale = weight.to(dtype), scale.float()  # float8_e4m3fn is exact in every wider type
    if block_size is None:
        return out.mul_(scale)
    (rows, columns), (height, width) = weight.shape[1:], block_size
    if rows % height or columns % width:
        scale = scale.repeat_interleave(height, 1)[:, :rows].repeat_interleave(width, 2)[..., :columns]
        return out.mul_(scale)
    out.view(-1, rows // height, height, columns // width, width).mul_(scale[:, :, None, :, None])
    return out


def _compute_dtype(hidden_states: Tensor) -> torch.dtype:
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_states.dtype


def read(module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor:
    """A weight of an experts module as stored, dequantised if need be.

    Past parametrize's cache, which would keep the copy until the module's forward ends.

    Args:
        module: The experts module.
        name: Of the parameter.
        like: What to dequantise to where the format has no dtype of its own (FP8): a dtype, or the hidden states, whose
            dtype it is unless autocast is on.
    """
    if is_plain(module, name):
        return module._parameters[name]  # type: ignore[return-value]  # by its key, at which ZeRO-3 gathers it
    if (parametrized := _parametrizations(module, name)) is not None:
        return parametrized()  # type: ignore[no-any-return]
    weight: Any = getattr(module, name)
    if _is_torchao(weight):
        return weight.dequantize()  # type: ignore[no-any-return]
    if weight.dtype.itemsize == 1 and _is_fp8_experts(module):
        dtype = like if isinstance(like, torch.dtype) else _compute_dtype(like)
        return _dequantised_fp8(weight.detach(), getattr(module, f"{name}_scale_inv"), module.block_size, dtype)
    return weight  # type: ignore[no-any-return]
