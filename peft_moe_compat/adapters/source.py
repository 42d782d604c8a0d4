"""An adapter on disk, opened: its config, checked, and its LoRA as typed slots."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from .adapter_config import AUTOMODEL_NAME, CONFIG_NAME, AdapterConfig, parse_config, require_few_names
from .base_model import BaseModel, base_model_of
from .files import find_adapter, ordinary_file, read_json, show
from .names import PREFIX, Names, in_model, linear_role, role_of, sort_names
from .ranks import lora_rank
from .renaming import renamed, renamed_config
from .safetensors_io import TensorInfo, without_data
from .slots import ExpertsModule, LinearSlot, experts_modules, is_signed_float, linear_slots
from .stamp import Stamp, numbers_of, numbers_said, read_stamp
from .stated import Stated
from .tensors import AdapterTensors, open_tensors

__all__ = ["CONFIG_NAME", "AdapterSource", "open_adapter", "source_of", "uncollected"]


_T = TypeVar("_T")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder. Nothing but headers is read until a tensor is asked for.

    Attributes:
        folder: Where it lies.
        config: adapter_config.json.
        given: Its fields as they lie there, where `config` has what another file says of them; parsed alike.
        automodel: NeMo Automodel's own file beside it, None where there is none: its name for the layout, and whether
            the experts have a rank of their own. Source: nemo_automodel 0.7, components/_peft/lora.py.
        tensors: The tensors, by name.
        base: The base model, where the caller or the config leads to it.
        stamp: This library's own, if the file has one.
        prefix: What precedes the module paths in the file, PEFT's `base_model.model.` or nothing.
        modules: The experts' LoRA, an entry per module.
        linears: The LoRA of ordinary linears.
        rest: All further tensors: PEFT's name -> the file's.
    """

    folder: Path
    config: AdapterConfig
    given: Mapping[str, Any]
    automodel: Mapping[str, Any] | None
    tensors: AdapterTensors
    base: BaseModel | None
    stamp: Stamp | None
    prefix: str
    modules: tuple[ExpertsModule, ...]
    linears: tuple[LinearSlot, ...]
    rest: Mapping[str, str]
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def form(self) -> str:
        """Of the experts' LoRA: `"fused"`, `"per_expert"`, `"stacked"`, or `"none"`."""
        return self.modules[0].form if self.modules else "none"

    def once(self, key: object, of: object, make: Callable[[], _T]) -> _T:
        """What was made of `of` under that key, for another reader perhaps; made now where it was not."""
        if key not in self._made or self._made[key][0] is not of:
            self._made[key] = of, make()
        found: _T = self._made[key][1]
        return found

    def meta(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors without their data, to find out what a conversion will write before it reads anything."""
        return without_data(self.tensors.infos[name] for name in names)


@contextmanager
def uncollected() -> Iterator[None]:
    """While objects are made that all stay: Python's collector would go through them again and again, a third of all
    the time that a file of 140,000 tensors takes."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def open_adapter(
    adapter: str | Path, stated: Stated, renames: Mapping[str, str] = MappingProxyType({})
) -> AdapterSource:
    """Opens an adapter folder, or the one behind a hub id.

    Args:
        adapter: It.
        stated: What the caller says of it.
        renames: Parts of module paths in the file -> what they are called from here on.

    Raises:
        AdapterFileError: A file is missing or damaged, or this is no LoRA adapter.
        AdapterError: The model's config is needed to read this adapter, or describes no routed experts; or `renames`
            cannot be meant.
    """
    if renames:
        return _opened_renamed(adapter, stated, renames)
    folder = find_adapter(adapter)
    if not (folder / CONFIG_NAME).exists() and (folder / "config.json").exists():
        raise AdapterFileError(
            f"{folder} is the folder of a whole model, and one with {CONFIG_NAME} was needed. A merged model is what "
            "`peft-moe-compat verify ADAPTER MERGED --base BASE` compares."
        )
    return source_of(folder, read_json(folder / CONFIG_NAME), open_tensors(folder), stated)


