"""The names of the tensors in an adapter file, sorted into what they belong to.

Three forms hold the LoRA of routed experts. What else bears LoRA in or under an experts module is `unknown`, and
everything else in the file `other`, which is never touched.

    fused       `P.lora_A.weight`, `P.base_layer.lora_A.weight`: PEFT's ParamWrapper, one flat pair per nesting level;
                or unfolded to 3-D, in true orientation
    per_expert  `P.3.gate_proj.lora_A.weight`, `P.gate_proj.3.lora_A.weight`: a LoRA of its own on each expert's linears
    stacked     `P.gate_up_proj.lora_A.weight`, 3-D: "E r in" and "E out r"

One factor of the last two may be shared by all experts: a matrix, or a stack of one, under the name of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache

from .. import families
from ..errors import AdapterError, AdapterFileError
from .adapter_config import AdapterConfig
from .bounds import MAX_BESIDE, MAX_MODULES, MAX_NAME, MAX_PARTS, MAX_WHOLE
from .files import show
from .ranks import lora_rank
from .safetensors_io import TensorInfo
from .targets import Targets

__all__ = [
    "LINEAR_NAMES",
    "PREFIX",
    "Factors",
    "Names",
    "Place",
    "in_model",
    "linear_role",
    "peft_name",
    "role_of",
    "same_tensor",
    "sort_names",
    "unwrapped",
]

PREFIX = "base_model.model."
# What torch.compile, FSDP and checkpointing put into the name of a module that they wrap.
_WRAPPER_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?(?:\.weight)?$")
# Linears of an expert, and lists of the experts' linears, as gpt_oss has them in 4 bit. No model has 10^5 experts.
_EXPERT = re.compile(r"^(?P<path>.+)\.(?P<expert>0|[1-9][0-9]{0,4})\.(?P<name>\w+)$")
_LISTED = re.compile(r"^(?P<path>.+)\.(?P<name>\w+_projs)\.(?P<expert>0|[1-9][0-9]{0,4})$")
# NeMo Automodel's own names, "E in r" and "E r out".
_NATIVE = re.compile(r"^(?P<path>.+)\.lora_(?P<name>gate_and_up|down|up)_(?P<factor>[AB])$")
# Parameters that are experts below each other in a matrix.
_FLAT_NAMES = {name for names in families.FLAT_CLASSES.values() for name in names}
_NATIVE_NAMES = {"gate_and_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}
# What a pair has beside it, after `lora_`: DoRA's magnitudes, and biases.
_BESIDE = re.compile(r"magnitude_vector(\.|$)|[AB](\.[^.]+)?\.bias$")
# A component of a path that is an experts module, or resembles one; those of shared experts are ordinary.
_EXPERTS = re.compile(r"^(?!.*share).*(expert|exps)")
_SHARED_EXPERTS = re.compile(r"share.*(expert|exps)|expert.*share")
# Components whose linears are experts' under no such name: Megatron's, and stacks beside their router.
_MOE = re.compile(r"(^|_)moe(_|$)|^switch_mlp$")
# Names of an expert's linears in any family -> role; of lists of them; and llama.cpp's for stacks, in what this package
# writes for it.
LINEAR_NAMES = (
    families.LINEAR_NAMES
    | {"gate_up_projs": "gate_up", "gate_projs": "gate", "up_projs": "up", "down_projs": "down"}
    | (_GGUF_NAMES := {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"})
)

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
        native: Of a stack: whether its name is NeMo Automodel's, who has the features before the ranks.
    """

    form: str
    path: str
    depth: int = 0
    expert: int = 0
    name: str = ""
    native: bool = False

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
        matrices: Paths that are called as routed experts are, and whose LoRA is that of one matrix.
        unknown: Names of tensors that are LoRA in or under an experts module, and that no rule places.
        other: Names of all further tensors, in the order of the file; empty ones of experts are left out.
    """

    prefix: str
    pairs: Mapping[str, Mapping[Place, Factors]]
    matrices: tuple[str, ...]
    unknown: tuple[str, ...]
    other: tuple[str, ...]


def role_of(path: str, parameter: str) -> str | None:
    """`"gate_up"`, `"up"` or `"down"` of an expert parameter, None for a name nobody has given a role."""
    return families.ROLES.get(parameter) or families.ROLES.get(f"{path.rpartition('.')[2]}.{parameter}")


def linear_role(name: str) -> str | None:
    """`"gate"`, `"up"`, `"down"` or `"gate_up"` of an expert's linear, None for a name nobody has given a role."""
    return LINEAR_NAMES.get(name)


