"""How expert weights are stored, and how each format is read: one row of `FORMATS` for every one but plain parameters.

A quantised stack is dequantised where it is used, once in the forward and once in the backward, and never kept in
between: only its packed form outlives a product. The LoRA factors never go through it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeftMoeCompatError
from ..families import PACKED_CLASSES
from ..reasons import Reason, because
from .decoders import DECODERS
from .packed import FLOAT8, INT8, Codec, PackedWeight

__all__ = [
    "FORMATS",
    "FP8_MODULE",
    "Format",
    "format_of",
    "held_as",
    "is_plain",
    "packed",
    "read",
    "read_packed",
    "refuse_leftovers",
    "stored_format",
    "unreadable_reason",
]

FP8_MODULE = "transformers.integrations.finegrained_fp8"
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Format:
    """A stored format. What each method is asked of a parameter holds for one that the format `holds`.

    Attributes:
        name: What `report` calls it, where it has one name.
        refused: Why this library can read none of it.
        caveat: What is wrong with PEFT's own forward on it, as measured on PEFT 0.20.0 and 0.21.2.
    """

    name = ""
    refused: Reason | None = None
    caveat: Reason | None = None

    def holds(self, module: nn.Module, name: str) -> bool:
        """Whether a module's parameter of that name is stored so."""
        raise NotImplementedError

    def label(self, module: nn.Module, name: str) -> str:
        """What `report` calls it."""
        return self.name

    def unreadable(self, module: nn.Module, name: str) -> Reason | None:
        """Why this library cannot read it."""
        return self.refused

    def read(self, module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor:
        """The weight as stored, dequantised. See `read`."""
        return getattr(module, name)  # type: ignore[no-any-return]

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...] | None:
        """Its shape, where that is known without dequantising."""
        return None

    def packed(self, module: nn.Module, name: str, dtype: torch.dtype) -> PackedWeight | None:
        """Its packed form for the fused kernels, read as "E d1 d2" stored; None for what they do not decode. See
        `packed`."""
        return None


class Packed(Format):
    """MXFP4 (gpt-oss): objects of a kernel library in the place of the parameters."""

    name = "mxfp4"
    refused = because("mxfp4")

    def holds(self, module: nn.Module, name: str) -> bool:
        return type(module).__name__ in PACKED_CLASSES


