"""Damage that knows the structure of an adapter, and what may come of it.

same     a refusal, or what the file meant before
read     a refusal, or what the oracle reads in the damaged file; where it reads nothing, a refusal
any      an answer or a refusal: what the file means now is not for the oracle to say
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from fuzz import files
from fuzz.cases import Case
from fuzz.configs import ON_CONFIGS
from fuzz.made import Adapter
from fuzz.oracle import Meaning, UnreadableError
from fuzz.reading import read
from fuzz.tensors import ON_TENSORS

_ON_ADAPTERS = ON_TENSORS | ON_CONFIGS
_ORDER = ("same", "read", "any")


@dataclass(frozen=True)
class Expected:
    """What may come of a file: the verdict, and why."""

    verdict: str = "same"
    why: str = ""

    def then(self, other: str, why: str) -> Expected:
        """After one more damage."""
        return Expected(max(self.verdict, other, key=_ORDER.index), f"{self.why} {why}".strip())

    def meaning(self, adapter: Adapter, folder: Path) -> Meaning | str | None:
        """What a conversion has to mean; "refuse" where there is to be none, None for whatever it does."""
        if self.verdict == "any":
            return None
        if self.verdict == "same":
            return adapter.meaning
        try:
            return read(folder, adapter.facts)
        except UnreadableError as error:
            self.__dict__["why"] = f"{self.why} ({error})"
            return "refuse"


class Damage:
    """One damage, on the way to the folder and in it."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.rng = random.Random(f"{case.seed} {name}")

    def before(self, adapter: Adapter) -> tuple[str, str]:
        """Changes what will be written; (verdict, what was done)."""
        if self.name not in _ON_ADAPTERS:
            return "same", ""
        return _ON_ADAPTERS[self.name](adapter, self.case, self.rng), self.name

    def after(self, folder: Path) -> tuple[str, str]:
        """Changes what was written."""
        if self.name not in files.ON_FOLDERS:
            return "same", ""
        return files.ON_FOLDERS[self.name](folder, self.rng), self.name


NAMES = (*_ON_ADAPTERS, *files.ON_FOLDERS)
