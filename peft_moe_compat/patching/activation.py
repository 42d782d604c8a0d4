"""Activation: on, off, and what stands in the way. `replacements` lists what is put in place."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from types import CodeType
from typing import TYPE_CHECKING, Any

from ..at_start import installed
from ..errors import CompatWarning, PatchConflictError, UnsupportedPeftError
from ..reasons import Reason, because
from ..releases import release_for

if TYPE_CHECKING:
    from ..releases import LayoutRule
    from .replacements import Replacement

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
        self._done: list[tuple[Replacement, Any, Any]] = []  # what was there, and ours

    @property
    def active(self) -> bool:
        return _current is self

    def restore(self) -> None:
        """Puts back exactly what was there; does nothing the second time. Not while a forward is running.

        Raises:
            PatchConflictError: Somebody has since replaced one of the functions; nothing is put back then.
        """
        global _current
        from .replacements import forget_converted

        with _lock:
            if not self.active:
                return
            if displaced := self.displaced(anywhere=True):
                raise PatchConflictError(f"{displaced}, so it cannot be put back. Undo that patch first.")
            for replacement, stock, _ in self._done:
                replacement.put(stock)
            forget_converted()
            _current = None

    def displaced(self, *, anywhere: bool = False) -> Reason | None:
        """Which function of the forward, or of all, is no longer the one put in place, and whose is; None if none."""
        for replacement, _, ours in self._done:
            if (anywhere or replacement.of_forward) and (there := replacement.there()) is not ours:
                return because("displaced", replacement.what, _owner(there))
        return None

    def _install(self) -> None:
        # Here, since these import torch, and transformers and peft need not be there when the package is imported.
        from ..model.probe import installed_rule
        from .replacements import replacements

        found = [(replacement, replacement.there()) for replacement in replacements()]
        for replacement, stock in found:
            if stock is None:
                raise UnsupportedPeftError(
                    f"{replacement.what} is not there in the installed PEFT and transformers. Update peft-moe-compat; "
                    "until then PEFT's own forward stays in place."
                )
            if not (owner := _owner(stock)).startswith(replacement.home):
                raise PatchConflictError(
                    f"{replacement.what} is already patched by {owner}, so peft_moe_compat stays inactive. Use one of "
                    "the two: drop that patch, or set PEFT_MOE_COMPAT=0 in the environment, which keeps the import "
                    "from activating."
                )
        self.rule = installed_rule()  # after the foreign functions, which could make its probe fail in any way
        self._done = [(replacement, stock, replacement.make(stock)) for replacement, stock in found]
        # Nothing has been touched up to here, so a refusal leaves no half-made activation.
        for replacement, _, ours in self._done:
            replacement.put(ours)

    def _install_in_trainer(self, trainer: Any) -> None:
        """What is replaced in `transformers.trainer`, all of it or, where somebody else has been there, nothing."""
        from .replacements import replacements_in_trainer

        found = [(replacement, replacement.there()) for replacement in replacements_in_trainer(trainer)]
        for replacement, stock in found:
            if stock is None or not _owner(stock).startswith(replacement.home):
                warnings.warn(
                    f"{replacement.what} is {'not there' if stock is None else f'patched by {_owner(stock)}'}, so "
                    "peft_moe_compat leaves it alone: a training checkpoint of another PEFT layout must be resumed "
                    "without its optimizer.pt.",
                    CompatWarning,
                    stacklevel=2,
                )
                return
        for replacement, stock in found:
            self._done.append((replacement, stock, replacement.make(stock)))
            replacement.put(self._done[-1][2])

    def __enter__(self) -> Activation:
        self._blocks.append(self._fresh)
        self._fresh = False
        return self

    def __exit__(self, *exc: object) -> None:
        if self._blocks.pop():
            self.restore()

    def __repr__(self) -> str:
        return f"<peft_moe_compat {'active' if self.active else 'restored'}; {self.rule}>"


def _owner(function: Any) -> str:
    """The module a function or class method was written in, of code its file; `functools.wraps` does not hide it."""
    if isinstance(function, CodeType):
        return function.co_filename
    function = getattr(function, "__func__", function)
    code_globals = getattr(function, "__globals__", {})
    return str(code_globals.get("__name__") or getattr(function, "__module__", None) or repr(function))


def is_active() -> bool:
    """Whether the library is active in this process."""
    return _current is not None


def inactive_reason() -> Reason | None:
    """Why a forward that could run fast would not: nobody activated, or somebody replaced what activation put there."""
    return because("not_active") if _current is None else _current.displaced()


def activate() -> Activation:
    """Puts the grouped-mm forward in place, importing peft. The same handle comes back while it is active.

    Raises:
        UnsupportedPeftError: The installed PEFT has no ParamWrapper, or an unknown layout.
        PatchConflictError: Another library has already patched a function this one replaces.
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
            _follow_trainer()
        else:
            _current._fresh = False
        return _current


def deactivate() -> None:
    """Puts back exactly what was there before `activate`, and cancels an activation that still waits for peft.

    Raises:
        PatchConflictError: Somebody has since replaced one of the functions.
    """
    global _waiting
    with _lock:
        _waiting = False
        if _current is not None:
            _current.restore()


_waiting = False
_following = False


def _follow_trainer() -> None:
    """Sees to `transformers.trainer` now if it has been imported, and whenever it is from here on."""
    global _following
    if not _following:
        from wrapt import register_post_import_hook

        _following = True
        register_post_import_hook(_trainer_imported, _TRAINER)
    elif (trainer := sys.modules.get(_TRAINER)) is not None:
        _trainer_imported(trainer)


def _trainer_imported(trainer: Any) -> None:
    with _lock:
        # It imports peft, and so may activate, before it has its class: then it comes again when it is complete.
        if _current is not None and hasattr(trainer, "Trainer"):
            _current._install_in_trainer(trainer)


def switched_off() -> bool:
    """Whether `PEFT_MOE_COMPAT` in the environment keeps the import from activating."""
    return os.environ.get("PEFT_MOE_COMPAT", "").lower() in ("0", "false", "no", "off")


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
    _follow_trainer()
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
