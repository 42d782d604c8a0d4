"""Whether all LoRA of a file has found its place in a model, by name, and what keeps the two apart where it has not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from ..adapters.names import PREFIX, unwrapped
from ..adapters.source import AdapterSource
from ..errors import LayoutError
from ..model.experts import bare
from .matching import counterparts, facts_of, known_of_this_pair, live_path

__all__ = ["check_names", "difference"]

_LORA = re.compile(r"^(?P<module>.+)\.lora_[^.]+")
_SHOWN = 4


def check_names(
    model: Any, model_id: str, adapter_name: str, names: Iterable[str], result: Any, source: AdapterSource | None
) -> None:
    """Whether every LoRA tensor that upstream was given is in the model, whatever it is LoRA of.

    Experts that upstream fuses are left to `arrival.check_per_expert`. What else it renames, after the names of older
    checkpoints, is counted: no more than the model has under names that the file has not.

    Args:
        model: The model, with the adapter in it.
        model_id: For messages.
        adapter_name: The adapter's name in the model.
        names: Of the tensors.
        result: What upstream says of missing and unexpected keys, None where it says nothing.
        source: The file; None where it was not opened, and counts only if it has LoRA on experts.

    Raises:
        LayoutError: Some of it is not.
    """
    if model.peft_config[adapter_name].peft_type != "LORA":
        return
    fused = _fused_by_upstream(source, model)
    given, unexpected = (
        {key: module for key, module in map(_place, found or ()) if key and not module.startswith(fused)}
        for found in (names, getattr(result, "unexpected_keys", None))
    )
    if source is None and not any("expert" in key for key in (*given, *unexpected)):
        return
    here = f".{adapter_name}."
    missing = {_place(name)[0] for name in getattr(result, "missing_keys", None) or () if here in f"{name}."}
    held = _held(model, adapter_name)
    arrived = held - missing
    lost = {key: module for key, module in given.items() if key not in arrived}
    others = {key for key in arrived - given.keys() if not live_path(key).startswith(fused)}
    if not unexpected and len(lost) <= len(others):
        return
    shown = list(lost := lost or unexpected)
    raise LayoutError(
        f"{len(lost)} of {len(given.keys() | unexpected)} LoRA tensors in {model_id} did not reach the model: "
        f"{', '.join(shown[:_SHOWN])}{' ...' if len(shown) > _SHOWN else ''}. "
        f"{difference(model, model_id, [live_path(module) for module in lost.values()], map(live_path, held))}"
    )


def _place(name: str) -> tuple[str, str]:
    """(module and factor, module) of a LoRA tensor's name, before anybody wrapped what it is in; else empty."""
    match = _LORA.match(unwrapped(name).removeprefix(PREFIX))
    return (match[0], match["module"]) if match else ("", "")


def _fused_by_upstream(source: AdapterSource | None, model: Any) -> tuple[str, ...]:
    """How names begin, in the file and in the model, of experts that one has one by one and the other fused."""
    if source is None or source.form != "per_expert":
        return ()
    facts = facts_of(model)
    fused = {module.path: facts.fused_path(module.path) for module in source.modules}
    live = counterparts(fused.values(), facts)
    return tuple(f"{p}." for path in fused if fused[path] in live for p in (path, live[fused[path]]))


def _held(model: Any, adapter_name: str) -> set[str]:
    """Module and factor of all LoRA an adapter has in a model, whatever its tensors are sharded or flattened to."""
    return {
        unwrapped(name).removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleDict | nn.ParameterDict)
        and name.rpartition(".")[2].startswith("lora_")
        and not name.endswith("lora_dropout")
        and adapter_name in module
    }


def difference(model: Any, model_id: str, paths: Collection[str], held: Iterable[str] = ()) -> str:
    """What the model lacks of the modules that a file has LoRA on, and what to do.

    Args:
        model: The model.
        model_id: The file, for messages.
        paths: Of modules in the file whose LoRA the model cannot take, or has not.
        held: Module and factor of the LoRA that PEFT has made.
    """
    made = {key.rpartition(".")[0] for key in held}
    modules = {live_path(name) for name, _ in bare(model).named_modules()}
    convert = f"`peft-moe-compat convert {model_id} OUT --to peft"
    if pair := _other_prefix(paths, modules):
        old, new = pair
        text = f"This model has these modules under {new!r}: {convert} --model BASE --rename {old}={new}` renames them"
        if any(path.startswith(f"{new}.") for path in made):  # its targets fit as they are
            mapping = {f"^{re.escape(old)}": new}
            text += f", and key_mapping={mapping!r}, given to PEFT's from_pretrained or load_adapter, while loading"
        return f"{text}."
    absent = next((path for path in paths if path not in modules), None)
    if absent is None and not made.isdisjoint(paths):
        known = known_of_this_pair("load_adapter_swaps", "load_adapter_fails")
        return f"PEFT made LoRA for them, and upstream lost what it was to hold.{known}"
    if absent is None:
        return (
            "The model has these modules, but PEFT made no LoRA for them out of the targets in adapter_config.json: "
            f"{convert} --model BASE` writes targets that reach all of them."
        )
    stem, rest = _split(absent)
    layers = {int(rest.split(".")[1]) for other, rest in map(_split, modules) if other == stem and rest}
    if layers and int(rest.split(".")[1]) > max(layers):
        last = max(int(rest.split(".")[1]) for other, rest in map(_split, paths) if other == stem)
        text = f"The file's {stem} go up to number {last}, this {type(bare(model)).__name__}'s to {max(layers)}."
    else:
        text = f"This {type(bare(model)).__name__} has no module {absent!r}."
    return f"{text} Is it the adapter's base model? If it is meant to do without, take those tensors out of the file."


def _other_prefix(paths: Collection[str], modules: Collection[str]) -> tuple[str, str] | None:
    """(old, new): what holds the layers in all these paths, and in the model's that are the same from there on."""
    rests = {_split(path)[1] for path in paths}
    stems = {_split(path)[0] for path in paths}
    if len(stems) != 1 or "" in rests:
        return None
    old, there = stems.pop(), set(map(_split, modules))
    last = old.rpartition(".")[2]
    others = {
        stem for stem, _ in there if stem.rpartition(".")[2] == last and all((stem, rest) in there for rest in rests)
    }
    return (old, others.pop()) if len(others) == 1 and old not in others else None


def _split(path: str) -> tuple[str, str]:
    """What holds the layers, and all from the first number on, dot included."""
    match = re.match(r"^(.*?)(\.\d+(?:\..*)?)$", path)
    return (match[1], match[2]) if match else (path, "")
