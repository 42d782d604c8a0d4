"""Packs a stack of experts by bitsandbytes' own quantisers, takes it apart for a file and puts it together again."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import LayoutError, PeftMoeCompatError
from .int8 import Int8Weight

__all__ = ["FORMATS", "Packing", "held_tensors", "need_bitsandbytes", "pack", "packed_stacks", "put_together"]

_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# Format -> the tensors that a packed stack may consist of, by the names they have in a checkpoint.
FORMATS: dict[str, tuple[str, ...]] = {
    "nf4": ("original", *_4BIT, "quant_state.bitsandbytes__nf4"),
    "fp4": ("original", *_4BIT, "quant_state.bitsandbytes__fp4"),
    "int8": ("original", "scales"),
}
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of bitsandbytes.functional.quantize_4bit
_NESTED_BLOCKSIZE = 256  # of its absmax, as quantize_4bit has it
_CHUNK = 2**20  # weights quantised at once: bitsandbytes needs some 20 bytes for each where it has no kernel


@dataclass(frozen=True)
class Packing:
    """How stacks of experts are packed; see `BitsAndBytesExpertsConfig`."""

    format: str = "nf4"
    double_quant: bool = False
    blocksize: int = 64

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise PeftMoeCompatError(f"Experts are packed as one of {', '.join(FORMATS)}, but got {self.format!r}.")
        if self.blocksize not in _BLOCKSIZES:
            raise PeftMoeCompatError(f"blocksize is {self.blocksize!r}; bitsandbytes knows {_BLOCKSIZES}.")
        if self.format == "int8" and (self.double_quant or self.blocksize != 64):
            raise PeftMoeCompatError("int8 has one scale for each row: leave out double_quant and blocksize.")

    @property
    def bytes_per_weight(self) -> float:
        """Scales included, those of int8 aside."""
        return 1.0 if self.format == "int8" else 0.5 + (1 if self.double_quant else 4) / self.blocksize


def need_bitsandbytes() -> None:
    """Raises where it is not installed: it is optional."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PeftMoeCompatError(
            "Packing experts needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.49'."
        )


def pack(experts: nn.Module, name: str, weight: Tensor, packing: Packing) -> None:
    """Puts a weight, packed, in the place of a parameter: a 4-bit one as `replace_parameter_4bit` leaves it.

    Args:
        experts: Holds the parameter.
        name: Of the parameter.
        weight: "E d1 d2" in bfloat16, float16 or float32; on the meta device what it is packed to is there too.
        packing: Into what.
    """
    if packing.format == "int8":
        packed, scales = _to_int8(weight)
        _hold_int8(experts, name, packed, scales, weight.dtype)
    elif weight.device.type == "cpu":
        packed, state = _to_4bit(weight, packing)
        _hold_4bit(experts, name, packed, state.as_dict())
    else:  # kernels, which need no memory beside the result
        experts._parameters[name] = nn.Parameter(weight, requires_grad=False)
        _bitsandbytes("nn.parametrize").replace_parameter_4bit(
            experts, name, packing.double_quant, packing.format, packing.blocksize
        )


def _bitsandbytes(module: str) -> Any:
    return importlib.import_module(f"bitsandbytes.{module}")


def _to_4bit(weight: Tensor, packing: Packing) -> tuple[Tensor, Any]:
    """`quantize_4bit`, some blocks at a time: bit-equal, since a block depends on none but itself."""
    functional = _bitsandbytes("functional")
    parts = [
        functional.quantize_4bit(part, blocksize=packing.blocksize, quant_type=packing.format)
        for part in torch.split(weight.detach().reshape(-1), _CHUNK)  # a multiple of every blocksize
    ]
    absmax, state = torch.cat([state.absmax for _, state in parts]), parts[0][1]
    state.absmax, state.shape = absmax, weight.shape
    if packing.double_quant:
        offset = absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCKSIZE)
        state.offset, state.nested = offset, True
    return torch.cat([packed for packed, _ in parts]), state


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`int8_vectorwise_quant`, some rows at a time: "E d1 d2" -> "E d1 d2" int8, "E d1" float32."""
    quantise = _bitsandbytes("functional").int8_vectorwise_quant
    rows = weight.detach().reshape(-1, weight.shape[-1])
    packed = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=weight.device)
    at_once = max(1, _CHUNK // weight.shape[-1])
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        packed[part], scales[part], _ = quantise(rows[part].half())
    if not weight.is_meta and not bool(scales.isfinite().all()):
        raise PeftMoeCompatError(
            "A weight is NaN or beyond 65504, which bitsandbytes' int8 cannot hold: pack the experts as nf4."
        )
    return packed.view(weight.shape), scales.view(weight.shape[:-1])


def _hold_4bit(experts: nn.Module, name: str, packed: Tensor, state: dict[str, Any]) -> None:
    experts._parameters[name] = nn.Parameter(packed, requires_grad=False)
    _bitsandbytes("nn.parametrize").replace_parameter_4bit_prequantized(experts, name, state, packed.device)


def _hold_int8(experts: nn.Module, name: str, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
    experts._parameters[name] = nn.Parameter(packed, requires_grad=False)
    parametrization = Int8Weight(scales, packed.shape, dtype)
    parametrize.register_parametrization(experts, name, parametrization, unsafe=True)


def packed_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, experts module, parameter) of every stack that `pack` could have packed."""
    for path, module in model.named_modules():
        for name, held in getattr(module, "parametrizations", {}).items():
            if isinstance(held[0], Int8Weight) or hasattr(held[0], "quant_state"):
                yield path, module, name


def held_tensors(experts: nn.Module, name: str) -> dict[str, Tensor]:
    """What a packed stack consists of, under the names in `FORMATS`."""
    held: Any = experts.parametrizations[name]  # type: ignore[index]
    if isinstance(held[0], Int8Weight):
        return {"original": held.original, "scales": held[0].scales}
    state: dict[str, Tensor] = held[0].quant_state.as_dict(packed=True)
    return {"original": held.original, **state, "quant_map": state["quant_map"].clone()}  # which stacks may share


def put_together(experts: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """The way back: packed tensors in the place of a parameter, whose shape and dtype the stack takes.

    Raises:
        LayoutError: They are of a stack of another shape.
    """
    weight, packed = experts.get_parameter(name), tensors["original"]
    if "scales" in tensors:
        shape = packed.shape
        _hold_int8(experts, name, packed, tensors["scales"], weight.dtype)
    else:
        _hold_4bit(experts, name, packed, {key: value for key, value in tensors.items() if key != "original"})
        state: Any = experts.parametrizations[name][0].quant_state  # type: ignore[index,union-attr]
        shape, state.dtype = state.shape, weight.dtype
    if shape != weight.shape:
        raise LayoutError(
            f"{type(experts).__name__}.{name} is packed as {tuple(shape)}; {tuple(weight.shape)} was expected of the "
            "model's config. Is the checkpoint another model's?"
        )
