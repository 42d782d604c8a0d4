"""Activation: the only code that touches somebody else's objects.

Two things are replaced: `ParamWrapper.forward`, and the "grouped_mm" and "batched_mm" entries of transformers' experts
registry. A wrapper that can run fast hands its factors down as a keyword argument; the registered function consumes
them. No state is kept on any module. Whatever cannot run fast goes to PEFT's own forward.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from typing import TYPE_CHECKING, Any

from .errors import CompatWarning, PatchConflictError, UnsupportedPeftError

if TYPE_CHECKING:
    from .releases import LayoutRule

__all__ = ["Activation", "activate", "deactivate", "is_active"]

KEYWORD = "expert_lora"
# Other names the experts classes' own forwards use for their arguments (gpt_oss, openai_privacy_filter).
_ARGUMENT_ALIASES = {"router_indices": "top_k_index", "routing_weights": "top_k_weights"}

_lock = threading.RLock()
_current: Activation | None = None


class Activation:
    """What was replaced, and how to put it back. A context manager; `restore()` does the same by hand.

    Attributes:
        rule: The layout rule in force, verified against the installed PEFT.
    """

    def __init__(self, rule: LayoutRule) -> None:
        self.rule = rule
        self._wrapper_class: Any = None
        self._peft_forward: Any = None
        self._our_forward: Any = None
        self._registry: Any = None
        # key -> (our function, the instance-level entry it displaced or None)
        self._entries: dict[str, tuple[Any, Any]] = {}

    @property
    def active(self) -> bool:
        return _current is self

    def restore(self) -> None:
        """Puts back exactly what was there; does nothing the second time.

        Raises:
            PatchConflictError: Somebody has since replaced one of the functions; nothing is put back then.
        """
        global _current
        with _lock:
            if not self.active:
                return
            self._refuse_if_displaced()
            self._wrapper_class.forward = self._peft_forward
            for key, (_, displaced) in self._entries.items():
                if displaced is None:
                    del self._registry[key]
                else:
                    self._registry[key] = displaced
            _current = None

    def _refuse_if_displaced(self) -> None:
        found = [("ParamWrapper.forward", self._wrapper_class.__dict__.get("forward"), self._our_forward)]
        found += [(f"the experts registry's {k!r}", self._registry[k], ours) for k, (ours, _) in self._entries.items()]
        for what, there, ours in found:
            if there is not ours:
                raise PatchConflictError(
                    f"{what} was replaced by {_owner(there)} after peft_moe_compat was activated, so it cannot be "
                    "put back. Undo that patch first, then deactivate."
                )

    def _install(self) -> None:
        from peft.tuners.lora.layer import ParamWrapper

        from .wrappers import TAKEN_IMPLEMENTATIONS

        self._wrapper_class = ParamWrapper
        self._peft_forward = ParamWrapper.__dict__["forward"]
        _refuse_foreign("ParamWrapper.forward", self._peft_forward, "peft.")
        registry = experts_registry()
        stock = {key: registry[key] for key in TAKEN_IMPLEMENTATIONS if key in registry} if registry is not None else {}
        for key, function in stock.items():
            _refuse_foreign(f"the experts registry's {key!r}", function, "transformers.")
        # Nothing has been touched up to here, so a refusal leaves no half-made activation.
        self._registry = registry
        local = getattr(registry, "_local_mapping", {})
        self._entries = {key: (_registered(function), local.get(key)) for key, function in stock.items()}
        for key, (ours, _) in self._entries.items():
            registry[key] = ours
        self._our_forward = _wrapper_forward(self._peft_forward, self.rule)
        ParamWrapper.forward = self._our_forward

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def _owner(function: Any) -> str:
    """The module a function was written in; `functools.wraps` does not hide it."""
    code_globals = getattr(function, "__globals__", {})
    return str(code_globals.get("__name__") or getattr(function, "__module__", None) or repr(function))


def _refuse_foreign(what: str, function: Any, home: str) -> None:
    owner = _owner(function)
    if not owner.startswith(home):
        raise PatchConflictError(
            f"{what} is already patched by {owner}, so peft_moe_compat stays inactive. Use one of the two: drop that "
            "patch, or set PEFT_MOE_COMPAT=0 to silence this."
        )


def experts_registry() -> Any:
    """transformers' `ALL_EXPERTS_FUNCTIONS`, or None where the installed transformers has none (before 5.0)."""
    try:
        return importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except ModuleNotFoundError as error:
        if error.name != "transformers.integrations.moe":
            raise
        return None


def _wrapper_forward(peft_forward: Any, rule: LayoutRule) -> Any:
    from .families import is_transposed
    from .wrappers import active_lora, native_reason

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`ParamWrapper.forward` with peft_moe_compat active: hands the factors down, or falls back to PEFT's own."""
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None or native_reason(self):
            return peft_forward(self, x, *args, **kwargs)
        lora = active_lora(self, bool(is_transposed(self.get_base_layer())), rule)
        if lora is None:
            return peft_forward(self, x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        kwargs[KEYWORD] = {**kwargs.get(KEYWORD, {}), self.parameter_name: lora}
        return self.base_layer(x, *args, **kwargs)

    return forward


def _registered(stock: Any) -> Any:
    """The registry entry that consumes the factors; without any it is transformers' own function."""
    from .experts import experts_forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        expert_lora = kwargs.pop(KEYWORD, None)
        if expert_lora is None:
            return stock(self, *args, **kwargs)
        named = {_ARGUMENT_ALIASES.get(key, key): value for key, value in kwargs.items()}
        return experts_forward(self, expert_lora, *args, **named)

    return forward


def is_active() -> bool:
    """Whether the library is active in this process."""
    return _current is not None


def activate() -> Activation:
    """Puts the grouped-mm forward in place, importing peft. The same handle comes back while it is active.

    Raises:
        UnsupportedPeftError: The installed PEFT has no ParamWrapper, or an unknown layout.
        PatchConflictError: Another library has already patched a function this one replaces.
    """
    global _current
    # Before the lock: importing peft may activate by itself, and another thread may be in the middle of that.
    import peft  # noqa: F401

    from .wrappers import installed_rule

    with _lock:
        if _current is None:
            handle = Activation(installed_rule())
            handle._install()
            _current = handle
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


def activate_on_import() -> None:
    """What `import peft_moe_compat` does: activates now if peft is there, else as soon as it is imported.

    A conflict or an unsupported PEFT becomes a `CompatWarning` here, and the library stays inactive: PEFT's own forward
    is right, only slower. `PEFT_MOE_COMPAT=0` in the environment turns this off; `activate()` still works.
    """
    global _waiting
    if os.environ.get("PEFT_MOE_COMPAT", "1") == "0":
        return
    from wrapt import register_post_import_hook

    _waiting = True
    register_post_import_hook(_activate_or_warn, "peft")  # at once where peft is imported already


def _activate_or_warn(_peft: Any) -> None:
    with _lock:
        if not _waiting:
            return
        try:
            activate()
        except (PatchConflictError, UnsupportedPeftError) as error:
            warnings.warn(f"peft_moe_compat is inactive: {error}", CompatWarning, stacklevel=2)
