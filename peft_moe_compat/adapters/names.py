"""The names of the tensors in an adapter file, sorted into what they belong to.

Three forms hold the LoRA of routed experts; everything else in the file is `other` and never touched.

    fused       `P.lora_A.weight`, `P.base_layer.lora_A.weight`: PEFT's ParamWrapper, one flat pair per nesting level
    per_expert  `P.3.gate_proj.lora_A.weight`: a LoRA of its own on each expert's linears
    stacked     `P.gate_up_proj.lora_A.weight`, 3-D: "E r in" and "E out r"; or 2-D, where all experts share it (VeOmni)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import AdapterFileError
from .ranks import lora_rank

__all__ = [
    "LINEAR_NAMES",
    "PREFIX",
    "ROLES",
    "AdapterKeys",
    "ExpertsKeys",
    "Pair",
    "parse_keys",
    "peft_name",
    "reaches_parameter",
    "role_of",
    "same_tensor",
    "targeted_matrix",
    "targeted_parameters",
    "unwrapped",
]

PREFIX = "base_model.model."
# What torch.compile, FSDP and checkpointing put into the name of a module that they wrap.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?(?:\.weight)?$")
_EXPERT = re.compile(r"^(?P<path>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)$")
# Names of an expert's linears -> role. w1, w3, w2 are Mixtral's, kept by PhiMoE, Jamba's relatives and MiniMax.
LINEAR_NAMES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    # llama.cpp's names for stacks, in what this package writes for it.
    "ffn_gate_exps": "gate",
    "ffn_up_exps": "up",
    "ffn_down_exps": "down",
}
# Expert parameters -> role, by their own name or, where that is `weight`, with the name of the module that holds it.
ROLES = {
    "gate_up_proj": "gate_up",
    "up_proj": "up",
    "down_proj": "down",
    "input_linear.weight": "gate_up",
    "output_linear.weight": "down",
    "fc1.weight": "gate_up",
    "fc2.weight": "down",
}


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Pair:
    """The two tensors of one LoRA, by their names in the file."""

    lora_A: str  # noqa: N815
    lora_B: str  # noqa: N815


@dataclass(frozen=True)
class ExpertsKeys:
    """The LoRA of one experts module.

    Attributes:
        path: Of the module in the model, without PEFT's `base_model.model.` and `base_layer`.
        form: `"fused"`, `"per_expert"` or `"stacked"`.
        slots: Of a fused module: its pairs by nesting, innermost first.
        experts: Of a per-expert module: (expert, name of the linear) -> pair.
        stacks: Of a stacked module: parameter -> pair.
    """

    path: str
    form: str
    slots: tuple[Pair, ...] = ()
    experts: Mapping[tuple[int, str], Pair] = field(default_factory=dict)
    stacks: Mapping[str, Pair] = field(default_factory=dict)

    def pairs(self) -> list[Pair]:
        return [*self.slots, *self.experts.values(), *self.stacks.values()]


@dataclass(frozen=True)
class AdapterKeys:
    """Everything an adapter file holds, by name.

    Attributes:
        prefix: What precedes the module paths, PEFT's `base_model.model.` or nothing.
        modules: One entry per experts module with LoRA.
        other: Names of all further tensors, in the order of the file.
    """

    prefix: str
    modules: tuple[ExpertsKeys, ...]
    other: tuple[str, ...]


def role_of(path: str, parameter: str) -> str | None:
    """`"gate_up"`, `"up"` or `"down"` of an expert parameter, None for a name nobody has given a role."""
    return ROLES.get(parameter) or ROLES.get(f"{path.rpartition('.')[2]}.{parameter}")


def linear_role(name: str) -> str | None:
    """`"gate"`, `"up"`, `"down"` or `"gate_up"` of an expert's linear, None for a name nobody has given a role."""
    return LINEAR_NAMES.get(name)


