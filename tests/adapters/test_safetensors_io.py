"""The safetensors format: every way a header can be bad, damage at random, and files written as a stream."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensor_files import (
    DTYPES,
    FUZZ,
    SINGLE,
    allocating_at_most,
    assert_same,
    damaged,
    edits,
    entry,
    raw_file,
    read_all,
    survives,
)

from peft_moe_compat.adapters.safetensors_io import write_safetensors
from peft_moe_compat.adapters.tensors import open_tensors
from peft_moe_compat.errors import AdapterError, AdapterFileError

# What the safetensors library refuses; none of it is checked here once more.
BAD_FILES = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "50 GB of header": struct.pack("<Q", 50 * 10**9) + b"{}",
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "header beyond the file": struct.pack("<Q", 3) + b"{}",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "empty header": raw_file(b""),
    "half a header": raw_file(b'{"a":'),
    "not UTF-8": raw_file(b'{"\xff\xfe":{}}'),
    "lone surrogate": raw_file(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "a list": raw_file(b"[]"),
    "deep": raw_file(b"[" * 200_000),
    "a field twice": raw_file(b'{"a":{"dtype":"U8","dtype":"I8"}}'),
    "NaN": raw_file(b'{"a":NaN}'),
    "metadata of numbers": raw_file({"__metadata__": {"r": 8}}),
    "metadata list": raw_file({"__metadata__": []}),
    "no dtype": raw_file({"a": {"shape": [], "data_offsets": [0, 0]}}),
    "no object": raw_file({"a": 3}),
    "unknown dtype": raw_file({"a": entry(0, 1, dtype="F5")}, b"1"),
    "dtype no text": raw_file({"a": entry(0, 1, dtype=["U8"])}, b"1"),
    "negative shape": raw_file({"a": entry(0, 1, [-1, -1])}, b"1"),
    "float shape": raw_file({"a": entry(0, 1, [1.0])}, b"1"),
    "bool shape": raw_file({"a": entry(0, 1, [True])}, b"1"),
    "shape no list": raw_file({"a": entry(0, 1, 1)}, b"1"),
    "wrapping product": raw_file({"a": entry(0, 0, [2**32, 2**32])}),
    "wrong size": raw_file({"a": entry(0, 6, [2], "F32")}, b"123456"),
    "three offsets": raw_file({"a": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"1"),
    "negative offsets": raw_file({"a": {**entry(0, 1), "data_offsets": [-1, 0]}}, b"1"),
    "offsets reversed": raw_file({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"1"),
    "overlap": raw_file({"a": entry(0, 4), "b": entry(3, 7)}, b"1234567"),
    "hole": raw_file({"a": entry(0, 2), "b": entry(3, 4)}, b"1234"),
    "hole at the start": raw_file({"a": entry(1, 2)}, b"12"),
    "truncated": raw_file({"a": entry(0, 9)}, b"12345678"),
    "rest": raw_file({"a": entry(0, 1)}, b"12"),
}
# What it accepts, and why that is refused all the same.
ACCEPTED = {
    "a tensor twice": (
        raw_file(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "the key 'a' appears twice",
    ),
    "metadata twice": (raw_file(b'{"__metadata__":{"r":"1","r":"2"}}'), "the key 'r' appears twice"),
    "an entry as a list": (raw_file({"a": ["U8", [1], [0, 1]]}, b"1"), r"the entry of 'a' is \['U8'"),
    "a dtype as an object": (raw_file({"a": entry(0, 1, dtype={"U8": None})}, b"1"), "the entry of 'a' is {'data_offs"),
    "empty, strides overflow": (raw_file({"a": entry(0, 0, [0, 2**40, 2**40])}), "sizes that fit"),
    "rank": (raw_file({"a": entry(0, 1, [1] * 65)}, b"1"), "at most 64 sizes"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_safetensors(tmp_path: Path, case: str) -> None:
    (tmp_path / SINGLE).write_bytes(BAD_FILES[case])
    with allocating_at_most(2**30), pytest.raises(AdapterFileError, match="is no complete safetensors file") as caught:
        open_tensors(tmp_path)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_library_accepts_and_we_do_not(tmp_path: Path, case: str) -> None:
    raw, message = ACCEPTED[case]
    (tmp_path / SINGLE).write_bytes(raw)
    with safetensors.safe_open(tmp_path / SINGLE, "np"):
        pass
    with pytest.raises(AdapterFileError, match=message) as caught:
        open_tensors(tmp_path)
    assert SINGLE in str(caught.value)


def test_a_dtype_of_half_a_byte_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw_file({"a": entry(0, 1, [2], "F4")}, b"1"))
    with pytest.raises(AdapterFileError, match="the entry of 'a' is .*F4|is no complete"):
        open_tensors(tmp_path)


def test_metadata_may_be_null_as_the_library_has_it(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw_file({"__metadata__": None}))
    assert open_tensors(tmp_path).metadata == {}


def test_a_message_stays_short_whatever_the_name(tmp_path: Path) -> None:
    for header in ({"x" * 10**6: entry(1, 2)}, {"x" * 10**6: entry(0, 1, [1] * 65)}):
        (tmp_path / SINGLE).write_bytes(raw_file(header, b"1"))
        with pytest.raises(AdapterFileError, match="xxx") as caught:
            open_tensors(tmp_path)
        assert len(str(caught.value)) < 2000


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SINGLE).write_bytes(raw_file({}))

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop root
    with pytest.raises(AdapterFileError, match="cannot be read: .*Permission denied"):
        open_tensors(tmp_path)


# Damage at random


def _small_tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}


@FUZZ
@given(edits())
def test_damaged_safetensors_read_or_raise_our_error(tmp_path: Path, changes: list[tuple[str, float, bytes]]) -> None:
    raw = safetensors.torch.save(_small_tensors(), {"format": "pt"})
    (tmp_path / SINGLE).write_bytes(damaged(raw, changes))
    survives(tmp_path)


NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1e5, 1e300]))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 30), NUMBERS), min_size=1, max_size=3), st.integers(0, 64))
def test_headers_with_other_numbers(tmp_path: Path, changes: list[tuple[int, float]], extra: int) -> None:
    """The header stays JSON, so that the checks behind the parser are what is put to the test."""
    raw = safetensors.torch.save(_small_tensors())
    length = int.from_bytes(raw[:8], "little")
    pieces = re.split(rb"(?<=[\[,])(\d+)", raw[8 : 8 + length])
    for which, number in changes:
        pieces[1 + 2 * (which % (len(pieces) // 2))] = str(number).encode()
    (tmp_path / SINGLE).write_bytes(raw_file(b"".join(pieces), raw[8 + length :] + bytes(extra)))
    survives(tmp_path)
    with contextlib.suppress(AdapterFileError):
        ours = read_all(tmp_path)  # what we accept, the library accepts and reads alike
        assert_same(ours, safetensors.torch.load_file(tmp_path / SINGLE))


# Writing


@st.composite
def _tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=seed)
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    form = draw(st.sampled_from(["as is", "transposed", "strided", "expanded"]))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if form == "strided" and tensor.ndim:
        return tensor[::2]
    return tensor.expand(3, *shape) if form == "expanded" else tensor


@settings(FUZZ, max_examples=80)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), _tensor(), max_size=5),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.text("aé\n\0", max_size=3)),
)
def test_the_library_reads_what_is_written(
    tmp_path: Path, saved: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    file = tmp_path / SINGLE
    file.unlink(missing_ok=True)
    write_safetensors(file, [(n, tuple(t.shape), t.dtype) for n, t in saved.items()], iter(saved.items()), metadata)
    assert_same(safetensors.torch.load_file(file), saved)
    assert_same(read_all(tmp_path), saved)
    with safetensors.safe_open(file, "pt") as stream:
        assert (stream.metadata() or {}) == metadata
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert [n for n in open_tensors(tmp_path).infos if saved[n].numel()] == [n for n in saved if saved[n].numel()]


PLAN = [("a", (2,), torch.float32), ("b", (3,), torch.float16)]
A, B = torch.ones(2), torch.ones(3, dtype=torch.float16)


@pytest.mark.parametrize(
    ("plan", "tensors", "metadata", "message"),
    [
        (PLAN, [("b", B), ("a", A)], {}, r"\('b', \(3,\), torch.float16\) came where \('a'"),
        (PLAN, [("a", A), ("c", B)], {}, "'c'"),
        (PLAN, [("a", A[:1]), ("b", B)], {}, r"\('a', \(1,\)"),
        (PLAN, [("a", A), ("b", B.float())], {}, "'b', .*float32.* came where .*float16"),
        (PLAN, [("a", A)], {}, "ended before .*'b'"),
        (PLAN, [("a", A), ("b", B), ("c", A)], {}, "came where the end was planned"),
        ([*PLAN, PLAN[0]], [], {}, "'a' is planned twice"),
        ([("__metadata__", (1,), torch.float32)], [], {}, "reserved"),
        ([("a", (1,), torch.complex128)], [], {}, "torch.complex128"),
        (PLAN, [], {"r": 8}, "metadata {'r': 8}"),
        ([("a" * 10**8, (), torch.int8)], [], {}, "the format allows 100000000"),
    ],
)
def test_what_deviates_from_the_plan(tmp_path: Path, plan: list, tensors: list, metadata: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=f"Internal inconsistency.*{message}"):
        write_safetensors(tmp_path / "f", plan, tensors, metadata)


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("precious")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "f", [], [], {})
    assert (tmp_path / "f").read_text() == "precious"