def _opened_renamed(adapter: str | Path, stated: Stated, renames: Mapping[str, str]) -> AdapterSource:
    """The adapter as if it had the new paths; its numbers must be those that it has under the old ones."""
    before = open_adapter(adapter, stated)
    names = {name: PREFIX + renamed(in_model(name, before.prefix), renames) for name in before.tensors.infos}
    for old in renames:
        if all(renamed(name, {old: ""}) == name for name in names):
            raise AdapterError(
                f"rename: no tensor of {before.folder} lies under {old!r}; one is called {show(next(iter(names), ''))}."
            )
    infos: dict[str, TensorInfo] = {}
    for name, new in names.items():
        if new in infos:
            raise AdapterError(f"rename gives two tensors of {before.folder} one name, {new!r}.")
        infos[new] = replace(before.tensors.infos[name], name=new)
    raw = renamed_config(read_json(before.folder / CONFIG_NAME), renames)
    after = source_of(before.folder, raw, replace(before.tensors, infos=infos), stated, renames)
    now = _kinds(after)
    for name, kind in _kinds(before).items():
        if now[names[name]] != kind:
            raise AdapterError(
                f"rename makes {now[names[name]]} of {show(name)}, which is {kind}. A part of the path above the "
                "experts and linears was expected, as in `--rename model.layers=model.language_model.layers`."
            )
    if _numbers(before) != _numbers(after):
        raise AdapterError(
            f"{before.folder} has expressions in rank_pattern or alpha_pattern that mean the old paths and cannot be "
            "renamed. Write its adapter_config.json with full names or the last parts of names, and convert that."
        )
    return after


def _kinds(source: AdapterSource) -> dict[str, str]:
    """Name of every tensor in the file -> what it is of."""
    linears = {name for slot in source.linears for name in slot.names}
    rest = set(source.rest.values())
    return {
        name: "LoRA of a linear" if name in linears else "no LoRA" if name in rest else "LoRA of experts"
        for name in source.tensors.infos
    }


def _numbers(source: AdapterSource) -> list[Any]:
    """Ranks and alphas of every LoRA, in the order of the file."""
    modules = source.modules
    return [
        *(sorted(slot.candidates.items(), key=str) for module in modules for slot in module.slots),
        *(slot.numbers for module in modules for slot in module.experts),
        *(slot.numbers for module in modules for slot in module.stacks),
        *(slot.numbers for slot in source.linears),
    ]


def source_of(
    folder: Path,
    raw: Mapping[str, Any],
    tensors: AdapterTensors,
    stated: Stated,
    renames: Mapping[str, str] = MappingProxyType({}),
) -> AdapterSource:
    """An adapter of this config and these tensors. What else lies in `folder` may speak of it; errors name it."""
    config = parse_config(raw)
    given = config.raw
    require_few_names(raw, len(tensors.infos))
    beside = folder / AUTOMODEL_NAME
    automodel = read_json(beside) if ordinary_file(beside) else None
    names = sort_names(tensors.infos, config)
    _check_experts(folder, names)
    base = base_model_of(config.base_model_name, stated.model)
    if base is not None and names.matrices and 1 not in base.expert_counts:
        raise AdapterFileError(
            f"lora_A of {names.matrices[0]!r} in {folder} has as many rows as the rank in {CONFIG_NAME}, which is the "
            f"LoRA of one expert; {base.described()} has more. Was the rank edited, or is it another model's adapter?"
        )
    if automodel and automodel.get("moe_rank_scaling") and (ranks := _automodel_ranks(folder, names, config, base)):
        config = parse_config({**raw, "rank_pattern": ranks | (raw.get("rank_pattern") or {})})
    stamp = read_stamp(tensors.metadata)
    if not renames:  # else it was opened without, before
        _check_config(folder, raw, numbers_said(tensors.metadata, stamp))
    if stamp is not None:
        stamp = replace(stamp, modules={renamed(path, renames): said for path, said in stamp.modules.items()})
    modules = experts_modules(names, config, base, stamp)
    linears, rest = linear_slots(names, tensors.infos, config)
    return AdapterSource(folder, config, given, automodel, tensors, base, stamp, names.prefix, modules, linears, rest)


