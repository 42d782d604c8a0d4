"""Adapters that come as a state dict, without a file and its config: what they hold.

Of one that carries its layout along, in the `_metadata` that torch's own state dicts have and pickle keeps, that tells;
of any other the shapes, or `written_by`, or it is refused. lora_B is taken to be packed as PEFT packs it, unless its
numbers speak against that.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter_config import parse_config
from ..adapters.decide import decide
from ..adapters.safetensors_io import TensorInfo
from ..adapters.shapes import readings_by_shape
from ..adapters.source import AdapterSource, source_of
from ..adapters.stamp import STAMP_KEY
from ..adapters.stated import Stated
from ..adapters.tensors import HeldTensors
from ..errors import AmbiguousAdapterError, LayoutError
from .matching import UnderstoodFile, counterparts, facts_of
from .opening import fitted, said_of_files

__all__ = ["STATE_DICT", "carried", "carrying", "understand_tensors", "whole"]

STATE_DICT = "the state dict"
_SAMPLE = 8


def whole(tensor: Any) -> bool:
    """Whether all of its numbers are here, in a tensor of torch's own."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _sample(tensor: Tensor) -> list[float]:
    found: list[float] = tensor.detach().reshape(-1)[:_SAMPLE].tolist()
    return found


def carrying(tensors: Mapping[str, Tensor], name: str, key: str, said: str) -> Any:
    """A state dict that says so under that key of its `_metadata`, and by a tensor's numbers that it is of these."""
    found: Any = OrderedDict(tensors)
    found._metadata = OrderedDict(getattr(tensors, "_metadata", {}))
    found._metadata[key] = {"said": said, "name": name, "sample": _sample(tensors[name])}
    return found


def carried(tensors: Mapping[str, Tensor], key: str) -> dict[str, str]:
    """What a state dict says under that key; nothing if other numbers were put into its tensors, as loaders do."""
    entry = (getattr(tensors, "_metadata", None) or {}).get(key)
    if not isinstance(entry, dict) or not whole(tensors.get(str(entry.get("name")))):
        return {}
    return {key: str(entry.get("said"))} if _sample(tensors[entry["name"]]) == entry.get("sample") else {}


def understand_tensors(model: Any, config: Any, tensors: Mapping[str, Tensor]) -> UnderstoodFile | None:
    """What a state dict holds; None where no fused LoRA of the model's experts is in it, or no numbers are.

    Args:
        model: It is for, with or without the adapter.
        config: Of the adapter: PEFT's, or as it is in adapter_config.json.
        tensors: By PEFT's names, without the adapter's.

    Raises:
        AmbiguousAdapterError: Nothing tells how it is laid out.
        LayoutError: PEFT would leave it out.
    """
    # What a config says of the file beside it is not said of this.
    told = config if isinstance(config, Mapping) else json.loads(json.dumps(config.to_dict(), default=_plain))
    raw = {key: value for key, value in told.items() if key not in ("peft_version", "auto_mapping")}
    if raw.get("peft_type", "LORA") != "LORA":
        return None
    where = Path(STATE_DICT)
    facts = facts_of(model, parse_config(raw).target_parameters)
    infos = {n: TensorInfo(n, tuple(t.shape), t.dtype, where, 0) for n, t in tensors.items() if hasattr(t, "dtype")}
    stated = replace(said_of_files(), model=facts)
    source = source_of(where, raw, HeldTensors(infos, carried(tensors, STAMP_KEY), held=tensors), stated)
    if source.form == "stacked":
        raise LayoutError(
            "The state dict holds the experts' LoRA as stacks, which PEFT leaves out without a word. Convert the "
            "adapter that it was made from."
        )
    paths = counterparts((module.path for module in source.modules), facts) if source.form == "fused" else {}
    if not paths or all(tensor.is_meta for tensor in tensors.values()):
        return None
    source = fitted(source, paths, facts)
    decision = decide(source, _settled(source, stated, all(map(whole, tensors.values()))))
    decision.require(STATE_DICT)
    return UnderstoodFile(source, paths, decision)


def _plain(value: Any) -> Any:
    """What JSON has for a value of PEFT's config."""
    return sorted(value) if isinstance(value, set) else str(value)


def _settled(source: AdapterSource, stated: Stated, whole: bool) -> Stated:
    """What the caller says; where that is nothing and shapes tell the layout, that PEFT wrote it, as for the packing.

    Raises:
        AmbiguousAdapterError: Shapes do not tell.
    """
    import peft
    import transformers

    here = f"peft=={peft.__version__},transformers=={transformers.__version__}"
    if not whole:
        stated = replace(stated, packing=stated.packing or "rank_major")  # nobody reads the numbers
    if source.stamp is not None or stated.written_by or stated.orientation:
        return stated
    if len(readings_by_shape(source, stated.nesting).orientations) > 1:
        raise AmbiguousAdapterError(
            "The state dict does not say how the experts' LoRA in it is laid out, and its shapes fit either way. If "
            "the releases that are installed made it, set it in a block `with "
            f'peft_moe_compat.written_by("{here}"):`; name those that did if others made it. What '
            "get_peft_model_state_dict gives while peft_moe_compat is active says so itself, until it is put into "
            "another dict."
        )
    return replace(stated, written_by=here)
