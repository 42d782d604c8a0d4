"""The targets of an adapter's config, kept from being read as those of another transformers release.

Under transformers 5, PEFT 0.19 and newer (`peft.utils.transformers_weight_conversion`), and transformers 5.0 to 5.12
themselves, take the names that an expert's linears had in transformers 4, in `target_modules`, for the experts' stacks:
`gate_proj` then targets `gate_up_proj`, with twice the rank, and no linear any more, shared experts and dense layers
included. Loaded, a file's linears keep their LoRA; saved, they go by names that are not taken so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..adapters.names import LINEAR_NAMES
from ..adapters.ranks import lora_alpha, lora_rank
from ..adapters.rewriting import rewritten, targets_of
from ..adapters.source import AdapterSource
from ..adapters.targets import any_ending
from ..errors import CompatWarning
from ..model.experts import bare
from ..model.weights import format_of
from ..model.wrappers import is_param_wrapper
from .matching import live_path, model_type_of

__all__ = ["convert_config", "named_for_any_reader"]


def convert_config(convert: Callable[[Any], Any], config: Any, source: AdapterSource) -> Any:
    """Upstream's conversion of a PEFT config, so that it targets what an adapter file holds.

    A file whose fused experts are targeted already keeps its targets, less the names that it has no tensor for. Any
    other one keeps, beside what upstream makes of them, those that its ordinary linears need.

    Args:
        convert: Upstream's, which changes the config it is given, or returns another.
        config: The `LoraConfig` that is about to be put into a model; its targets are changed.
        source: The file.

    Returns:
        What upstream's is to return: the config that counts.
    """
    taken = _taken(convert, config)
    if not taken:
        return convert(config)
    before, linears = config.target_modules or (), [linear.path for linear in source.linears]
    listed = () if isinstance(before, str) else [name for name in before if name.rpartition(".")[2] in taken]
    kept = {name for name in listed if any(any_ending(path, {name}) for path in linears)}
    targets = source.config.target_parameters
    if source.form == "fused" and all(targets.parameters(module.path) for module in source.modules):
        if isinstance(before, str):
            return config
        config.target_modules = set(before) - set(listed)
    elif isinstance(before, str):  # upstream makes a list of it
        kept = {path for path in linears if path.rpartition(".")[2] in taken}
    result = convert(config)
    converted = config if result is None else result
    converted.target_modules = {*converted.target_modules, *kept}
    return result


def _taken(convert: Callable[[Any], Any], config: Any) -> set[str]:
    """The names of linears that upstream takes for experts in the model it converts for."""
    probe = copy.deepcopy(config)
    probe.target_modules = set(LINEAR_NAMES)
    result = convert(probe)
    return set(LINEAR_NAMES) - set((probe if result is None else result).target_modules)


@contextmanager
def named_for_any_reader(model: Any) -> Iterator[None]:
    """While a model is saved: configs that name linears beside LoRA on experts so that stock PEFT finds them again.

    By their weights in `target_parameters`; what PEFT refuses for those it refuses for experts too. Not with a dropout,
    which stock PEFT has for none of the two, and this library for experts alone.
    """
    before = []
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        with_stacks = getattr(config, "target_parameters", None) and not getattr(config, "lora_dropout", 0)
        new = _named(model, adapter, config) if with_stacks else {}
        before.append((config, {name: getattr(config, name) for name in new}))
        vars(config).update(new)
    try:
        yield
    finally:
        for config, old in before:
            vars(config).update(old)


def _named(model: Any, adapter: str, config: Any) -> dict[str, Any]:
    """What a config is to say otherwise in the file."""
    import peft
    import transformers

    never = rewritten(model_type_of(bare(model)), peft.__version__, transformers.__version__)
    stacks, linears = {}, {}
    for name, module in bare(model).named_modules():
        if adapter in getattr(module, "lora_A", ()):
            path = live_path(name)
            if not is_param_wrapper(module):
                linears[path] = module
            elif module.num_experts > 1:
                stacks[f"{path}.{module.parameter_name}"] = path
    if not any(path.rpartition(".")[2] in never for path in linears):
        return {}
    modules = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    modules, parameters = targets_of((modules, sorted(config.target_parameters)), stacks, list(linears), never)
    new: dict[str, Any] = {"target_modules": set(modules), "target_parameters": parameters}
    moved = {f"{path}.weight": module for path, module in linears.items() if f"{path}.weight" in parameters}
    unfit = [key for key, module in moved.items() if format_of(module.get_base_layer(), "weight") is not None]
    for table, value, find in (("rank_pattern", "r", lora_rank), ("alpha_pattern", "lora_alpha", lora_alpha)):
        said = {value: getattr(config, value), table: dict(getattr(config, table) or {})}
        wanted = {key: getattr(module, value)[adapter] for key, module in moved.items()}
        new[table] = dict(sorted({**said[table], **{k: v for k, v in wanted.items() if find(said, k) != v}}.items()))
        unfit += [key for key, v in wanted.items() if find({**said, table: new[table]}, key) != v]  # as PEFT sorts it
    if unfit:
        warnings.warn(
            f"The saved config names {unfit[0].removesuffix('.weight')!r} in target_modules: the weight is packed, "
            "or a pattern stands in the way of its other name. Stock PEFT from 0.19 on takes such names for experts' "
            "and leaves that LoRA out. This library reads it; `peft-moe-compat convert ADAPTER OUT --to peft --model "
            "BASE` writes what PEFT reads without it.",
            CompatWarning,
            stacklevel=5,
        )
        return {}
    return new
