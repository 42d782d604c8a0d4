"""Parametrised weights that the kernels decode: one row of `DECODERS` for each class of parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .packed import CODES, INT8, Codec, PackedWeight

__all__ = ["DECODERS"]


def _bnb4(data: Tensor, parametrization: Any) -> PackedWeight | None:
    """bitsandbytes' nf4 and fp4: blocks of consecutive weights, high half first."""
    state = parametrization.quant_state
    if len(state.shape) != 3:
        return None
    nested: tuple[Any, ...] = ()
    if state.nested:
        nested = state.state2.code, state.state2.absmax, state.offset
    codec = Codec(CODES, True, 0, state.blocksize, nested=state.state2.blocksize if state.nested else 0)
    return PackedWeight(codec, state.dtype, tuple(state.shape), True, data, state.absmax, state.code, None, *nested)


def _int8_rows(data: Tensor, parametrization: Any) -> PackedWeight | None:
    """Rows of int8 as bitsandbytes' `int8_vectorwise_quant` makes them: 1 / 127 comes last."""
    E, rows, columns = data.shape
    codec = Codec(INT8, height=1, width=columns, steps=127)
    return PackedWeight(codec, parametrization.dtype, (E, rows, columns), True, data, parametrization.scales)


def _mxfp4(data: Tensor, parametrization: Any) -> PackedWeight | None:
    """Blocks "E out in/32 16" and exponents "E out in/32", low half first; read as "E in out"."""
    E, columns, rows = parametrization.shape
    codec = Codec(CODES, height=1, width=32, exponent=True)
    return PackedWeight(codec, parametrization.dtype, (E, rows, columns), False, data, parametrization.scales)


# (module, name) of a parametrization's class -> its packed form, from what it keeps as `original` and itself.
DECODERS: dict[tuple[str, str], Callable[[Tensor, Any], PackedWeight | None]] = {
    ("bitsandbytes.nn.parametrize", "Bnb4bitParametrization"): _bnb4,
    ("peft_moe_compat.quantising.int8", "Int8Weight"): _int8_rows,
    ("peft_moe_compat.quantising.mxfp4", "Mxfp4Weight"): _mxfp4,
}
