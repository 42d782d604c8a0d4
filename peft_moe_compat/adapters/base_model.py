"""What is known of the base model an adapter is for: sizes, storage and names of its experts.

Read from the model's `config.json`, or made from a live model by `guard`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterError, AdapterFileError
from .files import download, is_hub_id, read_json, usable_path

__all__ = [
    "DENSE_INTERMEDIATE",
    "HIDDEN",
    "INTERMEDIATE",
    "NUM_EXPERTS",
    "BaseModel",
    "Features",
    "base_model_of",
    "load_base_model",
    "load_config",
]

# (in, out) of an expert parameter.
Features = tuple[int, int]

# Names that the configs of transformers 4.57 to 5.24 use, the more specific ones first.
NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size")
DENSE_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size")
HIDDEN = ("hidden_size", "moe_hidden_size", "moe_latent_size")

# Families whose experts' gate and up rows alternate in gate_up_proj instead of lying one after the other.
_INTERLEAVED = {"gpt_oss"}
# Families without a gate: up_proj and down_proj.
_NOT_GATED = {"nemotron_h"}
# Experts' linears of the Hub's checkpoints that are not called gate_proj, up_proj, down_proj: as transformers 4 had
# them, and as the readers that take per-expert adapters want them. Source: conversion_mapping.py of transformers 5.24.
_W123 = {"gate": "w1", "up": "w3", "down": "w2"}
_PROJ = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_LINEARS = {
    "deepseek_v4": _W123,
    "kimi_linear": _W123,
    "lfm2_moe": _W123,
    "minimax": _W123,
    "minimax_m2": _W123,
    "minimax_m3_vl": _W123,
    "mistral_large4": _W123,
    "mixtral": _W123,
    "phimoe": _W123,
}
# Of these, the ones whose experts stand in `block_sparse_moe` there and in `mlp` in transformers 5.
_BLOCK_SPARSE_MOE = {"kimi_linear", "minimax", "minimax_m2", "minimax_m3_vl", "mixtral", "phimoe"}


@dataclass(frozen=True)
class Scope:
    """One config, or part of a config, that describes routed experts: its possible sizes."""

    num_experts: frozenset[int]
    hidden: frozenset[int]
    intermediate: frozenset[int]

    def fits(self, role: str | None, num_experts: int, features: Features) -> bool:
        """Whether a stack of that role can belong to this model."""
        fan_in, fan_out = features
        if num_experts not in self.num_experts:
            return False
        if role == "down":
            return fan_in in self.intermediate and fan_out in self.hidden
        if role == "gate_up":
            return fan_in in self.hidden and fan_out % 2 == 0 and fan_out // 2 in self.intermediate
        if role in ("gate", "up"):
            return fan_in in self.hidden and fan_out in self.intermediate
        return True


@dataclass(frozen=True)
class BaseModel:
    """Facts on a base model.

    Attributes:
        model_type: Of the part that holds the experts, without `_text`.
        scopes: From a config: the sizes it allows.
        stacks: From a live model: (module path, parameter) -> (E, in, out).
        name: For messages.
    """

    model_type: str
    scopes: tuple[Scope, ...] = ()
    stacks: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)
    name: str = "the base model"

    @property
    def interleaved(self) -> bool:
        """Whether gate and up alternate in the rows of gate_up_proj."""
        return self.model_type in _INTERLEAVED

    @property
    def gated(self) -> bool:
        return self.model_type not in _NOT_GATED

    def fits(self, path: str, parameter: str, role: str | None, num_experts: int, features: Features) -> bool:
        """Whether LoRA of those sizes can belong to a parameter of this model."""
        if self.stacks:
            return self.stacks.get((path, parameter)) == (num_experts, *features)
        return any(scope.fits(role, num_experts, features) for scope in self.scopes)

    def require(self, path: str, parameter: str, role: str | None, num_experts: int, features: Features) -> None:
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
            return f"{self.name} ({len(self.stacks)} expert parameters)"
        scope = self.scopes[0]
        sizes = zip(("E", "H", "I"), (scope.num_experts, scope.hidden, scope.intermediate), strict=True)
        shown = ", ".join(f"{letter} {' or '.join(map(str, sorted(values)))}" for letter, values in sizes)
        return f"{self.name} ({shown})"

    def sizes(self, hidden: int | None = None, intermediate: int | None = None) -> tuple[int, int]:
        """(H, I) of the experts, given what an adapter shows of them.

        Raises:
            AdapterError: The config allows several.
        """
        found = {
            (h, i)
            for scope in self.scopes
            for h in scope.hidden
            for i in scope.intermediate
            if hidden in (None, h) and intermediate in (None, i)
        }
        if len(found) != 1:
            raise AdapterError(
                f"{self.name} allows the expert sizes (hidden, intermediate) {sorted(found)}; one pair was needed to "
                "fill in the projections this adapter lacks."
            )
        return found.pop()

    @property
    def num_experts(self) -> int | None:
        """E, where the config allows only one."""
        found = {count for scope in self.scopes for count in scope.num_experts}
        found |= {count for count, _, _ in self.stacks.values()}
        return found.pop() if len(found) == 1 else None

    def linear(self, role: str) -> str:
        """Name of an expert's linear in the Hub's checkpoints: `gate_proj`, or `w1` for Mixtral's relatives."""
        return _LINEARS.get(self.model_type, _PROJ)[role]

    def per_expert_path(self, path: str) -> str:
        """Path of an experts module in the Hub's checkpoints, given the one in transformers 5."""
        if self.model_type in _BLOCK_SPARSE_MOE:
            return re.sub(r"(^|\.)mlp\.experts$", r"\1block_sparse_moe.experts", path)
        return path

    def fused_path(self, path: str) -> str:
        """The inverse of `per_expert_path`."""
        if self.model_type in _BLOCK_SPARSE_MOE:
            return re.sub(r"(^|\.)block_sparse_moe\.experts$", r"\1mlp.experts", path)
        return path

    @property
    def parameters(self) -> dict[str, str]:
        """Role -> parameter of the fused experts in transformers 5."""
        up = {"gate_up": "gate_up_proj"} if self.gated else {"up": "up_proj"}
        return up | {"down": "down_proj"}


