"""Activation: on, off, and what stands in the way. `replacements` lists what is put in place."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..at_start import OFF, installed
from ..errors import CompatWarning, PatchConflictError, UnsupportedPeftError
from ..families import OWN_FORWARDS
from ..others import owner_of, remedy
from ..reasons import Reason, because
from ..releases import release_for

if TYPE_CHECKING:
    from ..releases import LayoutRule
    from .replacement import Placed, Replacement

__all__ = ["Activation", "activate", "deactivate", "is_active"]

_TRAINER = "transformers.trainer"
_lock = threading.RLock()
_current: Activation | None = None


class Activation:
    """What was replaced, and how to put it back.

    `restore()` puts it back. As a context manager it brings back the state before the block: `with activate():`
    restores at the end only if that call was the one that activated.

    Attributes:
        rule: The layout rule in force, verified against the installed PEFT.
    """

    rule: LayoutRule

    def __init__(self) -> None:
        self._fresh = True  # whether the last `activate()` made this activation rather than found it
        self._blocks: list[bool] = []  # of each `with` block entered: whether its end restores
        self._placed: list[Placed] = []

    @property
    def active(self) -> bool:
        return _current is self

    def restore(self) -> None:
        """Puts back exactly what was there; does nothing the second time. Not while a forward is running.

        What somebody has put on top of ours in the meantime stays, and ours below it only calls what was there.
        """
        global _current
        from . import displaced, reach
        from .replacements import forget_converted

        with _lock:
            if not self.active:
                return
            for placed in self._placed:
                placed.take_back()
            reach.forget()
            displaced.follow([])
            forget_converted()
            _current = None

    def _install(self) -> None:
        # Here, since these import torch, and transformers and peft need not be there when the package is imported.
        from ..model.probe import installed_rule
        from .replacements import replacements

        found = replacements()
        for replacement in found:
            self._check(replacement)
        self.rule = installed_rule()  # after the foreign functions, which could make its probe fail in any way
        self._place(found)

    def _check(self, replacement: Replacement) -> None:
        """Whether ours can go there.

        Raises:
            UnsupportedPeftError: There is nothing.
            PatchConflictError: There is somebody else's forward, and it is not one that calls PEFT's own.
        """
        from .replacement import below

        if replacement.missing():
            raise UnsupportedPeftError(
                f"{replacement.what} is not there in the installed PEFT and transformers. Update peft-moe-compat; "
                "until then PEFT's own forward stays in place."
            )
        stock = below(replacement.there())
        if replacement.foreign(stock) and not replacement.taken(stock):
            owner = owner_of(stock)
            raise PatchConflictError(
                f"{replacement.what} is already patched by {owner}, which does not leave experts to PEFT's own, so "
                f"peft_moe_compat stays inactive. Use one of the two: {remedy(owner)}. Or set PEFT_MOE_COMPAT=0 in the "
                "environment, which keeps the import from activating."
            )

    def _place(self, found: Iterable[Replacement]) -> None:
        from . import displaced, reach

        made = [replacement.made() for replacement in found]
        # Nothing has been touched up to here, so a refusal leaves no half-made activation.
        for placed in made:
            placed.replacement.put(placed.ours)
        self._placed += made
        displaced.follow(self._placed)
        reach.begin(next(placed.ours for placed in self._placed if placed.replacement.what == "ParamWrapper.forward"))

    def _renew(self) -> None:
        """Puts ours back in the places where somebody has put something else that does not come to it.

        Raises:
            PatchConflictError: See `_check`.
        """
        lost = [placed for placed in self._placed if placed.replacement.lost(placed.ours)]
        for placed in lost:
            self._check(placed.replacement)
        for placed in lost:
            placed.on = False
            self._placed.remove(placed)
        self._place(placed.replacement for placed in lost)

    def _install_in_model(self, module: Any) -> None:
        """What is replaced in a module of transformers that has experts with a forward of their own."""
        from .replacements import replacements_in_model

        self._place(found for found in replacements_in_model(module) if not found.foreign(found.there()))

    def _install_in_trainer(self, trainer: Any) -> None:
        """What is replaced in `transformers.trainer`, all of it or, where a function is missing, nothing."""
        from .replacements import replacements_in_trainer

        found = replacements_in_trainer(trainer)
        if missing := next((replacement.what for replacement in found if replacement.missing()), None):
            warnings.warn(
                f"{missing} is not there, so peft_moe_compat leaves Trainer alone: a training checkpoint of another "
                "PEFT layout must be resumed without its optimizer.pt.",
                CompatWarning,
                stacklevel=2,
            )
        else:
            self._place(found)

    def __enter__(self) -> Activation:
        self._blocks.append(self._fresh)
        self._fresh = False
        return self

    def __exit__(self, *exc: object) -> None:
        if self._blocks.pop():
            self.restore()

    def __repr__(self) -> str:
        return f"<peft_moe_compat {'active' if self.active else 'restored'}; {self.rule}>"


def is_active() -> bool:
    """Whether the library is active in this process, and forwards of `ParamWrapper` come to its own."""
    if _current is None:
        return False
    from . import reach

    return reach.displaced() is None


def not_active_reason() -> Reason | None:
    return because("not_active") if _current is None else None


def activate() -> Activation:
    """Puts the grouped-mm forward in place, importing peft. The same handle comes back while it is active.

    Where somebody has since replaced what it had put in place, it is put there again, on top of theirs.

    Raises:
        UnsupportedPeftError: The installed PEFT has no ParamWrapper, or an unknown layout.
        PatchConflictError: Another library has replaced a forward by one that does not call PEFT's own.
    """
    global _current
    # Before the lock: importing peft may activate by itself, and another thread may be in the middle of that.
    import peft

    release_for(peft.__version__)  # before anything that only a PEFT with ParamWrapper has
    with _lock:
        if _current is None:
            handle = Activation()
            handle._install()
            _current = handle
            _follow()
        else:
            _current._renew()
            _current._fresh = False
        return _current


def deactivate() -> None:
    """Puts back exactly what was there before `activate`, and cancels an activation that still waits for peft."""
    global _waiting
    with _lock:
        _waiting = False
        if _current is not None:
            _current.restore()


_waiting = False
_following = False


def _follow() -> None:
    """Sees to what activation does not import, now if it has been imported, and whenever it is from here on."""
    global _following
    followed = {_TRAINER, *(module for module, _ in OWN_FORWARDS.values())}
    if not _following:
        from wrapt import register_post_import_hook

        _following = True
        for name in followed:
            register_post_import_hook(_imported, name)
    else:
        for module in filter(None, map(sys.modules.get, followed)):
            _imported(module)


def _imported(module: Any) -> None:
    with _lock:
        if _current is None:
            return
        if module.__name__ != _TRAINER:
            _current._install_in_model(module)
        # It imports peft, and so may activate, before it has its class: then it comes again when it is complete.
        elif hasattr(module, "Trainer"):
            _current._install_in_trainer(module)


def switched_off() -> bool:
    """Whether `PEFT_MOE_COMPAT` in the environment keeps the import from activating."""
    return os.environ.get("PEFT_MOE_COMPAT", "").lower() in OFF


def activate_on_import() -> None:
    """What `import peft_moe_compat` does: activates now if peft is there, else as soon as it is imported.

    A conflict or an unsupported PEFT becomes a `CompatWarning` here, and the library stays inactive: PEFT's own forward
    is right, only slower. `PEFT_MOE_COMPAT=0` in the environment turns this off; `activate()` still works.
    """
    global _waiting
    if switched_off():
        return
    from wrapt import register_post_import_hook

    _waiting = True
    _follow()
    register_post_import_hook(_activate_or_warn, "peft")  # at once where peft is imported already


def _activate_or_warn(_peft: Any) -> None:
    with _lock:
        if not _waiting:
            return
        try:
            activate()
        except (PatchConflictError, UnsupportedPeftError) as error:
            who = " (`peft-moe-compat enable` switched it on here; `disable` ends that)" if installed() else ""
            warnings.warn(f"peft_moe_compat is inactive{who}: {error}", CompatWarning, stacklevel=2)
