"""What PEFT makes of the names in `target_modules` before it looks for them, and names that it leaves as they are.

Beside transformers 5, PEFT from 0.19 on takes `gate_proj`, or any name that ends in it, for the fused `gate_up_proj` in
the families of `families.REWRITTEN`: see `rewritten`. What it must not take so, the linears of dense and shared MLPs,
goes by the name of its weight in `target_parameters`, whose LoRA PEFT lays out like a linear's. So do routers, which
are linears in one release and bare parameters in the next. Source: `_convert_peft_config_moe` in PEFT 0.19.0 to 0.21.2,
peft/utils/transformers_weight_conversion.py, and in transformers 5.0 to 5.12, integrations/peft.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import families
from ..releases import FIRST_PEFT_FOR_TRANSFORMERS_5, FIRST_PEFT_THAT_REWRITES, base_release, parse_version
from .names import LINEAR_NAMES
from .patterns import Expression
from .targets import Targets, any_ending

__all__ = ["as_peft_reads", "named_as", "reaching", "rewritten", "taken_for_experts", "targets_of"]


def rewritten(model_type: str | None, peft: str, transformers: str | None) -> frozenset[str]:
    """Names that mean fused experts in `target_modules`, whatever else bears them.

    Args:
        model_type: Of the base model, without `_text`; None where it is not known, and may be any.
        peft: The release that reads the config.
        transformers: The release beside it; None for any.
    """
    beside = None if transformers is None else base_release(parse_version(transformers))
    old = base_release(parse_version(peft)) < FIRST_PEFT_FOR_TRANSFORMERS_5
    if old or (beside is not None and beside.major < 5):
        return frozenset()
    found = [one for one in ([model_type] if model_type else families.REWRITTEN) if families.is_rewritten(one, beside)]
    return frozenset(name for one in found for name in families.family(one).linears.values())


def named_as(targets: Targets, path: str) -> str:
    """The name that patterns find the LoRA of an ordinary module under: a parameter's where it is targeted as one."""
    target = targets.matrix(path)
    return path if target is None else f"{path}.{target.rpartition('.')[2]}"


def targets_of(
    given: tuple[Any, Sequence[str]], experts: Mapping[str, str], linears: Sequence[str], never: frozenset[str]
) -> tuple[Any, list[str]]:
    """`target_modules` and `target_parameters` under which PEFT finds all LoRA on fused experts and on linears.

    Names stay as they are where they do no harm, whether or not the file has LoRA for them.

    Args:
        given: The two, as a config has them. Parameters of it that hold neither of the two are the caller's to drop.
        experts: Full name of a parameter of fused experts -> the path of its module.
        linears: Paths of all other modules with LoRA.
        never: See `rewritten`.
    """
    modules, held = given[0], Targets(given[1])
    parameters = [*held, *(key for key in experts if not held.reach(key))]
    named = []
    for path in (path for path in linears if held.matrix(path) is None):
        if path.rpartition(".")[2] in never | families.ROUTERS:
            parameters.append(f"{path}.weight")
        else:
            named.append(path)
    if isinstance(modules, str) and not never and modules != "all-linear":
        return modules, parameters
    inside = [*experts, *experts.values()]
    kept = [name for name in modules if _harmless(name, never, inside)] if isinstance(modules, list) else []
    reach = reaching({"target_modules": kept})
    return list(dict.fromkeys([*kept, *(path for path in named if not reach(path))])), parameters


def _harmless(name: str, never: frozenset[str], inside: Sequence[str]) -> bool:
    """Whether a name of `target_modules` means neither fused experts, nor what is in them, nor a router."""
    if name.rpartition(".")[2] in never | families.ROUTERS:
        return False
    return not any(any_ending(key, (name,)) or name.startswith(f"{key}.") for key in inside)


def reaching(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a config's targets reach a linear or parameter, by its full name, as PEFT matches them."""
    modules, parameters = config.get("target_modules"), set(config.get("target_parameters") or ())
    if isinstance(modules, str):
        expression = Expression(modules) if modules != "all-linear" else None
        return lambda key: any_ending(key, parameters) or expression is None or expression.matches(key)
    names = parameters.union(modules or ())
    return lambda key: any_ending(key, names)


def as_peft_reads(config: Mapping[str, Any], model_type: str, peft: str, transformers: str | None) -> dict[str, Any]:
    """A config with a list of `target_modules` after PEFT has rewritten it; the same one where it does not.

    `target_modules` is None where PEFT refuses the list: gate without up, or up without gate.
    """
    targets, never = config.get("target_modules"), rewritten(model_type, peft, transformers)
    if not never or not isinstance(targets, list) or base_release(parse_version(peft)) < FIRST_PEFT_THAT_REWRITES:
        return dict(config)
    modules, parameters, roles = [], list(config.get("target_parameters") or ()), set()
    for target in targets:
        leaf = target.rpartition(".")[2]
        if leaf in never:
            roles.add(LINEAR_NAMES[leaf])
        elif leaf == "gate":
            parameters.append("gate.weight")
        else:
            modules.append(target)
    new: dict[str, Any] = {"target_modules": modules, "target_parameters": parameters}
    sides = roles & {"gate", "up"}
    if len(sides) == 1:
        return {**config, "target_modules": None, "target_parameters": None}
    parameters += ["down_proj"] if "down" in roles else []
    if sides:
        parameters.append("gate_up_proj")
        for patterns, value in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            if isinstance(config.get(value), int | float):
                new[patterns] = {**(config.get(patterns) or {}), r".*\.gate_up_proj": 2 * config[value]}
    return {**config, **new}


def taken_for_experts(
    config: Mapping[str, Any], linears: Sequence[str], model_type: str, peft: str, transformers: str | None
) -> list[str]:
    """Paths of linears that `target_modules` names, and that PEFT leaves without LoRA since it rewrites the names."""
    before, after = reaching(config), reaching(as_peft_reads(config, model_type, peft, transformers))
    return [path for path in linears if before(path) and not after(path)]
