"""The safetensors format: a header that is checked before anything is believed, and a file written as a stream.

The header is parsed here rather than by the safetensors library, so that a key written twice is noticed, and an
error says which entry is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from .files import parse_json, show

__all__ = ["DTYPE_NAMES", "TensorInfo", "opened", "read_header", "write_safetensors"]

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
_MAX_RANK = 64  # as torch's iterators
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor. `nbytes` is that of its elements, without padding."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """The file, to be read; whatever the system refuses comes as an `AdapterFileError`."""
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error}. Check its access rights.") from error


def read_header(file: Path) -> tuple[dict[str, str], list[tuple[int, TensorInfo]]]:
    """The metadata, and (offset in the file, info) of every tensor in the order of the bytes; all of it checked.

    Raises:
        AdapterFileError: The file is unreadable, cut short, or its header contradicts itself or the file.
    """
    header, start, size = _parse_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFileError(f"{file}: __metadata__ must map strings to strings, but is {show(metadata)}.")
    spans = [_check_entry(file, name, entry) for name, entry in header.items()]
    spans.sort(key=lambda span: span[:2])
    _check_spans(file, spans, size - start)
    return metadata, [(start + begin, info) for begin, _, info in spans]


def _parse_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data begins, size of the file). A bogus length is refused before anything is allocated."""
    with opened(file) as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise AdapterFileError(
                f"{file} is no complete safetensors file: its first 8 bytes announce a header of {length} bytes, but "
                f"the file has {size} bytes and a header at most {_MAX_HEADER_BYTES}. Was the download cut short?"
            )
        raw = stream.read(length)
    return parse_json(raw, f"The header of {file}"), 8 + length, size


def _check_entry(file: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """(begin, end, info) of one entry of a header, the offsets relative to where the data begins."""
    what = f"{file}: the entry of {show(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise AdapterFileError(f"{what} is {show(entry)}; dtype, shape and data_offsets were needed.")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterFileError(f"{what} has the dtype {show(dtype)}; known are {', '.join(_DTYPES)}.")
    # torch computes strides, and so the product, even for an empty tensor.
    if not _naturals(shape) or len(shape) > _MAX_RANK or math.prod(max(size, 1) for size in shape) * 8 >= 2**63:
        raise AdapterFileError(
            f"{what} has the shape {show(shape)}; at most {_MAX_RANK} integers >= 0 of a possible size were needed."
        )
    if not _naturals(offsets) or len(offsets) != 2:
        raise AdapterFileError(f"{what} has the data_offsets {show(offsets)}; two integers >= 0 were needed.")
    info = TensorInfo(name, tuple(shape), _DTYPES[dtype], file)
    if offsets[1] - offsets[0] != info.nbytes:
        raise AdapterFileError(
            f"{what} spans the bytes {show(offsets)}, but {dtype} of shape {show(shape)} takes {info.nbytes} bytes."
        )
    return offsets[0], offsets[1], info


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_spans(file: Path, spans: list[tuple[int, int, TensorInfo]], available: int) -> None:
    """The sorted spans must cover the data without a hole, an overlap or a rest."""
    position = 0
    for begin, end, info in spans:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise AdapterFileError(
                f"{file}: {show(info.name)} begins at {show(begin)} and {fault} (ends at {position})."
            )
        position = end
    if position > available:
        raise AdapterFileError(
            f"{file} is truncated: its header describes {show(position)} bytes of tensors, {available} are there. "
            "Download or copy it again."
        )
    if position < available:
        raise AdapterFileError(f"{file} has {available - position} bytes at its end that belong to no tensor.")


def write_safetensors(
    path: Path,
    plan: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, one tensor in memory at a time. `path` must not exist yet.

    Args:
        plan: (name, shape, dtype) of every tensor, in the order of the bytes in the file.
        tensors: (name, tensor) in the same order; strided anyhow, on any device.
        metadata: The file's `__metadata__`; none is written if empty.

    Raises:
        AdapterError: The plan cannot be written, or the tensors are not those of the plan.
    """
    header = _header(plan, metadata)
    with Path(path).open("xb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        planned = iter(plan)
        for name, tensor in tensors:
            expected, found = next(planned, None), (name, tuple(tensor.shape), tensor.dtype)
            if expected is None or found != (expected[0], tuple(expected[1]), expected[2]):
                raise _inconsistent(f"{found} came where {expected or 'the end'} was planned")
            _write(stream, tensor)
        if (missing := next(planned, None)) is not None:
            raise _inconsistent(f"the tensors ended before {missing}")


def _inconsistent(what: str) -> AdapterError:
    return AdapterError(f"Internal inconsistency while writing safetensors: {what}. Please report this as a bug.")


def _header(plan: Sequence[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> bytes:
    """The header as the safetensors library lays it out, padded with spaces so that the data begins at 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise _inconsistent(f"the metadata {show(dict(metadata))} are not strings alone")
    end = 0
    for name, shape, dtype in plan:
        if name in header or name == "__metadata__" or dtype not in DTYPE_NAMES:
            raise _inconsistent(
                f"{show(name)} is planned twice, reserved, or of {dtype}, which has no name in the format"
            )
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER_BYTES:
        raise _inconsistent(f"a header of {len(raw)} bytes; the format allows {_MAX_HEADER_BYTES}")
    return raw


def _write(stream: BufferedWriter, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.numel():
        # One element is contiguous whatever its stride says, and `view` wants a stride of 1.
        stream.write(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data)
