"""Adapter files read and written: what the safetensors library and torch agree on, and every way a file can be bad."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_moe_compat.adapters.files import atomic_folder, find_adapter, read_json
from peft_moe_compat.adapters.safetensors_io import write_safetensors
from peft_moe_compat.adapters.tensors import check_finite, open_tensors
from peft_moe_compat.errors import AdapterError, AdapterFileError

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
    for name in tensors:
        with tensors.reading([name]) as get:
            result[name] = get[name].clone()
    return result


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    def described(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
        return {name: (tuple(t.shape), t.dtype, raw_bytes(t)) for name, t in tensors.items()}

    assert described(found) == described(expected)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# Reading


def test_every_dtype_reads_as_the_library_wrote_it(tmp_path: Path) -> None:
    saved = {f"t{i}.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    saved |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(3, 0, 2), "ünï": torch.ones(1)}
    safetensors.torch.save_file(saved, tmp_path / SINGLE, metadata={"format": "pt"})
    tensors = open_tensors(tmp_path)
    assert tensors.metadata == {"format": "pt"}
    assert tensors.files == [tmp_path / SINGLE]
    assert tensors.total_bytes == sum(t.nbytes for t in saved.values())
    assert list(tensors.infos) == list(tensors)
    assert len(tensors) == len(saved)
    with safetensors.safe_open(tmp_path / SINGLE, "pt") as stream:
        assert [n for n in tensors if tensors[n].nbytes] == [n for n in stream.offset_keys() if saved[n].numel()]
    assert_same(read_all(tmp_path), saved)


def test_a_block_gives_the_names_asked_for_and_ends_empty(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / SINGLE)
    tensors = open_tensors(tmp_path)
    with tensors.reading(["c", "a"]) as get:
        assert list(get) == ["c", "a"]
    assert get == {}
    with pytest.raises(AdapterFileError, match=r"'nope' was needed, but none of adapter_model\.safetensors"):
        tensors.reading(["nope"]).__enter__()


def test_safetensors_are_preferred_and_the_bin_is_noted(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / BIN)
    safetensors.torch.save_file({"new": torch.ones(1)}, tmp_path / SINGLE)
    tensors = open_tensors(tmp_path)
    assert list(tensors) == ["new"]
    (note,) = tensors.notes
    assert BIN in note


def test_the_file_to_read_must_be_clear(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"was needed in .*; found: config\.json"):
        open_tensors(tmp_path)
    with pytest.raises(AdapterFileError, match="found: no folder"):
        open_tensors(tmp_path / "nothing")
    (tmp_path / SINGLE).write_bytes(raw_file({}))
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(AdapterFileError, match="holds both"):
        open_tensors(tmp_path)


def test_no_tensor_is_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw_file({}))
    tensors = open_tensors(tmp_path)
    assert (len(tensors), tensors.total_bytes) == (0, 0)
    with tensors.reading([]) as get:
        assert get == {}


def test_a_file_cut_short_after_opening(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(100)}, tmp_path / SINGLE)
    tensors = open_tensors(tmp_path)
    os.truncate(tmp_path / SINGLE, 200)
    with pytest.raises(AdapterFileError, match="ends inside 'a'"):
        tensors.reading(["a"]).__enter__()
    (tmp_path / SINGLE).unlink()
    with pytest.raises(AdapterFileError, match="cannot be read"):
        tensors.reading(["a"]).__enter__()


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


# Shards

ONE, TWO = "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"


def sharded(folder: Path, weight_map: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / ONE, metadata={"format": "pt"})
    safetensors.torch.save_file({"b": torch.zeros(3)}, folder / TWO, metadata={"format": "pt"})
    weight_map = {"b": TWO, "a": ONE} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    tensors = open_tensors(tmp_path)
    assert (list(tensors), tensors.files) == (["a", "b"], [tmp_path / ONE, tmp_path / TWO])
    assert (tensors.metadata, tensors.notes) == ({"format": "pt"}, [])
    with tensors.reading(["b", "a"]) as get:
        assert_same(get, {"a": torch.ones(2), "b": torch.zeros(3)})
        assert list(get) == ["b", "a"]
    safetensors.torch.save_file({"b": torch.zeros(3)}, tmp_path / TWO, metadata={"format": "tf"})
    assert "another 'format'" in open_tensors(tmp_path).notes[0]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has the weight_map {}"),
        ([], r"has the weight_map \[\]"),
        ({"a": 3}, "'a' is said to be in 3"),
        *(({"a": bad}, "a plain file name in its own folder") for bad in ("../x", "/etc/passwd", "x/y", "x\\y")),
        *(({"a": bad}, "a plain file name in its own folder") for bad in ("", ".", "..", "C:x", "a\0b", "x/")),
        ({"a": ONE, "b": "adapter_model-3.safetensors"}, "lists adapter_model-3.safetensors, but there is no such"),
        ({"a": ONE, "b": ONE}, "puts 'b' in .*00001.*, but it is in no shard"),
        ({"a": ONE, "b": TWO, "c": TWO}, "puts 'c' in .*, but it is in no shard"),
        ({"a": TWO, "b": ONE}, "puts 'a' in .*00002.*, but it is in .*00001"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object, message: str) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(AdapterFileError, match=message):
        open_tensors(tmp_path)


def test_index_without_a_tensor_of_a_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    safetensors.torch.save_file({"b": torch.zeros(3), "extra": torch.ones(1)}, tmp_path / TWO)
    with pytest.raises(AdapterFileError, match="puts 'extra' in None, but it is in .*00002"):
        open_tensors(tmp_path)
    safetensors.torch.save_file({"b": torch.zeros(3), "a": torch.ones(2)}, tmp_path / TWO)
    with pytest.raises(AdapterFileError, match="'a' is in two shards, .*00001.* and .*00002"):
        open_tensors(tmp_path)


def test_links_of_a_hub_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    snapshot = sharded(tmp_path / "models--org--name" / "snapshots" / "0123abc")
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (snapshot / TWO).rename(blobs / "deadbeef")
    (snapshot / TWO).symlink_to("../../blobs/deadbeef")
    assert_same(read_all(snapshot), {"a": torch.ones(2), "b": torch.zeros(3)})

    (blobs / "deadbeef").rename(tmp_path / "secret")
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterFileError, match="is a link to .*secret, outside of"):
        open_tensors(snapshot)


# .bin


class Asks:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_is_refused_unread_with_what_makes_safetensors_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": Asks(f"touch {tmp_path / 'ran'}")}, tmp_path / BIN)
    with pytest.raises(AdapterFileError, match="holds adapter_model.bin, a pickle, and only safetensors are read"):
        open_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()
    saved = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    torch.save(saved, tmp_path / BIN)
    with pytest.raises(AdapterFileError) as caught:
        open_tensors(tmp_path)
    (command,) = re.findall("`(.*)`", str(caught.value))
    monkeypatch.chdir(tmp_path)
    exec(command)
    assert_same(read_all(tmp_path), saved)


# Damage at random


def _edits() -> st.SearchStrategy[list[tuple[str, float, bytes]]]:
    edit = st.tuples(
        st.sampled_from(["set", "insert", "cut", "drop", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff" * 8, b"\0" * 8, b'"', b"}", b"9" * 20])),
    )
    return st.lists(edit, min_size=1, max_size=4)


def _damaged(raw: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, new in edits:
        at = int(where * len(raw))
        raw = {
            "set": raw[:at] + new + raw[at + len(new) :],
            "insert": raw[:at] + new + raw[at:],
            "cut": raw[:at],
            "drop": raw[:at] + raw[at + len(new) :],
            "repeat": raw[:at] + raw[at : at + 40] + raw[at:],
        }[kind]
    return raw


def _survives(folder: Path) -> None:
    begin = time.monotonic()
    with allocating_at_most(2**30), contextlib.suppress(AdapterFileError):
        read_all(folder)
    assert time.monotonic() - begin < 1


def _small_tensors() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}


@FUZZ
@given(_edits())
def test_damaged_safetensors_read_or_raise_our_error(tmp_path: Path, edits: list[tuple[str, float, bytes]]) -> None:
    raw = safetensors.torch.save(_small_tensors(), {"format": "pt"})
    (tmp_path / SINGLE).write_bytes(_damaged(raw, edits))
    _survives(tmp_path)


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
    _survives(tmp_path)
    with contextlib.suppress(AdapterFileError):
        ours = read_all(tmp_path)  # what we accept, the library accepts and reads alike
        assert_same(ours, safetensors.torch.load_file(tmp_path / SINGLE))


CONFIG = b'{"r": 8, "alpha": 1.5e1, "rank_pattern": {"a\\u00e9": 4}, "target_modules": ["q_proj", "\\ud83d\\ude00"]}'


@FUZZ
@given(_edits())
def test_damaged_json_reads_or_raises_our_error(tmp_path: Path, edits: list[tuple[str, float, bytes]]) -> None:
    (tmp_path / "c.json").write_bytes(_damaged(CONFIG, edits))
    with contextlib.suppress(AdapterFileError):
        value = read_json(tmp_path / "c.json")
        assert repr(value) == repr(json.loads((tmp_path / "c.json").read_text("utf-8")))


# JSON and folders


def test_json(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(CONFIG)
    assert read_json(tmp_path / "c.json") == json.loads(CONFIG)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no JSON to rely on: Expecting value"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b'{"r": 1, "r": 1}', "the key 'r' appears twice"),
        (b'{"a": [{"r": 1, "r": 2}]}', "the key 'r' appears twice"),
        (b'{"r": "\xff"}', "no JSON to rely on: 'utf-8' codec"),
        ('{"r": 1}'.encode("utf-16"), "no JSON to rely on: 'utf-8' codec"),
        (b'{"r":' * 100_000, "no JSON to rely on: maximum recursion depth"),
        (b'{"r": ' + b"9" * 5000 + b"}", "no JSON to rely on: Exceeds the limit"),
    ],
)
def test_bad_json(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "c.json").write_bytes(raw)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_json(tmp_path / "c.json")
    assert "c.json" in str(caught.value)


def test_json_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no such file"):
        read_json(tmp_path / "c.json")
    with pytest.raises(AdapterFileError, match="there is no such file"):
        read_json(tmp_path)
    with (tmp_path / "c.json").open("wb") as stream:
        stream.truncate(64 * 2**20 + 1)
    with allocating_at_most(2**25), pytest.raises(AdapterFileError, match="has 67108865 bytes"):
        read_json(tmp_path / "c.json")


def test_find_adapter_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file").touch()
    (tmp_path / "org" / "broken").symlink_to("nowhere")
    assert find_adapter("org/name") == Path("org/name")
    assert find_adapter(tmp_path / "org") == tmp_path / "org"
    for source, message in [
        ("org/file", "is a file; .* Did you mean org"),
        ("org/broken", "a broken link"),
        ("/no/such/folder", "does not exist, and is no id"),
        ("./org/other", "does not exist, and is no id"),
        ("a/b/c", "does not exist, and is no id"),
        ("org/na me", "is no id"),
    ]:
        with pytest.raises(AdapterFileError, match=message):
            find_adapter(source)


def test_find_adapter_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert allow_patterns == ["adapter_config.json", "adapter_model*", "automodel_peft_config.json"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_adapter("org/name-1.5_b") == tmp_path
    assert find_adapter("gpt2-lora") == tmp_path
    assert asked == ["org/name-1.5_b", "gpt2-lora"]


def test_the_hubs_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            AdapterFileError, match="no folder org/name, and the Hugging Face Hub did not .*EntryNotFound"
        ):
            find_adapter("org/name")
        with pytest.raises(AdapterFileError, match="HFValidationError"):
            find_adapter("org/name--x")

    def unreachable(*args: object, **kwargs: object) -> str:
        raise HfHubHTTPError.__bases__[0]("proxy refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(AdapterFileError, match="proxy refused"):
        find_adapter("org/name")


# NaN and infinity


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t.is_floating_point])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    good = torch.ones(5, 7).to(dtype)
    check_finite("w", good)
    check_finite("w", good[:0])
    bad = torch.ones(5, 7)
    bad[1, 2] = bad[4, 6] = math.nan
    with pytest.raises(AdapterFileError, match="'w' has 2 NaN and 0 infinite of 35 entries"):
        check_finite("w", bad.to(dtype).t())


def test_infinity_and_nan_are_counted_across_chunks() -> None:
    tensor = torch.zeros(3 * 2**20, dtype=torch.bfloat16)
    tensor[0], tensor[2**20], tensor[-1] = math.inf, math.nan, -math.inf
    with pytest.raises(AdapterFileError, match="1 NaN and 2 infinite of 3145728"):
        check_finite("w", tensor)
    with pytest.raises(AdapterFileError, match="0 NaN and 1 infinite of 1 "):
        check_finite("w", torch.tensor([complex(0, math.inf)]))
    check_finite("w", torch.tensor([True]))
    check_finite("w", torch.tensor(2**62))


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
    assert [n for n in open_tensors(tmp_path) if saved[n].numel()] == [n for n in saved if saved[n].numel()]


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


# The output folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("input")
    return tmp_path / "in"


def test_the_folder_appears_complete(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, source=source) as folder:
        assert (folder.parent, folder.name[:9]) == (tmp_path, ".out.tmp-")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("output")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "output"
    assert listed(tmp_path) == ["in", "out"]
    assert out.stat().st_mode == source.stat().st_mode  # as mkdir makes it, not private as tempfile would


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, GeneratorExit])
def test_a_failure_leaves_nothing(tmp_path: Path, source: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "out", source=source) as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(AdapterError if error is OSError else error):
        fail()
    assert listed(tmp_path) == ["in"]


def test_an_output_that_exists_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("folder", "file", "broken"):
        with pytest.raises(AdapterError, match=f"{name} exists already, and nothing is ever overwritten"):
            atomic_folder(tmp_path / name, source=source).__enter__()
    assert listed(tmp_path) == ["broken", "file", "folder", "in"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_output_somebody_makes_meanwhile_is_kept(tmp_path: Path, source: Path, make) -> None:
    context = atomic_folder(tmp_path / "out", source=source)
    (context.__enter__() / "file").write_text("ours")
    make(tmp_path / "out")
    with pytest.raises(AdapterError, match="exists already"):
        context.__exit__(None, None, None)
    assert listed(tmp_path) == ["in", "out"]
    assert not (tmp_path / "out" / "file").exists()


def test_an_output_that_overlaps_the_input_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link").symlink_to("in")
    for out, given_source, message in [
        (source, source, "is the input"),
        (tmp_path / "in" / ".." / "in", source, "is the input"),
        (source / "out", source, "lies inside the input"),
        (tmp_path / "link" / "out", source, "lies inside the input"),
        (tmp_path, source, "contains the input"),
        (tmp_path / "new", tmp_path / "new" / "adapter", "contains the input"),
    ]:
        with pytest.raises(AdapterError, match=message):
            atomic_folder(out, source=given_source).__enter__()


def test_the_parent_must_be_there_and_writable(tmp_path: Path, source: Path) -> None:
    with pytest.raises(AdapterError, match="there is no folder .*none. Create it first"):
        atomic_folder(tmp_path / "none" / "out", source=source).__enter__()
    with pytest.raises(AdapterError, match="cannot be written: .*too long"):
        atomic_folder(tmp_path / ("x" * 250), source=source).__enter__()


def _python(script: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


KILLED = """
    import sys, time, torch
    from pathlib import Path
    from peft_moe_compat.adapters.files import atomic_folder
    from peft_moe_compat.adapters.safetensors_io import write_safetensors
    from peft_moe_compat.adapters.tensors import open_tensors

    source, out = map(Path, sys.argv[1:])
    tensors = open_tensors(source)

    def halves():
        with tensors.reading(["a"]) as get:
            yield "a", get["a"]
        print("half", flush=True)
        time.sleep(60)

    plan = [(name, info.shape, info.dtype) for name, info in tensors.items()]
    with atomic_folder(out, source=source) as folder:
        write_safetensors(folder / "adapter_model.safetensors", plan, halves(), {})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_the_input_and_no_output(tmp_path: Path, source: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(50_000), "b": torch.ones(50_000)}, source / SINGLE)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with _python(KILLED, source, tmp_path / "out") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "half\n", process.stderr.read()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    left, source_name = listed(tmp_path)
    assert left.startswith(".out.tmp-")
    assert source_name == "in"
    with atomic_folder(tmp_path / "out", source=source):  # and what is left does not stand in the way
        pass


