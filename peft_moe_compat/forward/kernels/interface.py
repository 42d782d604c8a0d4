"""What the kernels and those above them tell each other; the one module here that imports no triton."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import ExpertLora, FlatLora
from ...model.packed import PackedWeight

__all__ = ["HeldProjection", "Nonlinearity", "next_power", "on_device", "padded_rank"]

# What a module holds of a projection: weight "E in out", bias "E out", and LoRA, checked against each other.
HeldProjection = tuple[Tensor | PackedWeight, Tensor | None, ExpertLora | FlatLora | None]


class Nonlinearity(NamedTuple):
    """What stands between the up and the down projection, where the kernels know it.

    Attributes:
        name: "silu", "gelu", "gelu_tanh", "relu", "relu2", or "clamped": gpt-oss's GLU of (alpha, limit).
        gated: h = act(gate) * up rather than h = act(up).
        interleaved: The up projection's columns are gate, up, gate, up, ... rather than all gates, then all ups.
        alpha, limit: Of "clamped" alone.
    """

    name: str
    gated: bool
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0


def next_power(n: int, least: int = 1) -> int:
    """The next power of two, `least` at least."""
    return max(least, 1 << (n - 1).bit_length())


def padded_rank(rank: int) -> int:
    """R: what the matrix units want of a contracted or a produced axis."""
    return next_power(rank, 16)


def on_device(device: torch.device) -> Any:
    """Makes a device the current one, on which triton launches."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