def targeted_parameters(config: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Names of the module's parameters that the config's `target_parameters` reach, matched as PEFT does, by suffix."""
    found = []
    for target in config.get("target_parameters") or ():
        module, _, parameter = str(target).rpartition(".")
        if not module or _reaches(module, path):
            found.append(parameter)
    return tuple(dict.fromkeys(found))


def reaches_parameter(config: Mapping[str, Any], key: str) -> bool:
    """Whether the config's `target_parameters` reach a parameter, by its full name, as PEFT matches them: by suffix."""
    return any(key == target or key.endswith(f".{target}") for target in config.get("target_parameters") or ())


def targeted_matrix(config: Mapping[str, Any], path: str) -> str | None:
    """The entry of `target_parameters` that LoRA on an ordinary module is for, a router's weight, say; else None.

    PEFT matches its patterns with the name of that parameter, and those of a linear with the linear's own.
    """
    for target in config.get("target_parameters") or ():
        module = str(target).rpartition(".")[0]
        if module and _reaches(module, path):
            return str(target)
    return None


def peft_name(name: str, prefix: str) -> str:
    """A tensor's name as PEFT saves it: with its prefix, and without the name of the adapter.

    Args:
        name: In the file.
        prefix: See `AdapterKeys`.
    """
    name = unwrapped(name.removeprefix(prefix))
    match = _LORA.match(name)
    if match is not None and match["adapter"] != "bias":
        name = f"{match['module']}.lora_{match['factor']}.weight"
    return PREFIX + name


def unwrapped(name: str) -> str:
    """The name of a module or tensor before anybody but PEFT wrapped what it is in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def same_tensor(name: str, other: str) -> AdapterFileError:
    return AdapterFileError(
        f"{name!r} and {other!r} are the same tensor under two names. Does the file hold two adapters? "
        "Save each one by itself."
    )


def _reaches(target: str, path: str) -> bool:
    """Whether a targeted module's name and a module's path can mean the same: one ends with the other."""
    return path == target or path.endswith(f".{target}") or target.endswith(f".{path}")


def parse_keys(tensors: Mapping[str, HasShape], config: Mapping[str, Any]) -> AdapterKeys:
    """Sorts the tensors of an adapter.

    Args:
        tensors: Name -> anything with a shape, in the order of the file.
        config: `adapter_config.json`, for the parameters it targets.

    Raises:
        AdapterFileError: One half of a pair is missing, or two names mean the same tensor.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    halves: dict[tuple[str, str], dict[str, str]] = {}
    other: list[str] = []
    for name, tensor in tensors.items():
        place = _place(unwrapped(name.removeprefix(prefix)), len(tensor.shape), config)
        if place is None:
            other.append(name)
            continue
        path, slot, factor = place
        pair = halves.setdefault((path, slot), {})
        if factor in pair:
            raise same_tensor(pair[factor], name)
        pair[factor] = name
    for (path, slot), pair in halves.items():
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            raise AdapterFileError(
                f"lora_{missing} of {path!r} ({slot}) is missing; only {next(iter(pair.values()))!r} is there. "
                "Is the file complete?"
            )
    routed = []
    left = set(other)
    for module in _modules(halves):
        if _is_matrix(module, tensors, config):
            left.update((module.slots[0].lora_A, module.slots[0].lora_B))
        else:
            routed.append(module)
    return AdapterKeys(prefix, tuple(routed), tuple(name for name in tensors if name in left))


def _is_matrix(module: ExpertsKeys, tensors: Mapping[str, HasShape], config: Mapping[str, Any]) -> bool:
    """Whether a fused pair is that of a 2-D parameter, such as a router's weight, or of one lone expert.

    PEFT of every release lays that out like the LoRA of a linear, so there is nothing to convert.
    """
    if module.form != "fused" or len(module.slots) > 1:
        return False
    names = targeted_parameters(config, module.path) or ("",)
    rows = tensors[module.slots[0].lora_A].shape[0]
    return all(lora_rank(config, f"{module.path}.{name}") == rows for name in names)


def _place(name: str, ndim: int, config: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(path of the experts module, slot, "A" or "B") of a tensor; None where it is no experts' LoRA."""
    match = _LORA.match(name)
    if match is None or match["adapter"] == "bias":
        return None
    parts = match["module"].split(".")
    depth = len(parts)
    while parts[-1] == "base_layer":
        parts.pop()
    depth -= len(parts)
    path = ".".join(parts)
    module, _, parameter = path.rpartition(".")
    shared = parameter in LINEAR_NAMES and module.rpartition(".")[2] == "experts"
    if (ndim == 3 and (parameter in LINEAR_NAMES or "expert" in module)) or (ndim == 2 and shared):
        return module, f"stack {parameter}", match["factor"]
    expert = _EXPERT.match(path)
    if expert and expert["projection"] in LINEAR_NAMES and "expert" in expert["path"].rpartition(".")[2]:
        return expert["path"], f"expert {int(expert['expert'])} {expert['projection']}", match["factor"]
    modules = [str(t).rpartition(".")[0] for t in config.get("target_parameters") or ()]
    targeted = any(module and _reaches(module, path) for module in modules)
    if ndim == 2 and (targeted or depth or parts[-1] == "experts"):
        return path, f"slot {depth}", match["factor"]
    return None


def _modules(halves: Mapping[tuple[str, str], Mapping[str, str]]) -> list[ExpertsKeys]:
    by_path: dict[str, dict[str, Pair]] = {}
    for (path, slot), pair in halves.items():
        by_path.setdefault(path, {})[slot] = Pair(pair["A"], pair["B"])
    return [_module(path, slots) for path, slots in by_path.items()]


def _module(path: str, slots: Mapping[str, Pair]) -> ExpertsKeys:
    kinds = {slot.partition(" ")[0] for slot in slots}
    if len(kinds) > 1:
        raise AdapterFileError(
            f"{path!r} has LoRA in several forms at once ({', '.join(sorted(slots))}); one was expected. "
            "Were two adapters merged into this file?"
        )
    kind = kinds.pop()
    if kind == "expert":
        experts = {}
        for slot, pair in slots.items():
            _, expert, projection = slot.split(" ")
            experts[int(expert), projection] = pair
        return ExpertsKeys(path, "per_expert", experts=experts)
    if kind == "stack":
        return ExpertsKeys(path, "stacked", stacks={slot.partition(" ")[2]: pair for slot, pair in slots.items()})
    depths = sorted((int(slot.partition(" ")[2]) for slot in slots), reverse=True)
    if depths != list(range(len(depths) - 1, -1, -1)):
        raise AdapterFileError(
            f"{path!r} has LoRA at nesting levels {sorted(depths)}; 0 to {len(depths) - 1} were expected. "
            "Is the file complete?"
        )
    return ExpertsKeys(path, "fused", slots=tuple(slots[f"slot {depth}"] for depth in depths))
