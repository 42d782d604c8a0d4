"""The package asked within bounds: what it raises has to be its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fuzz.limits import TooSlowError, bounded
from fuzz.takes import ViolationError
from peft_moe_compat.errors import PeftMoeCompatError


def guarded(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, or this package's own error as a value; anything else it raises is a violation."""
    try:
        with bounded():
            return function(*args, **kwargs)
    except PeftMoeCompatError as error:
        if len(str(error)) > 20_000:
            raise ViolationError(f"{what} says too much", f"{len(str(error))} characters") from None
        return error
    except TooSlowError:
        raise ViolationError(f"{what} takes too long", "over 5 s") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ViolationError(f"{what} raises {type(error).__name__}", str(error)[:300]) from error