def _check_config(folder: Path, raw: Mapping[str, Any], saved: Mapping[str, Any] | None) -> None:
    """Whether weights and config were saved together: a process that is killed may leave the one of before."""
    here = numbers_of(raw)
    there = here if saved is None else saved
    if differing := [name for name in here if there.get(name) != here[name]]:
        said = "; ".join(f"{name} {show(there.get(name))} and {show(here[name])}" for name in differing)
        raise AdapterFileError(
            f"The tensors in {folder} were saved with another {CONFIG_NAME} than lies beside them: {said}. Was saving "
            "interrupted? Save the adapter again, or take it from another checkpoint. If the config was edited on "
            "purpose, take the stamp out of the file: safetensors.torch.save_file(load_file(FILE), FILE)."
        )


def _check_experts(folder: Path, names: Names) -> None:
    if names.unknown:
        shown = ", ".join(map(show, names.unknown[:4])) + (", ..." if len(names.unknown) > 4 else "")
        raise AdapterFileError(
            f"{folder} has {len(names.unknown)} LoRA tensors on experts under names that are not understood: {shown}. "
            "Left out, the adapter would be another one, so nothing is done with it. Does its writer have an export to "
            "PEFT's form? docs/forms.md lists the forms that are read."
        )
    forms = sorted({place.form for places in names.pairs.values() for place in places})
    if len(forms) > 1:
        raise AdapterFileError(
            f"{folder} holds LoRA on experts in several forms: {', '.join(forms)}. Were two adapters merged into one?"
        )
    for path, places in names.pairs.items():
        _check_roles(path, sorted({place.name for place in places if place.form != "fused"}))
    for factor in (factor for places in names.pairs.values() for pair in places.values() for factor in pair):
        if not is_signed_float(factor.dtype):
            raise AdapterFileError(f"{factor.name!r} is {factor.dtype}; LoRA of floating-point numbers was needed.")


def _check_roles(path: str, linears: list[str]) -> None:
    """Whether no two of an experts module's linears are the same one in two spellings."""
    by_role: dict[str | None, str] = {}
    for linear in linears:
        role = role_of(path, linear) or linear_role(linear)
        sides = ("gate", "up") if role == "gate_up" else (role,)
        for side in sides:
            if (other := by_role.setdefault(side, linear)) != linear:
                raise AdapterFileError(
                    f"{path!r} has two {side} LoRA ({other}, {linear}); one was expected. Were two adapters merged?"
                )


def _automodel_ranks(folder: Path, names: Names, config: AdapterConfig, base: BaseModel | None) -> dict[str, int]:
    """Pattern -> rank of the fused experts, which the config does not say."""
    found = {}
    for path, places in names.pairs.items():
        (place, (lora_A, _)), *_ = places.items()
        if place.form != "fused":
            continue
        if base is None or base.num_experts is None:
            raise AdapterError(
                f"{folder} was trained with NeMo Automodel's moe_rank_scaling: its experts have a rank of their own, "
                "which adapter_config.json does not say. Pass --model (model=...): its number of experts tells."
            )
        rank, rest = divmod(lora_A.shape[0], base.num_experts)
        whole, active = lora_rank(config.raw, path), base.active_experts
        if rest or not 0 < rank <= whole or (active is not None and rank != whole // active):
            raise AdapterFileError(
                f"{folder} was trained with NeMo Automodel's moe_rank_scaling: an expert has the rank {whole} // "
                f"{active or 'experts per token'}. lora_A of {path!r} has {lora_A.shape[0]} rows, for the "
                f"{base.num_experts} experts of {base.name}. Is it the adapter's base model?"
            )
        found[rf"{path}\.[^.]+"] = rank
    return found
