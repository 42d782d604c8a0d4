"""What a conversion does to an adapter, as values; each becomes a sentence where it is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Step", "exactness"]

# Kind -> its sentence, given the step's details.
_SENTENCES = {
    "joined": "gate and up joined block-diagonally, rank {} + {}",
    "join_folded": "scaling of up folded into lora_B",
    "experts_padded": "ranks {0} to {1} of {2} padded with zeros to {1}",
    "experts_folded": "scalings of {} that differ between experts folded into lora_B",
    "experts_filled": "zeros for {} of experts without LoRA",
    "filled": "LoRA of zeros for {}, which {} asks for",
    "folded": "scaling of {} of {} LoRA folded into lora_B",
    "padded": "rank of {} of {} LoRA padded with zeros to {}",
    "dropped": "{} tensors that are no LoRA of linears left out ({})",
}
_ROUND_OFF = {"join_folded", "experts_folded", "folded"}


@dataclass(frozen=True)
class Step:
    """One thing done beyond laying out the same numbers anew.

    Attributes:
        kind: One of those above.
        details: What its sentence mentions, in order.
    """

    kind: str
    details: tuple[object, ...] = ()

    def __str__(self) -> str:
        return _SENTENCES[self.kind].format(*self.details)


def exactness(steps: Iterable[Step]) -> str:
    """`"bits"`, `"round-off"` or `"lossy"`: what a conversion in these steps keeps of the factors."""
    kinds = {step.kind for step in steps}
    return "lossy" if "dropped" in kinds else "round-off" if kinds & _ROUND_OFF else "bits"
