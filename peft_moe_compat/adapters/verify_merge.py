"""A merged checkpoint compared with base and adapter, row by row of each matrix, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base_model import BaseModel
from .checkpoint import Checkpoint, open_checkpoint
from .files import finite_or_null
from .merge import Job, Progress, delta, matrices, plan_merge
from .placing import Placed
from .stated import Stated

__all__ = ["MergeVerification", "MergedWeight", "verify_merge"]

# Of what one rounding explains of a row. Into a plain dtype others round twice, the update and the sum; into a packed
# one its steps are wide, and a scale that is off by a tenth is to be seen among them.
_SLACK_PLAIN, _SLACK_PACKED = 2.0, 1.1


@dataclass(frozen=True)
class MergedWeight:
    """One projection, by its expert that is worst, or a tensor that differs.

    Attributes:
        name: Of the module, as the adapter has it, or of the tensor.
        projection: As the adapter has it; empty for a tensor that the adapter does not change.
        error: Norm of merged - (base + s B A), which is what the output is off by for random inputs of unit variance;
            infinite where a number of the merged one is not finite. Of the rows alone in which rounding does not
            explain it, if there are any.
        explained: The most that rounding to the base's format explains of it.
        update: Norm of s B A, of the same rows.
        note: What kept it from being compared, or how it differs, if anything.
    """

    name: str
    projection: str
    error: float
    explained: float
    update: float
    note: str = ""

    @property
    def same(self) -> bool:
        return not self.note and self.error <= self.explained

    @property
    def excess(self) -> float:
        """The error, relative to what rounding explains of it."""
        return self.error / self.explained if self.explained else (float("inf") if self.error else 0.0)


@dataclass(frozen=True)
class MergeVerification:
    """What `verify_merge` found: every projection, and every other tensor that is not the base's own, bit for bit."""

    rows: tuple[MergedWeight, ...]

    @property
    def same(self) -> bool:
        return all(row.same for row in self.rows)

    @property
    def absent(self) -> bool:
        """Whether every error is the update itself: nothing of the adapter is there."""
        found = [row for row in self.rows if not row.note and row.update > row.explained]
        return bool(found) and all(abs(row.error - row.update) < 0.01 * row.update for row in found)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no number that is infinite: null for those."""
        rows = [
            {key: finite_or_null(value) for key, value in asdict(row).items()} | {"same": row.same} for row in self.rows
        ]
        return {"schema_version": 1, "same": self.same, "rows": rows}


def verify_merge(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> MergeVerification:
    """Compares a merged checkpoint, whoever merged it, with its base and the adapter.

    Each row of each expert's matrix is compared merged and unmerged, in float64; what the base's format cannot hold
    explains a part of the difference, anything beyond is an error. All other tensors are compared bit for bit. The
    merged checkpoint must have the base's names and formats.

    Args:
        base, adapter: As `merge_adapter` takes them.
        merged: The merged checkpoint's folder, or a Hub id.
        model, written_by, orientation, packing, nesting: As `merge_adapter` takes them.
        progress: Called with (bytes done, bytes in all).

    Raises:
        AdapterError: One of the three cannot be read, or adapter and base do not fit: see `merge_adapter`.
    """
    job = plan_merge(base, adapter, Stated(model, written_by, orientation, packing, nesting))
    other = open_checkpoint(merged)
    ours, theirs = job.checkpoint.tensors.infos, other.tensors.infos
    rows = [_odd(name, "only the merged one has it") for name in theirs.keys() - ours.keys()]
    total, done = job.checkpoint.tensors.total_bytes, 0
    units: list[Placed | str] = [*job.placed]
    changed = {info.name for placed in job.placed for info in placed.weight.tensors}
    units += [name for name in ours if name not in changed]
    worst: dict[tuple[str, str], MergedWeight] = {}
    for unit in units:
        names = [unit] if isinstance(unit, str) else [info.name for info in unit.weight.tensors]
        note = next((note for name in names if (note := _unlike(name, job.checkpoint, other))), "")
        if note:
            rows.append(_odd(names[0], note))
        elif isinstance(unit, str):
            rows += _tensor(unit, job, other)
        else:
            for row in _placed(unit, job, other):
                key = row.name, row.projection
                if key not in worst or not row.excess <= worst[key].excess:
                    worst[key] = row
        done += sum(ours[name].nbytes for name in names)
        if progress is not None:
            progress(done, total)
    return MergeVerification((*worst.values(), *rows))


def _odd(name: str, note: str) -> MergedWeight:
    return MergedWeight(name, "", 0.0, 0.0, 0.0, note)


def _unlike(name: str, base: Checkpoint, merged: Checkpoint) -> str:
    ours, theirs = base.tensors.infos[name], merged.tensors.infos.get(name)
    if theirs is None:
        return "only the base has it"
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{theirs.shape} of {theirs.dtype} where the base has {ours.shape} of {ours.dtype}"
    return ""


def _tensor(name: str, job: Job, merged: Checkpoint) -> list[MergedWeight]:
    """A tensor that the adapter does not update: the base's, or the adapter's own, bit for bit."""
    whole = job.replaced.get(name)
    source, in_file = (job.source.tensors, whole) if whole else (job.checkpoint.tensors, name)
    with source.reading([in_file]) as found:
        expected = found[in_file].to(job.checkpoint.tensors.infos[name].dtype)
    with merged.tensors.reading([name]) as found:
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (expected, found[name])]
        same = torch.equal(*bits)
    return [] if same else [_odd(name, f"not that of the {'adapter' if whole else 'base'}")]


def _placed(placed: Placed, job: Job, merged: Checkpoint) -> list[MergedWeight]:
    """Each update of a weight, expert by expert."""
    names = [info.name for info in placed.weight.tensors]
    found: list[MergedWeight] = []
    with job.checkpoint.tensors.reading(names) as before, merged.tensors.reading(names) as after:
        for (expert, ours), (_, theirs) in zip(matrices(placed, before), matrices(placed, after), strict=True):
            found += _matrix(placed, job, expert, (ours, theirs))
    return found


def _matrix(
    placed: Placed, job: Job, expert: int | None, stored: tuple[Sequence[Tensor], Sequence[Tensor]]
) -> list[MergedWeight]:
    form = placed.weight.format
    before, after = (form.decode(tensors, torch.float64) for tensors in stored)
    difference = after - before
    added = [delta(job.lora(update.part), update, expert, torch.float64) for update in placed.updates]
    for update, of_update in zip(placed.updates, added, strict=True):
        difference[update.put] -= of_update
    margin = form.margin(stored[1]) * (_SLACK_PACKED if form.packed else _SLACK_PLAIN)
    found = []
    for update, of_update in zip(placed.updates, added, strict=True):
        rows = torch.stack((difference[update.put], margin[update.put], of_update)).norm(dim=2)
        rows[1] += 1e-6 * rows[2]
        beyond = ~(rows[0] <= rows[1])
        error, explained, size = (rows[:, beyond] if beyond.any() else rows).norm(dim=1).tolist()
        if not math.isfinite(error + explained):  # NaN would be no more than any bound, and infinity its own
            error, explained = math.inf, 0.0
        found.append(MergedWeight(update.part.path, update.part.name, error, explained, size))
    return found
