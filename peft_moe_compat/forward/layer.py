"""The one forward: routed experts with LoRA on their fused weights, without ever building an updated weight.

gather -> base grouped mm + (x A^T)(scaling B)^T -> bias -> gate or activation -> the same for down -> combine
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import LayoutError, PeftMoeCompatError
from ..layout import ExpertLora, FlatLora, MixedLora
from ..model.experts import is_transposed, up_name
from ..model.packed import PackedWeight
from ..model.weights import read, read_packed, refuse_leftovers
from .dropout import dropped
from .frozen import grouped_mm_of
from .fused import run_fused, runs_fused
from .grouped_mm import Gather, alignment, grouped_mm

__all__ = ["Groups", "LoraOf", "Mixed", "experts_forward", "group_ends", "lora_term", "project", "weight_of"]

Weight = TypeVar("Weight", Tensor, Tensor | PackedWeight)

_LORA_WITHOUT_DATA = (
    "lora_A or lora_B of {!r} is on the meta device and holds no numbers. PEFT puts a new adapter where the weight is, "
    "so on an offloaded model it is lost: call get_peft_model before the model is offloaded, or give each of these "
    "layers data, with to_empty(device=...) and then reset_lora_parameters or set_peft_model_state_dict."
)


class LoraOf(Protocol):
    """A dict, or whatever else has its `get`."""

    def get(self, name: str, /) -> ExpertLora | FlatLora | MixedLora | None: ...


class Mixed(NamedTuple):
    """Which of several adapters each token takes.

    Attributes:
        adapters: N.
        of_token: "T", ids of the adapters.
    """

    adapters: int
    of_token: Tensor


class Groups(NamedTuple):
    """Routed rows sorted by expert, and those of an expert by adapter.

    Attributes:
        experts, adapters: "E" and "(E N)", where each one's rows end.
        of_row: "S", each row's adapter, where they differ.
        places: "S", which row of the whole batch each is; None where a dropout takes them one after the other.
    """

    experts: Tensor
    adapters: Tensor
    of_row: Tensor | None = None
    places: Tensor | None = None


def lora_term(
    x: Tensor, update: ExpertLora | FlatLora | MixedLora, dtype: torch.dtype, groups: Groups, gather: Gather | None
) -> Tensor:
    """scaling * (x A^T) B^T of each row's own expert, and adapter: "S in" -> "S out", computed in `dtype`."""
    lora, offs = update.canonical(), groups.adapters
    if isinstance(update, MixedLora) and any(update.dropout):
        p = torch.tensor(update.dropout, device=x.device)[groups.of_row].unsqueeze(1)
        x = dropped(x, p, groups.places)
    A, B = lora.A, lora.B * lora.scaling  # scaled before any rounding to `dtype`
    if pad := -lora.rank % alignment(dtype):
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
    low_rank = _low_rank(x, A.to(dtype).transpose(1, 2), lora.dropout, groups, gather)
    return grouped_mm(low_rank, B.to(dtype).transpose(1, 2), offs)


