"""adapter_config.json of a converted adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..releases import stamps_its_version
from .adapter_config import UNSLOTH_DETAIL, UNSLOTH_LAYOUT, AdapterConfig
from .names import LINEAR_NAMES, targeted_matrix
from .outputs import Named
from .ranks import lora_alpha, lora_rank
from .readers import Target

__all__ = ["evened_config", "target_config", "without_the_rest"]

# PEFT heeds these for target_modules, not for target_parameters: they said nothing of fused experts.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
# What else than LoRA of linears a config speaks of -> that there is none.
_THE_REST = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none", "lora_bias": False}


def target_config(
    source: AdapterConfig,
    target: Target,
    form: str,
    loras: Sequence[Named],
    others: Sequence[str],
    *,
    was: str,
    keep_targets: bool,
) -> dict[str, Any]:
    """The config that makes a reader see the LoRA as it is.

    Args:
        source: The config the adapter came with.
        target: The reader.
        form: Of the experts' LoRA, see `Reader.form`.
        loras: The experts' LoRA.
        others: Paths of all other modules with LoRA.
        was: The form they came in, see `AdapterSource.form`.
        keep_targets: Whether the config's own targets are right.
    """
    config = _without_marks(dict(source.raw))
    if target.peft is not None:
        config.pop("peft_version", None)
        if stamps_its_version(target.peft):
            config["peft_version"] = target.peft
    if not keep_targets:
        if was == "fused" and form != "fused":
            narrowing = [name for name in _NARROWING if config.get(name) not in (None, [], "")]
            if narrowing:
                config |= {**dict.fromkeys(narrowing), "target_modules": None}
        _retarget(config, form, loras, {path: targeted_matrix(source.target_parameters, path) for path in others})
    for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        wanted = {named: named.rank if default == "r" else number(named.alpha) for named in loras}
        config[patterns] = _patterns(config, patterns, default, wanted)
    return config


def evened_config(config: Mapping[str, Any], rank: int, alpha: float) -> dict[str, Any]:
    """The config for a reader that knows one rank and one alpha, see `outputs.evened`."""
    return {
        **config,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }


def without_the_rest(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a file that holds LoRA of linears and nothing else."""
    return {**config, **{name: value for name, value in _THE_REST.items() if config.get(name)}}


def number(value: float) -> int | float:
    """Whole numbers as such, as people write them into configs."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-9 * abs(value) else value


def _without_marks(config: dict[str, Any]) -> dict[str, Any]:
    """Without Unsloth's markers for lora_B's packing; where it left any sign of itself, with the one that is now true.

    Under auto_mapping, since PEFT knows that field and warns of others.
    """
    config.pop(UNSLOTH_LAYOUT, None)
    marked = config.pop(UNSLOTH_DETAIL, None) is not None
    auto_mapping = config.get("auto_mapping")
    if isinstance(auto_mapping, dict) and (marked or any("unsloth" in key for key in auto_mapping)):
        kept = {key: value for key, value in auto_mapping.items() if key != UNSLOTH_DETAIL}
        config["auto_mapping"] = kept | {UNSLOTH_LAYOUT: "rank_major"}
    return config


def _retarget(config: dict[str, Any], form: str, loras: Sequence[Named], others: Mapping[str, str | None]) -> None:
    """target_parameters and target_modules for experts that are called otherwise than before.

    Args:
        others: Path of every other module with LoRA -> see `targeted_matrix`.
    """
    kept = sorted({target for target in others.values() if target is not None})
    linears = [path for path, target in others.items() if target is None]
    given = config.get("target_modules")
    if isinstance(given, list):
        names = [name for name in given if name.rpartition(".")[2] not in LINEAR_NAMES]
        # Linears of dense and shared MLPs go by their full names: their short ones may mean experts.
        names += [path for path in linears if path.rpartition(".")[2] in LINEAR_NAMES]
    else:
        names = linears
    if form == "fused":
        config["target_parameters"] = sorted([*kept, *(named.key for named in loras)])
    else:
        config["target_parameters"] = kept or None
        names += sorted({named.key.rpartition(".")[2] for named in loras})
    config["target_modules"] = sorted(dict.fromkeys(names))


def _patterns(
    config: Mapping[str, Any], patterns: str, default: str, wanted: Mapping[Named, int | float]
) -> dict[str, Any]:
    """The table of patterns under which PEFT finds each wanted value, with as few new entries as that takes."""
    table = dict(config.get(patterns) or {})
    trial = {**config, patterns: table}
    by_pattern: dict[str, set[int | float]] = {}
    for named, value in wanted.items():
        by_pattern.setdefault(named.pattern, set()).add(value)
    new: dict[str, Any] = {}
    for named, value in wanted.items():
        if _found(trial, default, named.key) != value:
            new[named.pattern if len(by_pattern[named.pattern]) == 1 else _full_pattern(named)] = value
    if not new:
        return table
    if any(_found({**config, patterns: {**new, **table}}, default, n.key) != v for n, v in wanted.items()):
        new = {_full_pattern(named): value for named, value in wanted.items()}
    return {**new, **table}  # PEFT takes the first pattern that matches


def _full_pattern(named: Named) -> str:
    """For one module alone; the experts of a per-expert one all have the same."""
    stem, zero, linear = named.key.rpartition(".0.")
    return rf"{stem}\.[0-9]+\.{linear}" if zero and named.pattern.endswith(rf"[0-9]+\.{linear}") else named.key


def _found(config: Mapping[str, Any], default: str, key: str) -> int | float:
    return lora_rank(config, key) if default == "r" else lora_alpha(config, key)
