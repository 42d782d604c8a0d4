"""The names of the tensors in an adapter file, sorted into what they belong to.

Three forms hold the LoRA of routed experts; everything else in the file is `other` and never touched.

    fused       `P.lora_A.weight`, `P.base_layer.lora_A.weight`: PEFT's ParamWrapper, one flat pair per nesting level
    per_expert  `P.3.gate_proj.lora_A.weight`: a LoRA of its own on each expert's linears
    stacked     `P.gate_up_proj.lora_A.weight`, 3-D: "E r in" and "E out r"; or 2-D, where all experts share it (VeOmni)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .. import families
from ..errors import AdapterFileError
from .adapter_config import AdapterConfig
from .ranks import lora_rank
from .safetensors_io import TensorInfo

__all__ = [
    "LINEAR_NAMES",
    "PREFIX",
    "Factors",
    "Names",
    "Place",
    "linear_role",
    "peft_name",
    "reaches_parameter",
    "role_of",
    "same_tensor",
    "sort_names",
    "targeted_matrix",
    "targeted_parameters",
    "unwrapped",
]

PREFIX = "base_model.model."
# What torch.compile, FSDP and checkpointing put into the name of a module that they wrap.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?(?:\.weight)?$")
_EXPERT = re.compile(r"^(?P<path>.+)\.(?P<expert>\d+)\.(?P<projection>\w+)$")
# Names of an expert's linears -> role, with llama.cpp's for stacks, in what this package writes for it.
LINEAR_NAMES = families.LINEAR_NAMES | {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}


Factors = tuple[TensorInfo, TensorInfo]  # lora_A and lora_B


@dataclass(frozen=True)
class Place:
    """What a pair is the LoRA of; `str` tells it from the others of its module.

    Attributes:
        form: One of the three.
        path: Of the module in the model, without PEFT's additions.
        depth: Of a fused pair: it is that many wrappers inside the outermost one.
        expert: Of a per-expert pair.
        name: Of an expert's linear, or of a stack.
    """

    form: str
    path: str
    depth: int = 0
    expert: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.form == "fused":
            return f"slot {self.depth}"
        return f"expert {self.expert} {self.name}" if self.form == "per_expert" else f"stack {self.name}"


@dataclass(frozen=True)
class Names:
    """Everything an adapter file holds, by name.

    Attributes:
        prefix: What precedes the module paths, PEFT's `base_model.model.` or nothing.
        pairs: Path of an experts module -> its places -> lora_A and lora_B.
        other: Names of all further tensors, in the order of the file.
    """

    prefix: str
    pairs: Mapping[str, Mapping[Place, Factors]]
    other: tuple[str, ...]


def role_of(path: str, parameter: str) -> str | None:
    """`"gate_up"`, `"up"` or `"down"` of an expert parameter, None for a name nobody has given a role."""
    return families.ROLES.get(parameter) or families.ROLES.get(f"{path.rpartition('.')[2]}.{parameter}")


def linear_role(name: str) -> str | None:
    """`"gate"`, `"up"`, `"down"` or `"gate_up"` of an expert's linear, None for a name nobody has given a role."""
    return LINEAR_NAMES.get(name)


def targeted_parameters(target_parameters: Iterable[str], path: str) -> tuple[str, ...]:
    """Names of the module's parameters that `target_parameters` reach, matched as PEFT does, by suffix."""
    parted = (target.rpartition(".") for target in target_parameters)
    return tuple(dict.fromkeys(name for module, _, name in parted if not module or _reaches(module, path)))


def reaches_parameter(target_parameters: Iterable[str], key: str) -> bool:
    """Whether targets reach a parameter, by its full name, as PEFT matches them: by suffix."""
    return any(key == target or key.endswith(f".{target}") for target in target_parameters)


def targeted_matrix(target_parameters: Iterable[str], path: str) -> str | None:
    """The entry of `target_parameters` that LoRA on an ordinary module is for, a router's weight, say; else None.

    PEFT matches its patterns with the name of that parameter, and those of a linear with the linear's own.
    """
    modules = {target: target.rpartition(".")[0] for target in target_parameters}
    return next((target for target, module in modules.items() if module and _reaches(module, path)), None)


def peft_name(name: str, prefix: str) -> str:
    """A tensor's name as PEFT saves it: with its prefix, and without the name of the adapter.

    Args:
        name: In the file.
        prefix: See `Names`.
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


def sort_names(infos: Mapping[str, TensorInfo], config: AdapterConfig) -> Names:
    """Sorts the tensors of an adapter.

    Args:
        infos: The tensors by name, in the order of the file.
        config: The adapter's.

    Raises:
        AdapterFileError: One half of a pair or a nesting level is missing, or two names mean the same tensor.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in infos) else ""
    halves: dict[Place, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        found = _place(unwrapped(name.removeprefix(prefix)), len(info.shape), config.target_parameters)
        if found is None:
            continue
        place, factor = found
        pair = halves.setdefault(place, {})
        if factor in pair:
            raise same_tensor(pair[factor].name, name)
        pair[factor] = info
    by_path: dict[str, dict[Place, Factors]] = {}
    for place, pair in halves.items():
        if len(pair) == 1:
            (there,) = pair
            raise AdapterFileError(
                f"lora_{'B' if there == 'A' else 'A'} of {place.path!r} ({place}) is missing; only "
                f"{pair[there].name!r} is there. Is the file complete?"
            )
        by_path.setdefault(place.path, {})[place] = pair["A"], pair["B"]
    for path, places in by_path.items():
        depths = sorted(place.depth for place in places if place.form == "fused")
        if depths != list(range(len(depths))):
            raise AdapterFileError(
                f"{path!r} has LoRA at nesting levels {depths}; 0 to {len(depths) - 1} were expected. Is the file "
                "complete?"
            )
    pairs = {path: places for path, places in by_path.items() if not _is_matrix(path, places, config)}
    experts = {factor.name for places in pairs.values() for pair in places.values() for factor in pair}
    return Names(prefix, pairs, tuple(name for name in infos if name not in experts))


def _is_matrix(path: str, places: Mapping[Place, Factors], config: AdapterConfig) -> bool:
    """Whether a module's LoRA is that of a 2-D parameter, such as a router's weight, or of one expert on its own.

    PEFT of every release lays those out like the LoRA of a linear, so there is nothing to convert.
    """
    (place, (lora_A, _)), *more = places.items()
    if more or place.form != "fused":
        return False
    targets = config.target_parameters
    if "expert" not in path.rpartition(".")[2]:  # bare names, `gate_up_proj`, are experts' wherever another one fits
        targets = tuple(target for target in targets if targeted_matrix((target,), path)) or targets
    parameters = targeted_parameters(targets, path) or ("",)
    return all(lora_rank(config.raw, f"{path}.{name}") == lora_A.shape[0] for name in parameters)


def _place(name: str, ndim: int, target_parameters: Sequence[str]) -> tuple[Place, str] | None:
    """(place, "A" or "B") of a tensor; None where it is no experts' LoRA."""
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
        return Place("stacked", module, name=parameter), match["factor"]
    expert = _EXPERT.match(path)
    if expert and expert["projection"] in LINEAR_NAMES and "expert" in expert["path"].rpartition(".")[2]:
        place = Place("per_expert", expert["path"], expert=int(expert["expert"]), name=expert["projection"])
        return place, match["factor"]
    targeted = targeted_matrix(target_parameters, path) is not None
    if ndim == 2 and (targeted or depth or parts[-1] == "experts"):
        return Place("fused", path, depth), match["factor"]
    return None
