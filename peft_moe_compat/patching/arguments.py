"""The arguments of a call to a function that is replaced, by the names upstream gives them.

Callers call upstream's function. What stands in its place may be somebody else's wrapper, such as
`(self, model_id, *args, **kwargs)`, whose own signature says nothing of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..others import owner_of

__all__ = ["naming"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def naming(stock: Any, *first: str) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]:
    """What names a call's positional and keyword arguments. A call that upstream refuses is named as far as it goes.

    Args:
        first: What upstream calls its first positional parameters, in every release. The others are named where
            upstream's own function is found, in place or below wrappers made with `functools.wraps`.
    """
    function, names = inspect.unwrap(stock), first
    if owner_of(function).partition(".")[0] in ("peft", "transformers"):
        names = tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in _POSITIONAL)
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}
