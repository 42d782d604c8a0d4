"""The tensors of an adapter folder, read block by block.

All headers are checked when the folder is opened, and no tensor is read then. Tensors are copied out by offset, never
mapped, so that resident memory is what the block at hand holds, and a file cut short meanwhile is an error rather than
a SIGBUS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from ..errors import AdapterFileError
from .bounds import MAX_TENSORS
from .files import ordinary_file, read_json, show
from .safetensors_io import TensorInfo, opened, read_header

__all__ = [
    "BIN",
    "INDEX",
    "SAFETENSORS",
    "AdapterTensors",
    "HeldTensors",
    "check_finite",
    "open_safetensors",
    "open_shards",
    "open_tensors",
    "refuse_outside",
]

_FEW = 2**12
SAFETENSORS, INDEX, BIN = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"


@dataclass
class AdapterTensors:
    """The tensors of one adapter, known by name, shape and dtype; their bytes are read in `reading` alone.

    Attributes:
        infos: By name, in the order of the files and of the bytes in them.
        metadata: The `__metadata__` of the files.
        files: The files that hold the tensors.
        notes: What the user may want to know about the choice of files, one sentence each.
    """

    infos: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Of all tensors together."""
        return sum(info.nbytes for info in self.infos.values())

    @contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """The named tensors, on the CPU, by name in the order asked for; valid inside the block only.

        At its end the dict is emptied, and their memory goes back unless the caller holds a tensor still.

        Raises:
            AdapterFileError: No tensor of that name, or the file changed since `open_tensors`.
        """
        tensors = self._read(list(dict.fromkeys(names)))
        try:
            yield tensors
        finally:
            tensors.clear()

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        for name in names:
            if name not in self.infos:
                raise AdapterFileError(
                    f"{show(name)} was needed, but none of {_names(self.files)} holds such a tensor."
                )
        found: dict[str, Tensor] = {}
        infos = sorted((self.infos[name] for name in names), key=lambda info: (info.file, info.offset))
        for file, here in groupby(infos, key=lambda info: info.file):
            with opened(file) as stream:
                for info in here:
                    data = _empty(info)
                    stream.seek(info.offset)
                    if stream.readinto(data.numpy().data) < info.nbytes:
                        raise AdapterFileError(
                            f"{file} ends inside {show(info.name)}: it changed while it was being read."
                        )
                    found[info.name] = data.view(info.dtype).reshape(info.shape)
        return {name: found[name] for name in names}


@dataclass
class HeldTensors(AdapterTensors):
    """Tensors in memory, by name: what they lie in is the caller's."""

    held: Mapping[str, Tensor] = field(default_factory=dict)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self.held[name] for name in names}


def open_tensors(folder: Path) -> AdapterTensors:
    """The tensors of the adapter in `folder`: all headers are read and checked, no tensor is.

    `adapter_model.safetensors`, or its shards by `adapter_model.safetensors.index.json`; an `adapter_model.bin` beside
    them is ignored, as PEFT (`load_peft_weights`) does, and refused where it is alone.

    Raises:
        AdapterFileError: Neither of them, both, or a damaged or unsafe file.
    """
    single, index, old = (folder / name for name in (SAFETENSORS, INDEX, BIN))
    has_single, has_index, has_old = map(ordinary_file, (single, index, old))
    if has_single and has_index:
        raise AdapterFileError(f"{folder} holds both {SAFETENSORS} and {INDEX}; remove the one that is out of date.")
    tensors = AdapterTensors()
    if has_index:
        open_shards(tensors, index, MAX_TENSORS)
    elif has_single:
        open_safetensors(tensors, single)
    elif has_old:
        raise AdapterFileError(
            f"{folder} holds {BIN}, a pickle, and only safetensors are read: save its tensors again, in that folder, "
            f'with `safetensors.torch.save_file(torch.load("{BIN}", weights_only=True), "{SAFETENSORS}")`, or with '
            f"PEFT's save_pretrained where it came from. Then remove {BIN}."
        )
    else:
        found = _names(sorted(folder.iterdir())[:20]) if folder.is_dir() else "no folder"
        raise AdapterFileError(f"{SAFETENSORS} or {INDEX} was needed in {folder}; found: {found or 'nothing'}.")
    if has_old:
        tensors.notes.append(f"{BIN} lies beside the safetensors and is ignored, as PEFT does.")
    return tensors