def peft_name(name: str, prefix: str) -> str:
    """A tensor's name as PEFT saves it: with its prefix, and without the name of the adapter.

    Args:
        name: In the file.
        prefix: See `Names`.
    """
    name = in_model(name, prefix)
    match = _LORA.match(name)
    if match is not None and match["adapter"] != "bias":
        name = f"{match['module']}.lora_{match['factor']}.weight"
    return PREFIX + name


def unwrapped(name: str) -> str:
    """The name of a module or tensor before anybody but PEFT wrapped what it is in."""
    if "_orig_mod" not in name and "wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def in_model(name: str, prefix: str) -> str:
    """A tensor's name below the model that LoRA was put into; `prefix`: see `Names`."""
    return unwrapped(name).removeprefix(prefix)


def same_tensor(name: str, other: str) -> AdapterFileError:
    return AdapterFileError(
        f"{name!r} and {other!r} are the same tensor under two names. Does the file hold two adapters? "
        "Save each one by itself."
    )


def sort_names(infos: Mapping[str, TensorInfo], config: AdapterConfig) -> Names:
    """Sorts the tensors of an adapter.

    Args:
        infos: The tensors by name, in the order of the file.
        config: The adapter's.

    Raises:
        AdapterFileError: One half of a pair or a nesting level is missing, or two names mean the same tensor.
    """
    prefix = PREFIX if any(unwrapped(name).startswith(PREFIX) for name in infos) else ""
    halves: dict[Place, dict[str, TensorInfo]] = {}
    empty = set()
    for name, info in infos.items():
        clean = in_model(name, prefix)
        if len(name) > MAX_NAME or not name.isprintable() or clean.count(".") >= MAX_PARTS:
            raise AdapterFileError(
                f"{show(name)} is no name of a tensor: at most {MAX_NAME} printable characters, and {MAX_PARTS} parts "
                "between dots, were expected. Is the file damaged?"
            )
        found = _place(clean, len(info.shape), config.target_parameters)
        if found is None:
            # As some writers leave the projection that a model has not.
            if info.nbytes == 0 and _is_of_experts(clean):
                empty.add(name)
            continue
        place, factor = found
        pair = halves.setdefault(place, {})
        if factor in pair:
            raise same_tensor(pair[factor].name, name)
        pair[factor] = info
    by_path = _paired(halves)
    if len(by_path) > MAX_MODULES:
        raise AdapterFileError(
            f"There is LoRA on {len(by_path)} experts modules, {show(next(iter(by_path)))} first; at most "
            f"{MAX_MODULES} were expected. Is the file damaged?"
        )
    for path, places in by_path.items():
        depths = sorted(place.depth for place in places if place.form == "fused")
        if depths != list(range(len(depths))):
            raise AdapterFileError(
                f"{path!r} has LoRA at nesting levels {depths}; 0 to {len(depths) - 1} were expected. Is the file "
                "complete?"
            )
    for path in by_path:
        if ".experts." in path and _FLAT_NAMES.issuperset(config.target_parameters.parameters(path) or ("",)):
            raise AdapterError(
                f"{path!r} has LoRA on experts that lie below each other in matrices, as dbrx's do. Every PEFT release "
                "lays it out alike, and no other reader has it, so there is nothing to inspect or convert. To merge "
                "it, load it with PeftModel.from_pretrained and call merge_and_unload()."
            )
    pairs = {path: places for path, places in by_path.items() if not _is_matrix(path, places, config)}
    experts = {factor.name for places in pairs.values() for pair in places.values() for factor in pair}
    other = [name for name in infos if name not in experts and name not in empty]
    placed = {name for places in by_path.values() for pair in places.values() for name in _names(pair)}
    unplaced = [name for name in other if name not in placed]
    stems = {_stem(name, prefix) for name in placed} if unplaced else set()
    unknown = tuple(name for name in unplaced if _is_unknown(in_model(name, prefix), stems))
    beside = [name for name in other if ".lora_" in name]
    if (len(beside) > MAX_BESIDE or len(other) - len(beside) > MAX_WHOLE) and not unknown:
        raise AdapterFileError(
            f"{len(beside)} tensors are LoRA elsewhere than on experts, and {len(other) - len(beside)} no LoRA, "
            f"{show(other[0])} first; at most {MAX_BESIDE} and {MAX_WHOLE} were expected. Is it an adapter?"
        )
    matrices = tuple(path for path in by_path if path not in pairs and _is_stack(path, config.target_parameters))
    return Names(prefix, pairs, matrices, unknown, tuple(other))


