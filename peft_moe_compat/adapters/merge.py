"""An adapter merged into a base checkpoint: placed from headers alone, then streamed, shard by shard."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from ..layout import ExpertLora, relative
from .base_model import BaseModel, load_base_model
from .checkpoint import Checkpoint, open_checkpoint
from .config_fields import unread
from .decide import decide
from .files import atomic_folder, finite_or_null, usable_path
from .parts import Part
from .placing import Placed, Update, place, replaced
from .readers import KEEP_THE_BASE
from .refit import module_parts, require_names
from .safetensors_io import read_header, write_safetensors
from .source import CONFIG_NAME, AdapterSource, open_adapter
from .stated import Stated
from .stored import Plain
from .tensors import check_finite

__all__ = ["Job", "Merge", "Rounding", "delta", "matrices", "merge_adapter", "plan_merge"]

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)
_LOADED_AT_ONCE = 4  # parts: those of one experts module


@dataclass(frozen=True)
class Rounding:
    """What the base's format left of one projection's update.

    Attributes:
        path, projection: As the adapter has them.
        format: Of the base: a dtype, `"FP8 in blocks"` or `"MXFP4"`.
        update: Norm of the update.
        relative: Norm of what rounding changed, over that of the update: 0 is exact, 1 as much as the update itself.
    """

    path: str
    projection: str
    format: str
    update: float
    relative: float


@dataclass(frozen=True)
class Merge:
    """What a merge did.

    Attributes:
        out: The new folder.
        rows: Every projection, experts and linears, in the order of the adapter.
        replaced: Weights that the adapter holds whole (`modules_to_save`), put in the place of the base's.
        left_adapter: Whether an adapter lay beside the base: its files are left out, and it was not merged.
    """

    out: Path
    rows: tuple[Rounding, ...]
    replaced: tuple[str, ...]
    left_adapter: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no number that is infinite: null for those."""
        rows = [{key: finite_or_null(value) for key, value in asdict(row).items()} for row in self.rows]
        found = {"replaced": list(self.replaced), "left_adapter": self.left_adapter}
        return {"schema_version": 1, "out": str(self.out), "rows": rows, **found}


@dataclass
class Job:
    """What is merged into what.

    Attributes:
        source, checkpoint: The adapter and the base.
        placed: Every weight that changes.
        replaced: The checkpoint's name -> the adapter's, of weights that the adapter holds whole.
    """

    source: AdapterSource
    checkpoint: Checkpoint
    placed: Sequence[Placed]
    replaced: Mapping[str, str]
    _loaded: OrderedDict[int, ExpertLora] = field(default_factory=OrderedDict)

    def lora(self, part: Part) -> ExpertLora:
        """A part's factors; those of the last few are kept, since the experts of a module follow each other."""
        if (key := id(part)) not in self._loaded:
            while len(self._loaded) >= _LOADED_AT_ONCE:
                self._loaded.popitem(last=False)
            with self.source.tensors.reading(part.reads) as tensors:
                for name, tensor in tensors.items():
                    check_finite(name, tensor)
                self._loaded[key] = part.load(tensors)
        return self._loaded[key]


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | Path | Mapping[str, Any] | BaseModel | None = None,
    written_by: str | None = None,
    orientation: str | None = None,
    packing: str | None = None,
    nesting: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Merge:
    """Writes the base checkpoint with an adapter's updates in its weights, in the base's dtypes and packed formats.

    Weights of float32, bfloat16, float16, FP8 in blocks (transformers' fine-grained FP8) and MXFP4 are taken, stored
    expert by expert or fused. A shard is written after the other, with a few tensors in memory; each number is rounded
    once, from float64 for a float32 base and from float32 for the others. What the adapter does not change is copied
    bit for bit, with all other files of the folder but weights in other forms and an adapter beside them. `out`
    appears complete or not at all.

    Args:
        base: The base model's folder with safetensors and `config.json`, or a Hub id.
        adapter: A folder, or a Hub id.
        out: The folder to make. It must not exist.
        model: Another config than the base's own to read the adapter by.
        written_by, orientation, packing, nesting: As `convert_adapter` takes them.
        progress: Called with (bytes done, bytes in all).

    Raises:
        AdapterFileError: A file is damaged, or base and adapter do not fit.
        AmbiguousAdapterError: The evidence does not settle what the adapter holds.
        UnsupportedPeftError: `written_by` names no PEFT release with expert LoRA.
        AdapterError: Something in the adapter finds no weight, or one that is quantised in a way that is not merged
            into, or a merged number does not fit the base's dtype.
    """
    job = plan_merge(base, adapter, Stated(model, written_by, orientation, packing, nesting))
    with atomic_folder(usable_path(out), source=job.checkpoint.folder) as folder:
        rows = _write(folder, job, progress)
    return Merge(Path(out), rows, tuple(job.replaced), job.checkpoint.adapter)


