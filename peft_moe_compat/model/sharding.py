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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelismError
from . import weights as quantised

__all__ = [
    "carried",
    "carry",
    "check_zero3",
    "exchanges_tokens",
    "get_in_out_features",
    "get_tp_plan_and_mesh",
    "local_experts",
    "local_factors",
    "refuse_native",
    "refuse_partitioned",
    "refuse_quantised",
    "shard_lora",
    "update_layer",
]

# Where transformers' replacement of an experts module's forward is written.
_HOME = "transformers.distributed."

_carried: ContextVar[Any] = ContextVar("peft_moe_compat_carried", default=None)


def exchanges_tokens(experts: Any) -> bool:
    """Whether a module's forward is transformers' exchange of tokens around the class's own."""
    if "forward" not in experts.__dict__:
        return False
    name: str = getattr(experts.__dict__["forward"], "__globals__", {}).get("__name__", "")
    return name.startswith(_HOME)


@contextmanager
def carry(handover: Any) -> Iterator[None]:
    """What the registered experts function finds in `carried()`: the exchange of tokens takes no keyword arguments.

    A context variable, set for one call within one thread; a recomputation sets it again.
    """
    token = _carried.set(handover)
    try:
        yield
    finally:
        _carried.reset(token)


def carried() -> Any:
    """What `carry` was given, None outside of it."""
    return _carried.get()


def _mesh(experts: Any, name: str) -> Any:
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
    mesh = _mesh(experts, name)
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


def refuse_native(experts: Any, reason: str) -> None:
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
    if quantised.is_plain(experts, name):
        return
    if exchanges_tokens(experts) or local_experts(experts, name) is not None:
        how = "spread over ranks by expert"
    elif any(hasattr(parameter, "ds_id") for parameter in quantised.held_as(experts, name)):
        how = "partitioned by DeepSpeed ZeRO-3"
    else:
        return
    if stored := quantised.stored_format(experts, name):
        raise ParallelismError(
            f"{type(experts).__name__}.{name} is quantised ({stored}) and {how}, which LoRA on experts does not "
            "support together. Load plain weights, or train with DistributedDataParallel or FSDP2."
        )


def shard_lora(wrapper: Any, adapter_name: str) -> None:
    """Keeps of one adapter of a `ParamWrapper` what belongs to this rank's experts, where there are others.

    Raises:
        ParallelismError: The experts are sharded in a way that LoRA cannot follow.
    """
    experts = wrapper.get_base_layer()
    mesh = _mesh(experts, wrapper.parameter_name)
    if mesh is None:
        return
    if not exchanges_tokens(experts):
        raise ParallelismError(
            f"{type(experts).__name__} holds {experts.num_experts} of {wrapper.num_experts} experts, but its forward "
            "is not transformers' exchange of tokens. Load the model with DistributedConfig(tp_size=N, ep_size=N)."
        )
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    placements = {"lora_A": Shard(0), "lora_B": _StridedShard(1, split_factor=wrapper.r[adapter_name])}
    for factor, placement in placements.items():
        linear = getattr(wrapper, factor)[adapter_name]
        weight = linear.weight
        if hasattr(weight, "placements"):
            continue
        # Each rank keeps its part of its own tensor: nothing is sent.
        sharded = distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=None)
        # By its key: under low_cpu_mem_usage PEFT has replaced how a parameter is registered.
        linear._parameters["weight"] = nn.Parameter(sharded, requires_grad=weight.requires_grad)


def update_layer(stock: Callable[..., None]) -> Callable[..., None]:
    """`ParamWrapper.update_layer`, which makes an adapter's factors, sharding them as the experts are."""

    @wraps(stock)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        stock(self, adapter_name, *args, **kwargs)
        shard_lora(self, adapter_name)

    return update


def get_tp_plan_and_mesh(stock: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's look-up of how a target is tensor-parallel, which is wrong for a parameter of an experts module.

    transformers drops the tensor-parallel rule of a parameter that has an expert-parallel one; PEFT would still follow
    it, and look for the `weight` of a linear layer.
    """

    @wraps(stock)
    def tp_plan_and_mesh(model: Any, current_key: str) -> Any:
        plan, mesh = stock(model, current_key)
        path, _, name = current_key.rpartition(".")
        module = _submodule(model, path)
        if plan is None or module is None or not hasattr(module._parameters.get(name), "placements"):
            return plan, mesh
        if _mesh(module, name) is None:
            raise ParallelismError(
                f"{current_key} is tensor-parallel ({plan!r}): every rank has a part of every expert, which LoRA on "
                "experts cannot follow. Give each rank whole experts: DistributedConfig(tp_size=N, ep_size=N)."
            )
        return None, None

    return tp_plan_and_mesh


def _submodule(model: nn.Module, path: str) -> Any:
    """The module at a path, looking through the wrappers that stand there; None where there is none."""
    module: Any = model
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


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


def refuse_partitioned(tensors: Mapping[str, Tensor]) -> None:
    """Raises `ParallelismError` for an adapter to be saved of which this process has only a piece, or nothing."""
    empty = [name for name, tensor in tensors.items() if "lora_" in name and tensor.numel() == 0]
    if empty:
        raise ParallelismError(
            f"{len(empty)} tensors of the adapter, {empty[0]} first, are partitioned by ZeRO-3: this process has none "
            "of their numbers. Save within deepspeed.zero.GatheredParameters([p for p in model.parameters() if "
            "p.requires_grad]), or pass save_pretrained the state_dict of accelerator.get_state_dict(model)."
        )


def get_in_out_features(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`ParamWrapper._get_in_out_features`, which before PEFT 0.21 takes a partitioned parameter for an empty one."""

    @wraps(stock)
    def in_out_features(self: Any, module: nn.Module) -> Any:
        try:
            return stock(self, module)
        except ValueError as error:
            if not hasattr(self.get_param(), "ds_shape"):
                raise
            raise ParallelismError(
                "This PEFT can't make LoRA for an expert parameter that ZeRO-3 has partitioned (deepspeed.zero.Init). "
                "Update PEFT to 0.21 or later."
            ) from error

    return in_out_features
