"""Whether a forward comes to this library's, whoever stands in front of `ParamWrapper.forward`.

Whether somebody's wrapper calls on cannot be told from what it is. Who replaces `ParamWrapper.forward`, or binds a
forward to one wrapper, leaves `ParamWrapper.__call__` alone: there it is asked at each call whether the forward is
plainly ours. Where it is not, the call is watched, and ours says that it was reached. Before any call, a tiny
`ParamWrapper` is run through what stands there.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..errors import CompatWarning
from ..model.probe import tiny_wrapper
from ..model.wrappers import native_reason
from ..others import owner_of, remedy
from ..reasons import Reason, because
from .context import holding

__all__ = [
    "TAKEN_FROM_US",
    "begin",
    "comes_to_peft",
    "displaced",
    "forget",
    "passed_by",
    "say_once",
    "state",
    "unreached",
    "warn_of",
    "watched_call",
]


class _State:
    """Of the process.

    Attributes:
        forward: What is in the place of `ParamWrapper.forward` while the library is active, else None.
        asks: Whether that function asks `passed_by` first: while inactive, and once a call has been watched.
    """

    forward: Any = None
    asks: bool = True


state = _State()
_watched: ContextVar[set[int] | None] = ContextVar("peft_moe_compat_watched", default=None)  # ids of who came
# Wrapper -> the forward that its last watched call began with, and whether that came to ours. A forward that is bound
# to its wrapper holds it, and is not held here.
_came: WeakKeyDictionary[nn.Module, tuple[ref[Any], bool]] = WeakKeyDictionary()
_probed: tuple[Any, bool] = (None, False)  # the same of a forward and a tiny wrapper
_said: set[Reason] = set()
# What a wrapper says that could run in our forward, and for which somebody else's has taken the place.
TAKEN_FROM_US = ("displaced", "forward_bound", "foreign_implementation", "class_forward_replaced")


def begin(forward: Any) -> None:
    """The library is active from here on, with that forward."""
    global _probed
    if state.forward is not forward:
        state.forward, state.asks = forward, False
        _probed = (None, False)


def forget() -> None:
    """It is no more."""
    state.forward, state.asks = None, True
    _said.clear()


def passed_by(wrapper: Any) -> bool:
    """Our forward was reached for a wrapper: whether it goes straight on to PEFT's, as the library is not active."""
    if not torch.compiler.is_compiling() and (came := _watched.get()) is not None:
        came.add(id(wrapper))
    return state.forward is None


def watched_call(_: Any) -> Any:
    """What `ParamWrapper.__call__` is while the library is active, instead of inheriting `nn.Module`'s."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        plainly = "forward" not in self.__dict__ and type(self).forward is state.forward
        if plainly or state.forward is None or torch.compiler.is_compiling():
            return nn.Module.__call__(self, *args, **kwargs)
        came: set[int] = set()
        try:
            with _watching(came):
                return nn.Module.__call__(self, *args, **kwargs)
        finally:
            _note(self, id(self) in came)

    return __call__


def _watching(came: set[int]) -> AbstractContextManager[None]:
    state.asks = True
    return holding(_watched, came)


def _begins_with(wrapper: Any) -> Any:
    return vars(wrapper).get("forward") or type(wrapper).forward


def _note(wrapper: Any, came: bool) -> None:
    """Keeps what a call showed, and warns of a wrapper that would have run in our forward and did not come to it."""
    with suppress(TypeError):  # a callable without weak references, which is asked anew each time
        _came[wrapper] = (ref(_begins_with(wrapper)), came)
    if not came and not wrapper.disable_adapters and not wrapper.merged and native_reason(wrapper) is None:
        reason = unreached(wrapper)
        if reason is not None:
            warn_of(reason)


def warn_of(reason: Reason) -> None:
    """Once for each reason."""
    if say_once(reason):
        sentence = f"Experts do not run in peft_moe_compat's forward: {reason}."
        warnings.warn(sentence, CompatWarning, stacklevel=4)


def say_once(reason: Reason) -> bool:
    """Whether nobody has been told yet."""
    new = reason not in _said
    _said.add(reason)
    return new


def unreached(wrapper: Any) -> Reason | None:
    """Why the forward of a wrapper does not come to ours, as its last call showed or a tiny wrapper's would; or None.

    A forward that accelerate's hook keeps is looked at by `native_reason`.
    """
    forward = _begins_with(wrapper)
    if forward is state.forward:
        return None
    began, came = _came.get(wrapper, (lambda: None, False))
    seen = began() is forward
    if seen and came:
        return None
    if "forward" in vars(wrapper):
        if hasattr(wrapper, "_old_forward"):
            return None
        owner = owner_of(forward)
        return because("forward_bound", owner, remedy(owner))
    return _displaced_by(forward) if seen else displaced(forward)


def displaced(forward: Any = None) -> Reason | None:
    """Whose forward is in place of ours and does not come to it, as a tiny wrapper shows; None if it comes to ours."""
    global _probed
    from peft.tuners.lora.layer import ParamWrapper

    forward = ParamWrapper.forward if forward is None else forward
    if forward is state.forward:
        return None
    if _probed[0] is not forward:
        _probed = (forward, _comes_to_ours(forward))
    return None if _probed[1] else _displaced_by(forward)


def _displaced_by(forward: Any) -> Reason:
    owner = owner_of(forward)
    return because("displaced", "ParamWrapper.forward", owner, remedy(owner))


def _comes_to_ours(forward: Any) -> bool:
    came: set[int] = set()
    wrapper, given = tiny_wrapper()
    with _watching(came):
        _run(forward, wrapper, given)
    return id(wrapper) in came


def comes_to_peft(forward: Any) -> bool:
    """Whether a forward that somebody has put in the place of PEFT's own leaves the experts of a usual model to that.

    PEFT's own puts LoRA on a module by `_activate_lora`, in every release.
    """
    came = []

    @contextmanager
    def activate_lora(*_: Any) -> Any:
        came.append(True)
        yield

    wrapper, given = tiny_wrapper()
    wrapper._activate_lora = activate_lora
    _run(forward, wrapper, given)
    return bool(came)


def _run(forward: Any, wrapper: Any, given: tuple[torch.Tensor, ...]) -> None:
    # Somebody else's code, which no model needs here, may raise anything: it came as far as it came.
    with suppress(Exception), torch.no_grad():
        forward(wrapper, *given)
