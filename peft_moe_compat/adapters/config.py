"""adapter_config.json of a converted adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..releases import stamps_its_version
from .adapter_config import UNSLOTH_DETAIL, UNSLOTH_LAYOUT
from .config_fields import CHANGES
from .names import LINEAR_NAMES
from .outputs import Output
from .patterns import Patterns
from .ranks import lora_alpha, lora_rank
from .readers import KEEP_THE_BASE, NotTakenError
from .refit import Refit
from .rewriting import named_as, reaching, rewritten, targets_of
from .steps import Step
from .targets import Targets, any_ending

__all__ = ["number", "target_config"]

# PEFT heeds these for target_modules, not for target_parameters: they said nothing of fused experts.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
# What else than LoRA of linears a config speaks of -> that there is none.
_THE_REST = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none", "lora_bias": False}


# What `ParamWrapper` refuses, of what a config says of factors.
_NOT_ON_PARAMETERS = ("use_dora", "lora_bias", "kasa_config", "velora_config")


class _Named(NamedTuple):
    """What patterns find a LoRA by; see `Output`."""

    keys: tuple[str, ...]
    pattern: str
    full_pattern: str


def target_config(
    how: Refit, experts: Sequence[Output], linears: Sequence[Output], others: Sequence[str], scaling: str
) -> tuple[dict[str, Any], list[Step]]:
    """The config that makes a reader see the LoRA as it is, and what that takes.

    Args:
        how: The file, the reader, and the form of the experts' LoRA there.
        experts, linears: Their LoRA.
        others: Paths of all other modules with LoRA.
        scaling: Of the reader's row; whether ranks and alphas may differ.

    Raises:
        NotTakenError: PEFT takes no LoRA of that kind on the parameters of experts.
    """
    source, target = how.source, how.target
    config = _without_marks(dict(source.config.raw)) | {"peft_type": "LORA"}
    if target.peft is not None:
        config.pop("peft_version", None)
        if stamps_its_version(target.peft):
            config["peft_version"] = target.peft
    parameters = how.form == "fused" and target.peft is not None
    steps = _fit_for_parameters(config, source.form != "fused") if parameters else []
    _retarget(config, how, experts, [output.path for output in linears] + list(others))
    targets = Targets(config["target_parameters"] or ())
    linears = [_keyed(output, named_as(targets, output.path), target.reader.everything) for output in linears]
    loras = {_Named(output.keys, output.pattern, output.full_pattern): output.part for output in (*experts, *linears)}
    for name, patterns, find, values in (
        ("r", "rank_pattern", lora_rank, {named: part.meta.rank for named, part in loras.items()}),
        ("lora_alpha", "alpha_pattern", lora_alpha, {named: number(part.alpha) for named, part in loras.items()}),
    ):
        if config.get(name) is None:
            config[name] = Counter(values.values()).most_common(1)[0][0]
        if scaling != "config" and not (scaling == "alpha" and name == "r"):
            config[patterns] = {}  # one for all
            continue
        kept = {_Named((path,), path, path): find(config, path) for path in others}
        config[patterns] = _patterns(config, patterns, find, kept | values)
    if not target.reader.everything:  # the file will hold LoRA of linears and nothing else
        config |= {name: value for name, value in _THE_REST.items() if config.get(name)}
    return config, steps


def _fit_for_parameters(config: dict[str, Any], moved: bool) -> list[Step]:
    """Takes out of a config what PEFT's `ParamWrapper` refuses and what changes nothing in a trained adapter.

    `moved`: The LoRA was not that of parameters before.
    """
    never = {*_NOT_ON_PARAMETERS, *(CHANGES.keys() - {"layer_replication"} if moved else ())}
    if refused := sorted(name for name in never if config.get(name)):
        raise NotTakenError(
            "parameters", f"The adapter has {' and '.join(refused)}, which PEFT takes on no parameter of fused experts."
        )
    config["fan_in_fan_out"] = False
    start = config.get("init_lora_weights")
    if moved and isinstance(start, str) and start in KEEP_THE_BASE:  # of linears; what is loaded replaces it
        config["init_lora_weights"] = True
    dropout = config.get("lora_dropout")
    config["lora_dropout"] = 0.0
    return [Step("dropout", (dropout,))] if dropout else []


def _keyed(output: Output, name: str, by_name: bool) -> Output:
    """Found by the name of what is targeted, as PEFT does; unless `by_name`, by the module's too, as others do."""
    if by_name or name == output.path:
        return replace(output, keys=(name,), pattern=name, full_pattern=name)
    pattern = rf"{output.path}(\.{name.rpartition('.')[2]})?"
    return replace(output, keys=(output.path, name), pattern=pattern, full_pattern=pattern)