def plan_merge(base: str | Path, adapter: str | Path, stated: Stated) -> Job:
    """Finds the place of everything in the adapter; headers alone are read. Raises as `merge_adapter` does."""
    checkpoint = open_checkpoint(base)
    model = load_base_model(checkpoint.folder if stated.model is None else stated.model)
    stated = Stated(model, stated.written_by, stated.orientation, stated.packing, stated.nesting)
    source = open_adapter(adapter, stated)
    require_names(source)
    for name, what in unread(source.config.raw):
        raise AdapterError(
            f"{CONFIG_NAME} has {name}: the adapter is {what}, and no sum of its factors with the base's weights "
            "computes that. Have PEFT apply it, unmerged."
        )
    decision = decide(source, stated)
    decision.require(str(source.folder))
    start = source.config.init_lora_weights
    if start is not None and start not in KEEP_THE_BASE:
        raise AdapterError(
            f"The adapter was made with init_lora_weights={start!r}, which changes the base model. Have PEFT save it "
            "as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if source.config.use_dora or source.config.raw.get("fan_in_fan_out"):
        raise AdapterError("DoRA, and linears with fan_in_fan_out, are not merged here. Use PEFT's merge_and_unload.")
    parts = module_parts(source, decision, fill_missing=True)
    placed = place(source, parts, checkpoint, model)
    if not placed:
        raise AdapterError(f"{source.folder} holds no LoRA; there is nothing to merge.")
    return Job(source, checkpoint, placed, replaced(source, checkpoint))


def _write(folder: Path, job: Job, progress: Progress | None) -> tuple[Rounding, ...]:
    """All shards, then every other file."""
    others = list(job.checkpoint.other_files())
    tensors = job.checkpoint.tensors
    by_name = {info.name: placed for placed in job.placed for info in placed.weight.tensors}
    squares: dict[tuple[str, str, str], list[float]] = {
        (update.part.path, update.part.name, placed.weight.format.name): [0.0, 0.0]
        for placed in job.placed
        for update in placed.updates
    }
    counted: set[str] = set()
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, tensors.total_bytes)

    def made(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        here = set(names)
        for group in _groups(names, by_name):
            if group[0] in job.replaced:
                yield group[0], _replacement(job, group[0])
            else:
                placed = by_name.get(group[0])
                reads = [info.name for info in placed.weight.tensors] if placed else group
                with tensors.reading(reads) as found:
                    if placed is not None:
                        for key, numbers in _merged(job, placed, found):
                            if placed.weight.name not in counted:
                                squares[key] = [a + b for a, b in zip(squares[key], numbers, strict=True)]
                        counted.add(placed.weight.name)
                    yield from ((name, tensor) for name, tensor in found.items() if name in here)
            advance(sum(tensors.infos[name].nbytes for name in group))

    for shard in tensors.files:
        metadata, infos = read_header(shard)
        names = [info.name for info in infos]
        if not any(name in by_name or name in job.replaced for name in names):
            shutil.copyfile(shard, folder / shard.name)
            advance(sum(info.nbytes for info in infos))
            continue
        ordered = [tensors.infos[name] for group in _groups(names, by_name) for name in group]
        layout = [(info.name, info.shape, info.dtype) for info in ordered]
        write_safetensors(folder / shard.name, layout, made(names), metadata)
    for file in others:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.checkpoint.folder / file, folder / file)
    return tuple(
        Rounding(*key, update**0.5, relative(error**0.5, update**0.5)) for key, (update, error) in squares.items()
    )


def _groups(names: Sequence[str], by_name: Mapping[str, Placed]) -> Iterator[list[str]]:
    """The names in a shard, what one weight is stored in side by side, in the order of that weight's tensors."""
    there, said = set(names), set[str]()
    for name in names:
        if name not in said:
            placed = by_name.get(name)
            group = [name] if placed is None else [i.name for i in placed.weight.tensors if i.name in there]
            said.update(group)
            yield group


def _replacement(job: Job, name: str) -> Tensor:
    with job.source.tensors.reading([job.replaced[name]]) as found:
        (tensor,) = found.values()
        check_finite(name, tensor)
        whole = tensor.to(job.checkpoint.tensors.infos[name].dtype)
        check_finite(name, whole)
        return whole


def matrices(placed: Placed, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int | None, list[Tensor]]]:
    """Of each expert (None for a weight that is one matrix) the "out in" views of what its matrix is stored in."""
    stored = [tensors[info.name] for info in placed.weight.tensors]
    if len(placed.weight.shape) == 2:
        yield None, stored
        return
    for expert in range(placed.weight.shape[0]):
        of_expert = [tensor[expert] for tensor in stored]
        yield expert, [tensor.t() for tensor in of_expert] if placed.transposed else of_expert


def _merged(
    job: Job, placed: Placed, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, str, str], tuple[float, float]]]:
    """Merges into the tensors in place. ((path, projection, format), squares of update and rounding) as it goes."""
    form = placed.weight.format
    work = torch.float64 if isinstance(form, Plain) and form.dtype.itemsize >= 4 else torch.float32
    for expert, stored in matrices(placed, tensors):
        exact = form.decode(stored, work)
        if not bool(exact.isfinite().all()):
            raise AdapterFileError(f"{placed.weight.name!r} of the base has numbers that are not finite.")
        sizes = []
        for update in placed.updates:
            added = delta(job.lora(update.part), update, expert, work)
            exact[update.put] += added
            sizes.append(float(added.square().sum(dtype=torch.float64)))
        if any(sizes):
            form.encode(stored, exact)
        errors = form.decode(stored, work).sub_(exact)
        if not bool(errors.isfinite().all()):
            raise AdapterError(
                f"{placed.weight.name!r} has merged numbers that {form.name} cannot hold. Merge into a base of a wider "
                "dtype."
            )
        for update, size in zip(placed.updates, sizes, strict=True):
            error = float(errors[update.put].square().sum(dtype=torch.float64))
            yield (update.part.path, update.part.name, form.name), (size, error)


def delta(lora: ExpertLora, update: Update, expert: int | None, dtype: torch.dtype) -> Tensor:
    """An update of one matrix, "out in"."""
    which = update.expert if expert is None else expert
    assert which is not None  # noqa: S101
    return (lora.B[which][update.take].to(dtype) @ lora.A[which].to(dtype)).mul_(lora.scaling)
