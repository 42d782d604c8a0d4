"""The safetensors format: a header that is checked before anything is believed, and a file written as a stream.

Opening a file, the safetensors library (0.4.3 to 0.8.0) checks its header against itself and the file: its length, JSON
with the fields and types the format has, spans that fit shape and dtype and cover the data without a hole, an overlap
or a rest. It accepts, and this module refuses, a name given twice (the library takes the last), a dtype of less than a
byte, and shapes that torch cannot hold: more than 64 dimensions, or empty with strides that overflow.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError, AdapterFileError
from .bounds import MAX_TENSORS
from .files import parse_json, show

__all__ = ["DTYPE_NAMES", "TensorInfo", "opened", "read_header", "without_data", "write_safetensors"]

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
_MAX_READ_BYTES = 64 * 2**20  # 200,000 tensors with names of two hundred characters have 60 MB
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
    """What a file says about one tensor: its bytes begin at `offset`, and are `nbytes`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def without_data(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The tensors on the meta device, by name; those of one shape and dtype are one tensor."""
    made: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
    found = {}
    for info in infos:
        kind = info.shape, info.dtype
        if kind not in made:
            made[kind] = torch.empty(info.shape, dtype=info.dtype, device="meta")
        found[info.name] = made[kind]
    return found


@contextmanager
def opened(file: Path) -> Iterator[BufferedReader]:
    """The file, to be read; whatever the system refuses comes as an `AdapterFileError`."""
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error}. Check its access rights.") from error


def read_header(file: Path) -> tuple[dict[str, str], list[TensorInfo]]:
    """The metadata, and what the file says of every tensor in the order of the bytes; all of it checked.

    Raises:
        AdapterFileError: The file is unreadable, cut short, or its header contradicts itself or the file.
    """
    with opened(file) as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(min(length, _MAX_READ_BYTES))
        there = length <= os.fstat(stream.fileno()).st_size  # else the library says what is wrong
        if there and (length > _MAX_READ_BYTES or raw.count(b'"data_offsets"') > MAX_TENSORS):
            raise AdapterFileError(
                f"{file} has a header of {length} bytes; at most {_MAX_READ_BYTES}, and {MAX_TENSORS} tensors, were "
                "expected. Is it an adapter?"
            )
        try:
            with safe_open(str(file), "np"):
                pass
        except SafetensorError as error:
            raise AdapterFileError(
                f"{file} is no complete safetensors file: {show(str(error))}. Was the download cut short?"
            ) from None
        except (MemoryError, OSError) as error:
            raise AdapterFileError(f"{file} cannot be mapped into memory: {error}.") from None
    header = parse_json(raw, f"The header of {file}", 16 * MAX_TENSORS)
    metadata = header.pop("__metadata__", None) or {}
    infos = [_info(file, name, entry, 8 + len(raw)) for name, entry in header.items()]
    return metadata, sorted(infos, key=lambda info: (info.offset, info.nbytes))


def _info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """What an entry says, of data that begin at `start`; what torch lacks is refused."""
    if not isinstance(entry, dict) or not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        what = f"{file}: the entry of {show(name)}"
        raise AdapterFileError(f"{what} is {show(entry)}; a dtype was needed that is one of {', '.join(_DTYPES)}.")
    shape = tuple(entry["shape"])
    if not _is_shape(shape):
        what = f"{file}: the entry of {show(name)}"
        raise AdapterFileError(f"{what} has the shape {show(shape)}; at most {_MAX_RANK} sizes that fit were needed.")
    return TensorInfo(name, shape, _DTYPES[entry["dtype"]], file, start + entry["data_offsets"][0])


@lru_cache(maxsize=1024)
def _is_shape(shape: tuple[int, ...]) -> bool:
    """Whether torch can hold it: it computes strides, and so the product, even for an empty tensor."""
    return len(shape) <= _MAX_RANK and math.prod(max(size, 1) for size in shape) * 8 < 2**63


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
    plain = tensor.detach().cpu().contiguous()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    if plain.numel():
        # One element is contiguous whatever its stride says, and `view` wants a stride of 1.
        stream.write(plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data)
