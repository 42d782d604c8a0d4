"""Where an adapter lies, its JSON files, and an output folder that appears complete or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import reprlib
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ..errors import AdapterError, AdapterFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_folder",
    "download",
    "find_adapter",
    "finite_or_null",
    "is_hub_id",
    "ordinary_file",
    "parse_json",
    "read_json",
    "show",
    "usable_path",
]

_MAX_JSON_BYTES = 64 * 2**20
# An entry for every linear of 61 layers of 384 experts, in three fields, has 210,816.
_MAX_VALUES, _MAX_DEPTH = 1_000_000, 100
_HUB_ID = re.compile(r"(?:\w[\w.\-]{0,95}/)?\w[\w.\-]{0,95}", re.ASCII)
_HUB_FILES = ["adapter_config.json", "adapter_model*", "automodel_peft_config.json"]

# Temporary folders: of this machine, as `atomic_folder` makes them.
_PREFIX, _SETTLED_SECONDS, _OLD_SECONDS = ".peft-moe-compat-", 60, 86_400

logger = logging.getLogger("peft_moe_compat")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxtuple = 8


def show(value: object) -> str:
    """`repr` of something read from a file, shortened: a damaged file may hold names of megabytes."""
    return _repr.repr(value)


def usable_path(text: str | Path) -> Path:
    """A path the file system can be asked about, whether anything is there or not.

    Raises:
        AdapterFileError: It is too long, or has characters no path has.
    """
    try:
        Path(text).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Path(text)  # nothing is there yet
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            f"{show(str(text))} is no usable path: {error}. Check its spelling and rights."
        ) from None
    return Path(text)


def find_adapter(source: str | Path) -> Path:
    """The folder of an adapter: an existing folder, or one the Hugging Face Hub has under the id `name` or `org/name`.

    Whatever exists locally is never looked up on the Hub.

    Raises:
        AdapterFileError: A file instead of a folder, nothing at all, or the Hub refused or could not be reached.
    """
    path = usable_path(source)
    if path.is_dir():
        return path
    if os.path.lexists(path):
        found = "a file" if path.is_file() else "neither a folder nor a file (a broken link?)"
        raise AdapterFileError(
            f"{path} is {found}; the folder that holds adapter_config.json was needed. Did you mean {path.parent}?"
        )
    if not is_hub_id(str(source)):
        raise AdapterFileError(
            f"{source} does not exist, and is no id of the Hugging Face Hub ('name' or 'org/name') either. "
            "Give the folder that holds adapter_config.json."
        )
    return download(str(source), _HUB_FILES)


def is_hub_id(text: str) -> bool:
    """Whether a text could be the id of a repository on the Hugging Face Hub: `name` or `org/name`."""
    return _HUB_ID.fullmatch(text) is not None


def download(repo_id: str, patterns: list[str]) -> Path:
    """The local folder of a repository of the Hub, with those of its files that match the patterns.

    Raises:
        AdapterFileError: The Hub refused, or could not be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # The base class is the HTTP client's own error: of requests, httpx or httpx2, by release of huggingface_hub.
    client_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns))
    except (client_error, OSError, ValueError, RuntimeError) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        said = "is not asked (HF_HUB_OFFLINE=1)" if offline else "gave nothing of that id"
        check = "Check the spelling, or the access rights (`hf auth login`) and the network."
        check = "Unset that variable, or pass a folder." if offline else check
        raise AdapterFileError(
            f"There is no folder {repo_id!r}, and the Hugging Face Hub {said}: {type(error).__name__}. {check}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB: see `parse_json`.

    Raises:
        AdapterFileError: No such file, too large, or not one JSON object.
    """
    try:
        if not ordinary_file(path):
            raise AdapterFileError(f"{path} was needed, but there is no such file. Is the folder complete?")
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise AdapterFileError(
                f"{path} has {size} bytes; a JSON file of an adapter has at most {_MAX_JSON_BYTES}. Is it another file?"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}. Check its access rights.") from error
    value = parse_json(raw, str(path))
    _require_shallow(value, str(path))
    return value


def finite_or_null(value: Any) -> Any:
    """What JSON has for a value: it has no number that is infinite or NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ordinary_file(path: Path) -> bool:
    """Whether there is a file at this path, a link to one included; nothing at all is none.

    Raises:
        AdapterFileError: There is something else: a folder, a device, a pipe, a broken link; or nobody may ask.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not path.is_symlink():
            return False
        raise AdapterFileError(f"{path} cannot be read: {error}. Check where it points, and its rights.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise AdapterFileError(f"{path} is {kind}; an ordinary file was needed.")
    return True


def parse_json(raw: bytes, what: str, most: int = _MAX_VALUES) -> dict[str, Any]:
    """One JSON object in UTF-8, no key twice at any level; numbers as Python reads them. `what` names it.

    Raises:
        AdapterFileError: Anything else; more values than `most`.
    """
    if (count := sum(map(raw.count, (b",", b"{", b"[")))) > most:
        raise AdapterFileError(f"{what} holds {count} JSON values or more; at most {most} were expected.")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} is no JSON to rely on: {error}. Is the file complete and unedited?") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{what} holds a JSON {type(value).__name__}; an object, {{...}}, was needed.")
    return value


def _require_shallow(value: dict[str, Any], what: str) -> None:
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise AdapterFileError(f"{what} holds JSON values more than {_MAX_DEPTH} within each other.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} appears twice in one object")
    return result


@contextmanager
def atomic_folder(out: Path, *, source: Path | None) -> Iterator[Path]:
    """A temporary folder beside `out` to write into; it becomes `out` when the block ends well, else it is removed.

    A process killed half-way leaves the input as it was, no `out`, and a folder `.peft-moe-compat-HOST-XXXXXXXX.tmp`,
    which the next run on that machine removes: nobody holds its lock any more.

    Args:
        out: The folder to be made. Its parent exists; it does not.
        source: The file or folder that is read meanwhile, if any; `out` must lie apart from it.

    Raises:
        AdapterError: `out` exists, before or after the block, or overlaps `source`, or cannot be made, a full disk
            included.
    """
    if source is not None:
        _check_apart(out, source)
    _check_absent(out)
    if not out.parent.is_dir():
        raise AdapterError(f"{out} cannot be written: there is no folder {out.parent}. Create it first.")
    _remove_left_over(out.parent)
    temporary = out.parent / f"{_PREFIX}{_host()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error}. Choose a folder you may write to.") from error
    try:
        with _locked(temporary):
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            _check_absent(out)
            temporary.rename(out)
    except OSError as error:
        raise AdapterError(f"{out} was not made: {error}. Is there room, and may you read and write there?") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)  # the next run tries again
    try:
        _sync(out.parent)
    except OSError as error:  # a folder that may be written and not read; `out` is there all the same
        logger.debug("%s could not be flushed: %s", out.parent, error)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "", socket.gethostname())[:40] or "host"


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process holds the folder's lock, which the system gives back when it dies; none holds it twice."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # held by another one, or a file system without locks
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_left_over(parent: Path) -> None:
    """Removes the temporary folders of this machine's runs that were killed, and names those of others'."""
    try:
        there = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(_PREFIX)]
    except OSError as error:
        logger.debug("%s cannot be listed: %s", parent, error)
        return
    for folder in there:
        try:
            status = folder.lstat()
            # One that was made just now may not be locked yet.
            if not stat.S_ISDIR(status.st_mode) or time.time() - status.st_mtime < _SETTLED_SECONDS:
                continue
            if re.fullmatch(rf"{re.escape(_PREFIX + _host())}-[0-9a-f]{{8}}\.tmp", folder.name):
                with _locked(folder) as held:
                    if held:
                        shutil.rmtree(folder)
                        logger.warning("%s was removed: the run that made it was killed.", folder)
                        continue
            if time.time() - status.st_mtime > _OLD_SECONDS:
                logger.warning("%s was left by a run that was killed, unless one still writes there.", folder)
        except OSError as error:
            logger.warning("%s was left by a run that was killed, and cannot be removed: %s", folder, error)


def _check_apart(out: Path, source: Path) -> None:
    try:
        target, origin = out.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise AdapterError(f"{out} cannot be written: {error}. Choose another folder.") from error
    relations = {"is": target == origin, "lies inside": origin in target.parents, "contains": target in origin.parents}
    for relation, holds in relations.items():
        if holds:
            raise AdapterError(f"The output {out} {relation} the input {source}. Choose a folder apart from the input.")


def _check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise AdapterError(f"{out} exists already, and nothing is ever overwritten. Choose another name or remove it.")


def _sync(path: Path) -> None:
    """fsync of one file or folder; where folders cannot be opened, as on Windows, there is nothing to flush."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
