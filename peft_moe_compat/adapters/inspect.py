"""`inspect_adapter`: everything that can be said of an adapter, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..releases import installed_versions
from .base_model import BaseModel
from .conclusions import ExpertsSummary, Inspection, ProjectionSummary
from .contents import contents
from .decide import Decision, decide
from .parts import expert_parts
from .slots import ExpertsModule
from .source import open_adapter, uncollected
from .stated import Stated
from .verdicts import reader_verdicts

__all__ = ["inspect_adapter"]


@uncollected()
def inspect_adapter(
    adapter: str | Path,
    *,
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    content: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Says who wrote an adapter, how its experts' LoRA is laid out, and what each reader would do with it.

    What the evidence does not settle is left open in the result; only damaged or contradictory files raise.

    Args:
        adapter: A folder, or a Hub id.
        model, written_by, orientation, packing, nesting: As `convert_adapter` takes them.
        content: Whether to read every tensor, once and a projection at a time, and to say what the numbers show: about
            as fast as the disk gives them. Without it hardly more than headers is read.
        progress: Called with (bytes done, bytes in all) while they are read.

    Raises:
        AdapterFileError: The file is damaged, or contradicts itself or the model.
        UnsupportedPeftError: `written_by` names no PEFT release with expert LoRA.
        AdapterError: Another of the arguments is no possible answer.
    """
    stated = Stated(model, written_by, orientation, packing, nesting)
    source = open_adapter(adapter, stated)
    base, decision = source.base, decide(source, stated)
    infos = source.tensors.infos
    expert_names = {name for module in source.modules for slot in module.every_slot() for name in slot.names}
    others = infos.keys() - expert_names
    installed = installed_versions("transformers")["transformers"]
    beside = None if installed == "not installed" else installed
    notes = list(source.tensors.notes)
    if model is None and base is not None:
        notes.append(f"the base model's config was found at {source.config.base_model_name}")
    return Inspection(
        path=str(source.folder),
        files=tuple(file.name for file in source.tensors.files),
        num_tensors=len(infos),
        total_bytes=source.tensors.total_bytes,
        dtypes=tuple(sorted({str(infos[name].dtype).removeprefix("torch.") for name in expert_names})),
        form=source.form,
        model_type=base.model_type if base else None,
        writer=decision.writer,
        orientation=decision.orientation,
        packing=decision.packing,
        nesting=decision.nesting,
        modules=tuple(_summary(module, decision, base.expert_counts if base else ()) for module in source.modules),
        other_tensors=len(others),
        other_bytes=sum(infos[name].nbytes for name in others),
        readers=reader_verdicts(source, decision, beside),
        transformers=beside,
        content=contents(source, decision, progress) if content else None,
        notes=tuple(notes),
    )


def _summary(module: ExpertsModule, decision: Decision, counts: Collection[int]) -> ExpertsSummary:
    if module.form == "fused" and module.path not in decision.readings:  # open: the rows alone are known
        rows = decision.expert_counts.get(module.path)
        nothing = ProjectionSummary(None, None, None, None, None)
        return ExpertsSummary(module.path, module.form, max(rows) if rows else None, (nothing,) * len(module.slots))
    parts = expert_parts(module, decision, counts if module.form == "stacked" else ())
    loras = [part.meta for part in parts]
    projections = (
        ProjectionSummary(part.name, lora.rank, lora.scaling, lora.in_features, lora.out_features)
        for part, lora in zip(parts, loras, strict=True)
    )
    return ExpertsSummary(module.path, module.form, max(lora.num_experts for lora in loras), tuple(projections))
