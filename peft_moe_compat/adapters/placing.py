"""Which weights of a checkpoint an adapter's LoRA goes into, and which rows of which expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import AdapterError, AdapterFileError
from ..families import LINEAR_NAMES, STORED_OTHERWISE, family
from .base_model import BaseModel
from .checkpoint import PLAIN, Checkpoint, StoredWeight
from .names import PREFIX
from .orientations import expert_parameter
from .parts import Part, plain_part
from .source import AdapterSource
from .stored import Plain

__all__ = ["Placed", "Update", "hub_paths", "place", "replaced"]

# What a name has before and from its layer on: checkpoints and classes differ in the first part.
_LAYER = re.compile(r"(?P<prefix>|.*?\.)(?P<tail>(?:layers|blocks|h)\.[0-9]+\..+)")


_TIED = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class Update:
    """An update, or some rows of it, that goes into a weight.

    Attributes:
        part: The LoRA.
        expert: Of the part, for a weight that is one matrix; None for a stack, expert by expert.
        take: Its rows that go there.
        put: The rows of the matrix that they go to.
    """

    part: Part
    expert: int | None
    take: slice
    put: slice


@dataclass(frozen=True)
class Placed:
    """A weight and what goes into it.

    Attributes:
        weight: The weight.
        transposed: Whether its matrices are "in out".
        updates: In the order of the file.
    """

    weight: StoredWeight
    transposed: bool
    updates: tuple[Update, ...]


@dataclass(frozen=True)
class _Option:
    """Weights that may hold what a part updates.

    Attributes:
        names: Of the weights, in the spelling of the adapter's module paths.
        expert: Whether each is one matrix, of one expert after the other.
        sides: Of each of an expert's weights: rows of the part to take, and rows of the matrix that they go to.
    """

    names: tuple[str, ...]
    expert: bool
    sides: tuple[tuple[slice, slice], ...]


def place(source: AdapterSource, parts: Sequence[Part], checkpoint: Checkpoint, base: BaseModel) -> list[Placed]:
    """Finds the weights for the LoRA of experts and linears.

    Args:
        source: The adapter.
        parts: Its experts' LoRA.
        checkpoint, base: The base model, and what its config says.

    Raises:
        AdapterError: One of them finds no weight, or several, or one of other sizes, or in a format not known.
    """
    most = len(checkpoint.tensors.infos)
    wanted = [(part, list(_expert_options(part, base, most))) for part in parts]
    for slot in source.linears:
        target = source.config.target_parameters.matrix(slot.path)
        parameter = "weight" if target is None else target.rpartition(".")[2]
        wanted.append((plain_part(slot), list(_linear_options(slot.path, parameter, base))))
    if checkpoint.config.get("tie_word_embeddings") is True:
        for name in (options[0].names[0] for _, options in wanted if options and options[0].names[0].endswith(_TIED)):
            raise _is_tied(name, checkpoint)
    names = _Names(checkpoint)
    names.settle(wanted, base)
    found: dict[str, tuple[StoredWeight, list[Update]]] = {}
    for part, options in wanted:
        option = next(option for option in options if names.find(option.names[0]) is not None)
        for index, name in enumerate(option.names):
            actual = names.find(name)
            weight = None if actual is None else checkpoint.weight(actual)
            if weight is None:
                raise AdapterError(f"{checkpoint.folder} lacks {name!r}, which the LoRA of {part.path!r} is for.")
            if len(weight.shape) != (2 if option.expert or part.meta.num_experts == 1 else 3):
                raise AdapterFileError(f"{weight.name!r} is {weight.shape}; that is no weight for {part.path!r}.")
            expert = index // len(option.sides) if len(weight.shape) == 2 else None
            update = Update(part, expert, *option.sides[index % len(option.sides)])
            found.setdefault(weight.name, (weight, []))[1].append(update)
    turned = _transposed([(weight, update) for weight, updates in found.values() for update in updates], base)
    return [_checked(weight, tuple(updates), turned) for weight, updates in found.values()]


def _expert_options(part: Part, base: BaseModel, most: int) -> Iterator[_Option]:
    """Fused as the model has it, under its older names, and expert by expert where there are `most` experts or less."""
    rows = part.meta.out_features
    whole = slice(None), slice(None)
    halves = _halves(2 * rows if part.role in ("gate", "up") else rows, base.interleaved)
    joined = part.role in ("gate", "up") and base.gated
    parameter = base.parameters.get("gate_up" if joined else part.role or "", part.name)
    # Of a part that is one half of the weight, all rows go to that half.
    into = (slice(None), halves[part.role == "up"]) if joined else whole
    own = (parameter,) if joined else dict.fromkeys((part.name, parameter))
    places = [(path, name) for path in hub_paths(part.path, base) for name in own]
    role = "gate_up" if joined else part.role
    if role in ("gate_up", "down"):
        renamed = [expert_parameter(base.model_type, release, part.path, role) for release in ("4.57.0", None)]
        places += [place for place in renamed if place is not None]
    for path, name in places:
        yield _Option((f"{path}.{name}",), False, (into,))
    if part.role is None or part.meta.num_experts > most:
        return
    roles = ("gate", "up") if part.role == "gate_up" else (part.role,)
    sides = tuple((half, slice(None)) for half in halves) if part.role == "gate_up" else (whole,)
    known = [base.linear(role) for role in roles], ["w1", "w3"], ["gate_proj", "up_proj"], ["w2"], ["down_proj"]
    linears = [names for names in known if [LINEAR_NAMES.get(name) for name in names] == list(roles)]
    linears += [[name] for role in roles if len(roles) == 1 for name in LINEAR_NAMES if LINEAR_NAMES[name] == role]
    for path in hub_paths(part.path, base):
        for names in linears:
            every = (f"{path}.{e}.{name}.weight" for e in range(part.meta.num_experts) for name in names)
            yield _Option(tuple(every), True, sides)


def _linear_options(path: str, parameter: str, base: BaseModel) -> Iterator[_Option]:
    for spelled in hub_paths(path, base):
        yield _Option((f"{spelled}.{parameter}",), True, ((slice(None), slice(None)),))


def hub_paths(path: str, base: BaseModel) -> list[str]:
    """A module's path, and as the Hub has it; for Mixtral's relatives, as the other form of the model has it."""
    found = [path, base.hub_path(path)]
    if family(base.model_type).block_sparse_moe:
        old, new = re.compile(r"(^|\.)block_sparse_moe(?=\.|$)"), re.compile(r"(^|\.)mlp(?=\.|$)")
        found += [new.sub(r"\1block_sparse_moe", path), old.sub(r"\1mlp", path)]
    return list(dict.fromkeys(found))


def _halves(rows: int, interleaved: bool) -> tuple[slice, slice]:
    """Rows of gate and of up in gate_up_proj."""
    if interleaved:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(0, rows // 2), slice(rows // 2, None)


class _Names:
    """Names of the checkpoint's weights, found by those that the adapter's modules would have."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._prefixes: dict[str, set[str]] = {}  # from the layer on -> what stands before it
        self._settled: dict[str, str] = {}
        for name in checkpoint.tensors.infos:
            plain = re.sub(r"_blocks$", "", re.sub(r"\.(qweight|weight_packed)$", ".weight", name))
            for prefix, tail in {self._split(name), self._split(plain)}:
                self._prefixes.setdefault(tail, set()).add(prefix)

    @staticmethod
    def _split(name: str) -> tuple[str, str]:
        match = _LAYER.fullmatch(name)
        return (match["prefix"], match["tail"]) if match else ("", name)

    def find(self, name: str) -> str | None:
        """The checkpoint's name of a weight, once `settle` has been called."""
        prefix, tail = self._split(name)
        there = self._settled.get(prefix, prefix)
        return there + tail if there in self._prefixes.get(tail, ()) else None

    def settle(self, wanted: Iterable[tuple[Part, Sequence[_Option]]], base: BaseModel) -> None:
        """Decides what stands for each prefix of the adapter: one that has a weight for every part with it.

        Raises:
            AdapterError: There is none, or there are several and none is spelled alike.
        """
        possible: dict[str, set[str]] = {}
        for part, options in wanted:
            split = [self._split(option.names[0]) for option in options]
            there = {prefix for _, tail in split for prefix in self._prefixes.get(tail, ())}
            prefix = split[0][0] if split else ""
            left = possible.get(prefix, there) & there
            if not left:
                tried = " or ".join(dict.fromkeys(repr(option.names[0]) for option in options))
                raise AdapterError(
                    f"The LoRA on {part.name} of {part.path!r} finds no weight in {self._folder}; {tried} was looked "
                    f"for, under any prefix. {self._why(base)}"
                )
            possible[prefix] = left
        for prefix, candidates in possible.items():
            if prefix not in candidates and len(candidates) > 1:
                raise AdapterError(
                    f"Modules {prefix!r} of the adapter may be {' or '.join(map(repr, sorted(candidates)))} in "
                    f"{self._folder}. Rename them in the adapter."
                )
            self._settled[prefix] = prefix if prefix in candidates else next(iter(candidates))

    def _why(self, base: BaseModel) -> str:
        if base.model_type not in STORED_OTHERWISE:
            return "Is it the adapter's base model?"
        return (
            f"Checkpoints of {base.model_type} hold some weights several in one, or under names that say nothing of "
            "their modules; transformers changes that as it loads them. Merge into a copy as the model has it: "
            f"from_pretrained({str(self._folder)!r}).save_pretrained(COPY, save_original_format=False)."
        )


