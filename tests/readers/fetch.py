"""Downloads the sources of vLLM, SGLang and llama.cpp that the reader tests run, and keeps the few files they need.

    python tests/readers/fetch.py FOLDER

About 120 MB are downloaded and about 50 MB kept; a folder that has the pinned versions already is left alone. pip says
where the wheels lie, and their members are read there one by one; what needs all of a file is left to pip, as is a
wheel whose server does not hand out parts. pip builds the metadata of the llama.cpp sdist, so scikit-build-core must be
installed.
"""

from __future__ import annotations

import fnmatch
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

__all__ = ["SOURCES", "fetch", "releases"]

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


_VLLM = (
    "vllm/lora/*.py",
    "vllm/model_executor/utils.py",
    "vllm/model_executor/models/*.py",
    "vllm/model_executor/layers/fused_moe/*.py",
    "vllm/utils/cache.py",
)
_SGLANG = ("sglang/srt/lora/*.py", "sglang/srt/models/*.py", "sglang/srt/layers/utils/*.py")
# The releases that the tests run: the newest, and those before a change of what is read; see FACTS.md.
SOURCES = (
    *(Source(f"vllm-{r}", f"vllm=={r}", _WHEEL, _VLLM) for r in ("0.28.0", "0.29.0", "0.30.0", "0.32.0", "0.33.0")),
    *(Source(f"sglang-{r}", f"sglang=={r}", _WHEEL, _SGLANG) for r in ("0.5.23",)),
    Source(
        "llama.cpp",
        "llama-cpp-python==0.3.36",
        ("--no-binary=:all:", "--no-build-isolation"),
        ("convert_lora_to_gguf.py", "conversion/*.py", "gguf-py/gguf/*.py"),
        strip="*/vendor/llama.cpp/",
    ),
)


def releases(reader: str) -> list[str]:
    """The releases of `vllm` or `sglang` that are fetched, the oldest first."""
    return [s.requirement.partition("==")[2] for s in SOURCES if s.requirement.startswith(f"{reader}==")]


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
        size, kept = _remote(source, target) if source.options == _WHEEL else _whole(source, target)
        if not kept:
            raise SystemExit(f"{source.requirement} holds none of {source.keep}: was it laid out anew? See fetch.py.")
        stamp.write_text(content, encoding="utf-8")
        seconds = time.monotonic() - start
        sys.stdout.write(f"{source.requirement}: {size / 1e6:.0f} MB downloaded, {kept} files kept, {seconds:.0f} s\n")


def _remote(source: Source, target: Path) -> tuple[int, int]:
    """Fetches single members of a wheel; (bytes downloaded, files kept)."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        options = ("--dry-run", "--ignore-installed", f"--target={scratch}", f"--report={report}")
        _pip(source, "install", *options)
        url = json.loads(report.read_text(encoding="utf-8"))["install"][0]["download_info"]["url"]
    try:
        with closing(_Remote(url)) as remote, zipfile.ZipFile(remote) as wheel:
            kept = _extract(_in_wheel(wheel), source, target)
            return remote.downloaded, kept
    except (urllib.error.URLError, io.UnsupportedOperation) as error:
        sys.stdout.write(f"{url} is not handed out in parts ({error}); pip downloads all of it.\n")
        return _whole(source, target)


def _whole(source: Source, target: Path) -> tuple[int, int]:
    """Fetches the file with pip; (bytes downloaded, files kept)."""
    with tempfile.TemporaryDirectory() as scratch:
        _pip(source, "download", "--no-cache-dir", "-d", scratch)
        (archive,) = Path(scratch).iterdir()
        size = archive.stat().st_size
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return size, _extract(_in_wheel(wheel), source, target)
        with tarfile.open(archive) as sdist:
            return size, _extract(_in_sdist(sdist), source, target)


def _pip(source: Source, verb: str, *options: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "-q", "--no-deps", *options, *source.options, source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip could not {verb} {source.requirement} for the reader tests:\n{done.stdout}{done.stderr}")


class _Remote(io.RawIOBase):
    """A file on a server, read in blocks; `downloaded` counts their bytes."""

    block = 1 << 20

    def __init__(self, url: str) -> None:
        self.url, self.at, self.downloaded = url, 0, 0
        self.blocks: dict[int, bytes] = {}
        self.size = 0
        self._get(0)

    def _get(self, index: int) -> bytes:
        if index not in self.blocks:
            start = index * self.block
            request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{start + self.block - 1}"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                if answer.headers.get("Content-Range") is None:
                    raise io.UnsupportedOperation("no ranges")
                self.size = int(answer.headers["Content-Range"].rpartition("/")[2])
                self.blocks[index] = answer.read()
            self.downloaded += len(self.blocks[index])
        return self.blocks[index]

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int | None = -1) -> bytes:
        end = self.size if count is None or count < 0 else min(self.size, self.at + count)
        found = bytearray()
        while self.at < end:
            index, start = divmod(self.at, self.block)
            piece = self._get(index)[start : start + end - self.at]
            found += piece
            self.at += len(piece)
        return bytes(found)


def _extract(members: Iterator[tuple[str, Callable[[], IO[bytes]]]], source: Source, target: Path) -> int:
    kept = 0
    for member, opened in members:
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


def _in_wheel(wheel: zipfile.ZipFile) -> Iterator[tuple[str, Any]]:
    for entry in wheel.infolist():
        if not entry.is_dir():
            yield entry.filename, lambda entry=entry: wheel.open(entry)


def _in_sdist(sdist: tarfile.TarFile) -> Iterator[tuple[str, Any]]:
    for member in sdist:
        if member.isfile():
            yield member.name, lambda member=member: sdist.extractfile(member)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/readers/fetch.py FOLDER")
    fetch(Path(sys.argv[1]))
