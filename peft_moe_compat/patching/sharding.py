"""Adapters made for experts that are spread over processes: what PEFT makes, sharded as its experts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ..errors import ParallelismError
from ..model.sharding import exchanges_tokens, expert_mesh

__all__ = ["get_in_out_features", "get_tp_plan_and_mesh", "refuse_partitioned", "update_layer"]


def shard_lora(wrapper: Any, adapter_name: str) -> None:
    """Keeps of one adapter of a `ParamWrapper` what belongs to this rank's experts, where there are others.

    Raises:
        ParallelismError: The experts are sharded in a way that LoRA cannot follow.
    """
    experts = wrapper.get_base_layer()
    mesh = expert_mesh(experts, wrapper.parameter_name)
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
        if expert_mesh(module, name) is None:
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
