"""Which row of the whole batch each row is that another rank has sent: a dropout is drawn for it by that."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .handed_down import carried

__all__ = ["dispatch_tokens"]


def dispatch_tokens(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`AllToAllEP._dispatch_tokens`: for a dropout, the ranks that get rows are told which of the whole batch they are.

    The batches of all ranks are taken to be as long as this rank's.
    """

    @wraps(stock)
    def dispatching(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        *received, state = stock(self, hidden_states, top_k_index, top_k_weights)
        handover = carried.get()
        if handover is not None and handover.drops():
            tp, tokens = self.tp_mesh.size(), hidden_states.shape[0]
            batch, part = divmod(torch.distributed.get_rank(), tp)  # of which DTensor's Shard(0) takes equal parts
            first = batch * tokens + min(part * -(-tokens // tp), tokens)
            sent = state.order + first * top_k_index.shape[1]
            handover.received = sent.new_empty(sum(state.recv_sizes))
            torch.distributed.all_to_all_single(
                handover.received, sent, state.recv_sizes, state.send_sizes, group=self.ep_mesh.get_group()
            )
        return (*received, state)

    return dispatching
