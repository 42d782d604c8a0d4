"""The experts' LoRA of an opened adapter in canonical form, projection by projection, each read when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from ..layout import ExpertLora, from_flat
from .names import PREFIX, ExpertsKeys, Pair, linear_role, peft_name, role_of, same_tensor, targeted_matrix
from .ranks import lora_alpha, lora_rank, lora_scaling
from .shapes import Reading, slot_orientations
from .source import AdapterSource
from .steps import Step

__all__ = ["Load", "Part", "fused_parts", "per_expert_parts", "plain_parts", "stacked_parts"]

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
        steps: What bringing them into this form takes.
    """

    path: str
    name: str
    role: str | None
    alpha: float
    reads: tuple[str, ...]
    load: Load
    steps: tuple[Step, ...] = ()


def fused_parts(
    source: AdapterSource, module: ExpertsKeys, reading: Reading, packing_of: Callable[[str], str]
) -> list[Part]:
    """A fused module, slot by slot, innermost first. `packing_of` says it for each parameter."""
    keys = [f"{module.path}.{name}" for name in reading.nesting]
    ranks = [lora_rank(source.config, key) for key in keys]
    rows = [source.tensors.infos[pair.lora_A].shape[0] for pair in module.slots]
    counts = [count // rank for count, rank in zip(rows, ranks, strict=True)]
    each = slot_orientations(reading.orientation, counts)
    found = []
    for name, pair, key, rank, count, orientation in zip(
        reading.nesting, module.slots, keys, ranks, counts, each, strict=True
    ):
        load = partial(
            _from_pair,
            pair,
            num_experts=count,
            orientation=orientation,
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


def plain_parts(source: AdapterSource) -> tuple[list[Part], dict[str, str]]:
    """The LoRA of ordinary linears, each as that of a single expert, and all tensors that are neither.

    Returns:
        The linears', and of the others PEFT's name -> the file's.
    """
    rest: dict[str, str] = {}
    for name in source.keys.other:
        if (other := rest.setdefault(peft_name(name, source.keys.prefix), name)) != name:
            raise same_tensor(other, name)
    found = []
    for name in list(rest):
        stem = name.removesuffix(".lora_A.weight")
        lora_B = f"{stem}.lora_B.weight"
        if stem != name and lora_B in rest and len(shape := source.tensors.infos[rest[name]].shape) == 2 and shape[0]:
            found.append(_plain_part(source, stem.removeprefix(PREFIX), rest.pop(name), rest.pop(lora_B)))
    return found, rest


def _plain_part(source: AdapterSource, path: str, lora_A: str, lora_B: str) -> Part:
    rank, target = source.tensors.infos[lora_A].shape[0], targeted_matrix(source.config, path)
    key = path if target is None else f"{path}.{target.rpartition('.')[2]}"
    scaling, alpha = lora_scaling(source.config, key, rank), lora_alpha(source.config, key)

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
    scaling = Counter(nonzero).most_common(1)[0][0]
    folds = {e: s / scaling for e, s in scalings.items() if s != scaling}
    steps = []
    if min(ranks.values()) < rank:
        steps.append(Step("experts_padded", (min(ranks.values()), rank, linear)))
    if folds:
        steps.append(Step("experts_folded", (linear,)))
    if missing:
        steps.append(Step("experts_filled", (linear,)))
    keeper = next((e for e in experts if ranks[e] == rank and scalings[e] == scaling), None)
    if keeper is not None:
        alpha = lora_alpha(source.config, keys[keeper])
    else:
        alpha = scaling * (rank**0.5 if source.config.get("use_rslora") else rank)
    reads = tuple(name for pair in experts.values() for name in (pair.lora_A, pair.lora_B))
    load = partial(_stack, experts, total, rank, scaling, folds)
    return Part(module.path, linear, linear_role(linear), alpha, reads, load, tuple(steps))


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
