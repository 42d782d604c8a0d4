"""Every LoRA of a file as a typed slot: its two tensors, where it belongs, and the numbers its config gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ..errors import AdapterFileError
from .adapter_config import AdapterConfig
from .base_model import BaseModel
from .names import PREFIX, Factors, Names, Place, peft_name, role_of, same_tensor
from .ranks import Numbers, lora_numbers, lora_rank
from .safetensors_io import TensorInfo
from .stamp import Stamp

__all__ = [
    "ExpertSlot",
    "ExpertsModule",
    "FusedSlot",
    "LinearSlot",
    "Slot",
    "StackSlot",
    "experts_modules",
    "is_signed_float",
    "linear_slots",
]


# Tinker's, which vLLM and SGLang serve, and llama.cpp's: stacks under these names are "E r in" and "E out r" alone.
_RANK_FIRST = {"w1", "w2", "w3", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}


@dataclass(frozen=True)
class Slot:
    """The two tensors of one LoRA."""

    lora_A: TensorInfo  # noqa: N815
    lora_B: TensorInfo  # noqa: N815

    @property
    def names(self) -> tuple[str, str]:
        return self.lora_A.name, self.lora_B.name


@dataclass(frozen=True)
class FusedSlot(Slot):
    """PEFT's pair of one parameter: lora_A "(E r) p" and lora_B "q (E r)".

    Or unfolded by others, and then linear: "E r in" with "E out r" (twinkle), or with "out r E" (for vLLM).

    Attributes:
        candidates: Parameters it may be on -> the numbers it has there.
        expert_slowest: Whether lora_B is "E out r".
    """

    candidates: Mapping[str, Numbers]
    expert_slowest: bool = False

    @property
    def rows(self) -> int:
        """E * r."""
        return prod(self.lora_A.shape[:-1])

    def num_experts(self, parameter: str) -> int | None:
        """E on that parameter, None where the rows are no multiple of its rank."""
        count, rest = divmod(self.rows, self.candidates[parameter].rank)
        return None if rest else count or None

    @property
    def unfolded(self) -> bool:
        return len(self.lora_A.shape) == 3

    def features(self, orientation: str) -> tuple[int, int]:
        """(in, out) under that orientation."""
        p, q = self.lora_A.shape[-1], self.lora_B.shape[self.expert_slowest]
        return (p, q) if orientation == "linear" else (q, p)


@dataclass(frozen=True)
class ExpertSlot(Slot):
    """A pair of matrices, "r in" and "out r", on one expert's linear; one of them may be, or be in, a stack for all."""

    expert: int
    linear: str
    numbers: Numbers


@dataclass(frozen=True)
class StackSlot(Slot):
    """A pair of stacks. One that all experts share is a stack of one, or a matrix.

    Attributes:
        parameter: Parameter or linear, as the file names it.
        layout: `"stacked"`, "E r in" and "E out r", or `"transposed"`, "E in r" and "E r out".
    """

    parameter: str
    layout: str
    numbers: Numbers

    @property
    def num_experts(self) -> int:
        """E; 1 where all experts share both factors."""
        return max(_stack(self.lora_A)[0], _stack(self.lora_B)[0])


@dataclass(frozen=True)
class LinearSlot(Slot):
    """LoRA of an ordinary linear, or of a 2-D parameter.

    Attributes:
        path: Of the linear, or of the module that holds the parameter.
    """

    path: str
    numbers: Numbers


@dataclass(frozen=True)
class ExpertsModule:
    """The LoRA of one experts module, in one of three forms.

    Attributes:
        path: Of the module in the model, without PEFT's `base_model.model.` and `base_layer`.
        form: `"fused"`, `"per_expert"` or `"stacked"`.
        slots: Of a fused module, innermost wrapper first.
        experts: Of a per-expert module.
        stacks: Of a stacked module.
    """

    path: str
    form: str
    slots: tuple[FusedSlot, ...] = ()
    experts: tuple[ExpertSlot, ...] = ()
    stacks: tuple[StackSlot, ...] = ()

    def every_slot(self) -> tuple[Slot, ...]:
        return (*self.slots, *self.experts, *self.stacks)


