"""Commands that end with a sentence and an exit code where this package refuses something."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from ..errors import PeftMoeCompatError

__all__ = ["with_exit_code"]


def with_exit_code(code: int, command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose errors of this package are a line on stderr and that exit code."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PeftMoeCompatError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(code) from None

    return guarded