def _is_tied(name: str, checkpoint: Checkpoint) -> AdapterError:
    return AdapterError(
        f"Head and embedding are one tensor in {checkpoint.folder} (tie_word_embeddings); the adapter changes {name!r} "
        "alone, which no checkpoint of this config can hold. Untie them in the base first."
    )


def _features(update: Update) -> tuple[int, int]:
    """(out, in) of the matrix that an update goes into."""
    lora = update.part.meta
    rows = len(range(lora.out_features)[update.take])
    return (rows if update.put == slice(None) else 2 * rows), lora.in_features


def _transposed(stacks: Iterable[tuple[StoredWeight, Update]], base: BaseModel) -> bool:
    """Whether the checkpoint's plain stacks are "E in out": by the sizes of all of them, then by the family."""
    possible, stored = {False, True}, family(base.model_type).transposed
    for weight, update in stacks:
        if len(weight.shape) != 3 or not isinstance(weight.format, Plain):
            continue
        out, fan_in = _features(update)
        if out == fan_in and stored is not None and stored.until is not None:
            raise AdapterError(
                f"{weight.name!r} is a stack of square matrices, which transformers reads as 'E in out' before "
                f"{stored.until}, and as 'E out in' since. It cannot be merged into without a guess."
            )
        possible &= {turned for turned in possible if weight.shape[1:] == ((fan_in, out) if turned else (out, fan_in))}
    return possible == {True} or (len(possible) == 2 and stored is not None)


