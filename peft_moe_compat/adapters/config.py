"""adapter_config.json of a converted adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..releases import stamps_its_version
from .adapter_config import UNSLOTH_DETAIL, UNSLOTH_LAYOUT
from .names import LINEAR_NAMES
from .outputs import Output
from .patterns import Patterns
from .ranks import lora_alpha, lora_rank
from .refit import Refit

__all__ = ["number", "target_config"]

# PEFT heeds these for target_modules, not for target_parameters: they said nothing of fused experts.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
# What else than LoRA of linears a config speaks of -> that there is none.
_THE_REST = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none", "lora_bias": False}


def target_config(how: Refit, experts: Sequence[Output], others: Sequence[str]) -> dict[str, Any]:
    """The config that makes a reader see the LoRA as it is.

    Args:
        how: The file, the reader, and the form of the experts' LoRA there.
        experts: The experts' LoRA.
        others: Paths of all other modules with LoRA.
    """
    source, target = how.source, how.target
    config = _without_marks(dict(source.config.raw)) | {"peft_type": "LORA"}
    if target.peft is not None:
        config.pop("peft_version", None)
        if stamps_its_version(target.peft):
            config["peft_version"] = target.peft
    if not _keeps_targets(how, experts):
        if source.form == "fused" and how.form != "fused":
            narrowing = [name for name in _NARROWING if config.get(name) not in (None, [], "")]
            if narrowing:
                config |= {**dict.fromkeys(narrowing), "target_modules": None}
        targeted = source.config.target_parameters
        _retarget(config, how.form, experts, {path: targeted.matrix(path) for path in others})
    ranks = {output: output.part.meta.rank for output in experts}
    alphas = {output: number(output.part.alpha) for output in experts}
    config["rank_pattern"] = _patterns(config, "rank_pattern", lora_rank, ranks)
    config["alpha_pattern"] = _patterns(config, "alpha_pattern", lora_alpha, alphas)
    if not target.reader.everything:  # the file will hold LoRA of linears and nothing else
        config |= {name: value for name, value in _THE_REST.items() if config.get(name)}
    return config


def _keeps_targets(how: Refit, experts: Iterable[Output]) -> bool:
    """Whether the config's targets stay right: every parameter is called as it was, and was targeted."""
    if not how.source.form == how.form == "fused":
        return False
    before = {f"{path}.{name}" for path, reading in how.decision.readings.items() for name in reading.nesting}
    after = {output.key for output in experts}
    return before == after and all(map(how.source.config.target_parameters.reach, after))


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


def _retarget(config: dict[str, Any], form: str, experts: Iterable[Output], others: Mapping[str, str | None]) -> None:
    """target_parameters and target_modules for experts that are called otherwise than before.

    Args:
        others: Path of every other module with LoRA -> see `Targets.matrix`.
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
        config["target_parameters"] = sorted([*kept, *(output.key for output in experts)])
    else:
        config["target_parameters"] = kept or None
        names += sorted({output.key.rpartition(".")[2] for output in experts})
    config["target_modules"] = sorted(dict.fromkeys(names))


def _patterns(
    config: Mapping[str, Any],
    patterns: str,
    find: Callable[[Mapping[str, Any], str], int | float],
    wanted: Mapping[Output, int | float],
) -> dict[str, Any]:
    """The table of patterns under which PEFT finds each wanted value, with as few new entries as that takes."""
    table = dict(config.get(patterns) or {})
    missed = {output: value for output, value in wanted.items() if find(config, output.key) != value}
    if not missed:
        return table
    by_pattern: dict[str, set[int | float]] = {}
    for output, value in wanted.items():
        by_pattern.setdefault(output.pattern, set()).add(value)
    new = {
        output.pattern if len(by_pattern[output.pattern]) == 1 else output.full_pattern: value
        for output, value in missed.items()
    }
    before = {**config, patterns: Patterns({pattern: table.get(pattern, value) for pattern, value in new.items()})}
    if any(
        find(before if before[patterns].find(output.key) else config, output.key) != value
        for output, value in wanted.items()
    ):
        new = {output.full_pattern: value for output, value in wanted.items()}
    return {**new, **table}  # PEFT takes the first pattern that matches