def load_base_model(model: str | Path | Mapping[str, Any] | BaseModel) -> BaseModel:
    """The facts in a model's config.

    Args:
        model: A folder with `config.json`, that file, a Hub id, the config as a dict, or facts already read.

    Raises:
        AdapterError: No such config, or it describes no routed experts.
    """
    if isinstance(model, BaseModel):
        return model
    return _from_config(load_config(model), "the base model's config" if isinstance(model, Mapping) else str(model))


def load_config(model: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A base model's config: see `load_base_model`."""
    if isinstance(model, Mapping):
        return model
    path = usable_path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and is_hub_id(str(model)):
        path = download(str(model), ["config.json"]) / "config.json"
    return read_json(path, python_numbers=True)


def base_model_of(named: str | None, model: str | Path | Mapping[str, Any] | BaseModel | None) -> BaseModel | None:
    """The facts on an adapter's base model: those given, else those in the local folder that its config names."""
    if model is not None:
        return load_base_model(model)
    if named is None:
        return None
    try:
        beside = (Path(named) / "config.json").is_file()
    except (OSError, ValueError):  # no name of a file at all
        return None
    if not beside or not any(_scopes(config := load_config(named))):
        return None  # a dense model's adapter has nothing that its config would tell
    return _from_config(config, named)


def _from_config(config: Mapping[str, Any], name: str) -> BaseModel:
    found = list(_scopes(config))
    if not found:
        counts = ", ".join(NUM_EXPERTS)
        raise AdapterError(
            f"{name} describes no model with routed experts: none of {counts} is in it. Is it the config.json of the "
            "adapter's base model?"
        )
    model_types = {model_type for model_type, _ in found}
    if len(model_types) > 1:  # a multimodal model whose parts each have experts
        model_types = {str(config.get("model_type", ""))}
    model_type = model_types.pop()
    return BaseModel(model_type.removesuffix("_text"), tuple(scope for _, scope in found), name=name)


def _scopes(config: Mapping[str, Any]) -> Iterator[tuple[str, Scope]]:
    """(model_type, sizes) of every (sub-)config that counts experts."""
    counts = _integers(config, NUM_EXPERTS)
    hidden = _integers(config, HIDDEN)
    intermediate = _integers(config, INTERMEDIATE) or _integers(config, DENSE_INTERMEDIATE)
    # longcat_flash: gate_up_proj has rows for the zero experts too, down_proj has none.
    zero = next(iter(_integers(config, ("zero_expert_num",))), 0)
    counts |= {count + zero for count in counts}
    if counts and hidden and intermediate:
        yield str(config.get("model_type", "")), Scope(counts, hidden, intermediate)
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _scopes(value)


def _integers(config: Mapping[str, Any], names: tuple[str, ...]) -> frozenset[int]:
    """Every positive number the config has under those names, singly or in lists."""
    values = [config.get(name) for name in names]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return frozenset(item for item in flat if type(item) is int and item > 0)