def _low_rank(
    x: Tensor, A: Tensor, dropout: tuple[tuple[int, float], ...], groups: Groups, gather: Gather | None
) -> Tensor:
    """x A of each row's own expert, "S in", "E in r" -> "S r", with a mask of x for each run of ranks that has one."""
    offs = groups.adapters
    if not dropout:
        return grouped_mm(x, A, offs, gather)
    if gather is not None:  # each routed row has its own mask, and what its group has none of is undefined
        inside = torch.arange(gather.order.shape[0], device=offs.device) < offs[-1]
        x = x[gather.order // gather.k].where(inside.unsqueeze(1), 0.0)
    ranks = [rank for rank, _ in dropout]
    ranks[-1] += A.shape[2] - sum(ranks)  # what was padded
    runs = zip(torch.split(A, ranks, 2), dropout, strict=True)
    return torch.cat([grouped_mm(dropped(x, p, groups.places), run, offs) for run, (_, p) in runs], 1)


def weight_of(
    module: Any,
    name: str,
    transposed: bool,
    in_features: int,
    lora: ExpertLora | FlatLora | MixedLora | None,
    hidden_states: Tensor,
    reader: Callable[[Any, str, Tensor], Weight],
) -> Weight:
    """A base weight as "E in out", checked against the rows it will meet and the factors it will be added to.

    A quantised weight that has no dtype of its own takes that of `hidden_states`, or autocast's.
    """
    weight = reader(module, name, hidden_states)  # once: a quantised weight is computed at each access
    if not transposed:
        weight = weight.mT  # "E out in -> E in out"
    num_experts, read_in, out_features = weight.shape
    if in_features != read_in:
        raise LayoutError(
            f"{type(module).__name__}.{name} is read as '{'E in out' if transposed else 'E out in'}' and then takes "
            f"{read_in} in-features, but gets rows of {in_features}. Its orientation comes from "
            "peft_moe_compat.declare_layout or from the module's is_transposed: correct the one that is wrong."
        )
    if lora is not None:
        if not (lora.has_data() or hidden_states.is_meta):
            raise PeftMoeCompatError(_LORA_WITHOUT_DATA.format(name))
        lora.check(num_experts, out_features, in_features, type(module).__name__, name)
        refuse_leftovers(module, name)
    return weight


def project(
    x: Tensor,
    module: Any,
    name: str,
    held: tuple[Tensor, Tensor | None, ExpertLora | FlatLora | MixedLora | None],
    groups: Groups,
    expert_ids: Tensor,
    transposed: bool,
    widen: bool,
    gather: Gather | None = None,
) -> Tensor:
    """One projection of every routed row, LoRA and bias included: "S in" -> "S out".

    With `widen` the sum of base and LoRA is kept in float32 where the weight is of lower precision. With `gather`, x is
    "T in", and its rows are taken from it.
    """
    weight, bias, lora = held
    y = grouped_mm_of(x, weight, groups.experts, gather, module, name, transposed)
    if lora is not None:
        if widen and y.dtype.itemsize < 4:
            y = y.float()
        y += lora_term(x, lora, weight.dtype, groups, gather)
    if bias is not None:
        y += bias[expert_ids]
    return y


def experts_forward(
    module: Any,
    expert_lora: LoraOf,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    mixed: Mixed | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Forward of an experts module made by transformers' `@use_experts_implementation`, with LoRA on its weights.

    Follows `grouped_mm_experts_forward` of transformers/integrations/moe.py, down to the deterministic sum over k.

    Args:
        module: The experts module. Its base weights may be frozen or not, of any floating-point dtype.
        expert_lora: Gives the factors of a parameter by its name. Parameters without any run as they are.
        hidden_states: "T H".
        top_k_index: "T k", ids of the experts; ids >= E (expert parallelism) mark rows computed elsewhere.
        top_k_weights: "T k", or "T E" (transformers 5.0), the routing weights.
        mixed: Where tokens take different adapters: all updates are then `MixedLora` of as many.
        places: "T k", which row of the whole batch each is, by which a dropout is drawn; its place here without.

    Returns:
        "T H", in the dtype of `hidden_states`.

    Raises:
        LayoutError: Factors that do not fit their weight.
    """
    T, k = top_k_index.shape
    up_proj = up_name(module)
    E, transposed = module.num_experts, bool(is_transposed(module))
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index.clamp(max=top_k_weights.shape[1] - 1))

    def held(
        name: str, in_features: int, reader: Callable[[Any, str, Tensor], Weight]
    ) -> tuple[Weight, Tensor | None, Any]:
        lora = expert_lora.get(name)
        weight = weight_of(module, name, transposed, in_features, lora, hidden_states, reader)
        return weight, getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None, lora

    if mixed is None and runs_fused(module, hidden_states, top_k_index):
        packed_up = held(up_proj, hidden_states.shape[1], read_packed)
        intermediate = packed_up[0].shape[2] // (2 if up_proj == "gate_up_proj" else 1)
        routed = hidden_states, top_k_index, top_k_weights
        fused = run_fused(module, routed, packed_up, lambda: held("down_proj", intermediate, read_packed), places)
        if fused is not None:
            return fused

    held_up = held(up_proj, hidden_states.shape[1], read)
    expert_ids, order, groups = _sorted(top_k_index, E, mixed)
    groups = groups._replace(places=order if places is None else places.reshape(-1)[order])
    # Sentinel rows sort to the tail, past offs[-1], where the grouped products leave results undefined.
    elsewhere = (expert_ids >= E).unsqueeze(-1) if getattr(module, "_is_expert_parallel", True) else None
    expert_ids = expert_ids.clamp(max=E - 1)
    row_weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)

    if torch.compiler.is_compiling() and mixed is None:
        x, gather = hidden_states, Gather(order, k)  # in the product, or the graph keeps the rows for its backward
    else:
        # Its backward keeps undefined gradients out of hidden_states.
        x, gather = _without(hidden_states[order // k], elsewhere), None
    # PEFT rounds W + dW and then the product; rounding the product and then its sum with the LoRA term costs more once
    # an activation amplifies it (relu^2 doubles it), so that sum is not rounded before the activation.
    up = project(x, module, up_proj, held_up, groups, expert_ids, transposed, True, gather)
    up = _without(up, elsewhere)
    del held_up
    h = module._apply_gate(up) if up_proj == "gate_up_proj" else module.act_fn(up)
    held_down = held("down_proj", h.shape[1], read)
    down = project(h, module, "down_proj", held_down, groups, expert_ids, transposed, False)
    down = _without(down, elsewhere)
    if getattr(module, "has_post_expert_norm", False):
        down = module.post_expert_norm(down)
    weighted = down * row_weights

    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    # Not index_add: the sum over k has a fixed order, and runs in float32 inside.
    return weighted[back].view(T, k, weighted.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _sorted(top_k_index: Tensor, E: int, mixed: Mixed | None) -> tuple[Tensor, Tensor, Groups]:
    """(sorted ids of experts, the order they were sorted in, where they end); the rows of an expert by adapter."""
    ids = top_k_index.reshape(-1)
    if mixed is None:
        expert_ids, order = torch.sort(ids)
        offs = group_ends(expert_ids, E)
        return expert_ids, order, Groups(offs, offs)
    N = mixed.adapters
    group_ids, order = torch.sort(ids * N + mixed.of_token.repeat_interleave(top_k_index.shape[1]))
    ends = group_ends(group_ids, E * N)
    return group_ids // N, order, Groups(ends[N - 1 :: N].contiguous(), ends, group_ids % N)


def group_ends(sorted_ids: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end, "E" int32, without a host synchronisation; sentinel ids are not counted."""
    experts = torch.arange(num_experts, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


def _without(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(mask, 0.0)
