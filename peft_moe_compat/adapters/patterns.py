r"""Regular expressions out of adapter_config.json, matched as PEFT matches them, in time that no file can stretch.

PEFT asks `re.match(rf"(.*\.)?({pattern})$", key)` of one pattern of rank_pattern or alpha_pattern after the other, and
`re.fullmatch` of target_modules. Nearly all patterns are names, in which a dot is any character; those are looked up.
The others are followed through a key for all positions at once, so that nothing is tried twice, and those on which PEFT
itself could hang are refused.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from itertools import takewhile
from typing import Any

from ..errors import AdapterFileError
from .files import show

__all__ = ["Expression", "Patterns"]

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_NAME = re.compile(r"[^\\^$*+?{}\[\]|()\n]+")  # only the dot means something else than itself
_MAX_KEY = 1024  # characters of a module's name; real ones have at most 200
_MAX_LENGTH = 50_000  # of one expression, as Unsloth and ms-swift write them for target_modules
_MAX_TOTAL = 100_000  # of all that are no names
_MAX_GROUPS, _MAX_REPEATS, _MAX_WAYS = 100, 4, 100_000
# Steps taken with one table: ten times what one expression for every layer and projection takes with 20,000 names.
_MAX_WORK = 2_000_000

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda char: char.isalnum() or char == "_",
}

# A set of positions in a text is the bits of an integer. A step takes those before it to those behind it.
_Step = Callable[["_Text", int], int]


class _Work:
    """Counts steps, and refuses more than `_MAX_WORK`."""

    def __init__(self) -> None:
        self.left = _MAX_WORK

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise AdapterFileError(
                "The patterns of adapter_config.json take too many steps to match with the names in this file. Replace "
                "them by plain names."
            )


class _Text:
    """A key, and where in it each character stands."""

    def __init__(self, key: str, work: _Work) -> None:
        self.work, self.size = work, len(key)
        self.chars: dict[str, int] = {}
        for at, char in enumerate(key):
            self.chars[char] = self.chars.get(char, 0) | 1 << at
        self.inner = (1 << self.size) - 1
        self._found: dict[Callable[[str], bool], int] = {}

    def where(self, test: Callable[[str], bool], cost: int = 1) -> int:
        if test not in self._found:
            self.work.spend(cost * len(self.chars))
            self._found[test] = sum(found for char, found in self.chars.items() if test(char))
        return self._found[test]


def _checked_key(key: str) -> str:
    if len(key) > _MAX_KEY or "\n" in key:
        raise AdapterFileError(
            f"{show(key)} is no name of a module or parameter: at most {_MAX_KEY} characters without a line break were "
            "expected. Is the file damaged?"
        )
    return key


class Expression:
    """A regular expression of `target_modules`.

    Raises:
        AdapterFileError: It is none, or one that may take forever in PEFT.
    """

    def __init__(self, pattern: str) -> None:
        self._work = _Work()
        self._run = _sequence(_parsed(pattern))

    def matches(self, key: str) -> bool:
        """Whether `re.fullmatch` would."""
        text = _Text(_checked_key(key), self._work)
        return bool(self._run(text, 1) >> text.size)


class Patterns(dict[str, Any]):
    """rank_pattern or alpha_pattern, indexed when first asked; not to be changed afterwards.

    Raises:
        AdapterFileError: A pattern is no regular expression, or one that may take forever in PEFT.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        super().__init__(table)
        self._order = list(self)
        self._known: dict[str, str | None] = {}
        self._work = _Work()
        # Length -> where dots are any character -> the name with dots there -> which pattern.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        # The same of what an expression begins with -> which ones, what each ends with, and how it goes on.
        self._begun: dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, str, _Step]]]]] = {}
        total = 0
        for index, pattern in enumerate(self._order):
            if _NAME.fullmatch(pattern):
                head, tail, rest = pattern, "", None
                wild = _dots(pattern)
            else:
                total += len(pattern)
                if total > _MAX_TOTAL:
                    raise AdapterFileError(
                        f"adapter_config.json has regular expressions of more than {_MAX_TOTAL} characters in a table "
                        "of patterns. Replace them by plain names."
                    )
                head, wild, tail, rest = _parts(_parsed(pattern))
            if rest is None:
                self._names.setdefault(len(head), {}).setdefault(wild, {}).setdefault(head, index)
            else:
                begun = self._begun.setdefault(len(head), {}).setdefault(wild, {})
                begun.setdefault(head, []).append((index, tail, rest))

    @cached_property
    def as_saved(self) -> Patterns:
        """The same in the order in which PEFT's `save_pretrained` writes them."""
        order = sorted(self._order)
        return self if order == self._order else Patterns({pattern: self[pattern] for pattern in order})

    def find(self, key: str) -> str | None:
        """The first pattern that PEFT's `get_pattern_key` matches with `key`, None where none does."""
        if key not in self._known:
            self._known[key] = self._find(_checked_key(key)) if self else None
        return self._known[key]

    def _find(self, key: str) -> str | None:
        starts = [0, *(at + 1 for at in _dots(key))]
        best, size = len(self._order), len(key)
        for start in (start for start in starts if size - start in self._names):
            for wild, names in self._names[size - start].items():
                self._work.spend(1 + size // 64)
                best = min(best, names.get(_masked(key[start:], wild), best))
        going: dict[int, tuple[_Step, int]] = {}
        for length, wilds in self._begun.items():
            for start in starts:
                for wild, heads in wilds.items() if start + length <= size else ():
                    candidates = heads.get(_masked(key[start : start + length], wild), ())
                    self._work.spend(1 + length // 64 + len(candidates))
                    for index, tail, rest in candidates:
                        if key.endswith(tail):
                            going[index] = rest, going.get(index, (rest, 0))[1] | 1 << start + length
        text = _Text(key, self._work) if going else None
        for index in sorted(going):
            rest, at = going[index]
            if index < best and text is not None and rest(text, at) >> size:
                return self._order[index]
        return self._order[best] if best < len(self._order) else None


def _dots(text: str) -> tuple[int, ...]:
    """Where a text has dots."""
    found, at = [], text.find(".")
    while at >= 0:
        found.append(at)
        at = text.find(".", at + 1)
    return tuple(found)


def _masked(text: str, wild: tuple[int, ...]) -> str:
    """A text with dots at these places."""
    for at in wild:
        if text[at] != ".":
            chars = list(text)
            for there in wild:
                chars[there] = "."
            return "".join(chars)
    return text


def _parts(tree: list[tuple[Any, Any]]) -> tuple[str, tuple[int, ...], str, _Step | None]:
    """What an expression begins with, where that is any character, what it ends with, and all behind the beginning.

    The last is None where the beginning is all of it.
    """
    count = next((at for at, (op, _) in enumerate(tree) if str(op) not in ("LITERAL", "ANY")), len(tree))
    head = "".join("." if str(op) == "ANY" else chr(value) for op, value in tree[:count])
    wild = tuple(at for at, (op, _) in enumerate(tree[:count]) if str(op) == "ANY")
    ending = [value for _, value in takewhile(lambda part: str(part[0]) == "LITERAL", reversed(tree[count:]))]
    return head, wild, "".join(map(chr, reversed(ending))), _sequence(tree[count:]) if count < len(tree) else None


def _refused(pattern: str, why: object) -> AdapterFileError:
    return AdapterFileError(f"adapter_config.json has the pattern {show(pattern)}, {why}.")


def _parsed(pattern: str) -> list[tuple[Any, Any]]:
    """Python's own syntax tree of an expression that PEFT is done with in good time."""
    if len(pattern) > _MAX_LENGTH or pattern.count("(") > _MAX_GROUPS:
        raise _refused(
            pattern, f"of more than {_MAX_LENGTH} characters or {_MAX_GROUPS} groups. Replace it by plain names"
        )
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(pattern, f"no regular expression: {error}") from None
    if tree.state.flags != re.UNICODE:
        raise _refused(pattern, "with flags, which PEFT takes at its beginning alone. Write it without")
    repeats, ways = _costs(pattern, tree)
    if repeats > _MAX_REPEATS or ways > _MAX_WAYS:
        raise _refused(
            pattern,
            f"with more than {_MAX_REPEATS} repetitions in a row or {_MAX_WAYS} ways to match, on which PEFT may take "
            "forever. Replace it by plain names",
        )
    return list(tree)


def _costs(pattern: str, tree: Any, repeated: bool = False) -> tuple[int, int]:
    """How many repetitions there are in a row, and in how many ways all else can match.

    What is repeated has a fixed length, so that no text can be parted among repetitions in more ways than one.
    """
    repeats, ways = 0, 1
    for op, value in tree:
        name, parts = str(op), []
        if name == "BRANCH":
            parts = value[1]
        elif name == "SUBPATTERN" and not value[1] and not value[2]:
            parts = [value[3]]
        elif name in ("ASSERT", "ASSERT_NOT") and value[0] == 1:
            parts = [value[1]]
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            parts = [value[2]]
            repeats += value[1] > 1
            ways *= 2 if value[1] == 1 else 1
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT") or str(value) == "AT_NON_BOUNDARY":
            raise _refused(pattern, f"which holds {name.lower()}. Replace it by plain names")
        if repeated and name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "SUBPATTERN"):
            raise _refused(
                pattern,
                f"which repeats what holds {name.lower()}, on which PEFT may take forever. Replace it by plain names",
            )
        inner = name in ("MAX_REPEAT", "MIN_REPEAT") and value[1] > 1
        costs = [_costs(pattern, part, repeated or inner) for part in parts]
        repeats += max((count for count, _ in costs), default=0)
        ways = min(ways * max(1, sum(count for _, count in costs)), _MAX_WAYS + 1)
    return repeats, ways


def _sequence(tree: Any) -> _Step:
    steps = [_step(str(op), value) for op, value in tree]

    def run(text: _Text, at: int) -> int:
        text.work.spend(1 + len(steps))
        for step in steps:
            if not at:
                break
            at = step(text, at)
        return at

    return run


def _step(op: str, value: Any) -> _Step:
    match op:
        case "LITERAL":
            char = chr(value)
            return lambda text, at: (at & text.chars.get(char, 0)) << 1
        case "ANY":
            return lambda text, at: (at & text.inner) << 1
        case "NOT_LITERAL" | "IN":
            items = value if op == "IN" else [("NEGATE", None), ("LITERAL", value)]
            test = _class(items)
            return lambda text, at: (at & text.where(test, len(items))) << 1
        case "BRANCH":
            branches = [_sequence(tree) for tree in value[1]]

            def either(text: _Text, at: int) -> int:
                found = 0
                for branch in branches:
                    found |= branch(text, at)
                return found

            return either
        case "SUBPATTERN":
            return _sequence(value[3])
        case "ASSERT" | "ASSERT_NOT":
            ahead, wanted = _sequence(value[1]), op == "ASSERT"
            return lambda text, at: sum(
                1 << p for p in range(text.size + 1) if at >> p & 1 and bool(ahead(text, 1 << p)) == wanted
            )
        case "AT":
            return _anchor(str(value))
    return _repeat(value[0], value[1], _sequence(value[2]))


def _anchor(place: str) -> _Step:
    if place.startswith("AT_BEGINNING"):
        return lambda _, at: at & 1
    if place.startswith("AT_END"):
        return lambda text, at: at & 1 << text.size
    return lambda text, at: at & _boundaries(text)


def _boundaries(text: _Text) -> int:
    word = text.where(_CATEGORIES["WORD"])
    return word ^ word << 1


def _repeat(least: int, most: int, body: _Step) -> _Step:
    def run(text: _Text, at: int) -> int:
        # As many as the text has characters: what is repeated more often than that is empty.
        for _ in range(min(least, text.size + 1)):
            at = body(text, at)
            if not at:
                return 0
        found = new = at
        for _ in range(min(most - least, text.size + 1)):
            new = body(text, new) & ~found
            if not new:
                break
            found |= new
        return found

    return run


def _class(items: Any) -> Callable[[str], bool]:
    tests = [_test(str(op), value) for op, value in items if str(op) != "NEGATE"]
    negated = len(tests) < len(items)
    return cache(lambda char: any(test(char) for test in tests) != negated)


def _test(op: str, value: Any) -> Callable[[str], bool]:
    if op == "LITERAL":
        return lambda char: ord(char) == value
    if op == "RANGE":
        return lambda char: value[0] <= ord(char) <= value[1]
    kind = str(value).removeprefix("CATEGORY_")
    test = _CATEGORIES[kind.removeprefix("NOT_")]
    return test if kind in _CATEGORIES else lambda char: not test(char)
