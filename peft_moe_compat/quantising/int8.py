"""bitsandbytes' row-wise int8 for fused experts, which it has a parametrization for in 4 bits only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Int8Weight"]

_STEP = 7.874015718698502e-3  # by which bitsandbytes multiplies, for a division by 127
_CHUNK = 2**24  # weights that are held in float32 at a time


class Int8Weight(nn.Module):
    """The parametrization of a stack in int8: `original` is "E d1 d2" int8, a row of d2 weights has one scale.

    Its values are those of `bitsandbytes.functional.int8_vectorwise_dequant`, rounded to `dtype`.

    Attributes:
        scales: "E d1" float32, the largest absolute value of each row.
        shape: (E, d1, d2).
        dtype: Of the weight. It follows the module's, as that of a parameter would: `model.to(torch.float16)`.
        stored_format: What `report` calls the format.
    """

    stored_format = "bnb int8"
    scales: Tensor

    def __init__(self, scales: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.shape = tuple(shape)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, original: Tensor) -> Tensor:
        """original "E d1 d2" int8 -> "E d1 d2" in `dtype`, some experts at a time."""
        scales = self.scales.unsqueeze(-1)
        at_once = max(1, _CHUNK // max(1, original[0].numel()))
        if torch.compiler.is_compiling() or original.shape[0] <= at_once:  # a graph fuses it, and has no loop over E
            return (original * scales * _STEP).to(self.dtype)
        out = torch.empty(original.shape, dtype=self.dtype, device=original.device)
        for start in range(0, original.shape[0], at_once):
            part = slice(start, start + at_once)
            out[part] = original[part] * scales[part] * _STEP
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != torch.float32:  # rounded with the rest: moved alone
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"shape={self.shape}, dtype={self.dtype}"
