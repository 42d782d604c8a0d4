"""What a live model says about its experts, and a file's expert tensors turned into what its wrappers hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import layout
from ..adapters.base_model import BaseModel, load_base_model
from ..adapters.decide import Decision
from ..adapters.names import PREFIX, unwrapped
from ..adapters.parts import expert_parts
from ..adapters.slots import ExpertsModule
from ..adapters.source import AdapterSource
from ..adapters.targets import any_ending
from ..errors import AdapterError, LayoutError
from ..model.experts import bare, features, held_parameters, routed_experts, stored_shape, stored_transposed
from ..model.probe import installed_rule
from ..model.wrappers import is_param_wrapper, live_orientation, wrapper_chain
from ..releases import known_issues

__all__ = [
    "UnderstoodFile",
    "Wrappers",
    "chains",
    "convert",
    "counterparts",
    "differences",
    "factor_names",
    "facts_of",
    "has_experts",
    "known_of_this_pair",
    "live_namer",
    "live_path",
    "live_wrappers",
    "model_type_of",
    "orientation_of",
]

_SLOT = re.compile(r"^(?P<module>.*?)(?:\.base_layer)*(?P<factor>\.lora_[AB].*)$")


def live_path(name: str) -> str:
    """A module's name as it was before anybody wrapped it."""
    return ".".join(part for part in unwrapped(name.removeprefix(PREFIX)).split(".") if part != "base_layer")


def live_namer(model: Any) -> Callable[[str], str]:
    """Tensor's name in a file -> as the model's own `state_dict` has it, whichever of its modules are compiled.

    `torch.compile(module)` adds to the names below it; FSDP and checkpointing keep theirs out of a `state_dict`.
    """
    names = (name.removeprefix(PREFIX) for name, _ in getattr(model, "_orig_mod", model).named_modules())
    compiled = {unwrapped(name): name for name in names if "_orig_mod" in name}

    def named(name: str) -> str:
        prefix = PREFIX if name.startswith(PREFIX) else ""
        module, dot, rest = unwrapped(name.removeprefix(prefix)).partition(".lora_")
        return f"{prefix}{compiled.get(module, module)}{dot}{rest}"

    return named


def facts_of(model: Any, target_parameters: Iterable[str] = ()) -> BaseModel:
    """The base model of a live model, wrapped or not: the sizes of its expert stacks.

    A module of unknown orientation counts as "E out in", which is what PEFT takes it for. Whatever is converted from
    and to that comes out right.

    Args:
        model: The model.
        target_parameters: PEFT's names of further stacks to list: of modules that nothing else shows to be experts.
    """
    inner = bare(model)
    found = {(live_path(name), p): module for name, module, names in routed_experts(inner) for p in names}
    targeted = frozenset(target_parameters)
    for name, module in inner.named_modules() if targeted else ():
        if not hasattr(module, "get_base_layer"):
            path = live_path(name)
            found |= {(path, p): module for p in held_parameters(module) if any_ending(f"{path}.{p}", targeted)}
    stacks = {}
    shapes = {key: stored_shape(module, key[1]) for key, module in found.items()}
    for (path, parameter), shape in shapes.items():
        # One expert, or a 2-D parameter, is laid out alike by every release: nothing there is to be converted.
        if shape is not None and len(shape) == 3 and shape[0] > 1:
            stacks[path, parameter] = (shape[0], *features(found[path, parameter], parameter))
    holders = {path for path, _ in stacks}
    for (path, parameter), shape in shapes.items():
        if path in holders and shape is not None and len(shape) == 2:  # but its LoRA is nested among that of stacks
            stacks[path, parameter] = (1, shape[1], shape[0])
    return BaseModel(model_type_of(inner), stacks=stacks, name=type(inner).__name__)


def counterparts(paths: Iterable[str], facts: BaseModel) -> dict[str, str]:
    """Path in the file -> path of a stack in the model: the same, else the only one alike from the layer on."""

    def layer(path: str) -> str:
        parts = path.split(".")
        return ".".join(parts[max(0, next((i for i, part in enumerate(parts) if part.isdigit()), 1) - 1) :])

    stacks = {path for path, _ in facts.stacks}
    by_layer: dict[str, list[str]] = {}
    for stack in sorted(stacks):
        by_layer.setdefault(layer(stack), []).append(stack)
    found = {}
    for path in paths:
        alike = [path] if path in stacks else by_layer.get(layer(path), [])
        if len(alike) == 1:
            found[path] = alike[0]
    return found


def has_experts(model: Any) -> bool:
    """Whether a model has experts by that name, fused or each a module."""
    return any(live_path(name).rpartition(".")[2] == "experts" for name, _ in bare(model).named_modules())


def model_type_of(model: Any) -> str:
    """`model_type` of the part of a config that has the experts, without `_text`; "" for a model without a config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return ""
    try:
        return load_base_model(config.to_dict()).model_type
    except AdapterError:  # a config that names its sizes as no other does
        return str(config.model_type).removesuffix("_text")


def chains(model: Any) -> dict[str, list[Any]]:
    """Path of an experts module -> the ParamWrappers around it, outermost first."""
    found: dict[str, list[Any]] = {}
    for name, module in bare(model).named_modules():
        if is_param_wrapper(module):
            found.setdefault(live_path(name), list(wrapper_chain(module)))
    return found


def orientation_of(wrapper: Any) -> str:
    """Orientation of a live wrapper's factors, `"linear"` or `"reversed"`, as its own `get_delta_weight` has it."""
    transposed = stored_transposed(wrapper.get_base_layer(), wrapper.parameter_name)
    return live_orientation(wrapper, transposed, installed_rule())


