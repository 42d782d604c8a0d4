"""What rows that meet lora_A are multiplied by: from a counter, so that a forward and a backward need but a seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import ExpertLora, FlatLora

__all__ = ["Drop", "arguments", "drawn", "kept"]


class Drop(NamedTuple):
    """The dropout of one forward.

    Attributes:
        seed: () int64 on the device of the rows.
        p: The probability.
    """

    seed: Tensor
    p: float


def drawn(lora: ExpertLora | FlatLora | None, device: torch.device) -> Drop | None:
    """That of an update all of whose ranks share a mask; the seed is from torch's generator of the device."""
    if lora is None or not lora.dropout:
        return None
    ((_, p),) = lora.dropout
    return Drop(torch.randint(2**63 - 1, (), device=device), p)


def arguments(drop: Drop | None, stand_in: Tensor) -> tuple[Tensor, float]:
    """What a kernel takes of it."""
    return drop or (stand_in, 0.0)


@triton.jit
def kept(seed, p, s, start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The multipliers of rows `s` and WIDE columns from `start`, both multiples of 4: 0 or 1 / (1 - p).

    Four neighbours are one draw of Philox4x32-7, whose seven rounds pass what the usual ten do (Salmon et al. 2011).
    """
    q = (start // 4 + tl.arange(0, WIDE // 4))[None, :]
    row, zero = s[:, None] + q * 0, s[:, None] * 0 + q * 0
    a, b, c, d = tl.philox(tl.load(seed), q + zero, row, zero, zero, 7)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK, WIDE])
    drawn = tl.uint_to_uniform_float(bits)
    return tl.where(drawn >= p, 1 / (1 - p), 0.0)
