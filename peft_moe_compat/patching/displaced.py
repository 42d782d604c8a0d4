"""Loaders and savers of this library in whose place somebody else's has come that does not call ours.

Whether a function calls another cannot be told before it runs, but what it does not hold it cannot call. Forwards are
asked by running them; see `reach`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ..errors import CompatWarning
from ..others import owner_of, remedy
from ..reasons import Reason, because
from .reach import say_once

__all__ = ["displaced_functions", "follow", "notice", "sentence"]

_placed: list[Any] = []


def follow(placed: list[Any]) -> None:
    """The `Placed` of this activation, from here on."""
    global _placed
    _placed = placed


def displaced_functions() -> Iterator[Reason]:
    """Of each place of a loader or saver in which somebody's function is that holds nothing of ours."""
    for placed in _placed:
        place = placed.replacement
        if not place.of_files or (found := place.there()) is placed.ours:
            continue
        if not _holds(found, _plain(placed.ours), place.owner, set()):
            owner = owner_of(found)
            yield because("displaced", place.what, owner, remedy(owner))


def notice() -> None:
    """Warns of them, once of each."""
    for reason in displaced_functions():
        if say_once(reason):
            warnings.warn(sentence(reason), CompatWarning, stacklevel=4)


def sentence(reason: Reason) -> str:
    return f"Adapters are not read or written as peft_moe_compat does it: {reason}."


def _plain(function: Any) -> Any:
    """Of a class method, or a bound one, its function."""
    return function.__func__ if isinstance(function, MethodType | classmethod | staticmethod) else function


def _holds(function: Any, ours: Any, owner: Any, seen: set[int]) -> bool:
    """Whether a function gets hold of ours, itself or through what it holds."""
    function = _plain(function)
    if function is ours:
        return True
    if id(function) in seen or isinstance(function, type):
        return False
    seen.add(id(function))
    return any(_holds(each, ours, owner, seen) for each in _held(function, owner))


def _held(function: Any, owner: Any) -> list[Any]:
    """The callables of a function's cells, defaults and attributes, and those it names: globals, and theirs."""
    found, names = [*getattr(function, "__dict__", {}).values()], set[str]()
    if isinstance(function, partial):
        found += [function.func, *function.args]
    if isinstance(function, FunctionType):  # other objects may have any attribute that they are asked for
        found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                found.append(cell.cell_contents)
        names.update(_names(function.__code__))
        found += [value for name, value in function.__globals__.items() if name in names]
    for holder in (owner, *found):
        if isinstance(holder, type | ModuleType):
            found += [vars(holder)[name] for name in names & vars(holder).keys()]
    return [each for each in found if callable(_plain(each))]


def _names(code: Any) -> Iterator[str]:
    """Of globals and attributes, those in functions within included."""
    if isinstance(code, CodeType):
        yield from code.co_names
        for constant in code.co_consts:
            yield from _names(constant)
