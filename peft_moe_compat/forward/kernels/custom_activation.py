"""A module's own gate or activation, which no kernel knows: computed by torch, in float32, between the fused parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common import Factor
from .dropout import Kept
from .routing import Route
from .rows import project

__all__ = ["activate", "activate_backward"]

Rows = Callable[[Tensor], Tensor]


def activate(
    up: Tensor, function: Rows, route: Route, factor: Factor | None, kept: Kept | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `activation.activate`, of any row-wise function."""
    with torch.no_grad():  # which may have parameters
        h = function(up.float()).to(up.dtype).contiguous()
    return h, project(h, route, factor, kept)


def activate_backward(
    up: Tensor, dh: Tensor, function: Rows, route: Route, weights: Tensor, factor: Factor | None, dots: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """As `activation.activate_backward`, in place too."""
    flat = route.order[: route.rows].clamp(0, weights.numel() - 1)  # undefined for rows that no expert here computes
    row_weights = weights.reshape(-1)[flat].float().unsqueeze(1)
    with torch.enable_grad():
        y = up.float().requires_grad_()
        h = function(y)
        (dy,) = torch.autograd.grad(h, y, dh * row_weights)
    h = h.detach()
    by_row = (h * dh).sum(1)
    by_row = by_row if dots is None else by_row + dots
    position = route.position[: route.rows].long()
    dweights = torch.where(position >= 0, by_row[position.clamp(min=0)], 0.0).view(weights.shape)
    up.data.copy_(dy)  # a kept tensor: what was computed from it is known to be spent, see `layer`
    dh.copy_(h * row_weights)
    return project(up, route, factor), dweights