def experts_modules(
    names: Names, config: AdapterConfig, base: BaseModel | None, stamp: Stamp | None
) -> tuple[ExpertsModule, ...]:
    """Every experts module of a file, in its order.

    Args:
        names: Of the file's tensors.
        config: The adapter's.
        base, stamp: Its base model and its stamp, where known: they name parameters that the config does not target.

    Raises:
        AdapterFileError: The factors of a slot do not fit together, or the config gives them no numbers.
    """
    layouts = {"stacked", "transposed"}  # that no stack of the file speaks against
    for place, pair in ((place, pair) for places in names.pairs.values() for place, pair in places.items()):
        if place.form == "stacked" and (fitting := _layouts(place, pair, config)):
            layouts &= {layout for layout, _ in fitting}
    found = []
    for path, places in names.pairs.items():
        said = stamp.modules.get(path) if stamp else None
        parameters = said.nesting if said else config.target_parameters.parameters(path)
        if base is not None and base.scopes and said is None:  # of targets for other models, nothing is LoRA here
            roles = {name: role_of(path, name) for name in parameters}
            parameters = tuple(n for n in parameters if roles[n] in base.parameters or "bias" in n)
        parameters = parameters or (
            tuple(base.parameters.values()) if base else ("gate_up_proj", "up_proj", "down_proj")
        )
        fused, experts, stacked = [], [], []
        for place, pair in sorted(places.items(), key=lambda item: -item[0].depth):
            if place.form == "fused":
                fused.append(_fused_slot(path, pair, parameters, config))
            elif place.form == "per_expert":
                experts.append(_expert_slot(place, pair, config))
            else:
                stacked.append(_stack_slot(place, pair, config, layouts))
        found.append(ExpertsModule(path, next(iter(places)).form, tuple(fused), tuple(experts), tuple(stacked)))
    return tuple(found)


def is_signed_float(dtype: torch.dtype) -> bool:
    """Whether LoRA can be of these numbers; float8_e8m0fnu has neither signs nor a zero."""
    return dtype.is_floating_point and dtype != torch.float8_e8m0fnu


def _fused_slot(path: str, pair: Factors, parameters: Iterable[str], config: AdapterConfig) -> FusedSlot:
    lora_A, lora_B = pair
    A, B = lora_A.shape, lora_B.shape
    flat = len(A) == len(B) == 2 and A[0] == B[1]
    unfolded = [len(A) == len(B) == 3 and A[:2] == there for there in ((B[-1], B[-2]), (B[0], B[-1]))]
    if 0 in (*A, *B) or [flat, *unfolded].count(True) != 1:
        raise AdapterFileError(
            f"{lora_A.name!r} is {A} and {lora_B.name!r} {B}; '(E r) p' and 'q (r E)' with the same E * r were "
            "expected, or 'E r in' with either 'E out r' or 'out r E'. Do the two belong to the same adapter?"
        )
    numbers = {name: lora_numbers(config.raw, f"{path}.{name}") for name in parameters}
    return FusedSlot(lora_A, lora_B, numbers, expert_slowest=unfolded[1])


def _expert_slot(place: Place, pair: Factors, config: AdapterConfig) -> ExpertSlot:
    A, B = (factor.shape for factor in pair)
    fits = len(A) == len(B) == 2 or all(len(shape) == 2 or 1 == shape[0] or place.expert < shape[0] for shape in (A, B))
    if not fits or A[-2] != B[-1] or 0 in (*A, *B):
        raise AdapterFileError(
            f"{place.path!r}, {place.name}, expert {place.expert}: lora_A is {A} and lora_B {B}; 'r in', 'out r' "
            "were expected."
        )
    listed = place.name.endswith("_projs")
    key = f"{place.path}.{place.name}.{place.expert}" if listed else f"{place.path}.{place.expert}.{place.name}"
    numbers = lora_numbers(config.raw, key, A[-2])
    return ExpertSlot(*pair, place.expert, place.name, numbers)


