"""Adapters made for experts that are spread over processes: what PEFT makes, sharded as its experts are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelismError
from ..model.sharding import exchanges_tokens, expert_mesh, whole
from ..model.wrappers import is_param_wrapper

__all__ = [
    "gather_state_dict_for_save",
    "get_in_out_features",
    "get_tp_plan_and_mesh",
    "inject_adapter",
    "linear_features",
    "refuse_merge",
    "refuse_partitioned",
    "update_layer",
]


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
        _as_on_first_rank(weight, mesh.device_type)
        # Each rank keeps its part of its own tensor.
        sharded = distribute_tensor(weight.detach(), mesh, [placement], src_data_rank=None)
        # By its key: under low_cpu_mem_usage PEFT has replaced how a parameter is registered.
        linear._parameters["weight"] = nn.Parameter(sharded, requires_grad=weight.requires_grad)


def _as_on_first_rank(weight: Any, device_type: str, meshes: Any = None) -> None:
    """Has all ranks draw the same initial values, however each is seeded: those of one process seeded as rank 0.

    Of a tensor-parallel weight, all that have the same part of it.
    """
    if weight.is_meta:
        return
    spread = hasattr(weight, "to_local")
    held = weight.detach().to_local() if spread else weight.detach()
    sent = held.to(device_type)  # one that is offloaded too
    for group in [meshes.get_mesh(name).get_group() for name in ("fsdp", "dp_replicate")] if spread else [None]:
        torch.distributed.broadcast(sent, group=group, group_src=0)
    held.copy_(sent)


def update_layer(stock: Callable[..., None]) -> Callable[..., None]:
    """`ParamWrapper.update_layer`, which makes an adapter's factors, sharding them as the experts are."""

    @wraps(stock)
    def update(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        stock(self, adapter_name, *args, **kwargs)
        shard_lora(self, adapter_name)

    return update


def inject_adapter(stock: Callable[..., None]) -> Callable[..., None]:
    """`BaseTuner.inject_adapter`: an adapter with LoRA on experts is sharded too where the model came so from loading.

    PEFT makes plain parameters, of which every rank would train its own.
    """

    @wraps(stock)
    def injecting(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = getattr(getattr(model, "config", None), "distributed_config", None)
        sharded = getattr(config, "dp_size", getattr(config, "fsdp_size", 1)) > 1
        adapter, there = self.peft_config[adapter_name], any(map(is_param_wrapper, model.modules()))
        if sharded and (there or getattr(adapter, "target_parameters", None)):
            _check_fsdp(model, config, adapter, there)  # some of it fails in PEFT otherwise, without a remedy
        stock(self, model, adapter_name, *args, **kwargs)
        if config is None or not any(map(is_param_wrapper, model.modules())):
            return
        if getattr(config, "pp_size", 1) > 1:
            raise ParallelismError(
                "LoRA on experts does not train under pipeline parallelism. Leave out pp_size: "
                "DistributedConfig(fsdp_size=M, ep_size=N)."
            )
        if sharded:
            _check_fsdp(model, config, adapter, there)
            fully_shard_lora(model, config)

    return injecting


def _check_fsdp(model: Any, config: Any, adapter: Any, another: bool) -> None:
    """Raises `ParallelismError` for an adapter that FSDP2 could not take in."""
    from peft import import_utils

    if not hasattr(config, "dp_size") or not getattr(import_utils, "is_transformers_dtensor_tp", False):
        raise ParallelismError(
            "transformers has sharded the model by FSDP2 while loading it, and LoRA on its experts would be every "
            "rank's own under these releases. Update PEFT to 0.21.1 and transformers to 5.24 or later, or shard the "
            "model by torch's fully_shard once it has its adapter."
        )
    if another:
        what = "a second adapter"
    elif adapter.modules_to_save or getattr(adapter, "trainable_token_indices", None):
        what = "modules_to_save or trainable_token_indices"
    elif model._get_fsdp_state()._is_root is not None:
        what = "an adapter made after the model's first forward"
    else:
        return
    raise ParallelismError(
        f"transformers has sharded the model by FSDP2 while loading it, which can't take in {what}: every rank would "
        "train its own. Make one LoRA, as soon as the model is loaded."
    )


def fully_shard_lora(model: Any, config: Any) -> None:
    """Gives an adapter to FSDP2: LoRA on experts over the mesh of the experts, the other over that of its layers.

    Of one module's linears (attention's, say) it is one group, gathered for that module's forward.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.distributed.fsdp import _get_fsdp_policy_kwargs

    replicated = ("dp_replicate",) if config.dp_replicate_size > 1 else ()
    policy = _get_fsdp_policy_kwargs(config)
    groups: dict[nn.Module, list[nn.Module]] = {}
    for layer, parent in _tuner_layers(model):
        alone = _is_spread(layer) or isinstance(parent, FSDPModule) or not _is_called(parent)
        groups.setdefault(layer if alone else parent, []).append(layer)
    for module, layers in sorted(groups.items(), key=lambda group: len(list(group[0].modules()))):  # inner ones first
        lora = [p for layer in layers for p in _lora_parameters(layer)]
        spread = _is_spread(layers[0])
        mesh = model._mesh_manager.get_mesh((*replicated, "efsdp" if spread else "fsdp"))
        for parameter in lora:
            if not spread:  # else they were, before they were sharded
                _as_on_first_rank(parameter, mesh.device_type, model._mesh_manager)
        ignored = set(module.parameters()) - set(lora)
        unit: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored, **policy)
        if spread:
            # As transformers has it for the experts: their gradients hold the tokens of all batches.
            unit.set_gradient_divide_factor(float(config.dp_size))
            unit.set_force_sum_reduction_for_comms(config.efsdp_size > 1)


def _tuner_layers(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """PEFT's outermost layers and the modules they stand in, innermost of these first."""
    for module in reversed(list(model.modules())):
        if not hasattr(module, "get_base_layer"):
            yield from ((child, module) for child in module.children() if hasattr(child, "get_base_layer"))


def _is_spread(layer: Any) -> bool:
    """Whether a layer is on experts of which other ranks have others."""
    return is_param_wrapper(layer) and expert_mesh(layer.get_base_layer(), layer.parameter_name) is not None


def _lora_parameters(layer: Any) -> list[nn.Parameter]:
    base = set(layer.get_base_layer().parameters())
    return [p for p in layer.parameters() if p not in base]


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward, as no list or dict of modules has."""
    return type(module).forward is not nn.Module.forward


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


def linear_features(stock: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's `_get_in_out_features` of a linear, of which it takes this rank's part wherever FSDP has a second mesh.

    What FSDP cuts it gathers for the forward; what tensor parallelism does stays cut. PEFT 0.21.2 knows "fsdp" alone.
    """

    @wraps(stock)
    def features(module: Any) -> Any:
        weight: Any = getattr(module, "weight", None)
        names = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()
        if not isinstance(module, nn.Linear) or "fsdp" not in names:
            return stock(module)
        out_in = list(weight.shape)
        for size, name, placement in zip(weight.device_mesh.shape, names, weight.placements, strict=True):
            if name == "tp" and placement.is_shard():
                out_in[placement.dim] //= size
        return out_in[1], out_in[0]

    return features


def _submodule(model: nn.Module, path: str) -> Any:
    """The module at a path, looking through the wrappers that stand there; None where there is none."""
    module: Any = model
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def refuse_merge(model: nn.Module) -> None:
    """Raises `ParallelismError` where PEFT would fail with a part of the LoRA merged: factors on different meshes."""
    for layer, _ in _tuner_layers(model):
        meshes = {getattr(parameter, "device_mesh", None) for parameter in _lora_parameters(layer)} - {None}
        if len(meshes) > 1:
            raise ParallelismError(
                f"lora_A and lora_B of a {type(layer.get_base_layer()).__name__} are sharded over different meshes "
                f"({' and '.join(map(str, meshes))}): tensor parallelism cuts one of them, FSDP both. PEFT can't merge "
                "them. Save the adapter and merge it into the checkpoint: `peft-moe-compat merge BASE ADAPTER OUT`."
            )


def gather_state_dict_for_save(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What PEFT gathers a model's tensors by to save an adapter: without stacks of experts, which are in none."""

    @wraps(stock)
    def gather(state_dict: Mapping[str, Any], *args: Any) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        for name, tensor in state_dict.items():
            if not isinstance(tensor, Tensor) or tensor.ndim < 3:
                held = whole(tensor) if isinstance(tensor, Tensor) else tensor
                gathered |= stock({name: held}, *args)
        return gathered

    return gather


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
