"""MXFP4, the format gpt-oss is published in: two 4-bit numbers to a byte, and an exponent for each 32 of a row.

A stack keeps its published tensors, which a parametrization dequantises where it is read.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..model.packed import E2M1

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BLOCK", "Mxfp4Weight", "hold_packed"]

BLOCK = 32
_CHUNK = 4 << 20  # bytes of packed numbers dequantised at once; the scratch beside the result is 10 times as large


def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """ "256 2": the two numbers of each byte, the one in the low bits first."""
    values = torch.tensor(E2M1, dtype=dtype)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), 1).to(device)


_kept_table = cache(_table)


class Mxfp4Weight(nn.Module):
    """A parametrization of `torch.nn.utils.parametrize`: blocks "E out in/32 16" -> weight "E in out".

    Bit-equal with `convert_moe_packed_tensors` of transformers (integrations/mxfp4.py). No gradient goes through it.

    Args:
        scales: "E out in/32", uint8: the exponents of two, plus 127. Kept as a buffer.
        dtype: Of the weight. It follows the module's, as that of a parameter would: `model.to(torch.float16)`.

    Attributes:
        stored_format: What `report` calls the format.
    """

    stored_format = "mxfp4"
    scales: Tensor

    def __init__(self, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        """ "E in out", of the weight; nothing is dequantised for it."""
        E, out_features, blocks = self.scales.shape
        return torch.Size((E, blocks * BLOCK, out_features))

    @torch.no_grad()
    def forward(self, blocks: Tensor) -> Tensor:
        """The weight, "E in out" laid out as "E out in": the transpose of what is stored, without another copy."""
        E, in_features, out_features = self.shape
        weight = torch.empty(E * out_features, in_features, dtype=self.dtype, device=blocks.device)
        in_graph = torch.compiler.is_compiling()
        rows = len(weight) if in_graph else max(1, 2 * _CHUNK // in_features)
        pairs = (_table if in_graph else _kept_table)(self.dtype, blocks.device)
        packed, exponents = blocks.reshape(len(weight), -1, BLOCK // 2), self.scales.reshape(len(weight), -1)
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            numbers = pairs[packed[part].int()].flatten(-2)
            torch.ldexp(numbers, exponents[part].int().sub_(127).unsqueeze(-1), out=weight[part].view_as(numbers))
        return weight.view(E, out_features, in_features).transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{' x '.join(map(str, self.shape))}, {self.dtype}"


def hold_packed(experts: nn.Module, name: str) -> None:
    """Replaces a parameter of an experts module by room for its blocks and scales, uninitialised, on the same device.

    Args:
        experts: Stores its weights as "E in out".
        name: Of the parameter; `in` is a multiple of 32.
    """
    weight = experts.get_parameter(name)
    E, in_features, out_features = weight.shape
    blocks = torch.empty(E, out_features, in_features // BLOCK, BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty_like(blocks[..., 0])
    experts.register_parameter(name, nn.Parameter(blocks, requires_grad=False))
    parametrize.register_parametrization(experts, name, Mxfp4Weight(scales, weight.dtype), unsafe=True)
