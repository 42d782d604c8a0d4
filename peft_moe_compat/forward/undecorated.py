"""Experts classes whose forward transformers' registry does not reach: what it takes and gives, with LoRA, grouped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import ExpertLora
from ..model.experts import is_transposed
from ..model.weights import read
from .grouped_mm import grouped_mm
from .layer import Groups, LoraOf, experts_forward, group_ends, lora_term, project, weight_of

__all__ = ["FORWARDS"]


def _projected(
    module: Any, expert_lora: LoraOf, name: str, rows: Tensor, offs: Tensor, first: int | None = None
) -> Tensor:
    """One projection of rows "S in", sorted by expert: "S out". `first`: of so many experts, if the stack has more."""
    transposed, lora = bool(is_transposed(module)), expert_lora.get(name)
    weight: Tensor = weight_of(module, name, transposed, rows.shape[1], lora, rows, read)[:first]
    if first is not None and lora is not None:
        whole = lora.canonical()
        lora = ExpertLora(whole.A[:first], whole.B[:first], whole.scaling, whole.dropout)
    before_activation = name == "gate_up_proj"
    return project(rows, module, name, (weight, None, lora), Groups(offs, offs), offs, transposed, before_activation)


def _one_projection(module: Any, expert_lora: LoraOf, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rows sorted by expert, and how many of each there are, whose name differs from class to class."""
    (counts,) = *args, *kwargs.values()
    offs = torch.as_tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
    lora = expert_lora.get("weight")
    weight: Tensor = weight_of(module, "weight", bool(is_transposed(module)), rows.shape[1], lora, rows, read)
    groups = Groups(offs, offs)
    out = project(rows, module, "weight", (weight, None, None), groups, offs, bool(is_transposed(module)), False)
    if lora is None:
        return out
    # In float32, or rounding it costs more than PEFT's rounding of W + dW: there is no other projection beside it.
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (out + lora_term(rows, lora, wide, groups, None)).to(out.dtype)


def _every_token(module: Any, expert_lora: LoraOf, hidden_states: Tensor) -> Tensor:
    """ "(E T) H": all tokens, weighted, for one expert after another."""
    E, width = module.num_experts, module.hidden_size
    rows = hidden_states.reshape(-1, width)
    offs = torch.arange(1, E + 1, device=rows.device, dtype=torch.int32) * (rows.shape[0] // E)
    gate, up = _projected(module, expert_lora, "gate_up_proj", rows, offs).chunk(2, dim=-1)
    return _projected(module, expert_lora, "down_proj", up * module.act_fn(gate), offs).view(-1, width)


def _with_identities(
    module: Any, expert_lora: LoraOf, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Ids from `num_routed_experts` on are of experts that give a token back; gate_up_proj has a place for them too."""
    E, k = module.num_routed_experts, top_k_index.shape[1]
    ids, order = torch.sort(top_k_index.reshape(-1))
    offs, identity = group_ends(ids, E), (ids >= E).unsqueeze(1)
    x = hidden_states[order // k]
    # What belongs to no group is undefined in the products and their gradients, and stays out of both.
    up = _projected(module, expert_lora, "gate_up_proj", x.masked_fill(identity, 0.0), offs, E)
    gate, up = up.masked_fill(identity, 0.0).chunk(2, dim=-1)
    down = _projected(module, expert_lora, "down_proj", module.act_fn(gate) * up, offs)
    rows = torch.where(identity, x, down) * top_k_weights.reshape(-1)[order].unsqueeze(1)
    return _combined(rows, order, k).to(hidden_states.dtype)


def _combined(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """Rows "S H", in the order they were sorted in: the sum of each token's, "T H"."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return rows[back].view(-1, k, rows.shape[1]).sum(dim=1)


def _matrices(
    module: Any, expert_lora: LoraOf, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts below each other in three matrices "(E I) H": w1 and v1 before the activation, w2 behind it."""
    E, k = module.moe_num_experts, top_k_index.shape[1]
    ids, order = torch.sort(top_k_index.reshape(-1))
    x, offs = hidden_states[order // k], group_ends(ids, E)
    gate, up = (_of_matrix(module, expert_lora, name, x, offs) for name in ("w1", "v1"))
    down = _of_matrix(module, expert_lora, "w2", module.activation_fn(gate) * up, offs)
    return _combined(down * top_k_weights.reshape(-1)[order].unsqueeze(1), order, k).to(hidden_states.dtype)


def _of_matrix(module: Any, expert_lora: LoraOf, name: str, rows: Tensor, offs: Tensor) -> Tensor:
    """One projection of rows "S in", sorted by expert: "S out".

    PEFT has one LoRA on the whole matrix: lora_A "r H" is every expert's, of lora_B "(E I) r" each has its rows.
    """
    E, transposed = module.moe_num_experts, name == "w2"  # "(E in) out", and the others "(E out) in"
    whole, lora = expert_lora.get(name), None
    if whole is not None:
        whole.check(1, E * module.ffn_hidden_size, module.hidden_size, type(module).__name__, name)
        found = whole.canonical()
        shared, own = found.A.repeat(E, 1, 1), found.B.reshape(E, -1, found.rank)
        A, B = (own.transpose(1, 2), shared.transpose(1, 2)) if transposed else (shared, own)
        lora = ExpertLora(A, B, found.scaling, found.dropout)

    def stacked(*of: Any) -> Tensor:
        weight = read(*of)
        return weight.view(E, -1, weight.shape[1])

    weight: Tensor = weight_of(module, name, transposed, rows.shape[1], lora, rows, stacked)
    y = grouped_mm(rows, weight, offs)
    if lora is None:
        return y
    # Not rounded once more, as in `experts_forward`.
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return wide + lora_term(rows, lora, weight.dtype, Groups(offs, offs), None)


# As `families.OWN_FORWARDS` names them: module, LoRA, and what the class's own forward takes -> what it gives.
FORWARDS: dict[str, Callable[..., Tensor]] = {
    "routed": experts_forward,
    "with_identities": _with_identities,
    "every_token": _every_token,
    "one_projection": _one_projection,
    "matrices": _matrices,
}
