"""The one forward: routed experts with LoRA on their fused weights, without ever building an updated weight.

gather -> base grouped mm + (x A^T)(scaling B)^T -> bias -> gate or activation -> the same for down -> combine
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import families, quantised
from .errors import LayoutError
from .fused import run_fused, runs_fused
from .grouped_mm import Gather, alignment, grouped_mm
from .layout import ExpertLora, FlatLora

__all__ = ["experts_forward"]


def _lora_term(x: Tensor, lora: ExpertLora, dtype: torch.dtype, offs: Tensor, gather: Gather | None) -> Tensor:
    """scaling * (x A^T) B^T of each row's own expert: "S in" -> "S out", computed in `dtype`."""
    A, B = lora.A, lora.B * lora.scaling  # scaled before any rounding to `dtype`
    if pad := -lora.rank % alignment(dtype):
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
    low_rank = grouped_mm(x, A.to(dtype).transpose(1, 2), offs, gather)
    return grouped_mm(low_rank, B.to(dtype).transpose(1, 2), offs)


def _weight(
    module: Any,
    name: str,
    transposed: bool,
    in_features: int,
    lora: ExpertLora | FlatLora | None,
    hidden_states: Tensor,
) -> Tensor:
    """A base weight as "E in out", checked against the rows it will meet and the factors it will be added to.

    A quantised weight that has no dtype of its own takes that of `hidden_states`, or autocast's.
    """
    weight = quantised.read(module, name, hidden_states)  # once: a quantised weight is computed at each access
    if not transposed:
        weight = weight.transpose(1, 2)  # "E out in -> E in out"
    if in_features != weight.shape[1]:
        raise LayoutError(
            f"{type(module).__name__}.{name} is read as '{'E in out' if transposed else 'E out in'}' and then takes "
            f"{weight.shape[1]} in-features, but gets rows of {in_features}. Its orientation comes from "
            "peft_moe_compat.declare_layout or from the module's is_transposed: correct the one that is wrong."
        )
    if lora is not None:
        lora.check(weight.shape[0], weight.shape[2], weight.shape[1], f"{type(module).__name__}.{name}")
        quantised.refuse_leftovers(module, name)
    return weight


def _project(
    x: Tensor,
    module: Any,
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    lora: ExpertLora | None,
    offs: Tensor,
    expert_ids: Tensor,
    transposed: bool,
    widen: bool,
    gather: Gather | None = None,
) -> Tensor:
    """One projection of every routed row, LoRA and bias included: "S in" -> "S out".

    With `widen` the sum of base and LoRA is kept in float32 where the weight is of lower precision. With `gather`, x is
    "T in", and its rows are taken from it.
    """
    y = quantised.grouped_mm_of(x, weight, offs, gather, module, name, transposed)
    if lora is not None:
        if widen and y.dtype.itemsize < 4:
            y = y.float()
        y += _lora_term(x, lora, weight.dtype, offs, gather)
    if bias is not None:
        y += bias[expert_ids]
    return y


def experts_forward(
    module: Any,
    expert_lora: Mapping[str, ExpertLora | FlatLora],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Forward of an experts module made by transformers' `@use_experts_implementation`, with LoRA on its weights.

    Follows `grouped_mm_experts_forward` of transformers/integrations/moe.py, down to the deterministic sum over k.

    Args:
        module: The experts module. Its base weights may be frozen or not, of any floating-point dtype.
        expert_lora: Parameter name -> factors. Parameters without an entry run as they are.
        hidden_states: "T H".
        top_k_index: "T k", ids of the experts; ids >= E (expert parallelism) mark rows computed elsewhere.
        top_k_weights: "T k", or "T E" (transformers 5.0), the routing weights.

    Returns:
        "T H", in the dtype of `hidden_states`.

    Raises:
        LayoutError: Factors that do not fit their weight.
    """
    T, k = top_k_index.shape
    up_name = families.up_name(module)
    E, transposed = module.num_experts, bool(families.is_transposed(module))
    up_lora, down_lora = expert_lora.get(up_name), expert_lora.get("down_proj")
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index.clamp(max=top_k_weights.shape[1] - 1))
    up_bias, down_bias = (getattr(module, f"{n}_bias") if module.has_bias else None for n in (up_name, "down_proj"))
    up_weight = _weight(module, up_name, transposed, hidden_states.shape[1], up_lora, hidden_states)
    intermediate = up_weight.shape[2] // (2 if up_name == "gate_up_proj" else 1)
    if runs_fused(module, hidden_states, top_k_index):
        down_weight = _weight(module, "down_proj", transposed, intermediate, down_lora, hidden_states)
        routed, biases = (hidden_states, top_k_index, top_k_weights), (up_bias, down_bias)
        fused = run_fused(module, (up_lora, down_lora), up_weight, down_weight, *routed, biases)
        if fused is not None:
            return fused
    up_lora, down_lora = up_lora and up_lora.canonical(), down_lora and down_lora.canonical()

    expert_ids, order = torch.sort(top_k_index.reshape(-1))
    offs = _group_ends(expert_ids, E)
    # Sentinel rows sort to the tail, past offs[-1], where the grouped products leave results undefined.
    elsewhere = (expert_ids >= E).unsqueeze(-1) if getattr(module, "_is_expert_parallel", True) else None
    expert_ids = expert_ids.clamp(max=E - 1)
    row_weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)

    if torch.compiler.is_compiling():
        x, gather = hidden_states, Gather(order, k)  # in the product, or the graph keeps the rows for its backward
    else:
        # Its backward keeps undefined gradients out of hidden_states.
        x, gather = _without(hidden_states[order // k], elsewhere), None
    # PEFT rounds W + dW and then the product; rounding the product and then its sum with the LoRA term costs more once
    # an activation amplifies it (relu^2 doubles it), so that sum is not rounded before the activation.
    up = _project(x, module, up_name, up_weight, up_bias, up_lora, offs, expert_ids, transposed, True, gather)
    up = _without(up, elsewhere)
    del up_weight
    h = module._apply_gate(up) if up_name == "gate_up_proj" else module.act_fn(up)
    down_weight = _weight(module, "down_proj", transposed, h.shape[1], down_lora, hidden_states)
    down = _project(h, module, "down_proj", down_weight, down_bias, down_lora, offs, expert_ids, transposed, False)
    down = _without(down, elsewhere)
    if getattr(module, "has_post_expert_norm", False):
        down = module.post_expert_norm(down)
    weighted = down * row_weights

    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    # Not index_add: the sum over k has a fixed order, and runs in float32 inside.
    return weighted[back].view(T, k, weighted.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _group_ends(sorted_ids: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end, "E" int32, without a host synchronisation; sentinel ids are not counted."""
    experts = torch.arange(num_experts, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


def _without(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(mask, 0.0)
