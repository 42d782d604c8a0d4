"""What is known of the base model an adapter is for: sizes, storage and names of its experts.

Read from the model's `config.json`, or made from a live model by `patching.matching`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import AdapterError, AdapterFileError
from ..families import family
from .bounds import MAX_EXPERTS
from .files import download, is_hub_id, read_json, show, usable_path

__all__ = [
    "DENSE_INTERMEDIATE",
    "HIDDEN",
    "INTERMEDIATE",
    "NUM_EXPERTS",
    "BaseModel",
    "base_model_of",
    "load_base_model",
    "role_sizes",
]

# Names that the configs of transformers 4.57 to 5.24 use, the more specific ones first.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size")
DENSE_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size")
HIDDEN = ("hidden_size", "moe_hidden_size", "moe_latent_size")
_MAX_SCOPES, _MAX_SIZES, _MAX_TYPE = 16, 64, 100


def role_sizes(role: str, features: tuple[int, int]) -> tuple[int, int]:
    """(H, I) that a projection of these (in, out) shows; I is 0 where gate and up cannot have half of the rows each."""
    fan_in, fan_out = features
    if role == "down":
        return fan_out, fan_in
    if role == "gate_up":
        return fan_in, 0 if fan_out % 2 else fan_out // 2
    return fan_in, fan_out


@dataclass(frozen=True)
class Scope:
    """One config, or part of a config, that describes routed experts: its possible sizes."""

    num_experts: frozenset[int]
    hidden: frozenset[int]
    intermediate: frozenset[int]

    def fits(self, role: str | None, num_experts: int, features: tuple[int, int]) -> bool:
        """Whether a stack of that role, and of these (in, out), can belong to this model."""
        if role is None or num_experts not in self.num_experts:
            return num_experts in self.num_experts
        hidden, intermediate = role_sizes(role, features)
        return hidden in self.hidden and intermediate in self.intermediate


@dataclass(frozen=True)
class BaseModel:
    """Facts on a base model.

    Attributes:
        model_type: Of the part that holds the experts, without `_text`.
        scopes: From a config: the sizes it allows.
        stacks: From a live model: (module path, parameter) -> (E, in, out).
        name: For messages.
        architectures: Its classes, as the config names them.
        text_part: Whether the config names none and is that of a text model, which may be a part of another.
        config: All of the config, if it was read from one.
    """

    model_type: str
    scopes: tuple[Scope, ...] = ()
    stacks: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    name: str = "the base model"
    architectures: tuple[str, ...] = ()
    text_part: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def interleaved(self) -> bool:
        """Whether gate and up alternate in the rows of gate_up_proj."""
        return family(self.model_type).interleaved

    @property
    def gated(self) -> bool:
        return family(self.model_type).gated

    def fits(self, path: str, parameter: str, role: str | None, num_experts: int, features: tuple[int, int]) -> bool:
        """Whether LoRA of those sizes can belong to a parameter of this model."""
        if self.stacks:
            return self.stacks.get((path, parameter)) == (num_experts, *features)
        return any(scope.fits(role, num_experts, features) for scope in self.scopes)

    def require(self, path: str, parameter: str, role: str | None, num_experts: int, features: tuple[int, int]) -> None:
        """Raises `AdapterFileError` unless LoRA of those sizes `fits`."""
        if not self.fits(path, parameter, role, num_experts, features):
            raise AdapterFileError(
                f"The LoRA on {parameter} of {path!r} is for {num_experts} experts of {features[0]} in- and "
                f"{features[1]} out-features; {self.described()} has none of these sizes. Is it the adapter's base "
                "model?"
            )

    def described(self) -> str:
        """Its name and what it has, for messages."""
        if self.stacks:
            stacks = ((name, *size) for (_, name), size in self.stacks.items())
            held = [f"{name} of {E} experts, {a} in and {b} out" for name, E, a, b in dict.fromkeys(stacks)]
            return f"{self.name} ({'; '.join(held[:4])}{' ...' if len(held) > 4 else ''})"
        scope = self.scopes[0]
        sizes = zip(("E", "H", "I"), (scope.num_experts, scope.hidden, scope.intermediate), strict=True)
        shown = ", ".join(f"{letter} {' or '.join(map(str, sorted(values)))}" for letter, values in sizes)
        return f"{self.name} ({shown})"

    @property
    def expert_counts(self) -> frozenset[int]:
        """Every E that the config allows: of longcat_flash's gate_up with its zero experts, of down without."""
        found = {count for scope in self.scopes for count in scope.num_experts}
        return frozenset(found | {count for count, _, _ in self.stacks.values()})

    @property
    def num_experts(self) -> int | None:
        """E, where the config allows only one."""
        return next(iter(self.expert_counts)) if len(self.expert_counts) == 1 else None

    @property
    def active_experts(self) -> int | None:
        """Experts per token, where the config says one number of that name."""
        parts = [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]
        found = {count for part in parts for count in _integers(part, ("num_experts_per_tok",))}
        return found.pop() if len(found) == 1 else None

    def linear(self, role: str) -> str:
        """Name of an expert's linear in the Hub's checkpoints: `gate_proj`, or `w1` for Mixtral's relatives."""
        return family(self.model_type).linears[role]

    def hub_path(self, path: str) -> str:
        """Path of a router, linear or shared expert in the Hub's checkpoints, given the one in transformers 5."""
        return _renamed(path, family(self.model_type).on_hub.items())

    def per_expert_path(self, path: str) -> str:
        """Path of an experts module in the Hub's checkpoints, given the one in transformers 5."""
        if family(self.model_type).block_sparse_moe:
            return re.sub(r"(^|\.)mlp\.experts$", r"\1block_sparse_moe.experts", path)
        return path

    def fused_path(self, path: str) -> str:
        """The inverse of `per_expert_path`."""
        if family(self.model_type).block_sparse_moe:
            return re.sub(r"(^|\.)block_sparse_moe\.experts$", r"\1mlp.experts", path)
        return path

    def beside_experts(self, path: str, form: str) -> str:
        """Path of a module beside the experts, a router, say, where those are `"fused"` or `"per_expert"`."""
        if not family(self.model_type).block_sparse_moe:
            return path
        if form == "fused":
            back = ((hub, name) for name, hub in family(self.model_type).on_hub.items())
            return re.sub(r"(^|\.)block_sparse_moe\.", r"\1mlp.", _renamed(path, back))
        return re.sub(r"(^|\.)mlp\.gate$", r"\1block_sparse_moe.gate", self.hub_path(path))

    @property
    def parameters(self) -> dict[str, str]:
        """Role -> parameter of the fused experts in transformers 5."""
        up = {"gate_up": "gate_up_proj"} if self.gated else {"up": "up_proj"}
        return up | {"down": "down_proj"}


