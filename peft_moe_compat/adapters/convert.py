"""An adapter in the form another reader takes: planned from headers alone, then streamed, part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, LossyConversionError
from .base_model import BaseModel
from .decide import Decision, decide
from .files import atomic_folder, usable_path
from .plan import Plan, plan_conversion
from .proof import Proof, Prover, by_rules
from .reader_target import Target, parse_target
from .refit import linears_taken_for_experts, refit
from .renaming import parse_renames
from .safetensors_io import write_safetensors
from .source import CONFIG_NAME, AdapterSource, open_adapter, uncollected
from .stated import Stated
from .steps import Step
from .tensors import SAFETENSORS, check_finite

__all__ = ["Conversion", "Progress", "convert_adapter", "emitted", "layout_of", "planned", "write_adapter"]

_AT_ONCE = 2**20  # bytes

# Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: The new folder.
        target: The reader it is for, as `--to` names it.
        exactness: `"bits"` where every factor is kept bit for bit, `"round-off"` where a scaling was folded into
            lora_B in float32, `"lossy"` where something was left out.
        steps: What was done beyond laying out the same numbers anew; `str()` of one is a sentence.
        decision: What the input was found to hold.
        proof: How it is known that the reader takes the new folder; `str()` of it is a sentence.
    """

    out: Path
    target: str
    exactness: str
    steps: tuple[Step, ...]
    decision: Decision
    proof: Proof

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema_version": 1,
            "out": str(self.out),
            "target": self.target,
            "exactness": self.exactness,
            "steps": [str(step) for step in self.steps],
            "proven_by": self.proof.by,
            "proof": str(self.proof),
        }


def convert_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    rename: Mapping[str, str] | Sequence[str] = (),
    fill_missing: bool = False,
    allow_lossy: bool = False,
    progress: Progress | None = None,
    prove: Prover | None = None,
) -> Conversion:
    """Writes an adapter in the form a reader takes. The input stays as it is; `out` appears complete or not at all.

    What was written is read again before it appears. For the installed PEFT beside the installed transformers, and with
    the base model's own config, PEFT itself is asked: it puts the adapter on a model built from that config, without
    weights, and every tensor has to arrive. Otherwise the rules are asked by which `inspect_adapter` judges files.

    Tensors are read, turned and written a projection at a time.

    Args:
        adapter: A folder, or a Hub id.
        out: The folder to make. It must not exist.
        to: `peft` (the installed one), `peft==VERSION[,transformers==VERSION]`, `per-expert`, `vllm` (a file that is
            right in every release from 0.28 on), `vllm==VERSION`, `sglang`, `llama.cpp`, or `shared-outer`, the small
            form of LoRA whose outer side all experts share.
        model: The base model's config: a folder, a `config.json`, a Hub id or a dict. Needed wherever the form of the
            experts' LoRA changes, and where nothing else tells how the model stores its experts.
        written_by: `peft==VERSION[,transformers==VERSION]`, where the file does not say who wrote it.
        orientation: `linear` or `reversed`, where neither shapes nor writer tell.
        packing: `rank_major` or `grouped`, where the file does not show how lora_B is packed.
        nesting: The parameters, innermost wrapper first, where the file does not show it.
        rename: Parts of module paths in the file -> what the reader's model calls them, or texts `OLD=NEW`:
            `model.layers=model.language_model.layers` from a text-only class to a multimodal one.
        fill_missing: Gives experts without LoRA one of zeros, where the form needs one for each.
        allow_lossy: Leaves out what the reader cannot take, instead of refusing.
        progress: Called with (bytes done, bytes in all) as the work goes on.
        prove: Asks the reader instead; see `Prover`.

    Raises:
        AdapterFileError: The input is damaged, or contradicts itself or the model.
        AmbiguousAdapterError: The evidence does not settle what the input holds.
        LossyConversionError: The reader cannot take all of it, and `allow_lossy` was not given.
        UnsupportedPeftError: `to` or `written_by` names no PEFT release with expert LoRA.
        AdapterError: Anything else that stands in the way; the message says what helps.
    """
    target, renames = parse_target(to), parse_renames(rename)
    stated = Stated(model, written_by, orientation, packing, nesting)
    source = open_adapter(adapter, stated, renames)
    decision, plan = planned(source, stated, target, fill_missing, allow_lossy)
    with atomic_folder(usable_path(out), source=source.folder) as folder:
        write_adapter(folder, source, plan, progress)
        # The base that the adapter's own config names has the old paths.
        asks = prove is not None and not (renames and model is None)
        proof = (prove(folder, target, source.base) if prove and asks else None) or by_rules(
            folder, target, source.base
        )
    return Conversion(Path(out), str(target), plan.exactness, plan.steps, decision, proof)


@uncollected()
def planned(
    source: AdapterSource, stated: Stated, target: Target, fill_missing: bool, allow_lossy: bool
) -> tuple[Decision, Plan]:
    """What an adapter holds, and how it becomes one for `target`. Raises as `convert_adapter` does."""
    decision = decide(source, stated)
    if source.form == "none" and not linears_taken_for_experts(source, target):
        raise AdapterError(f"{source.folder} holds no LoRA on routed experts; there is nothing to convert.")
    decision.require(str(source.folder))
    plan = plan_conversion(refit(source, decision, target), fill_missing)
    if plan.exactness == "lossy" and not allow_lossy:
        raise LossyConversionError(
            f"{target} takes this adapter only with {plan.steps[-1]}. Pass --allow-lossy (allow_lossy=True) for that."
        )
    return decision, plan


@uncollected()
def layout_of(source: AdapterSource, plan: Plan) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor to write, in order."""
    return [
        (name, tuple(tensor.shape), tensor.dtype)
        for item in plan.items
        for name, tensor in item.emit(source.meta(item.reads))
    ]


def emitted(source: AdapterSource, plan: Plan, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything to write, in order, where what is read lies; valid until the next is asked for.

    Raises:
        AdapterFileError: A tensor has NaN or infinite entries.
    """
    total = sum(source.tensors.infos[name].nbytes for item in plan.items for name in item.reads)
    done = 0
    for item in plan.items:
        with source.tensors.reading(item.reads) as get:
            for name, tensor in get.items():
                check_finite(name, tensor)
                done += source.tensors.infos[name].nbytes
            for name, tensor in item.emit(get):
                yield name, tensor.contiguous()
        if progress is not None:
            progress(done, total)


def write_adapter(
    folder: Path, source: AdapterSource, plan: Plan, progress: Progress | None = None, *, ahead: bool = True
) -> None:
    """The tensors and the config into a folder, a projection in memory at a time.

    `ahead`: the next one is made while the last one is written, in another thread.
    """
    tensors = emitted(source, plan, progress)
    layout, metadata = layout_of(source, plan), {"format": "pt"} | plan.metadata
    write_safetensors(folder / SAFETENSORS, layout, _ahead(tensors) if ahead else tensors, metadata)
    # Fields in order, as PEFT has them; not what is in them, since PEFT takes the first pattern that matches.
    text = json.dumps(dict(sorted(plan.config.items())), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _ahead(made: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, the next ones made in another thread while the last ones are written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_some, made)
        while some := coming.result():
            coming = pool.submit(_some, made)
            yield from some


def _some(made: Iterator[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The next one, and those after it while they are small."""
    found, size = [], 0
    for name, tensor in made:
        found.append((name, tensor))
        size += tensor.nbytes
        if size >= _AT_ONCE:
            break
    return found