def _keeps_targets(how: Refit, experts: Iterable[Output]) -> bool:
    """Whether the config's targets stay right: parameters are called as they were, and they reach these alone."""
    if not how.source.form == how.form == "fused":
        return False
    targets, readings = how.source.config.target_parameters, how.decision.readings
    before = {f"{path}.{name}" for path, reading in readings.items() for name in reading.nesting}
    names = {name for reading in readings.values() for name in reading.nesting}
    reached = {key for path in readings for name in names if targets.reach(key := f"{path}.{name}")}
    return before == {output.key for output in experts} == reached


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


def _retarget(config: dict[str, Any], how: Refit, experts: Sequence[Output], others: Sequence[str]) -> None:
    """target_parameters and target_modules under which the reader finds the LoRA.

    Args:
        others: Path of every other module with LoRA.
    """
    source, target = how.source, how.target
    keeps = _keeps_targets(how, experts)
    if source.form == "fused" and how.form != "fused":
        narrowing = [name for name in _NARROWING if config.get(name) not in (None, [], "")]
        if narrowing:
            config |= {**dict.fromkeys(narrowing), "target_modules": None}
    modules, targets = config.get("target_modules"), source.config.target_parameters
    if not keeps:
        held = map(targets.matrix, others)
        targets = Targets(sorted({target for target in held if target is not None}))
        # Linears of dense and shared MLPs go by their full names: their short ones may mean experts.
        kept = modules if isinstance(modules, list) else []
        modules = [name for name in kept if name.rpartition(".")[2] not in LINEAR_NAMES]
    named = {output.key: output.path for output in experts}
    if how.form == "fused":
        known = source.base.model_type if source.base else None
        never = rewritten(known, target.peft, target.transformers) if target.peft else frozenset()
        modules, parameters = targets_of((modules, targets), named, others, never)
    else:
        modules = [name for name in modules or () if not any(any_ending(path, (name,)) for path in named.values())]
        reach = reaching({"target_modules": modules})
        modules += [path for path in others if targets.matrix(path) is None and not reach(path)]
        modules += sorted({key.rpartition(".")[2] for key in named})
        parameters = list(targets)
    config["target_modules"] = modules if keeps else sorted(dict.fromkeys(modules))
    config["target_parameters"] = parameters if keeps else sorted(parameters) or None


def _patterns(
    config: Mapping[str, Any],
    patterns: str,
    find: Callable[[Mapping[str, Any], str], int | float],
    wanted: Mapping[_Named, int | float],
) -> dict[str, Any]:
    """The table of patterns under which PEFT finds each wanted value, with as few new entries as that takes.

    It takes the first that matches: of the table as written, and of the sorted one that its `save_pretrained` writes.
    """
    table = config.get(patterns) or Patterns({})

    def missed(new: Patterns) -> dict[_Named, set[str | None]]:
        """What does not find its value -> the patterns that stand in the way."""
        found: dict[_Named, set[str | None]] = {}
        for order in (new,) if new.as_saved is new else (new, new.as_saved):
            read = {**config, patterns: order}
            for named, value in wanted.items():
                keys = named.keys if new else named.keys[:1]  # without patterns, one speaks for all
                for key in (key for key in keys if find(read, key) != value):
                    found.setdefault(named, set()).add(order.find(key))
        return found

    if not (wrong := missed(table)):
        return table
    by_pattern: dict[str, set[int | float]] = {}
    for named, value in wanted.items():
        by_pattern.setdefault(named.pattern, set()).add(value)
    in_the_way = set[str | None]().union(*wrong.values())
    new = {o.pattern if len(by_pattern[o.pattern]) == 1 else o.full_pattern: wanted[o] for o in wrong}
    new |= {pattern: value for pattern, value in table.items() if pattern not in in_the_way | set(new)}
    if missed(Patterns(new)):  # then each by its own name from the beginning, which no other pattern matches
        new = {f"^{named.full_pattern}": value for named, value in wanted.items()}
    return new
