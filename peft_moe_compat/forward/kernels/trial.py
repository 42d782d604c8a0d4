"""A forward and a backward small enough to be run before the first real one, against the same computed densely."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import ExpertLora
from .interface import Nonlinearity
from .layer import Projection, fused_experts

__all__ = ["worst_error"]

# Enough rows an expert for the largest tiles, and sizes that compile what a real layer compiles.
_E, _T, _K, _H, _I, _RANK, _SCALING = 2, 256, 2, 128, 64, 16, 0.5


def _dense(hidden: Tensor, gates: Tensor, up: Tensor, down: Tensor, loras: list[Tensor]) -> Tensor:
    """Every expert for every token, in float32; `gates` "T E"."""
    up_A, up_B, down_A, down_B = (t.float() for t in loras)
    up = up.float() + _SCALING * (up_B @ up_A).transpose(1, 2)
    down = down.float() + _SCALING * (down_B @ down_A).transpose(1, 2)
    gate, rows = torch.einsum("th,eho->teo", hidden.float(), up).chunk(2, -1)
    h = torch.nn.functional.silu(gate) * rows
    out: Tensor = torch.einsum("tei,eih,te->th", h, down, gates.float())
    return out


def worst_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of the output, of a few tokens' output or of any gradient, over that tensor's largest
    entry. Raises whatever a kernel raises that cannot be built.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return drawn.to(device, dtype)

    index = torch.randint(0, _E, (_T, _K), generator=generator).to(device)
    up, down = draw(_E, 2 * _I, _H).transpose(1, 2), draw(_E, _H, _I).transpose(1, 2)
    sizes = (_E, _RANK, _H), (_E, 2 * _I, _RANK), (_E, _RANK, _I), (_E, _H, _RANK)
    loras = [draw(*size, dtype=torch.float32).requires_grad_() for size in sizes]
    hidden, weights = (8 * draw(_T, _H)).requires_grad_(), draw(_T, _K).abs().requires_grad_()
    leaves = [hidden, weights, *loras]

    function = Nonlinearity("silu", True)
    of_up = Projection.of(up, None, ExpertLora(loras[0], loras[1], _SCALING))
    of_down = Projection.of(down, None, ExpertLora(loras[2], loras[3], _SCALING))
    found = fused_experts(function, hidden, index, weights, of_up, lambda: of_down)
    gates = torch.zeros(_T, _E, device=device, dtype=torch.float32).scatter_add(1, index, weights.float())
    expected = _dense(hidden, gates, up, down, loras)
    gradient = draw(_T, _H)
    pairs = [(found, expected)]
    theirs = torch.autograd.grad(expected, leaves, gradient.float())
    pairs += zip(torch.autograd.grad(found, leaves, gradient), theirs, strict=True)
    with torch.no_grad():
        few = fused_experts(function, hidden[:16], index[:16], weights[:16], of_up, lambda: of_down)
    pairs.append((few, expected[:16]))
    with torch.no_grad():
        return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
