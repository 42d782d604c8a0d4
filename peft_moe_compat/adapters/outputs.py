"""What a converted file will hold: LoRA, each with the part it is made of, and tensors copied as they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose

from torch import Tensor

from ..errors import AdapterError
from ..layout import ExpertLora, to_flat
from .bounds import require_room
from .names import PREFIX
from .parts import Part
from .shaping import folded
from .steps import Step

__all__ = ["GGUF_PATH", "LAYER", "Copied", "Output", "evened", "fused", "gguf", "per_expert", "plain", "shared_outer"]

GGUF_PATH = re.compile(r"blk\.\d+")  # where llama.cpp has the stacks of a layer
LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.([0-9]+)(?:\.|$)")
# vLLM 0.28 to 0.33 want these names for shared factors, and SGLang renames them.
_SHARED_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_GGUF_NAMES = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


@dataclass(frozen=True)
class Copied:
    """A tensor as it is, by its name in the file and the new one."""

    name: str
    new_name: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def names(self) -> Iterator[str]:
        return iter((self.new_name,))

    def emit(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.new_name, tensors[self.name]


@dataclass(frozen=True, eq=False)
class Output:
    """A LoRA to write.

    Attributes:
        part: What is written.
        path: Of the module, in the file to be written.
        keys: The full names by which adapter_config.json's patterns and targets find it: one, or one for each expert.
        pattern, full_pattern: Regular expressions for its key, the second for that of no other module.
        modules: Names of the modules whose tensors will be in the file.
        factors: The loaded part -> (lora_A, lora_B) of each of them.
    """

    part: Part
    path: str
    keys: tuple[str, ...]
    pattern: str
    full_pattern: str
    modules: tuple[str, ...]
    factors: Callable[[ExpertLora], Iterable[tuple[Tensor, Tensor]]]

    @property
    def key(self) -> str:
        """The first of its keys."""
        return self.keys[0]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.part.reads

    @property
    def names(self) -> Iterator[str]:
        """Of the tensors that it will be."""
        return (f"{PREFIX}{module}.lora_{factor}.weight" for module in self.modules for factor in "AB")

    def emit(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs, of the tensors it reads. Runs on meta tensors too."""
        factors = self.factors(self.part.load(tensors))
        return zip(self.names, (factor for pair in factors for factor in pair), strict=True)


def fused(part: Part, path: str, parameter: str, depth: int, orientation: str) -> Output:
    """PEFT's flat pair of one parameter, `depth` wrappers inside the outermost one."""
    key, name = f"{path}.{parameter}", path + ".base_layer" * depth
    short = f"{path.rpartition('.')[2]}.{parameter}"
    return Output(part, path, (key,), short, key, (name,), lambda lora: [to_flat(lora, orientation=orientation)])


def per_expert(part: Part, path: str, linear: str) -> Output:
    """A pair of matrices, "r in" and "out r", for every expert's linear."""

    def factors(lora: ExpertLora) -> Iterator[tuple[Tensor, Tensor]]:
        # At once: a copy for every expert would take as many kernels.
        return zip(lora.A.contiguous().unbind(), lora.B.contiguous().unbind(), strict=True)

    keys = tuple(f"{path}.{expert}.{linear}" for expert in range(part.meta.num_experts))
    pattern = rf"\.[0-9]+\.{linear}"
    return Output(part, path, keys, path.rpartition(".")[2] + pattern, path + pattern, keys, factors)


def gguf(part: Part, path: str) -> Output:
    """3-D factors, "E r in" and "E out r", under the name of llama.cpp's own tensor."""
    layer = LAYER.search(path)
    if layer is None or part.role not in _GGUF_NAMES:
        raise AdapterError(f"llama.cpp has no name for the {part.role or part.name} LoRA of {path!r}.")
    key = f"blk.{layer[1]}.{_GGUF_NAMES[part.role]}"
    return Output(part, path, (key,), key, key, (key,), lambda lora: [(lora.A, lora.B)])


def shared_outer(part: Part, path: str, linear: str) -> Output:
    """3-D factors under w1, w3 or w2, where the one that faces the hidden size is a stack of one, for all experts.

    Config and targets know them by the names that the readers give these: gate_proj, up_proj, down_proj.
    """
    down = part.role == "down"

    def factors(lora: ExpertLora) -> Iterator[tuple[Tensor, Tensor]]:
        A = lora.A if down else _of_all(part, "lora_A", lora.A)
        yield A, _of_all(part, "lora_B", lora.B) if down else lora.B

    key = f"{path}.{linear}"
    return Output(part, path, (key,), key, key, (f"{path}.{_SHARED_NAMES[linear]}",), factors)


def _of_all(part: Part, side: str, factor: Tensor) -> Tensor:
    """ "1 ..." of a factor "E ..." that is the same for all experts.

    Raises:
        AdapterError: It is not.
    """
    if not factor.is_meta and bool((differs := (factor != factor[:1]).flatten(1).any(1)).any()):
        raise AdapterError(
            f"{side} of {part.path!r}, {part.name}, has other values for expert {int(differs.nonzero()[0])} than for "
            "expert 0. Only LoRA whose outer side all experts share is written so; convert it with --to vllm or sglang."
        )
    return factor[:1]


def plain(part: Part, path: str) -> Output:
    """LoRA of an ordinary linear; its part has a single expert."""
    return Output(part, path, (path,), path, path, (path,), lambda lora: [(lora.A[0], lora.B[0])])


def evened(outputs: Sequence[Output], how: str, rslora: bool = False) -> tuple[list[Output], int, float, list[Step]]:
    """All LoRA of a file for a reader that knows one rank and one alpha.

    Args:
        outputs: All of it.
        how: `"uniform"`, `"rslora"`: every rank is `r`, every scaling `alpha / r`. `"alpha"`: ranks may differ, every
            scaling is `alpha` over the rank.
        rslora: Whether the scaling is `alpha / sqrt(r)` instead.

    Returns:
        The outputs, `r`, `alpha`, and what it took.
    """
    loras = [output.part.meta for output in outputs]
    rank = max(lora.rank for lora in loras)
    # Nothing can be folded into a scaling of 0, as lora_alpha 0 gives it.
    lead = [lora for lora in loras if lora.scaling] or loras
    over = rank**0.5 if rslora else rank
    if how == "alpha":
        # llama.cpp takes an alpha of 0 for a scaling of 1.
        alpha = Counter(lora.scaling * lora.rank for lora in lead).most_common(1)[0][0] or 1.0
    else:
        alpha = Counter(lora.scaling for lora in lead).most_common(1)[0][0] * over
        sizes = [(lora.num_experts * (lora.in_features + lora.out_features), lora.A.element_size()) for lora in loras]
        before = sum(lora.rank * numel * size for lora, (numel, size) in zip(loras, sizes, strict=True))
        require_room(f"LoRA all of rank {rank}", sum(rank * numel * size for numel, size in sizes), 16 * before)
    found, folds, pads = [], 0, 0
    for output, lora in zip(outputs, loras, strict=True):
        new_rank = lora.rank if how == "alpha" else rank
        factor = lora.scaling / (alpha / (new_rank if how == "alpha" else over)) if alpha else 1.0
        factor = 1.0 if isclose(factor, 1.0, rel_tol=1e-12) else factor
        folds += factor != 1
        pads += new_rank > lora.rank
        found.append(replace(output, part=folded(output.part, factor, new_rank, alpha)))
    steps = [Step("folded", (folds, len(outputs)))] if folds else []
    steps += [Step("padded", (pads, len(outputs), rank))] if pads else []
    return found, rank, alpha, steps
