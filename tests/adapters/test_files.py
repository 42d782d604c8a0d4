"""Where an adapter lies, its JSON files, and an output folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from support.tensor_files import FUZZ, SINGLE, allocating_at_most, damaged, edits

from peft_moe_compat.adapters.files import atomic_folder, find_adapter, read_json
from peft_moe_compat.errors import AdapterError, AdapterFileError

CONFIG = b'{"r": 8, "alpha": 1.5e1, "rank_pattern": {"a\\u00e9": 4}, "target_modules": ["q_proj", "\\ud83d\\ude00"]}'


@FUZZ
@given(edits())
def test_damaged_json_reads_or_raises_our_error(tmp_path: Path, changes: list[tuple[str, float, bytes]]) -> None:
    (tmp_path / "c.json").write_bytes(damaged(CONFIG, changes))
    with contextlib.suppress(AdapterFileError):
        value = read_json(tmp_path / "c.json")
        assert repr(value) == repr(json.loads((tmp_path / "c.json").read_text("utf-8")))


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
        (b'{"r":' * 100_000, "no JSON to rely on"),
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
    with pytest.raises(AdapterFileError, match="is a folder; an ordinary file was needed"):
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
            AdapterFileError, match="no folder 'org/name', and the Hugging Face Hub .*HF_HUB_OFFLINE=1.*EntryNotFound"
        ):
            find_adapter("org/name")
        with pytest.raises(AdapterFileError, match="HFValidationError"):
            find_adapter("org/name--x")

    def unreachable(*args: object, **kwargs: object) -> str:
        raise HfHubHTTPError.__bases__[0]("proxy refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(AdapterFileError, match="HTTPError"):
        find_adapter("org/name")


# The output folder


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("input")
    return tmp_path / "in"


def test_the_folder_appears_complete(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, source=source) as folder:
        assert (folder.parent, folder.name[:17], folder.suffix) == (tmp_path, ".peft-moe-compat-", ".tmp")
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
    with atomic_folder(tmp_path / ("x" * 255), source=source):  # as long as a name may be
        pass
    assert listed(tmp_path) == ["in", "x" * 255]


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

    plan = [(name, info.shape, info.dtype) for name, info in tensors.infos.items()]
    with atomic_folder(out, source=source) as folder:
        write_safetensors(folder / "adapter_model.safetensors", plan, halves(), {})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_the_input_and_no_output(tmp_path: Path, source: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(50_000), "b": torch.ones(50_000)}, source / SINGLE)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), source, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "half\n", process.stderr.read()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    left, source_name = listed(tmp_path)
    assert left.startswith(".peft-moe-compat-")
    assert source_name == "in"
    with atomic_folder(tmp_path / "out", source=source):  # and what is left does not stand in the way
        pass
    assert listed(tmp_path) == [left, "in", "out"]  # it may be that of a run which has just begun
    os.utime(tmp_path / left, (0, 0))
    with atomic_folder(tmp_path / "out2", source=source) as ours:
        assert listed(tmp_path) == [ours.name, "in", "out"]
        os.utime(ours, (0, 0))
        with atomic_folder(tmp_path / "out3", source=source):  # one that lives is left alone
            assert ours.exists()
