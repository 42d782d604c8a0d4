"""What torch.compile is told, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_when_compiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """As `torch.compiler.assume_constant_result`, which imports all of dynamo, and triton where it is, to set this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