def _stack_slot(place: Place, pair: Factors, config: AdapterConfig, layouts: set[str]) -> StackSlot:
    """A tie between two layouts is broken by the rank in the config, the name, and then the file's other stacks."""
    A, B = (factor.shape for factor in pair)
    fitting = _layouts(place, pair, config)
    if len(fitting) > 1:
        fitting = [(layout, rank) for layout, rank in fitting if layout in layouts]
    if len(fitting) != 1 or 0 in (*A, *B):
        raise AdapterFileError(
            f"{pair[0].name!r} is {A} and {pair[1].name!r} {B}; either 'E r in' with 'E out r' or 'E in r' with 'E r "
            "out' was expected, with the rank that adapter_config.json gives; 1 in place of E, or a matrix, where all "
            "experts share a factor. Is it the config of this file?"
        )
    ((layout, rank),) = fitting
    numbers = lora_numbers(config.raw, f"{place.path}.{place.name}", rank)
    return StackSlot(*pair, place.name, layout, numbers)


def _stack(factor: TensorInfo) -> tuple[int, ...]:
    """Its shape as a stack; a matrix is one for all experts."""
    return factor.shape if len(factor.shape) == 3 else (1, *factor.shape)


def _layouts(place: Place, pair: Factors, config: AdapterConfig) -> list[tuple[str, int]]:
    """(layout, rank) of each layout the two shapes allow, by the rank in the config where they allow both."""
    A, B = map(_stack, pair)
    # A matrix beside a stack is one expert's, whose names overwrote each other (Megatron-Bridge's packed families).
    if (A[0] != B[0] and 1 not in (A[0], B[0])) or len(pair[0].shape) != len(pair[1].shape):
        return []
    both = [] if place.native else [("stacked", A[1], B[2])]
    if len(pair[0].shape) == 3:
        both.append(("transposed", A[2], B[1]))
    fitting = [(layout, a) for layout, a, b in both if a == b]
    if len(fitting) < 2:
        return fitting
    known = lora_rank(config.raw, f"{place.path}.{place.name}")
    ranked = [(layout, rank) for layout, rank in fitting if rank == known]
    return ranked[:1] if place.name in _RANK_FIRST else ranked


def linear_slots(
    names: Names, infos: Mapping[str, TensorInfo], config: AdapterConfig
) -> tuple[tuple[LinearSlot, ...], dict[str, str]]:
    """The LoRA of ordinary linears, and all tensors that are neither theirs nor the experts'.

    Returns:
        The linears', and of the others PEFT's name -> the file's.

    Raises:
        AdapterFileError: Two names mean the same tensor, or the config gives a LoRA no numbers.
    """
    rest: dict[str, str] = {}
    for name in names.other:
        if (other := rest.setdefault(peft_name(name, names.prefix), name)) != name:
            raise same_tensor(other, name)
    found = []
    for name in list(rest):
        stem = name.removesuffix(".lora_A.weight")
        lora_B = f"{stem}.lora_B.weight"
        if stem == name or lora_B not in rest:
            continue
        A, B = infos[rest[name]], infos[rest[lora_B]]
        same_ndim = len(A.shape) == len(B.shape)
        stack_of_one = same_ndim and len(A.shape) == 3 and (A.shape[0], B.shape[0], B.shape[2]) == (1, 1, A.shape[1])
        if same_ndim and len(A.shape) > 2 and not stack_of_one and A.shape[0] == B.shape[1]:
            continue  # a convolution's
        floating = is_signed_float(A.dtype) and is_signed_float(B.dtype)
        fits = stack_of_one or (same_ndim and len(A.shape) == 2 and A.shape[0] == B.shape[1])
        if not fits or 0 in (*A.shape, *B.shape) or not floating:
            raise AdapterFileError(
                f"{A.name!r} is {A.shape} of {A.dtype} and {B.name!r} {B.shape} of {B.dtype}; floating-point "
                "'r in' and 'out r' with the same r were expected. Do the two belong to the same adapter?"
            )
        del rest[name], rest[lora_B]
        path = stem.removeprefix(PREFIX)
        target = config.target_parameters.matrix(path)
        key = path if target is None else f"{path}.{target.rpartition('.')[2]}"
        found.append(LinearSlot(A, B, path, lora_numbers(config.raw, key, A.shape[-2])))
    return tuple(found), rest
