"""target_parameters, matched as PEFT does, by suffix; indexed, so that thousands meet thousands of modules."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterator
from functools import cached_property

from ..errors import AdapterFileError
from .files import show

__all__ = ["Targets", "any_ending"]

_MAX_PARAMETERS = 64  # of one module; the experts of gpt_oss have four


def any_ending(key: str, names: Container[str]) -> bool:
    """Whether a name is one of these, or ends with one behind a dot."""
    return any(ending in names for ending in _endings(key))


def _endings(name: str) -> Iterator[str]:
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


class Targets(tuple[str, ...]):
    """The entries of `target_parameters`; one without a module is a bare one.

    Raises:
        AdapterFileError: One module would have more parameters than any model's has.
    """

    def __init__(self, *_: object) -> None:
        modules = Counter(target.rpartition(".")[0] for target in set(self))
        module, count = max(modules.items(), key=lambda item: item[1], default=("", 0))
        if count > _MAX_PARAMETERS:
            raise AdapterFileError(
                f"adapter_config.json targets {count} parameters of {show(module) if module else 'every module'}; at "
                f"most {_MAX_PARAMETERS} were expected. Is the file damaged?"
            )

    @cached_property
    def _modules(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, target in enumerate(self):
            found.setdefault(target.rpartition(".")[0], []).append(index)
        return found

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(module[::-1] for module in self._modules)

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self)

    def _at(self, path: str) -> list[int]:
        """Which entries name a module that may be the one at this path: one of the two names ends with the other."""
        if path not in self._known:
            found = [index for ending in _endings(path) if ending for index in self._modules.get(ending, ())]
            longer = f"{path[::-1]}."
            for at in range(bisect_left(self._backwards, longer), len(self._backwards)):
                module = self._backwards[at]
                if not module.startswith(longer):
                    break
                found += self._modules[module[::-1]]
            self._known[path] = sorted(found)
        return self._known[path]

    def matrix(self, path: str) -> str | None:
        """The entry that LoRA on an ordinary module is for, a router's weight, say; else None.

        PEFT matches its patterns with the name of that parameter, and those of a linear with the linear's own.
        """
        at = self._at(path)
        return self[at[0]] if at else None

    def parameters(self, path: str, *, bare: bool = True) -> tuple[str, ...]:
        """Names of the module's parameters that are targeted; `bare`: by entries without a module too."""
        at = sorted([*self._at(path), *self._modules.get("", ())]) if bare else self._at(path)
        return tuple(dict.fromkeys(self[index].rpartition(".")[2] for index in at))

    def reach(self, key: str) -> bool:
        """Whether they reach a parameter, by its full name."""
        return any_ending(key, self._names)
