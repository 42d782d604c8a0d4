"""The tensors of an adapter folder: which files hold them, read block by block, and checked for NaN."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from support.tensor_files import BIN, DTYPES, INDEX, SINGLE, assert_same, entry, raw_file, read_all

from peft_moe_compat.adapters.tensors import check_finite, open_tensors
from peft_moe_compat.errors import AdapterFileError

# Reading


def test_every_dtype_reads_as_the_library_wrote_it(tmp_path: Path) -> None:
    saved = {f"t{i}.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    saved |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(3, 0, 2), "ünï": torch.ones(1)}
    safetensors.torch.save_file(saved, tmp_path / SINGLE, metadata={"format": "pt"})
    tensors = open_tensors(tmp_path)
    assert tensors.metadata == {"format": "pt"}
    assert tensors.files == [tmp_path / SINGLE]
    assert tensors.total_bytes == sum(t.nbytes for t in saved.values())
    assert tensors.infos.keys() == saved.keys()
    with safetensors.safe_open(tmp_path / SINGLE, "pt") as stream:
        held = [name for name, info in tensors.infos.items() if info.nbytes]
        assert held == [name for name in stream.offset_keys() if saved[name].numel()]
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
    assert list(tensors.infos) == ["new"]
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
    assert (tensors.infos, tensors.total_bytes) == ({}, 0)
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
    assert (list(tensors.infos), tensors.files) == (["a", "b"], [tmp_path / ONE, tmp_path / TWO])
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


MEASURED = """
    import sys, torch
    from pathlib import Path
    from peft_moe_compat.adapters.safetensors_io import write_safetensors
    from peft_moe_compat.adapters.tensors import check_finite, open_tensors

    def peak():  # of this process alone; ru_maxrss would start with the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    source, out = map(Path, sys.argv[1:])
    tensors = open_tensors(source)

    written = list(tensors.infos)[:4]  # enough to see growth; a copy of all of it would take the disk's time

    def blocks():
        for name in written:
            with tensors.reading([name]) as get:
                yield name, get[name]

    before = peak()
    for name in tensors.infos:
        with tensors.reading([name]) as get:
            check_finite(name, get[name])
    plan = [(name, tensors.infos[name].shape, tensors.infos[name].dtype) for name in written]
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
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), tmp_path, tmp_path / "copy"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    growth, imported = done.stdout.splitlines()
    assert block * 0.9 < int(growth) < 3 * block
    assert imported == "[]"
    (tmp_path / "copy").unlink()
