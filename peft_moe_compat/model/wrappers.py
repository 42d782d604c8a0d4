"""A live `ParamWrapper` chain -> {parameter name: ExpertLora}.

PEFT nests one wrapper per targeted parameter around the experts module. Each is resolved when it is used, from what
its own `get_delta_weight` would do: parameters are told apart by `parameter_name`, never by depth, and a swap flag
counts only where the installed PEFT obeys it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..errors import LayoutError, PeftMoeCompatError
from ..families import FLAT_CLASSES, OWN_FORWARDS
from ..layout import ExpertLora, FlatLora
from ..others import owner_of, remedy
from ..reasons import Reason, because
from ..releases import LayoutRule
from .experts import REGISTRIES, dispatching_registry, features, is_transposed, stored_shape, stored_transposed
from .probe import installed_rule
from .sharding import exchanges_tokens, local_experts, local_factors
from .weights import unreadable_reason

__all__ = [
    "TAKEN_IMPLEMENTATIONS",
    "TAKES_LORA",
    "active_adapters",
    "dropout_of",
    "expert_loras",
    "experts_of",
    "experts_reason",
    "held_weight",
    "is_dtensor",
    "is_param_wrapper",
    "live_orientation",
    "native_reason",
    "parameter_reason",
    "read_adapter",
    "wrapper_chain",
]

# The experts implementations whose registry entry `patching` replaces, and the mark on every forward it puts in place.
TAKEN_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
TAKES_LORA = "_peft_moe_compat_takes_lora"


def is_param_wrapper(module: Any) -> bool:
    """Whether a module is a PEFT `ParamWrapper`, by what it has, so that PEFT need not be imported.

    What it has itself: torch.compile(module) and checkpoint_wrapper(module) pass on what is asked of them.
    """
    return isinstance(module, nn.Module) and "parameter_name" in vars(module) and "lora_A" in module._modules


def wrapper_chain(module: nn.Module) -> Iterator[Any]:
    """The ParamWrappers around one experts module, outermost first. Empty for a module that is not wrapped."""
    while is_param_wrapper(module):
        yield module
        module = module.base_layer  # type: ignore[assignment]


def live_orientation(wrapper: Any, transposed: bool, rule: LayoutRule) -> str:
    """`"linear"` or `"reversed"`, as `get_delta_weight` of the installed PEFT reads a live wrapper's lora_A and lora_B.

    lora_A's columns span the last stored axis ("e o i") where PEFT obeys the wrapper's swap flag and it is set, else
    the other ("e i o"). One expert, or a 2-D parameter, goes through `Linear.get_delta_weight`, which is B @ A on the
    stored axes whatever the flag says.
    """
    spans_last = wrapper.num_experts == 1 or (rule.reads_swap_flag and bool(wrapper._did_swap_in_out_features))
    return "linear" if spans_last != transposed else "reversed"


def held_weight(linear: Any) -> torch.Tensor:
    """`linear.weight`, without nn.Module's slow lookup, of which a forward would pay a dozen.

    By its key, at which ZeRO-3 gathers a parameter.
    """
    parameters = linear._parameters
    if "weight" not in parameters:  # parametrised
        return linear.weight  # type: ignore[no-any-return]
    return parameters["weight"]  # type: ignore[no-any-return]


def experts_of(wrapper: Any) -> Any:
    """`wrapper.get_base_layer()`, by the same shorter way."""
    module = wrapper
    while (inner := module._modules.get("base_layer")) is not None:
        module = inner
    return module


def _loaded(linear: Any) -> torch.Tensor:
    """The weight of lora_A or lora_B, fetched by the hook of accelerate that keeps it elsewhere, if there is one.

    A ParamWrapper reads these weights without calling the layers, so that their hooks do not run by themselves.
    """
    weight = held_weight(linear)
    if not weight.is_meta or (hook := getattr(linear, "_hf_hook", None)) is None:
        return weight
    hook.pre_forward(linear)
    loaded: torch.Tensor = linear.weight
    hook.post_forward(linear, None)
    if loaded.requires_grad:
        loaded.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
    return loaded


def _refuse_gradient(_gradient: torch.Tensor) -> None:
    raise PeftMoeCompatError(
        "lora_A or lora_B of expert weights is offloaded by accelerate, which drops the gradient of whatever it loads "
        "for one forward. To train, leave the adapter out of the offloading: offload only the modules called "
        "base_layer, or freeze the adapter."
    )


def read_adapter(
    wrapper: Any, adapter_name: str, transposed: bool, rule: LayoutRule, held: tuple[int, int] | None
) -> FlatLora:
    """One adapter of one wrapper. Of the live parameters: gradients reach them.

    Under expert parallelism these are the factors of the experts that this rank holds.

    Args:
        wrapper: A PEFT `ParamWrapper`.
        adapter_name: One of `wrapper.lora_A`.
        transposed: Whether the wrapped weight is stored "E in out" rather than "E out in".
        rule: Of the installed PEFT.
        held: `local_experts` of the wrapped parameter.

    Raises:
        LayoutError: The factors cannot belong to `wrapper.num_experts` experts of the adapter's rank.
    """
    modules = wrapper._modules
    lora_A = _loaded(modules["lora_A"]._modules[adapter_name])
    lora_B = _loaded(modules["lora_B"]._modules[adapter_name])
    num_experts = wrapper.num_experts
    if held is not None:
        num_experts = held[1] - held[0]
        lora_A, lora_B = local_factors(lora_A), local_factors(lora_B)
    orientation, scaling = live_orientation(wrapper, transposed, rule), wrapper.scaling[adapter_name]
    lora = layout.flat(lora_A, lora_B, num_experts, orientation=orientation, scaling=scaling)
    if lora.rank != wrapper.r[adapter_name]:
        raise LayoutError(
            f"lora_A of {wrapper.parameter_name!r}, adapter {adapter_name!r}, has {lora_A.shape[0]} rows; "
            f"r * E = {wrapper.r[adapter_name]} * {num_experts} were expected ('(E r) p'). "
            "Was the adapter trained with another rank or num_experts?"
        )
    p = dropout_of(wrapper, adapter_name)
    return lora._replace(dropout=((lora.rank, p),)) if p else lora


def dropout_of(wrapper: Any, adapter_name: str) -> float:
    """The probability with which an adapter's input is dropped now: 0 in evaluation."""
    layer = wrapper._modules["lora_dropout"]._modules.get(adapter_name)
    if layer is None or not layer.training or isinstance(layer, nn.Identity):  # as PEFT has it where there is none
        return 0.0
    return float(getattr(layer, "p", 0.0))


