"""Experts and their LoRA spread over processes: by expert (transformers), and cut into pieces (DeepSpeed ZeRO-3).

Expert parallelism gives every rank some of a stack's experts, whole. transformers shards an expert parameter along its
experts, and replaces the module's forward by one that exchanges the tokens. The LoRA of such a parameter is sharded
alike as soon as PEFT has made it: lora_A "(E r) p" along its rows, lora_B "q (r E)" within each of its r blocks of
columns. The whole of such a tensor is PEFT's flat form of all experts, so PEFT gathers it into one file and takes each
rank's part out of a file, whatever the number of ranks.

Where several ranks have the same experts (transformers 5.24: `efsdp`), FSDP2 cuts their weights once more, along the
first axis, and gathers them for every forward; the LoRA too.

ZeRO-3 cuts every parameter into pieces and gathers it whenever a module's forward or backward reads it, also from
another module, so nothing is to be done for that. What it and PEFT would get wrong is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelismError
from ..reasons import Reason
from .weights import held_as, is_plain, stored_format

__all__ = [
    "batch_of",
    "check_zero3",
    "exchanges_tokens",
    "expert_mesh",
    "local_experts",
    "local_factors",
    "refuse_native",
    "refuse_quantised",
    "still_sharded",
    "whole",
]


def exchanges_tokens(experts: Any) -> bool:
    """Whether a module's forward is transformers' exchange of tokens around the class's own."""
    if "forward" not in experts.__dict__:
        return False
    name: str = getattr(experts.__dict__["forward"], "__globals__", {}).get("__name__", "")
    return name.startswith("transformers.distributed.")


def batch_of(config: Any) -> int:
    """Which of the batches that the ranks of a model have this rank has; 0 where transformers has not spread it.

    The ranks of a tensor-parallel group share theirs, and follow each other.
    """
    distributed = getattr(config, "distributed_config", None)
    batches = getattr(distributed, "dp_size", getattr(distributed, "fsdp_size", None)) or 1
    if batches == 1:
        return 0
    return torch.distributed.get_rank() * batches // torch.distributed.get_world_size()


def expert_mesh(experts: Any, name: str) -> Any:
    """The mesh over which an expert parameter is sharded along its experts; None where it is not.

    Raises:
        ParallelismError: It is sharded in another way as well.
    """
    weight = experts._parameters.get(name)
    # A stack that FSDP shards is a DTensor as well; only expert parallelism counts its own experts.
    if not hasattr(weight, "placements") or getattr(experts, "num_experts", weight.shape[0]) == weight.shape[0]:
        return None
    mesh = weight.device_mesh
    if len(weight.placements) == 1:
        return mesh
    if "efsdp" not in (mesh.mesh_dim_names or ()):
        raise ParallelismError(
            f"{type(experts).__name__}.{name} is sharded by expert and by FSDP ({mesh}), and this transformers does "
            "not exchange tokens between batches. Update transformers to 5.24 or later; or leave out fsdp_size: "
            "DistributedConfig(tp_size=N, ep_size=N)."
        )
    return mesh["ep"]


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


def still_sharded(weight: Any, spread: bool) -> bool:
    """Whether FSDP has not gathered a LoRA weight: all of it, or with `spread` what is of this rank's experts."""
    return hasattr(weight, "device_mesh") and (not spread or weight.device_mesh.ndim > 1)


def local_factors(weight: Any) -> Tensor:
    """This rank's part of a LoRA weight on experts that it holds some of.

    Gradients reach the weight, but where FSDP has cut it once more: then the other ranks send theirs, a collective
    operation.

    Raises:
        ParallelismError: The weight is not sharded.
    """
    if not hasattr(weight, "to_local"):
        raise ParallelismError(
            "The experts are spread over ranks, but their LoRA is not: PEFT made it while peft_moe_compat was not "
            "active. Import peft_moe_compat, or call peft_moe_compat.activate(), before the adapter is made or loaded."
        )
    if not still_sharded(weight, True):
        local: Tensor = weight.to_local()
        return local
    from torch.distributed.tensor import Shard

    mesh, shape, axis = weight.device_mesh, list(weight.shape), weight.placements[-1].dim
    shape[axis] //= mesh["ep"].size()
    return _gathered(weight.detach().to_local(), mesh["efsdp"], Shard(0), shape)


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded, without autograd: a collective operation."""
    found: Tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return found
    mesh, placement = tensor.device_mesh, tensor.placements[-1]
    if "efsdp" in (mesh.mesh_dim_names or ()):
        found = _gathered(local_factors(tensor), mesh["ep"], placement, tensor.shape)
    elif mesh.ndim == 1 and hasattr(placement, "split_factor"):
        found = _gathered(tensor.detach().to_local(), mesh, placement, tensor.shape)
    else:
        found = tensor.detach().full_tensor()
    return found


def _gathered(part: Tensor, mesh: Any, placement: Any, shape: Sequence[int]) -> Tensor:
    """All of what the ranks of a one-dimensional mesh hold. torch 2.11 cannot do it for lora_B of experts."""
    from torch.distributed.tensor import DTensor, Shard

    axis = placement.dim
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(part, mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=stride)
    found: Tensor = sharded.full_tensor()
    if groups := getattr(placement, "split_factor", 0):
        # "q (n r e)", rank by rank, -> "q (r n e)"
        q, columns = shape[:axis], shape[axis + 1 :]
        by_rank = found.reshape(*q, mesh.size(), groups, -1, *columns)
        found = by_rank.transpose(axis, axis + 1).reshape(shape)
    return found


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
