"""What a model's routed experts are called: names for PEFT's `target_parameters`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..errors import NoExpertParametersError
from ..families import FLAT_CLASSES, PACKED_CLASSES
from ..releases import installed_issue
from .experts import bare, routed_experts, strip_base_layer
from .weights import unreadable_reason

__all__ = ["expert_parameters"]


def expert_parameters(
    model: nn.Module, projections: Collection[str] | None = None, layers: Collection[int] | None = None
) -> list[str]:
    """Names for `LoraConfig(target_parameters=...)` that reach every routed expert weight and nothing else.

    PEFT wraps a parameter whose full name is, or ends in "." plus, a target. The names returned are the shortest such
    endings, from two components on, that no other parameter of the model shares; so shared experts, dense layers,
    routers and biases stay out. Pass `target_modules=[]` beside them if nothing else should be adapted: left at None,
    some PEFT releases add attention layers of their own choice.

    Args:
        model: The model, wrapped by PEFT or not.
        projections: Only these, for example `["down_proj"]`. By default all.
        layers: Only decoder layers of these indices, the first number in a module's name. By default all.

    Raises:
        NoExpertParametersError: The model has no such parameter, or none for one of the projections or layers asked
            for; the message lists what was found instead.
    """
    model = bare(model)
    found = []
    for name, module, names in routed_experts(model):
        _refuse_unrunnable(name, module)
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        found += [(f"{name}.{parameter}", module, parameter, layer) for parameter in names]
    if not found:
        raise NoExpertParametersError(_nothing_found(model))
    projections = _chosen("projections", projections, {parameter for _, _, parameter, _ in found})
    layers = _chosen("layers", layers, {layer for *_, layer in found})
    wanted = {full: m for full, m, parameter, layer in found if parameter in projections and layer in layers}
    names_of_all = (strip_base_layer(name) for name, _ in model.named_parameters())
    others = [tuple(name.split(".")) for name in names_of_all if name not in wanted]
    # PEFT finds an already parametrised weight by its full name only.
    targets = {
        full if getattr(module, "parametrizations", None) else _shortest_ending(full, others): None
        for full, module in wanted.items()
    }
    return list(targets)


def _chosen(what: str, asked: Any, there: set[Any]) -> Collection[Any]:
    """What was asked for, all by default; one value may come without a list around it."""
    if asked is None:
        return there
    chosen = {asked} if isinstance(asked, str) or not isinstance(asked, Iterable) else set(asked)
    if chosen - there or not chosen:
        raise NoExpertParametersError(
            f"{what}={_in_order(chosen)} was asked for, but the experts have {what}={_in_order(there)}."
        )
    return chosen


def _in_order(values: Collection[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (isinstance(value, int), value if isinstance(value, int) else str(value)))


def _shortest_ending(full: str, others: list[tuple[str, ...]]) -> str:
    """Of two components at least, shared with none of the others, and not beginning with a bare layer number."""
    parts = tuple(full.split("."))
    for length in range(2, len(parts)):
        ending = parts[-length:]
        if not ending[0].isdigit() and not any(other[-length:] == ending for other in others):
            return ".".join(ending)
    return full


def _refuse_unrunnable(name: str, module: nn.Module) -> None:
    if type(module).__name__ in PACKED_CLASSES:
        reason = unreadable_reason(module, "")
        raise NoExpertParametersError(f"{name} ({type(module).__name__}): {reason}.")
    if type(module).__name__ in FLAT_CLASSES and (issue := installed_issue("dbrx_turned")):
        raise NoExpertParametersError(f"{name}: {issue.symptom}: {issue.remedy}.")


def _nothing_found(model: nn.Module) -> str:
    message = f"{type(model).__name__} has no routed expert parameter."
    for name, module in model.named_modules():
        if name.endswith("experts") and isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module):
            each = type(next(module.children())).__name__
            return (
                f"{message} Its experts are separate modules ({name} is a list of {each}), as in most models of "
                "transformers before 5.0: target their linear layers with target_modules, or install a transformers "
                "that fuses them."
            )
    stacks = [f"{n} {tuple(p.shape)}" for n, p in model.named_parameters() if p.ndim == 3]
    if not stacks:
        return f"{message} It has no 3-D parameter at all, so it is not a Mixture-of-Experts model with fused experts."
    return (
        f"{message} 3-D parameters found: {', '.join(stacks[:5])}. If one of these is an expert stack, name its class "
        "with peft_moe_compat.declare_layout."
    )