def _checked(weight: StoredWeight, updates: tuple[Update, ...], turned: bool) -> Placed:
    transposed = turned and len(weight.shape) == 3 and isinstance(weight.format, Plain)
    for update in updates:
        lora, (out, fan_in) = update.part.meta, _features(update)
        matrix = (fan_in, out) if transposed else (out, fan_in)
        expected = (lora.num_experts, *matrix) if len(weight.shape) == 3 else matrix
        if weight.shape != expected:
            raise AdapterFileError(
                f"{weight.name!r} is {weight.shape}; {expected} was needed for the LoRA on {update.part.name} of "
                f"{update.part.path!r}. Is it the adapter's base model?"
            )
    return Placed(weight, transposed, updates)


def replaced(source: AdapterSource, checkpoint: Checkpoint) -> Mapping[str, str]:
    """Tensors that the adapter holds whole (`modules_to_save`): the checkpoint's name -> the adapter's.

    Raises:
        AdapterError: What is neither LoRA nor a weight of the checkpoint.
    """
    found, tied = {}, checkpoint.config.get("tie_word_embeddings") is True
    for name, in_file in source.rest.items():
        plain = name.removeprefix(PREFIX)
        if tied and plain.endswith(_TIED):
            raise _is_tied(plain, checkpoint)
        info, ours = checkpoint.tensors.infos.get(plain), source.tensors.infos[in_file]
        if ".lora_" in plain or info is None or info.shape != ours.shape or info.dtype not in PLAIN:
            raise AdapterError(
                f"{in_file!r} is neither LoRA that is merged here nor a weight of {checkpoint.folder} of its size: "
                "DoRA, biases and LoRA on embeddings are not. Merge it with PEFT's merge_and_unload."
            )
        found[plain] = in_file
    return found
