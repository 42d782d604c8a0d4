"""That a written folder can be read by the reader it is for, and how that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError
from .base_model import BaseModel
from .decide import decide
from .orientations import has_separate_experts
from .reader_target import Target
from .source import open_adapter, uncollected
from .stated import Stated
from .verdicts import reader_verdict

__all__ = ["Proof", "Prover", "by_rules"]

# How it is known -> its sentence, given the details.
_SENTENCES = {
    "model": "{0} takes every tensor, in a model of {1} without weights",
    "rules": "by what is known of its rules for names, shapes and config, {0} reads it; it was not tried",
    "none": "not known whether it is read: {0}",
}


@dataclass(frozen=True)
class Proof:
    """How it is known that a reader takes a folder.

    Attributes:
        by: `"model"`: the reader itself, with a model built from the base's config; `"rules"`: what is known of the
            reader; `"none"`: nothing.
        details: What its sentence mentions, in order.
    """

    by: str
    details: tuple[object, ...]

    def __str__(self) -> str:
        return _SENTENCES[self.by].format(*self.details)


_TRANSFORMERS_4 = "4.57.6"  # the last of them

# Called with a written folder, its reader and the base model; None where it cannot tell. Raises `AdapterError` for one
# that the reader would not take.
Prover = Callable[[Path, Target, BaseModel | None], Proof | None]


def _beside(target: Target, base: BaseModel | None) -> str:
    """The reader, with the transformers release where that decides and was not said."""
    if target.peft and not target.transformers and base is not None:
        forms = [has_separate_experts(base.model_type, target.peft, beside) for beside in (None, _TRANSFORMERS_4)]
        if forms == [False, True]:
            return f"{target} beside transformers 5 (beside 4: --to {target},transformers=={_TRANSFORMERS_4})"
    return str(target)


@uncollected()
def by_rules(folder: Path, target: Target, base: BaseModel | None) -> Proof:
    """Opens a written folder as anybody's, and asks what its reader would do with it.

    Raises:
        AdapterError: PEFT would not read it. What other readers would is said in the proof.
    """
    stated = Stated(base)
    try:
        source = open_adapter(folder, stated)
        if source.form == "none":
            return Proof("none", ("it holds no LoRA on the stacks of several experts",))
        verdict = reader_verdict(source, decide(source, stated), target)
    except AdapterError as error:  # a file whose reader knows what this package would have to guess
        return Proof("none", (error,))
    if target.peft is not None and verdict.verdict in ("fails", "wrong"):
        raise AdapterError(
            f"What was written for {target} would not be read by it, so it was thrown away: {verdict.why}. This is a "
            "fault of peft_moe_compat; please report it with the adapter's config."
        )
    if target.newest_known:
        return Proof("none", (f"nothing is known of {target}, and what was written is for {target.newest_known}",))
    return Proof("rules", (_beside(target, base),)) if verdict.verdict == "reads" else Proof("none", (verdict.why,))