def _names(pair: Factors) -> tuple[str, str]:
    return pair[0].name, pair[1].name


def _stem(name: str, prefix: str) -> str:
    """What a tensor is the LoRA of."""
    return in_model(name, prefix).rpartition(".lora_")[0]


def _is_unknown(name: str, stems: Container[str]) -> bool:
    """Whether a tensor that no rule places is LoRA of experts; a magnitude or a bias beside a pair is part of that."""
    stem, _, factor = name.rpartition(".lora_")
    return not (stem in stems and _BESIDE.match(factor)) and _is_of_experts(name)


def _is_of_experts(name: str) -> bool:
    """Whether a tensor is LoRA in or under what is, or resembles, a module of routed experts."""
    module, lora, _ = name.lower().rpartition("lora")
    *above, last = module.rstrip("._").split(".")
    if not lora:
        return False
    inside = last in LINEAR_NAMES or f"{last}.weight" in families.ROLES
    for place in range(len(above) - 1, -1, -1):
        kind = _kind(above[place])
        if kind == "shared":
            return False
        if kind == "experts":  # jetmoe has its router there
            return [*above[place + 1 :], last] not in (["router"], ["router", "layer"])
        if kind == "moe" and inside:
            return True
        inside = inside and (above[place].isdecimal() or above[place] == "mlp")
    # `pre_expert_proj` is a linear beside the experts.
    return last.endswith(("expert", "experts", "exps")) and _EXPERTS.search(last) is not None


def _is_inside_experts(path: str) -> bool:
    """Whether a module lies in one of routed experts, and is not its router."""
    *above, _ = path.lower().split(".")
    return any(_kind(part) == "experts" for part in above) and _is_of_experts(f"{path}.lora_A")


@lru_cache(4096)
def _kind(part: str) -> str | None:
    """What a component of a path speaks of."""
    kinds = {"shared": _SHARED_EXPERTS, "experts": _EXPERTS, "moe": _MOE}
    return next((kind for kind, pattern in kinds.items() if pattern.search(part)), None)


def _paired(halves: Mapping[Place, Mapping[str, TensorInfo]]) -> dict[str, dict[Place, Factors]]:
    """Path -> places -> lora_A and lora_B; a factor that all experts share goes to each of them.

    Raises:
        AdapterFileError: One half of a pair is missing.
    """
    shared = {
        (place.path, place.name): pair for place, pair in halves.items() if place.form == "stacked" and len(pair) == 1
    }
    unused = set(shared)
    found: dict[str, dict[Place, Factors]] = {}
    for place, pair in halves.items():
        if place.form == "stacked" and len(pair) == 1:
            continue
        of_all = shared.get((place.path, place.name), {}) if place.form == "per_expert" else {}
        unused.discard((place.path, place.name))
        both = {**pair, **of_all}
        if len(both) == 1 or len(both) < len(pair) + len(of_all):
            raise _half(place, of_all or pair)
        found.setdefault(place.path, {})[place] = both["A"], both["B"]
    for path, name in unused:
        raise _half(Place("stacked", path, name=name), shared[path, name])
    return found


