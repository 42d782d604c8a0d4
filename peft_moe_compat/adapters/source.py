"""An adapter on disk, opened: its config, its tensors by name, and its experts' LoRA in canonical form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from ..layout import ExpertLora, from_flat
from .base_model import BaseModel, base_model_of
from .detect import Reading
from .files import find_adapter, read_json, show
from .keys import AdapterKeys, ExpertsKeys, Pair, linear_role, parse_keys, role_of
from .ranks import lora_alpha, lora_rank, lora_scaling
from .tensors import AdapterTensors, open_tensors

__all__ = ["AdapterSource", "Load", "Part", "fused_parts", "open_adapter", "open_with_model", "per_expert_parts"]
__all__ += ["plain_parts", "read_fused", "stacked_parts"]

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


def open_adapter(source: str | Path, subfolder: str | None = None) -> AdapterSource:
    """Opens an adapter folder, or the one behind a hub id.

    Raises:
        AdapterFileError: A file is missing or damaged, or this is no LoRA adapter.
    """
    folder = find_adapter(source)
    if subfolder is not None:
        folder /= subfolder
    config = read_json(folder / CONFIG_NAME)
    _check_config(config)
    _check_fields(config, folder / CONFIG_NAME)
    side = {name: read_json(folder / name) for name in _SIDE_FILES if (folder / name).is_file()}
    tensors = open_tensors(folder)
    keys = parse_keys(tensors.infos, config)
    forms = sorted({module.form for module in keys.modules})
    if len(forms) > 1:
        raise AdapterFileError(
            f"{folder} holds LoRA on experts in several forms: {', '.join(forms)}. Were two adapters merged into one?"
        )
    return AdapterSource(folder, config, side, tensors, keys)


def _check_fields(config: Mapping[str, Any], file: Path) -> None:
    """Raises `AdapterFileError` where targets or patterns are not of PEFT's types."""

    def names(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    for field, wanted, good in (
        ("target_modules", "a text or a list of texts", lambda value: isinstance(value, str) or names(value)),
        ("target_parameters", "a list of texts", names),
        ("rank_pattern", "an object", lambda value: isinstance(value, dict)),
        ("alpha_pattern", "an object", lambda value: isinstance(value, dict)),
    ):
        value = config.get(field)
        if value is not None and not good(value):
            raise AdapterFileError(f"{file} has {field} {show(value)}; {wanted} was needed. Is the file damaged?")


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


Load = Callable[[Mapping[str, Tensor]], ExpertLora]


@dataclass(frozen=True)
class Part:
    """LoRA of one projection of one experts module, not read yet.

    Attributes:
        path: Of the module, as the file has it.
        name: Of the parameter or linear, as the file has it.
        role: `"gate_up"`, `"gate"`, `"up"`, `"down"`, or None for a parameter nobody gave one.
        alpha: LoRA alpha that belongs to the rank of the loaded factors.
        reads: Names of the tensors it needs.
        load: Those tensors, by name -> factors.
        notes: What bringing them into this form takes, beyond a rearrangement.
    """

    path: str
    name: str
    role: str | None
    alpha: float
    reads: tuple[str, ...]
    load: Load
    notes: tuple[str, ...] = ()


def read_fused(
    source: AdapterSource, module: ExpertsKeys, reading: Reading, packing: str, tensors: Mapping[str, Tensor]
) -> dict[str, ExpertLora]:
    """A fused module's LoRA: parameter -> factors, views of `tensors`."""
    return {part.name: part.load(tensors) for part in fused_parts(source, module, reading, lambda _: packing)}


def fused_parts(
    source: AdapterSource, module: ExpertsKeys, reading: Reading, packing_of: Callable[[str], str]
) -> list[Part]:
    """A fused module, slot by slot, innermost first. `packing_of` says it for each parameter."""
    found = []
    for name, pair in zip(reading.nesting, module.slots, strict=True):
        key = f"{module.path}.{name}"
        rank = lora_rank(source.config, key)
        rows = source.tensors.infos[pair.lora_A].shape[0]
        load = partial(
            _from_pair,
            pair,
            num_experts=rows // rank,
            orientation=reading.orientation,
            packing=packing_of(name),
            scaling=lora_scaling(source.config, key, rank),
        )
        alpha = lora_alpha(source.config, key)
        found.append(Part(module.path, name, role_of(module.path, name), alpha, (pair.lora_A, pair.lora_B), load))
    return found


def _from_pair(pair: Pair, tensors: Mapping[str, Tensor], **how: Any) -> ExpertLora:
    # lora_B turned once, by torch's fast 2-D transpose, so that each expert's columns lie in rows from here on.
    return from_flat(tensors[pair.lora_A], tensors[pair.lora_B].t().contiguous().t(), **how)


def stacked_parts(source: AdapterSource, module: ExpertsKeys, num_experts: int | None) -> list[Part]:
    """A module of 3-D factors, "E r in" and "E out r", or "E in r" and "E r out", or of 2-D ones for all experts.

    Raises:
        AdapterFileError: The two factors do not belong together, or fit both layouts.
        AdapterError: All experts share a LoRA, and their number is not known.
    """
    found = []
    for name, pair in module.stacks.items():
        key = f"{module.path}.{name}"
        A, B = (source.tensors.infos[tensor].shape for tensor in (pair.lora_A, pair.lora_B))
        if len(A) == len(B) == 2 and A[0] == B[1]:
            if num_experts is None:
                raise AdapterError(
                    f"All experts of {module.path!r} share one LoRA on {name}. Pass --model (model=...) to tell how "
                    "many experts there are."
                )
            load: Load = partial(_from_shared, pair, num_experts, lora_scaling(source.config, key, A[0]))
        else:
            transposed, rank = _stack_layout(source, pair, key)
            load = partial(_from_stacks, pair, transposed=transposed, scaling=lora_scaling(source.config, key, rank))
        role = role_of(module.path, name) or linear_role(name)
        alpha = lora_alpha(source.config, key)
        found.append(Part(module.path, name, role, alpha, (pair.lora_A, pair.lora_B), load))
    return found


def _stack_layout(source: AdapterSource, pair: Pair, key: str) -> tuple[bool, int]:
    """(whether stored "E in r" and "E r out", rank), from the one axis the two can share.

    A tie is broken by the rank in the config, and then by the file's other stacks.
    """
    fitting = _fitting_layouts(source, pair, key)
    if len(fitting) > 1:
        others = [
            {transposed for transposed, _ in _fitting_layouts(source, other, f"{module.path}.{name}")}
            for module in source.keys.modules
            for name, other in module.stacks.items()
            if len(source.tensors.infos[other.lora_A].shape) == 3
        ]
        allowed = set.intersection(*others)
        fitting = [layout for layout in fitting if layout[0] in allowed]
    if len(fitting) == 1:
        return fitting[0]
    A, B = (source.tensors.infos[tensor].shape for tensor in (pair.lora_A, pair.lora_B))
    raise AdapterFileError(
        f"{pair.lora_A!r} is {A} and {pair.lora_B!r} {B}; either 'E r in' with 'E out r' or 'E in r' with 'E r out' "
        "was expected, with the rank that adapter_config.json gives. Is it the config of this file?"
    )


def _fitting_layouts(source: AdapterSource, pair: Pair, key: str) -> list[tuple[bool, int]]:
    """(transposed, rank) of each layout the two shapes allow, by the rank in the config where they allow both."""
    A, B = (source.tensors.infos[tensor].shape for tensor in (pair.lora_A, pair.lora_B))
    if not (len(A) == len(B) == 3 and A[0] == B[0]):
        return []
    fitting = [(transposed, a) for transposed, a, b in ((False, A[1], B[2]), (True, A[2], B[1])) if a == b]
    return fitting if len(fitting) < 2 else [lay for lay in fitting if lay[1] == lora_rank(source.config, key)]


def _from_shared(pair: Pair, num_experts: int, scaling: float, tensors: Mapping[str, Tensor]) -> ExpertLora:
    A, B = tensors[pair.lora_A], tensors[pair.lora_B]
    return ExpertLora(A.expand(num_experts, -1, -1), B.expand(num_experts, -1, -1), scaling)


def _from_stacks(pair: Pair, tensors: Mapping[str, Tensor], *, transposed: bool, scaling: float) -> ExpertLora:
    A, B = tensors[pair.lora_A], tensors[pair.lora_B]
    return ExpertLora(A.transpose(1, 2), B.transpose(1, 2), scaling) if transposed else ExpertLora(A, B, scaling)


def plain_parts(source: AdapterSource) -> tuple[list[Part], list[str]]:
    """The LoRA of ordinary linears, each as that of a single expert, and the names of all tensors that are neither."""
    rest = dict.fromkeys(source.keys.other)
    found = []
    for lora_A in source.keys.other:
        lora_B = lora_A.replace(".lora_A.weight", ".lora_B.weight")
        shape = source.tensors.infos[lora_A].shape
        if lora_A.endswith(".lora_A.weight") and lora_B in rest and len(shape) == 2 and shape[0]:
            found.append(_plain_part(source, lora_A, lora_B))
            del rest[lora_A], rest[lora_B]
    return found, list(rest)


def _plain_part(source: AdapterSource, lora_A: str, lora_B: str) -> Part:
    path = lora_A.removeprefix(source.keys.prefix).removesuffix(".lora_A.weight")
    rank = source.tensors.infos[lora_A].shape[0]
    scaling, alpha = lora_scaling(source.config, path, rank), lora_alpha(source.config, path)

    def load(tensors: Mapping[str, Tensor]) -> ExpertLora:
        return ExpertLora(tensors[lora_A][None], tensors[lora_B][None], scaling)

    return Part(path, path.rpartition(".")[2], None, alpha, (lora_A, lora_B), load)


def per_expert_parts(
    source: AdapterSource, module: ExpertsKeys, *, num_experts: int | None, fill_missing: bool
) -> list[Part]:
    """A per-expert module, its experts stacked per projection.

    Ranks that differ between experts are padded with zeros, scalings that differ are folded into B.

    Raises:
        AdapterFileError: The factors do not fit together.
        AdapterError: Experts are missing and `fill_missing` is false.
    """
    by_linear: dict[str, dict[int, Pair]] = {}
    for (expert, linear), pair in module.experts.items():
        by_linear.setdefault(linear, {})[expert] = pair
    total = num_experts or 1 + max(expert for expert, _ in module.experts)
    return [_stacked_experts(source, module, linear, by_linear[linear], total, fill_missing) for linear in by_linear]


def _stacked_experts(
    source: AdapterSource, module: ExpertsKeys, linear: str, experts: Mapping[int, Pair], total: int, fill: bool
) -> Part:
    what = f"{module.path!r}, {linear}"
    if max(experts) >= total:
        raise AdapterError(f"{what} has LoRA for expert {max(experts)}, but the model has {total} experts.")
    missing = [expert for expert in range(total) if expert not in experts]
    if missing and not fill:
        raise AdapterError(
            f"{what} has LoRA for {len(experts)} of {total} experts (expert {missing[0]} has none). Pass "
            "--fill-missing (fill_missing=True) to give the others a LoRA of zeros, which changes nothing."
        )
    shapes = {e: tuple(source.tensors.infos[name].shape for name in (p.lora_A, p.lora_B)) for e, p in experts.items()}
    for expert, (A, B) in shapes.items():
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise AdapterFileError(
                f"{what}, expert {expert}: lora_A is {A} and lora_B {B}; 'r in', 'out r' were expected."
            )
    if len(sizes := {(A[1], B[0]) for A, B in shapes.values()}) > 1:
        raise AdapterFileError(f"{what} differs in size between experts: (in, out) are {sorted(sizes)}.")
    ranks = {expert: A[0] for expert, (A, _) in shapes.items()}
    keys = {expert: f"{module.path}.{expert}.{linear}" for expert in experts}
    scalings = {expert: lora_scaling(source.config, keys[expert], ranks[expert]) for expert in experts}
    rank = max(ranks.values())
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    nonzero = [value for value in scalings.values() if value] or [0.0]
    scaling, agreeing = Counter(nonzero).most_common(1)[0]
    notes = []
    if min(ranks.values()) < rank:
        notes.append(f"ranks {min(ranks.values())} to {rank} of {linear} padded with zeros to {rank}")
    if agreeing < len(scalings):
        notes.append(f"scalings of {linear} that differ between experts folded into lora_B")
    if missing:
        notes.append(f"zeros for {linear} of experts without LoRA")
    keeper = next((e for e in experts if ranks[e] == rank and scalings[e] == scaling), None)
    if keeper is not None:
        alpha = lora_alpha(source.config, keys[keeper])
    else:
        alpha = scaling * (rank**0.5 if source.config.get("use_rslora") else rank)
    reads = tuple(name for pair in experts.values() for name in (pair.lora_A, pair.lora_B))
    folds = {e: s / scaling for e, s in scalings.items() if s != scaling}
    load = partial(_stack, experts, total, rank, scaling, folds)
    return Part(module.path, linear, linear_role(linear), alpha, reads, load, tuple(notes))


def _stack(
    experts: Mapping[int, Pair],
    total: int,
    rank: int,
    scaling: float,
    folds: Mapping[int, float],
    tensors: Mapping[str, Tensor],
) -> ExpertLora:
    pairs = {e: (tensors[pair.lora_A], tensors[pair.lora_B]) for e, pair in experts.items()}
    first_A, first_B = next(iter(pairs.values()))
    dtypes_A = {A.dtype for A, _ in pairs.values()}
    dtypes_B = {B.dtype for _, B in pairs.values()} | ({torch.float32} if folds else set())
    A = first_A.new_zeros(total, rank, first_A.shape[1], dtype=_widest(dtypes_A))
    B = first_B.new_zeros(total, first_B.shape[0], rank, dtype=_widest(dtypes_B))
    for expert, (a, b) in pairs.items():
        A[expert, : a.shape[0]] = a
        B[expert, :, : b.shape[1]] = b.to(B.dtype) * folds[expert] if expert in folds else b
    return ExpertLora(A, B, scaling)


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    first, *others = dtypes
    for other in others:
        first = torch.promote_types(first, other)
    return first
