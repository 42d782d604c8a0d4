"""`peft-moe-compat enable`, `disable` and `status`: the package in every process of this environment that uses PEFT.

A .pth file of the environment's site-packages carries `at_start`; Python runs it whenever it starts.
"""

from __future__ import annotations

import inspect
import os
import site
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import typer

from .. import __version__, at_start
from ..errors import PeftMoeCompatError
from ..patching.activation import switched_off
from .failing import with_exit_code

__all__ = ["register"]

_NAME = "peft_moe_compat_at_start.pth"
_MARK = "# Written by `peft-moe-compat enable`, release "
_ON, _OFF, _STALE = 0, 1, 3  # exit codes of `status`; 2 is that of options that do not exist


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (enable, disable, status):
        app.command()(with_exit_code(1, command))


def enable() -> None:
    """Switches the package on in this Python environment, for every process that imports PEFT, trainers' included.

    Exit code 0 if it is on now, 1 if the file cannot be written.
    """
    path = _folder() / _NAME
    there = _read(path)
    if there is not None and _code(there) == _code(_text()):
        typer.echo(f"on already: {path}")
        return
    temporary = path.with_name(f"{_NAME}.{os.getpid()}.tmp")  # which Python does not read
    with _explained(path):
        try:
            temporary.write_text(_text(), encoding="ascii")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    typer.echo(f"on: {path}\nProcesses started from now on are active as soon as they import PEFT.")


def disable() -> None:
    """Undoes `enable`. Processes that run already are left as they are.

    Exit code 0 if it is off now, 1 if a file cannot be removed.
    """
    found = {path: there for path in _paths() if (there := _read(path)) is not None}
    for path in found:
        with _explained(path):
            path.unlink(missing_ok=True)
        typer.echo(f"off: {path} removed")
    if not found:
        typer.echo("off already")


def status() -> None:
    """Says whether `enable` is in force, where, and which release wrote it.

    Exit code 0 if it is on, 1 if it is off, 3 if something of it is stale.
    """
    found = {path: there for path in _paths() if (there := _read(path)) is not None}
    stale = []
    for path, there in found.items():
        release = there.partition("\n")[0].removeprefix(_MARK).rstrip(".")
        typer.echo(f"on: {path}, written by release {release}")
        if _code(there) != _code(_text()):
            stale.append(f"{path} is of another release: peft-moe-compat enable")
    if found and not at_start.installed():
        stale.append("this process has not read it: Python was started with -S, -I or -s, or reads no .pth there")
    if len(found) > 1:
        stale.append("one of the files is enough: peft-moe-compat disable, then enable")
    if not found:
        typer.echo("off: peft-moe-compat enable switches it on")
    elif switched_off():
        typer.echo("switched off in this shell by PEFT_MOE_COMPAT=0")
    typer.echo(f"package: {Path(at_start.__file__).parent}, release {__version__}")
    for sentence in stale:
        typer.echo(f"stale: {sentence}")
    raise typer.Exit(_STALE if stale else _ON if found and not switched_off() else _OFF)


def _folder() -> Path:
    """The environment's site-packages, or the user's where the package is installed there."""
    try:
        home = Path(str(distribution("peft-moe-compat").locate_file("")))
    except PackageNotFoundError:  # run from a checkout
        home = Path(__file__).parents[2]
    user = Path(site.getusersitepackages())
    return user if site.ENABLE_USER_SITE and home.resolve() == user.resolve() else _purelib()


def _purelib() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _paths() -> list[Path]:
    """Where `enable` may have written."""
    return [folder / _NAME for folder in dict.fromkeys((_purelib(), Path(site.getusersitepackages())))]


def _text() -> str:
    """The file: who wrote it, and the one line that Python runs."""
    source = f"{inspect.getsource(at_start)}\ninstall()\n"
    return f"{_MARK}{__version__}.\nimport sys; exec({source!r}, {{'__name__': 'peft_moe_compat_at_start'}})\n"


def _code(text: str) -> str:
    return text.partition("\n")[2]


def _read(path: Path) -> str | None:
    """The text of what `enable` wrote there; None where there is nothing.

    Raises:
        PeftMoeCompatError: It cannot be read, or somebody else wrote it.
    """
    with _explained(path):
        if not path.exists():
            return None
        text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(_MARK):
        raise PeftMoeCompatError(
            f"{path} was not written by `peft-moe-compat enable`. Remove it by hand, or rename it."
        )
    return text


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeftMoeCompatError(
            f"{path} cannot be read or written: {error}. Run this as who owns that folder, or in a virtual environment."
        ) from error
