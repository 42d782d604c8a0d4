"""Bytes of tensor files, good and damaged, and what must come of them."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from peft_moe_compat.adapters.tensors import open_tensors
from peft_moe_compat.errors import AdapterFileError

SINGLE, INDEX, BIN = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = open_tensors(folder)
    result = {}
    for name in tensors.infos:
        with tensors.reading([name]) as get:
            result[name] = get[name].clone()
    return result


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    def described(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
        return {name: (tuple(t.shape), t.dtype, raw_bytes(t)) for name, t in tensors.items()}

    assert described(found) == described(expected)


def raw_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@contextlib.contextmanager
def allocating_at_most(extra: int) -> Iterator[None]:
    """Address space beyond that in use now is limited, so that an allocation a damaged file asks for fails."""
    if sys.platform != "linux":
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def edits() -> st.SearchStrategy[list[tuple[str, float, bytes]]]:
    edit = st.tuples(
        st.sampled_from(["set", "insert", "cut", "drop", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, b"\0" * 8, b'"', b"}", b"9" * 20])),
    )
    return st.lists(edit, min_size=1, max_size=4)


def damaged(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in changes:
        at = int(where * len(raw))
        raw = {
            "set": raw[:at] + new + raw[at + len(new) :],
            "insert": raw[:at] + new + raw[at:],
            "cut": raw[:at],
            "drop": raw[:at] + raw[at + len(new) :],
            "repeat": raw[:at] + raw[at : at + 40] + raw[at:],
        }[kind]
    return raw


def survives(folder: Path) -> None:
    begin = time.monotonic()
    with allocating_at_most(2**30), contextlib.suppress(AdapterFileError):
        read_all(folder)
    assert time.monotonic() - begin < 1
