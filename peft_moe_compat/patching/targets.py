"""The targets of an adapter's config, kept from being read as those of another transformers release.

Under transformers 5, PEFT 0.19 and newer (`peft.utils.transformers_weight_conversion`), and transformers 5.0 to 5.12
themselves, take the names that an expert's linears had in transformers 4, in `target_modules`, for the experts' stacks:
`gate_proj` then targets `gate_up_proj`, with twice the rank, and no linear any more, shared experts and dense layers
included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ..adapters.names import LINEAR_NAMES
from ..adapters.source import AdapterSource
from ..adapters.targets import any_ending

__all__ = ["convert_config"]


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