def _renamed(path: str, names: Iterable[tuple[str, str]]) -> str:
    """With parts of a path replaced, one after the other."""
    for old, new in names:
        path = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, path)
    return path


def load_base_model(model: str | Path | Mapping[str, Any] | BaseModel) -> BaseModel:
    """The facts in a model's config.

    Args:
        model: A folder with `config.json`, that file, a Hub id, the config as a dict, or facts already read.

    Raises:
        AdapterError: No such config, or it describes no routed experts.
    """
    if isinstance(model, BaseModel):
        return model
    if isinstance(model, Mapping):
        return _from_config(model, "the base model's config")
    path = usable_path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and is_hub_id(str(model)):
        path = download(str(model), ["config.json"]) / "config.json"
    return _from_config(read_json(path), str(model))


def base_model_of(named: str | None, model: str | Path | Mapping[str, Any] | BaseModel | None) -> BaseModel | None:
    """The facts on an adapter's base model: those given, else those in the local folder that its config names."""
    if model is not None:
        return load_base_model(model)
    if named is None:
        return None
    path = Path(named) / "config.json"
    try:
        beside = path.is_file()
    except (OSError, ValueError):  # no name of a file at all
        return None
    if not beside or not any(_scopes(config := read_json(path))):
        return None  # a dense model's adapter has nothing that its config would tell
    return _from_config(config, named)


def _from_config(config: Mapping[str, Any], name: str) -> BaseModel:
    found = list(islice(_scopes(config), _MAX_SCOPES + 1))
    counts_of = {count for _, scope in found for count in scope.num_experts}
    if len(found) > _MAX_SCOPES or max(counts_of, default=0) > MAX_EXPERTS:
        said = max(counts_of) if len(found) <= _MAX_SCOPES else f"more than {_MAX_SCOPES} parts"
        raise AdapterError(
            f"{name} describes {said} of routed experts; at most {MAX_EXPERTS} in {_MAX_SCOPES} parts were expected. "
            "Is the file damaged?"
        )
    if not found:
        counts = ", ".join(NUM_EXPERTS)
        raise AdapterError(
            f"{name} describes no model with routed experts: none of {counts} is in it. Is it the config.json of the "
            "adapter's base model?"
        )
    model_types = {model_type for model_type, _ in found}
    if len(model_types) > 1:  # a multimodal model whose parts each have experts
        model_types = {_model_type(config)}
    model_type = model_types.pop()
    given = config.get("architectures")
    classes = tuple(item for item in given if isinstance(item, str)) if isinstance(given, list) else ()
    text_part = not classes and str(config.get("model_type", "")).endswith("_text")
    scopes = tuple(scope for _, scope in found)
    return BaseModel(model_type.removesuffix("_text"), scopes, {}, name, classes, text_part, config)


def _scopes(config: Mapping[str, Any]) -> Iterator[tuple[str, Scope]]:
    """(model_type, sizes) of every (sub-)config that counts experts."""
    counts = _integers(config, NUM_EXPERTS)
    hidden = _integers(config, HIDDEN)
    intermediate = _integers(config, INTERMEDIATE) or _integers(config, DENSE_INTERMEDIATE)
    # longcat_flash: gate_up_proj has rows for the zero experts too, down_proj has none.
    zero = next(iter(_integers(config, ("zero_expert_num",))), 0)
    counts |= {count + zero for count in counts}
    # jetmoe: its attention has experts too, of an input_linear without a gate, whose rows count as two halves.
    channels, heads = (_integers(config, (name,)) for name in ("kv_channels", "num_key_value_heads"))
    inner = frozenset(size for a in channels for b in heads for size in (a * b, a * b // 2))
    if counts and hidden and intermediate:
        yield _model_type(config), Scope(counts, hidden, intermediate | inner)
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _scopes(value)


def _integers(config: Mapping[str, Any], names: tuple[str, ...]) -> frozenset[int]:
    """Every positive number the config has under those names, singly or in lists."""
    values = [config.get(name) for name in names]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    found = frozenset(item for item in flat if type(item) is int and item > 0)
    if len(found) > _MAX_SIZES:
        raise AdapterError(
            f"The base model's config has {len(found)} numbers as its {names[0]}; at most {_MAX_SIZES} were expected. "
            "Is the file damaged?"
        )
    return found


def _model_type(config: Mapping[str, Any]) -> str:
    found = config.get("model_type", "")
    if not isinstance(found, str) or len(found) > _MAX_TYPE or not (found.isprintable() or not found):
        raise AdapterError(f"The base model's config has the model_type {show(found)}; a name was expected.")
    return found
