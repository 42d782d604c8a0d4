"""Experts and their LoRA spread over processes: by expert (transformers), and cut into pieces (DeepSpeed ZeRO-3).

Expert parallelism gives every rank some of a stack's experts, whole. transformers shards an expert parameter along its
experts, and replaces the module's forward by one that exchanges the tokens. The LoRA of such a parameter is sharded
alike as soon as PEFT has made it: lora_A "(E r) p" along its rows, lora_B "q (r E)" within each of its r blocks of
columns. The whole of such a tensor is PEFT's flat form of all experts, so PEFT gathers it into one file and takes each
rank's part out of a file, whatever the number of ranks.

ZeRO-3 cuts every parameter into pieces and gathers it whenever a module's forward or backward reads it, also from
another module, so nothing is to be done for that. What it and PEFT would get wrong is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelismError
from ..reasons import Reason
from .weights import held_as, is_plain, stored_format

__all__ = [
    "check_zero3",
    "exchanges_tokens",
    "expert_mesh",
    "local_experts",
    "local_factors",
    "refuse_native",
    "refuse_quantised",
]


def exchanges_tokens(experts: Any) -> bool:
    """Whether a module's forward is transformers' exchange of tokens around the class's own."""
    if "forward" not in experts.__dict__:
        return False
    name: str = getattr(experts.__dict__["forward"], "__globals__", {}).get("__name__", "")
    return name.startswith("transformers.distributed.")


def expert_mesh(experts: Any, name: str) -> Any:
    """The mesh over which an expert parameter is sharded along its experts; None where it is not.

    Raises:
        ParallelismError: It is sharded in another way as well.
    """
    weight = experts._parameters.get(name)
    # A stack that FSDP shards is a DTensor as well; only expert parallelism counts its own experts.
    if not hasattr(weight, "placements") or getattr(experts, "num_experts", weight.shape[0]) == weight.shape[0]:
        return None
    if len(weight.placements) > 1:
        raise ParallelismError(
            f"{type(experts).__name__}.{name} is sharded by expert and by FSDP ({weight.device_mesh}). LoRA on experts "
            "needs expert parallelism within one batch: DistributedConfig(tp_size=N, ep_size=N), without fsdp_size."
        )
    return weight.device_mesh


def local_experts(experts: nn.Module, name: str) -> tuple[int, int] | None:
    """First and last (exclusive) of the experts this rank holds of a parameter; None where it holds all of them.

    Raises:
        ParallelismError: The parameter is sharded in another way as well.
    """
    mesh = expert_mesh(experts, name)
    if mesh is None:
        return None
    count: int = experts.num_experts  # type: ignore[assignment]
    start = mesh.get_local_rank() * count
    return start, start + count


def local_factors(weight: Tensor) -> Tensor:
    """This rank's part of a LoRA weight on experts that it holds some of. Gradients reach the weight.

    Raises:
        ParallelismError: The weight is not sharded.
    """
    if not hasattr(weight, "to_local"):
        raise ParallelismError(
            "The experts are spread over ranks, but their LoRA is not: PEFT made it while peft_moe_compat was not "
            "active. Import peft_moe_compat, or call peft_moe_compat.activate(), before the adapter is made or loaded."
        )
    local: Tensor = weight.to_local()
    return local


def refuse_native(experts: Any, reason: Reason) -> None:
    """Raises `ParallelismError` for experts spread over ranks whose LoRA would have to go through PEFT's own forward.

    That adds factors of all experts to the parameter.
    """
    if exchanges_tokens(experts):
        raise ParallelismError(
            f"LoRA on experts that are spread over ranks runs through peft_moe_compat alone, which can't run here: "
            f"{reason}."
        )


def refuse_quantised(experts: Any, name: str) -> None:
    """Raises `ParallelismError` for a quantised parameter of experts that are spread over ranks, or cut by ZeRO-3.

    The scales of its blocks, or the packed form, would have to be spread or cut alike.
    """
    if is_plain(experts, name):
        return
    if exchanges_tokens(experts) or local_experts(experts, name) is not None:
        how = "spread over ranks by expert"
    elif any(hasattr(parameter, "ds_id") for parameter in held_as(experts, name)):
        how = "partitioned by DeepSpeed ZeRO-3"
    else:
        return
    if stored := stored_format(experts, name):
        raise ParallelismError(
            f"{type(experts).__name__}.{name} is quantised ({stored}) and {how}, which LoRA on experts does not "
            "support together. Load plain weights, or train with DistributedDataParallel or FSDP2."
        )


def check_zero3(wrapper: Any, x: Tensor) -> None:
    """Raises `ParallelismError` for a training step in which DeepSpeed ZeRO-3 would take the LoRA's gradients for zero.

    It makes leaf modules of many mixture-of-experts blocks. The gradients of a leaf module are reduced as soon as those
    of its inputs are there: at once, before any has been computed, where the inputs need none.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return
    if any(hasattr(p, "ds_z3_leaf_module") and p.requires_grad for p in wrapper.lora_A.parameters()):
        raise ParallelismError(
            "The inputs of these experts need no gradient, and then DeepSpeed ZeRO-3 reduces the gradients of their "
            "LoRA before they are computed. Call model.enable_input_require_grads() before training."
        )