def active_adapters(wrapper: Any) -> list[str]:
    """The active ones among a wrapper's own."""
    held = wrapper._modules["lora_A"]._modules
    return [name for name in wrapper.active_adapters if name in held]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded or replicated over the processes of a mesh."""
    return hasattr(tensor, "device_mesh")


def expert_loras(module: nn.Module, adapter_names: Collection[str] | None = None) -> dict[str, ExpertLora]:
    """The expert LoRA of one wrapped experts module, in canonical form, per parameter.

    Args:
        module: The outermost wrapper, as it stands in the wrapped model: `...layers[0].mlp.experts`.
        adapter_names: Adapters to read, concatenated along the rank; by default the active ones. Whether adapters are
            disabled or merged makes no difference here.

    Returns:
        Parameter name -> ExpertLora with A "E r in", B "E out r"; parameters without such an adapter are left out.
        Under expert parallelism E counts the experts that this rank holds.

    Raises:
        LayoutError: No ParamWrapper, or no adapter of that name; the module's orientation is unknown (see
            `declare_layout`); or the factors do not fit the weight.
    """
    rule = installed_rule()
    adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    chain = list(wrapper_chain(module))
    if not chain:
        raise LayoutError(
            f"expert_loras needs the ParamWrapper that PEFT put in place of an experts module, but got a "
            f"{type(module).__name__}. Pass it as it stands in the wrapped model: model.model.layers[0].mlp.experts."
        )
    known = {name for wrapper in chain for name in wrapper.lora_A}
    if unknown := set(adapter_names or ()) - known:
        raise LayoutError(f"No adapter {sorted(unknown)} on this module; it has {sorted(known)}.")
    found: dict[str, ExpertLora] = {}
    for wrapper in chain:
        asked = wrapper.active_adapters if adapter_names is None else adapter_names
        names = [name for name in asked if name in wrapper.lora_A]
        if not names:
            continue
        experts, parameter = wrapper.get_base_layer(), wrapper.parameter_name
        in_features, out_features = features(experts, parameter)
        shape = stored_shape(experts, parameter) or ()
        if len(shape) == 3 and is_transposed(experts) is None:
            raise LayoutError(
                f"{type(experts).__name__} does not say whether its weights are stored '(E, out, in)' or "
                f"'(E, in, out)'; {parameter!r} is {shape}. Say it once with "
                f"peft_moe_compat.declare_layout({type(experts).__name__}, is_transposed=...)."
            )
        held = local_experts(experts, parameter)
        transposed = stored_transposed(experts, parameter)
        lora = layout.concat([read_adapter(wrapper, name, transposed, rule, held).canonical() for name in names])
        num_experts = shape[0] if len(shape) == 3 else 1
        if held is not None:
            num_experts = held[1] - held[0]
        lora.check(num_experts, out_features, in_features, f"{type(experts).__name__}.{parameter}, stored as {shape}")
        found[parameter] = layout.concat([found[parameter], lora]) if parameter in found else lora
    return found


def native_reason(wrapper: Any) -> Reason | None:
    """Why a ParamWrapper runs PEFT's own forward, or None where it can run the grouped-mm forward.

    About the module alone: a wrapper whose adapters are disabled or merged goes through PEFT's forward as well.
    """
    experts, hooked = wrapper.get_base_layer(), getattr(wrapper, "_old_forward", None)
    if hooked is not None and not hasattr(hooked, TAKES_LORA):
        return because("hooked_before")
    return experts_reason(experts, is_transposed(experts)) or parameter_reason(wrapper, experts)


def experts_reason(experts: Any, transposed: bool | None) -> Reason | None:
    """The same of an experts module of that orientation, whichever of its parameters are wrapped."""
    cls = type(experts)
    own = hasattr(cls.forward, TAKES_LORA)
    registry = None if own else dispatching_registry(cls)
    if registry is None and not own:
        owner = owner_of(cls.forward)
        if cls.__module__.startswith("transformers.") and not owner.startswith("transformers."):
            return because("class_forward_replaced", cls.__name__, owner, remedy(owner))
        return because("not_dispatching", cls.__name__)
    if "forward" in experts.__dict__ and not (_only_hooked(experts) or exchanges_tokens(experts)):
        return because("forward_replaced", cls.__name__)
    if registry is None:
        return because("unknown_orientation", cls.__name__) if transposed is None else None
    implementation = _implementation(experts.config)
    if implementation not in TAKEN_IMPLEMENTATIONS:
        return because("other_implementation", implementation, TAKEN_IMPLEMENTATIONS)
    entry = getattr(sys.modules[registry], REGISTRIES[registry])[implementation]
    if not hasattr(entry, TAKES_LORA):
        return because("foreign_implementation", implementation, entry.__module__)
    if transposed is None:
        return because("unknown_orientation", cls.__name__)
    return None


def _implementation(config: Any) -> str | None:
    """`config._experts_implementation`, from where transformers keeps it: each attribute goes through its own code."""
    found: str | None = vars(config).get("_experts_implementation_internal")
    return config._experts_implementation if found is None else found


def parameter_reason(wrapper: Any, experts: Any) -> Reason | None:
    """The same of the parameter that a wrapper is for, once its experts can run the grouped-mm forward."""
    name = wrapper.parameter_name
    if name not in ("gate_up_proj", "up_proj", "down_proj") and not _of_own_forward(experts, name):
        return because("no_projection", name)
    for linear in wrapper._modules["lora_A"]._modules.values():
        if held_weight(linear).dtype.itemsize < 2:
            return because("lora_in_8_bits")
    return unreadable_reason(experts, name)


def _of_own_forward(experts: Any, name: str) -> bool:
    """Whether a parameter is all that an experts class of one projection has, or one of its matrices."""
    classes = [cls.__name__ for cls in type(experts).__mro__]
    if name == "weight":
        return any(OWN_FORWARDS.get(cls, ("", ""))[1] == "one_projection" for cls in classes)
    return any(name in FLAT_CLASSES.get(cls, ()) for cls in classes)


def _only_hooked(experts: Any) -> bool:
    """Whether an instance's own forward is accelerate's hook around the class's."""
    wrapped = getattr(experts, "_old_forward", None) if hasattr(experts, "_hf_hook") else None
    return getattr(wrapped, "__func__", None) is type(experts).forward