@dataclass(frozen=True)
class UnderstoodFile:
    """An adapter file with fused expert LoRA, and the model it is for.

    Attributes:
        source: The adapter, its expert modules those that the model has too.
        paths: Path of an experts module in the file -> in the model.
        decision: What the file holds.
    """

    source: AdapterSource
    paths: Mapping[str, str]
    decision: Decision


# Of one experts module: parameter -> (how many wrappers are around its own, its wrapper).
Wrappers = Mapping[str, tuple[int, Any]]


def live_wrappers(file: UnderstoodFile, model: Any, adapter_name: str) -> list[tuple[ExpertsModule, Wrappers]]:
    """Every experts module of the file with the live wrappers that are to take its LoRA.

    Raises:
        LayoutError: A wrapper is missing, or its factors are not such as PEFT's own forward could use.
    """
    around = chains(model)
    found: list[tuple[ExpertsModule, Wrappers]] = []
    for module in file.source.modules:
        chain = enumerate(around.get(file.paths[module.path], ()))
        wrappers = {w.parameter_name: (depth, w) for depth, w in chain if adapter_name in w.lora_A}
        for name in file.decision.readings[module.path].nesting:
            if name not in wrappers:
                raise LayoutError(
                    f"The file has LoRA on {module.path}.{name}; PEFT made adapter {adapter_name!r} there for "
                    f"{', '.join(sorted(wrappers)) or 'no parameter'} alone.{known_of_this_pair('second_adapter')}"
                )
            _check_usable(f"{module.path}.{name}", wrappers[name][1], adapter_name)
        found.append((module, wrappers))
    return found


def _check_usable(what: str, wrapper: Any, adapter_name: str) -> None:
    weights = (wrapper.lora_A[adapter_name].weight, wrapper.lora_B[adapter_name].weight)
    A, B = (tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights)
    fan_in, fan_out = features(wrapper.get_base_layer(), wrapper.parameter_name)
    p, q = (fan_in, fan_out) if orientation_of(wrapper) == "linear" else (fan_out, fan_in)
    if (A[1], B[0]) != (p, q):
        raise LayoutError(
            f"The LoRA that was made for {what} has lora_A {A} and lora_B {B}; PEFT computes with '(E r) {p}' and "
            f"'{q} (r E)' there, so its forward would fail.{known_of_this_pair('load_adapter_swaps')}"
        )


def known_of_this_pair(*codes: str) -> str:
    """Which of the known issues of those codes the installed PEFT and transformers have, and the ways around."""
    import peft
    import transformers

    issues = known_issues(peft.__version__, transformers.__version__)
    known = "; ".join(f"{issue.symptom}: {issue.remedy}" for issue in issues if issue.code in codes)
    pair = f"PEFT {peft.__version__} and transformers {transformers.__version__}"
    return f" Known of {pair}: {known}." if known else f" Nothing of the kind is known of {pair}: is PEFT patched?"


def differences(module: ExpertsModule, wrappers: Wrappers, decision: Decision) -> set[str]:
    """What a module's tensors in the file are that its wrappers' are not, in words; empty where they are the same."""
    reading, found = decision.readings[module.path], set()
    if any(slot.unfolded for slot in module.slots):
        found.add("its factors are stacks")
    for level, name in enumerate(reversed(reading.nesting)):
        depth, wrapper = wrappers[name]
        if wrapper.num_experts > 1 and orientation_of(wrapper) != reading.orientation:
            found.add(f"it is {reading.orientation} ({decision.orientation.why})")
        if depth != level:
            found.add(f"it is nested {', '.join(reading.nesting)} ({decision.nesting.why})")
    if decision.packing.value != "either" and "grouped" in map(decision.packing_of, reading.nesting):
        found.add(f"lora_B is grouped by expert ({decision.packing.why})")
    return found


def convert(file: UnderstoodFile, module: ExpertsModule, wrappers: Wrappers, tensors: dict[str, Tensor]) -> None:
    """Replaces the tensors of a module, by their names in the file, with what its wrappers hold. Values move only."""
    parts = expert_parts(module, file.decision)
    loras = {part.name: part.load(tensors) for part in parts}
    for name in (name for slot in module.slots for name in slot.names):
        del tensors[name]
    for name, lora in loras.items():
        depth, wrapper = wrappers[name]
        flat = layout.to_flat(lora, orientation=orientation_of(wrapper))
        for key, tensor in zip(factor_names(module, depth), flat, strict=True):
            tensors[key] = tensor.contiguous()


def factor_names(module: ExpertsModule, depth: int) -> tuple[str, ...]:
    """What the file calls lora_A and lora_B of a module's wrapper that has `depth` others around it."""
    nested = rf"\g<module>{'.base_layer' * depth}\g<factor>"
    return tuple(_SLOT.sub(nested, key) for key in module.slots[0].names)
