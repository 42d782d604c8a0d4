"""What a converted file will hold: items, each with the tensors it reads and a function that makes what it writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose

from torch import Tensor

from ..errors import AdapterError
from ..layout import ExpertLora, to_flat
from .names import PREFIX
from .parts import Part
from .shaping import folded
from .steps import Step

__all__ = ["GGUF_PATH", "Item", "Named", "Output", "copied", "evened", "fused", "gguf", "per_expert", "plain"]

GGUF_PATH = re.compile(r"blk\.\d+")  # where llama.cpp has the stacks of a layer
_LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)(?:\.|$)")
_GGUF_NAMES = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


@dataclass(frozen=True)
class Named:
    """What adapter_config.json has to say of one LoRA: `pattern` matches its key as PEFT's patterns do."""

    key: str
    pattern: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Item:
    """Something to write.

    Attributes:
        reads: Names of the tensors it needs.
        emit: Those tensors, by name -> (name, tensor) pairs to write. Runs on meta tensors too.
        lora: What the config has to say of it; None for what is no LoRA.
    """

    reads: tuple[str, ...]
    emit: Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]
    lora: Named | None = None


def copied(name: str, new_name: str) -> Item:
    """A tensor as it is."""

    def emit(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield new_name, tensors[name]

    return Item((name,), emit)


@dataclass(frozen=True)
class Output:
    """A LoRA to write.

    Attributes:
        part: What is written.
        rank, scaling: Of the part.
        key, pattern: See `Named`.
        write: The loaded part -> (name, tensor) pairs.
    """

    part: Part
    rank: int
    scaling: float
    key: str
    pattern: str
    write: Callable[[ExpertLora], Iterator[tuple[str, Tensor]]]

    def item(self) -> Item:
        def emit(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
            return self.write(self.part.load(tensors))

        return Item(self.part.reads, emit, Named(self.key, self.pattern, self.rank, self.part.alpha))


def fused(part: Part, meta: ExpertLora, path: str, parameter: str, depth: int, orientation: str) -> Output:
    """PEFT's flat pair of one parameter, `depth` wrappers inside the outermost one."""

    def write(lora: ExpertLora) -> Iterator[tuple[str, Tensor]]:
        stem = PREFIX + path + ".base_layer" * depth
        for letter, tensor in zip("AB", to_flat(lora, orientation=orientation), strict=True):
            yield f"{stem}.lora_{letter}.weight", tensor

    short = f"{path.rpartition('.')[2]}.{parameter}"
    return Output(part, meta.rank, meta.scaling, f"{path}.{parameter}", short, write)


def per_expert(part: Part, meta: ExpertLora, path: str, linear: str) -> Output:
    """A pair of matrices, "r in" and "out r", for every expert's linear."""

    def write(lora: ExpertLora) -> Iterator[tuple[str, Tensor]]:
        for expert in range(lora.num_experts):
            stem = f"{PREFIX}{path}.{expert}.{linear}"
            yield f"{stem}.lora_A.weight", lora.A[expert]
            yield f"{stem}.lora_B.weight", lora.B[expert]

    pattern = rf"{path.rpartition('.')[2]}\.[0-9]+\.{linear}"
    return Output(part, meta.rank, meta.scaling, f"{path}.0.{linear}", pattern, write)


def gguf(part: Part, meta: ExpertLora, path: str) -> Output:
    """3-D factors, "E r in" and "E out r", under the name of llama.cpp's own tensor."""
    layer = _LAYER.search(path)
    if layer is None or part.role not in _GGUF_NAMES:
        raise AdapterError(f"llama.cpp has no name for the {part.role or part.name} LoRA of {path!r}.")
    stem = f"{PREFIX}blk.{layer[1]}.{_GGUF_NAMES[part.role]}"

    def write(lora: ExpertLora) -> Iterator[tuple[str, Tensor]]:
        yield f"{stem}.lora_A.weight", lora.A
        yield f"{stem}.lora_B.weight", lora.B

    return Output(part, meta.rank, meta.scaling, stem, stem, write)


def plain(part: Part, meta: ExpertLora) -> Output:
    """LoRA of an ordinary linear; its part has a single expert."""

    def write(lora: ExpertLora) -> Iterator[tuple[str, Tensor]]:
        for letter, factor in (("A", lora.A), ("B", lora.B)):
            yield f"{PREFIX}{part.path}.lora_{letter}.weight", factor[0]

    return Output(part, meta.rank, meta.scaling, part.path, part.path, write)


def evened(outputs: Sequence[Output], how: str) -> tuple[list[Output], int, float, list[Step]]:
    """All LoRA of a file for a reader that knows one rank and one alpha.

    Args:
        outputs: All of it.
        how: `"uniform"`: every rank is `r`, every scaling `alpha / r`. `"alpha"`: ranks may differ, every scaling is
            `alpha` over the rank.

    Returns:
        The outputs, `r`, `alpha`, and what it took.
    """
    rank = max(output.rank for output in outputs)
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    lead = [output for output in outputs if output.scaling] or outputs
    if how == "uniform":
        scaling = Counter(output.scaling for output in lead).most_common(1)[0][0]
        alpha = scaling * rank
    else:
        # llama.cpp takes an alpha of 0 for a scaling of 1.
        alpha = Counter(output.scaling * output.rank for output in lead).most_common(1)[0][0] or 1.0
    found, folds, pads = [], 0, 0
    for output in outputs:
        new_rank = rank if how == "uniform" else output.rank
        factor = output.scaling / (alpha / new_rank) if alpha else 1.0
        factor = 1.0 if isclose(factor, 1.0, rel_tol=1e-12) else factor
        folds += factor != 1
        pads += new_rank > output.rank
        part = replace(folded(output.part, factor, new_rank), alpha=alpha)
        found.append(replace(output, part=part, rank=new_rank, scaling=alpha / new_rank))
    steps = [Step("folded", (folds, len(outputs)))] if folds else []
    steps += [Step("padded", (pads, len(outputs), rank))] if pads else []
    return found, rank, alpha, steps
