"""The folders that `bench` and `demo` write their results into."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import PeftMoeCompatError

__all__ = ["check_writable", "writing"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written within, for a command to say: `PeftMoeCompatError` for an `OSError`."""
    try:
        yield
    except OSError as error:
        raise PeftMoeCompatError(f"--out {folder} cannot be written: {error}") from error


def check_writable(folder: Path) -> None:
    """Makes a folder and writes into it, so that a long run does not end in an error.

    Raises:
        PeftMoeCompatError: It cannot be made or written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