def _half(place: Place, pair: Mapping[str, TensorInfo]) -> AdapterFileError:
    (there,) = pair
    return AdapterFileError(
        f"lora_{'B' if there == 'A' else 'A'} of {place.path!r} ({place}) is missing; only {pair[there].name!r} is "
        "there. Is the file complete?"
    )


def _is_matrix(path: str, places: Mapping[Place, Factors], config: AdapterConfig) -> bool:
    """Whether a module's LoRA is that of a 2-D parameter, such as a router's weight, or of one expert on its own.

    PEFT of every release lays those out like the LoRA of a linear, so there is nothing to convert.
    """
    (place, (lora_A, _)), *more = places.items()
    if more or place.form != "fused" or len(lora_A.shape) != 2:
        return False
    targets, parameters = config.target_parameters, tuple[str, ...]()
    if "expert" not in path.rpartition(".")[2]:  # bare names, `gate_up_proj`, are experts' wherever another one fits
        parameters = targets.parameters(path, bare=False)
    # Where nothing is targeted, a pattern for any parameter of experts says that it is theirs.
    untold = ("", "gate_up_proj", "up_proj", "down_proj") if path.endswith("experts") else ("",)
    parameters = parameters or targets.parameters(path) or untold
    return all(lora_rank(config.raw, f"{path}.{name}") == lora_A.shape[0] for name in parameters)


def _is_stack(path: str, targets: Targets) -> bool:
    """Whether a module is called as routed experts are, and no other parameter of it is targeted, such as a bias."""
    return _is_of_experts(f"{path}.lora_A") and all(role_of(path, name) for name in targets.parameters(path))


@lru_cache(4096)
def _is_experts(path: str) -> bool:
    """Whether a module's path is that of routed experts."""
    return _EXPERTS.search(path.rpartition(".")[2]) is not None and path.endswith("experts")


def _place(name: str, ndim: int, targets: Targets) -> tuple[Place, str] | None:
    """(place, "A" or "B") of a tensor; None where it is no experts' LoRA."""
    native = _NATIVE.match(name) if ndim == 3 else None
    if native and _is_experts(native["path"]):
        return Place("stacked", native["path"], name=_NATIVE_NAMES[native["name"]], native=True), native["factor"]
    match = _LORA.match(name)
    if match is None or match["adapter"] == "bias" or ndim not in (2, 3):
        return None
    path, depth = match["module"], 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    module, _, parameter = path.rpartition(".")
    expert = _EXPERT.match(path) or _LISTED.match(path)
    if expert and expert["name"] in LINEAR_NAMES and _is_experts(expert["path"]):
        place = Place("per_expert", expert["path"], expert=int(expert["expert"]), name=expert["name"])
        return (place, match["factor"]) if ndim == 2 else None
    if parameter in LINEAR_NAMES and (_is_experts(module) or (ndim == 3 and parameter in _GGUF_NAMES)):
        return Place("stacked", module, name=parameter), match["factor"]
    if expert and _is_experts(expert["path"]):
        return None  # of an expert's linear that nobody calls so, not of a router of that name
    target = targets.matrix(path)
    if target and target.endswith(".weight") and role_of(path, "weight") is None and _is_inside_experts(path):
        return None  # a router's `gate.weight` is targeted, and so is called what an expert's linear may be
    known = target is not None and (ndim == 2 or role_of(path, target.rpartition(".")[2]) is not None)
    if known or depth or parameter == "experts":
        return Place("fused", path, depth), match["factor"]
    return None
