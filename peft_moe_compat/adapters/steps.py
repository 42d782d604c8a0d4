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
    "dropout": "lora_dropout {} left out, since PEFT takes none on parameters",
    # What a conversion does besides, which none of its steps says.
    "from_fused": "the experts' LoRA in another form than PEFT's fused one",
    "from_per_expert": "the experts' LoRA in another form than expert by expert",
    "from_stacked": "the experts' LoRA in another form than these 3-D factors",
    "orientation": "{} factors",
    "nesting": "the wrappers nested the other way round",
    "unfolded": "matrices for each pair instead of stacks",
    "packing": "lora_B's columns in another order",
    "path": "the experts under another path ({})",
    "linears": "linears called {}",
    "names": "tensors under other names",
    "rank": "another rank in the config",
    "scaling": "another lora_alpha in the config",
    "targets": "the names of what it adapts in the config's targets",
    "more_targets": "the names of all projections in target_modules",
    "peft_type": "a config with peft_type LORA",
    "heeded": "a config without {}",
    "shards": "the tensors in a single adapter_model.safetensors",
    "upstream_rslora": "its own conversion, which has rsLoRA off by sqrt(2), left out",
    "upstream_patterns": "its own conversion, which drops the patterns of single projections, left out",
    "upstream_roles": "its own conversion, which loses experts without all three projections, left out",
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