def _empty(info: TensorInfo) -> Tensor:
    try:
        return torch.empty(info.nbytes, dtype=torch.uint8)
    except RuntimeError:
        raise AdapterFileError(
            f"{show(info.name)} in {info.file} has {info.nbytes} bytes, for which there is no memory."
        ) from None


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files)


def open_safetensors(tensors: AdapterTensors, file: Path) -> None:
    """Adds the tensors of one safetensors file."""
    metadata, infos = read_header(file)
    for info in infos:
        if info.name in tensors.infos:
            other = tensors.infos[info.name].file.name
            raise AdapterFileError(f"{show(info.name)} is in two shards, {other} and {file.name}; one was expected.")
        tensors.infos[info.name] = info
    for key, value in metadata.items():
        if tensors.metadata.setdefault(key, value) != value:
            tensors.notes.append(f"{file.name} has another {show(key)} in its metadata than an earlier shard.")
    tensors.files.append(file)


def open_shards(tensors: AdapterTensors, index: Path, most: float = math.inf) -> None:
    """Adds the tensors of the shards an index lists, `most` together, once index and shards agree."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFileError(
            f"{index} has the weight_map {show(weight_map)}; an object from tensor to file was needed."
        )
    _require_few(len(weight_map), most, index)
    names = {value: _plain_name(value) for value in weight_map.values() if isinstance(value, str)}
    for name, value in weight_map.items():
        if not isinstance(value, str) or not names[value]:
            raise AdapterFileError(
                f"{index}: {show(name)} is said to be in {show(value)}; a plain file name in its own folder was needed."
            )
    for value in sorted(set(weight_map.values())):
        open_safetensors(tensors, _shard(index, value))
        _require_few(len(tensors.infos), most, index)
    for name in {**weight_map, **tensors.infos}:
        listed, info = weight_map.get(name), tensors.infos.get(name)
        if info is None or info.file.name != listed:
            raise AdapterFileError(
                f"{index} puts {show(name)} in {show(listed)}, but it is in {info.file.name if info else 'no shard'}. "
                "Do the shards belong to this index?"
            )


def _require_few(count: int, most: float, index: Path) -> None:
    if count > most:
        raise AdapterFileError(
            f"{index.parent} has {count} tensors or more; at most {most} were expected. Is it an adapter?"
        )


def _plain_name(value: str) -> bool:
    one_part = PurePosixPath(value).name == value and PureWindowsPath(value).name == value
    return one_part and value not in ("", ".", "..") and value.isprintable() and len(value) <= 255


def refuse_outside(file: Path, folder: Path) -> None:
    """Raises for a link to what lies neither in `folder` nor in the `blobs` of its Hub cache.

    Raises:
        AdapterFileError: It names where the link leads.
    """
    root, target = folder.resolve(), file.resolve()
    snapshots = [path for path in (root, *root.parents) if path.parent.name == "snapshots"]
    if not any(target.is_relative_to(root) for root in (root, *(p.parent.parent / "blobs" for p in snapshots))):
        raise AdapterFileError(f"{file} is a link to {target}, outside of {root}. Copy the file there if you trust it.")


def _shard(index: Path, value: str) -> Path:
    """The shard beside its index, or in the `blobs` of a Hub cache, `models--X/{blobs,snapshots/REVISION}`."""
    shard = index.parent / value
    if not ordinary_file(shard):
        raise AdapterFileError(f"{index} lists {value}, but there is no such file. Is the download complete?")
    refuse_outside(shard, index.parent)
    return shard


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `AdapterFileError`, with the counts, if a tensor has NaN or infinite entries. Any shape and dtype."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    if tensor.dtype.itemsize > 1 and tensor.numel() < _FEW and math.isfinite(abs(tensor.sum().item())):
        return  # a sum that is finite has finite terms alone
    nan = inf = 0
    # A processor's cache is small, and to wait for a GPU is dear.
    for chunk in torch.split(real.reshape(-1), 2**20 if real.device.type == "cpu" else 2**26):
        part = chunk.float() if chunk.element_size() == 1 else chunk
        # One pass without a temporary, and NaN wins; only a bad chunk is counted.
        if part.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(part)).tolist())):
            nan += int(part.isnan().sum())
            inf += int(part.isinf().sum())
    if nan or inf:
        raise AdapterFileError(
            f"{show(name)} has {nan} NaN and {inf} infinite of {tensor.numel()} entries; finite numbers were needed. "
            "Did the training diverge? Take an earlier checkpoint."
        )
