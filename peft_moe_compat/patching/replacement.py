"""How a function of PEFT's or transformers' is replaced, and put back: what `replacements` has the rows of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from ..model.wrappers import TAKES_LORA
from ..others import owner_of
from . import kbit
from .reach import comes_to_peft, displaced

__all__ = [
    "CodeReplacement",
    "FileReplacement",
    "ForwardReplacement",
    "Placed",
    "RegistryEntry",
    "Replacement",
    "WrapperCall",
    "WrapperForward",
    "below",
]


@dataclass(frozen=True)
class Replacement:
    """A function that is replaced while the library is active. Ours calls what was there, whoever has written it.

    Attributes:
        owner: The class, module or mapping that holds it.
        name: The attribute or key.
        home: How the name of the module it was written in begins; any other is somebody else's patch.
        make: What was there, as it stands in the owner's `__dict__` -> what goes there instead.
        what: For messages.
    """

    of_files: ClassVar[bool] = False  # whether files would be read or written wrongly without ours, silently
    owner: Any
    name: str
    home: str
    make: Callable[[Any], Any]
    what: str

    def there(self) -> Any:
        """What is in place now."""
        return (self.owner if isinstance(self.owner, dict) else vars(self.owner)).get(self.name)

    def put(self, function: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = function
        else:
            setattr(self.owner, self.name, function)

    def missing(self) -> bool:
        return self.there() is None

    def foreign(self, found: Any) -> bool:
        """Whether somebody else has written what was found there."""
        return not owner_of(found).startswith(self.home)

    def taken(self, _found: Any) -> bool:
        """Whether ours can call what somebody else has put there."""
        return True

    def lost(self, ours: Any) -> bool:
        """Whether something else has taken the place of ours."""
        return self.there() is not ours

    def made(self) -> Placed:
        """Ours, for what is there or stands below an earlier one of ours that is off; not in its place yet."""
        placed = Placed(self, below(self.there()))
        placed.ours = self._ours(placed)
        setattr(placed.ours, _PLACED, placed)
        return placed

    def _ours(self, placed: Placed) -> Any:
        return _switched(self.make(placed.stock), placed.stock, placed)


class FileReplacement(Replacement):
    """Of what loads or saves."""

    of_files = True


class ForwardReplacement(Replacement):
    """Of what runs at every forward: ours asks by itself whether the library is active."""

    def _ours(self, placed: Placed) -> Any:
        return self.make(placed.stock)


class WrapperForward(ForwardReplacement):
    """`ParamWrapper.forward`: one that calls PEFT's own on, for what is not its, is called by ours."""

    def taken(self, found: Any) -> bool:
        return comes_to_peft(found)

    def lost(self, _ours: Any) -> bool:
        return displaced() is not None


class WrapperCall(ForwardReplacement):
    """`ParamWrapper.__call__`, which that class does not have itself, and has no more when it is put back."""

    def missing(self) -> bool:
        return False

    def foreign(self, found: Any) -> bool:
        return found is not None

    def put(self, function: Any) -> None:
        if function is None:
            delattr(self.owner, self.name)
        else:
            super().put(function)


class RegistryEntry(ForwardReplacement):
    """One of transformers' experts implementations, which somebody has registered anew where it is not theirs."""

    def taken(self, _found: Any) -> bool:
        return False

    def lost(self, _ours: Any) -> bool:
        return not hasattr(self.there(), TAKES_LORA)


class CodeReplacement(ForwardReplacement):
    """The code of a function, its `owner`: for one that others hold by its name. See `kbit`."""

    def there(self) -> Any:
        return self.owner.__code__

    def put(self, function: Any) -> None:
        kbit.put_code(self.owner, function)

    def foreign(self, found: Any) -> bool:
        return not found.co_filename.startswith(self.home)

    def lost(self, _ours: Any) -> bool:
        return False

    def made(self) -> Placed:
        return Placed(self, self.there(), self.make(self.there()))


@dataclass(eq=False)
class Placed:
    """A replacement as it was made: what was there, ours, and whether ours still does more than to call that.

    Whoever has put something on top of ours, or kept ours, goes on calling it when it has been switched off.
    """

    replacement: Replacement
    stock: Any
    ours: Any = None
    on: bool = True

    def take_back(self) -> None:
        """Puts back what was there, unless something else has taken the place of ours."""
        if self.replacement.there() is self.ours:
            self.replacement.put(self.stock)
        self.on = False


_PLACED = "_peft_moe_compat_placed"


def _switched(ours: Any, stock: Any, placed: Placed) -> Any:
    """Ours while it is on, else what was there."""
    if isinstance(ours, classmethod):

        @wraps(ours.__func__)
        def of_class(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return (ours if placed.on else stock).__get__(None, cls)(*args, **kwargs)

        return classmethod(of_class)

    @wraps(ours)
    def switched(*args: Any, **kwargs: Any) -> Any:
        return (ours if placed.on else stock)(*args, **kwargs)

    return switched


def below(function: Any) -> Any:
    """What stands in a place, without what an earlier activation has left there."""
    placed = getattr(function, _PLACED, None)
    return below(placed.stock) if placed is not None and placed.ours is function and not placed.on else function
