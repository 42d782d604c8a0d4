"""An adapter on disk, opened: its config, checked, and its tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from .base_model import BaseModel, base_model_of
from .files import find_adapter, read_json, show
from .names import AdapterKeys, parse_keys
from .tensors import AdapterTensors, open_tensors

__all__ = ["CONFIG_NAME", "AdapterSource", "open_adapter", "open_with_model"]

CONFIG_NAME = "adapter_config.json"
_SIDE_FILES = ("automodel_peft_config.json",)
_AUTOMODEL_RANK_SCALING = "moe_rank_scaling"  # Source: nemo_automodel 0.7, components/_peft/lora.py


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder. Nothing but headers is read until a tensor is asked for.

    Attributes:
        folder: Where it lies.
        config: adapter_config.json.
        side_files: Names of other writers' files beside it, which say who wrote it.
        tensors: The tensors, by name.
        keys: The same, sorted.
    """

    folder: Path
    config: dict[str, Any]
    side_files: dict[str, dict[str, Any]]
    tensors: AdapterTensors
    keys: AdapterKeys

    @property
    def form(self) -> str:
        """Of the experts' LoRA: `"fused"`, `"per_expert"`, `"stacked"`, or `"none"`."""
        forms = {module.form for module in self.keys.modules}
        return forms.pop() if forms else "none"

    def meta(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors without their data, to find out what a conversion will write before it reads anything."""
        infos = self.tensors.infos
        return {name: torch.empty(infos[name].shape, dtype=infos[name].dtype, device="meta") for name in names}


def open_adapter(source: str | Path) -> AdapterSource:
    """Opens an adapter folder, or the one behind a hub id.

    Raises:
        AdapterFileError: A file is missing or damaged, or this is no LoRA adapter.
    """
    folder = find_adapter(source)
    config = read_json(folder / CONFIG_NAME)
    _check_config(config)
    side = {name: read_json(folder / name) for name in _SIDE_FILES if (folder / name).is_file()}
    tensors = open_tensors(folder)
    keys = parse_keys(tensors.infos, config)
    forms = sorted({module.form for module in keys.modules})
    if len(forms) > 1:
        raise AdapterFileError(
            f"{folder} holds LoRA on experts in several forms: {', '.join(forms)}. Were two adapters merged into one?"
        )
    for pair in (pair for module in keys.modules for pair in module.pairs()):
        for name in (pair.lora_A, pair.lora_B):
            if not tensors.infos[name].dtype.is_floating_point:
                raise AdapterFileError(
                    f"{name!r} is {tensors.infos[name].dtype}; LoRA of floating-point numbers was needed."
                )
    return AdapterSource(folder, config, side, tensors, keys)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


# Field -> (what PEFT writes there, whether a value is that). None is allowed everywhere.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "target_modules": ("names or a pattern", lambda value: isinstance(value, str) or _names(value)),
    "target_parameters": ("names", _names),
    "rank_pattern": ("an object", lambda value: isinstance(value, dict)),
    "alpha_pattern": ("an object", lambda value: isinstance(value, dict)),
    "auto_mapping": ("an object", lambda value: isinstance(value, dict)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "use_dora": ("true or false", lambda value: isinstance(value, bool)),
}


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises `AdapterFileError` unless the fields this package reads hold what PEFT writes there."""
    for name, (expected, fits) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not fits(value):
            raise AdapterFileError(
                f"{CONFIG_NAME} has {name} {show(value)}; {expected} was expected. Is it the config of a LoRA adapter?"
            )


def open_with_model(
    adapter: str | Path, model: str | Path | Mapping[str, Any] | BaseModel | None
) -> tuple[AdapterSource, BaseModel | None]:
    """An adapter, and the facts on its base model: those given, else those its config leads to.

    Raises:
        AdapterFileError: See `open_adapter`.
        AdapterError: The model's config is needed to read this adapter, or describes no routed experts.
    """
    source = open_adapter(adapter)
    base = base_model_of(source.config, model)
    if not any(side.get(_AUTOMODEL_RANK_SCALING) for side in source.side_files.values()) or source.form != "fused":
        return source, base
    if base is None or base.num_experts is None:
        raise AdapterError(
            f"{source.folder} was trained with NeMo Automodel's {_AUTOMODEL_RANK_SCALING}: its experts have a rank of "
            "their own, which adapter_config.json does not say. Pass --model (model=...): its number of experts tells."
        )
    rows = {module.path: source.tensors.infos[module.slots[0].lora_A].shape[0] for module in source.keys.modules}
    ranks = {rf"{path}\.[^.]+": count // base.num_experts for path, count in rows.items()}
    return replace(
        source, config={**source.config, "rank_pattern": ranks | (source.config.get("rank_pattern") or {})}
    ), base