MEASURED = """
    import sys, torch
    from pathlib import Path
    from peft_moe_compat.adapters.safetensors_io import write_safetensors
    from peft_moe_compat.adapters.tensors import check_finite, open_tensors

    def peak():  # of this process alone; ru_maxrss would start with the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    source, out = map(Path, sys.argv[1:])
    tensors = open_tensors(source)

    written = list(tensors)[:4]  # enough to see growth; a copy of all of it would take the disk's time

    def blocks():
        for name in written:
            with tensors.reading([name]) as get:
                yield name, get[name]

    before = peak()
    for name in tensors:
        with tensors.reading([name]) as get:
            check_finite(name, get[name])
    plan = [(name, tensors[name].shape, tensors[name].dtype) for name in written]
    write_safetensors(out, plan, blocks(), tensors.metadata)
    print(peak() - before)
    print(sorted({"peft", "transformers", "huggingface_hub"} & set(sys.modules)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_that_of_a_block_and_neither_peft_nor_transformers_is_imported(tmp_path: Path) -> None:
    block, count = 50_000_000, 12
    header = {str(i): entry(i * block, (i + 1) * block, [block // 2], "BF16") for i in range(count)}
    (tmp_path / SINGLE).write_bytes(raw_file(header))
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size + block * count)
    process = _python(MEASURED, tmp_path, tmp_path / "copy")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    growth, imported = stdout.splitlines()
    assert block * 0.9 < int(growth) < 3 * block
    assert imported == "[]"
    (tmp_path / "copy").unlink()