class Parametrised(Format):
    """bitsandbytes 4-bit, uint8 under `torch.nn.utils.parametrize`, and whatever else is parametrised."""

    caveat = because("peft_and_parametrised")

    def holds(self, module: nn.Module, name: str) -> bool:
        return _parametrizations(module, name) is not None

    def label(self, module: nn.Module, name: str) -> str:
        first = _parametrizations(module, name)[0]
        quant_type = getattr(getattr(first, "quant_state", None), "quant_type", None)
        named: str = getattr(first, "stored_format", f"parametrised by {type(first).__name__}")
        return f"bnb {quant_type}" if quant_type else named

    def read(self, module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor:
        # Past parametrize's cache, which would keep the copy until the module's forward ends.
        return _parametrizations(module, name)()  # type: ignore[no-any-return]

    def shape(self, module: nn.Module, name: str) -> tuple[int, ...] | None:
        first = _parametrizations(module, name)[0]
        shape = getattr(getattr(first, "quant_state", first), "shape", None)
        return None if shape is None else tuple(shape)

    def packed(self, module: nn.Module, name: str, dtype: torch.dtype) -> PackedWeight | None:
        parametrizations = _parametrizations(module, name)
        cls = type(parametrizations[0])
        of = DECODERS.get((cls.__module__, cls.__name__)) if len(parametrizations) == 1 else None
        return None if of is None else of(parametrizations.original, parametrizations[0])


class TorchAO(Format):
    """torchao: a tensor subclass, "E d1 d2" in the model's dtype."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        return type(weight) is not nn.Parameter and _descends_from(type(weight), "torchao.utils", "TorchAOBaseTensor")

    def label(self, module: nn.Module, name: str) -> str:
        return f"torchao {type(module._parameters[name]).__name__}"

    def read(self, module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor:
        weight: Any = getattr(module, name)
        return weight.dequantize()  # type: ignore[no-any-return]

    def packed(self, module: nn.Module, name: str, dtype: torch.dtype) -> PackedWeight | None:
        weight: Any = module._parameters[name]
        kinds = {"Int8Tensor": (INT8, torch.int8), "Float8Tensor": (FLOAT8, torch.float8_e4m3fn)}
        kind, dtype_of_data = kinds.get(type(weight).__name__, (None, None))
        if kind is None or getattr(weight, "act_pre_scale", None) is not None:
            return None
        data, scale, shape = weight.qdata, weight.scale, tuple(weight.shape)
        zeros = getattr(weight, "zero_point", None)
        of_blocks = scale.ndim == 3 and scale.shape[0] == shape[0] and (zeros is None or zeros.shape == scale.shape)
        if data.dtype != dtype_of_data or not of_blocks or any(map(operator.mod, shape, scale.shape)):
            return None
        height, width = map(operator.floordiv, shape[1:], scale.shape[1:])
        codec = Codec(kind, height=height, width=width, zeros=zeros is not None)
        return PackedWeight(codec, weight.dtype, shape, True, data, scale, None, zeros)


class FineGrained(Format):
    """transformers' fine-grained FP8: float8 "E out in", and a `_scale_inv` for each block or expert."""

    name = "fp8 (fine-grained)"
    caveat = because("peft_and_fp8")

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        return (
            weight is not None and _is_fp8_experts(module) and weight.dtype.itemsize == 1 and weight.is_floating_point()
        )

    def unreadable(self, module: nn.Module, name: str) -> Reason | None:
        weight, scale = module._parameters[name], module._parameters.get(f"{name}_scale_inv")
        found = None if scale is None else tuple(scale.shape)
        expected = _scale_shape(weight, _block(weight, scale, module.block_size))  # type: ignore[arg-type]
        return None if found == expected else because("scale_shape", name, found, expected, str(module.block_size))

    def read(self, module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor:
        dtype = like if isinstance(like, torch.dtype) else _compute_dtype(like)
        weight: Tensor = getattr(module, name)
        return _dequantised_fp8(weight.detach(), getattr(module, f"{name}_scale_inv"), module.block_size, dtype)

    def packed(self, module: nn.Module, name: str, dtype: torch.dtype) -> PackedWeight | None:
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        if weight.dtype != torch.float8_e4m3fn or not scale.is_floating_point():
            return None
        height, width = _block(weight, scale, module.block_size)
        codec = Codec(FLOAT8, height=height, width=width)
        return PackedWeight(codec, dtype, tuple(weight.shape), True, weight, scale)


class FineGrainedFP4(Format):
    """The same classes of transformers with two 4-bit numbers to a byte."""

    name = "fp4 (fine-grained)"
    refused = because("fp4_packed")

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        return weight is not None and _is_fp8_experts(module) and weight.dtype.itemsize == 1


class OtherDtype(Format):
    """Whatever has fewer than 16 bits or is no floating-point number, without a word on how to read it."""

    def holds(self, module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        return weight is not None and not (weight.dtype.is_floating_point and weight.dtype.itemsize >= 2)

    def label(self, module: nn.Module, name: str) -> str:
        return str(module._parameters[name].dtype).removeprefix("torch.")  # type: ignore[union-attr]

    def unreadable(self, module: nn.Module, name: str) -> Reason | None:
        return because("stored_as", str(module._parameters[name].dtype))  # type: ignore[union-attr]


# The first that holds a parameter is the one.
FORMATS: tuple[Format, ...] = (Packed(), Parametrised(), TorchAO(), FineGrained(), FineGrainedFP4(), OtherDtype())


def _parametrizations(module: nn.Module, name: str) -> Any:
    """The `ParametrizationList` of a parametrised weight, None for any other."""
    lists: Any = module._modules.get("parametrizations")
    return lists[name] if lists is not None and name in lists else None


def _descends_from(cls: type, module: str, name: str) -> bool:
    """By name, since a lookup in `sys.modules` would let torch.compile start over whenever something is imported."""
    return any(base.__name__ == name and base.__module__ == module for base in cls.__mro__)


def _is_fp8_experts(module: nn.Module) -> bool:
    return _descends_from(type(module), FP8_MODULE, "FP8Experts")


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a weight is an ordinary floating-point parameter, as most are: one quick answer to all questions here."""
    weight = module._parameters.get(name)
    return type(weight) is nn.Parameter and weight.dtype in _PLAIN and type(module).__name__ not in PACKED_CLASSES


def format_of(module: nn.Module, name: str) -> Format | None:
    """The row of `FORMATS` for a parameter; None for a plain one, and for what is computed at each access.

    Args:
        module: The experts module, not a PEFT wrapper around it.
        name: Of the parameter.
    """
    if is_plain(module, name):
        return None
    return next((row for row in FORMATS if row.holds(module, name)), None)


def stored_format(module: nn.Module, name: str) -> str:
    """What a weight is quantised to: "bnb nf4", "torchao Int8Tensor", "fp8 (fine-grained)"; empty where it is not."""
    row = format_of(module, name)
    return "" if row is None else row.label(module, name)


def packed(module: nn.Module, name: str, like: Tensor | torch.dtype) -> PackedWeight | None:
    """The packed form of a quantised weight, read as "E d1 d2" stored; None for one that is decoded by `read` alone.

    Args:
        like: See `read`.
    """
    row = format_of(module, name)
    if row is None or row.unreadable(module, name):
        return None
    found = row.packed(module, name, like if isinstance(like, torch.dtype) else _compute_dtype(like))
    return found if found is not None and found.is_decodable else None


def unreadable_reason(module: nn.Module, name: str) -> Reason | None:
    """Why a weight cannot be read by this library; None where it can be."""
    row = format_of(module, name)
    return None if row is None else row.unreadable(module, name)


def held_as(module: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The parameters that a weight is made of: itself, or what its parametrization keeps in its place."""
    parametrized = _parametrizations(module, name)
    held = (module._parameters.get(name),) if parametrized is None else tuple(parametrized._parameters.values())
    return tuple(parameter for parameter in held if parameter is not None)


def refuse_leftovers(module: nn.Module, name: str) -> None:
    """Raises where PEFT's own forward has left its update on a parametrised weight, which would then count twice.

    PEFT 0.21.0 to 0.21.2 do so (`ParamWrapper._remove_parametrizations` knows one of its two proxies).
    """
    parametrizations = _parametrizations(module, name)
    if parametrizations is None:
        return
    if left := [type(p).__name__ for p in parametrizations if type(p).__module__.startswith("peft.")]:
        raise PeftMoeCompatError(
            f"PEFT's own forward left {len(left)} {left[0]} on {type(module).__name__}.{name}, so its update would be "
            "added at every forward. Load the model again, and keep peft_moe_compat active from its first forward on."
        )


def _scale_shape(weight: Tensor, block: tuple[int, int] | None) -> tuple[int, int, int]:
    """Of the scales of an FP8 stack: one per block, or per expert where there are no blocks."""
    E, rows, columns = weight.shape
    return (E, 1, 1) if block is None else (E, -(-rows // block[0]), -(-columns // block[1]))


def _block(weight: Tensor, scale: Tensor | None, block_size: Any) -> tuple[int, int]:
    """Rows and columns of an expert that share a scale.

    transformers keeps a row of scales for the gate and one for the up where a block would hold both.
    """
    rows, columns = weight.shape[1:]
    height, width = (rows, columns) if block_size is None else block_size
    halves = scale is not None and scale.ndim == 3 and scale.shape[1] == 2 and height >= rows and rows % 2 == 0
    return (rows // 2 if halves else height), width


def _dequantised_fp8(weight: Tensor, scale: Tensor, block_size: Any, dtype: torch.dtype) -> Tensor:
    """weight "E out in" in float8, scale "E out/b in/b": their product, rounded once to `dtype`."""
    (rows, columns), (height, width) = weight.shape[1:], _block(weight, scale, block_size)
    out, scale = weight.to(dtype), scale.float()  # float8_e4m3fn is exact in every wider type
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

    Args:
        module: The experts module.
        name: Of the parameter.
        like: What to dequantise to where the format has no dtype of its own (FP8): a dtype, or the hidden states, whose
            dtype it is unless autocast is on.
    """
    if is_plain(module, name):
        return module._parameters[name]  # type: ignore[return-value]  # by its key, at which ZeRO-3 gathers it
    row = format_of(module, name)
    return getattr(module, name) if row is None else row.read(module, name, like)


def read_packed(module: nn.Module, name: str, like: Tensor | torch.dtype) -> Tensor | PackedWeight:
    """What the fused kernels read: the packed form where they decode it, else as `read` gives it."""
    found = packed(module, name, like)
    return read(module, name, like) if found is None else found
