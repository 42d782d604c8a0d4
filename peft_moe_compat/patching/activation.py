"""Activation: the only code that touches somebody else's objects.

For the forward two things are replaced: `ParamWrapper.forward`, and the "grouped_mm" and "batched_mm" entries of
transformers' experts registries (FP8 experts have one of their own). A wrapper that can run fast hands its factors down
as a keyword argument; the registered function consumes them. No state is kept on any module. Whatever cannot run fast
goes to PEFT's own forward.

For adapter files, the functions that load and save them: `guard.replacements` lists these.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import CompatWarning, PatchConflictError, PeftMoeCompatError, UnsupportedPeftError

if TYPE_CHECKING:
    from ..releases import LayoutRule

__all__ = ["Activation", "activate", "deactivate", "is_active"]

KEYWORD = "expert_lora"
# Other names the experts classes' own forwards use for their arguments (gpt_oss, openai_privacy_filter).
_ARGUMENT_ALIASES = {"router_indices": "top_k_index", "routing_weights": "top_k_weights"}

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
        self._wrapper_class: Any = None
        self._peft_forward: Any = None
        self._our_forward: Any = None
        self._fresh = True  # whether the last `activate()` made this activation rather than found it
        self._blocks: list[bool] = []  # of each `with` block entered: whether its end restores
        # what it is -> (the registry's mapping that holds it, its key there, transformers' function, ours)
        self._entries: dict[str, tuple[Any, str, Any, Any]] = {}
        # (the class or module that holds it, its name there, what was there, ours)
        self._loaders: list[tuple[Any, str, Any, Any]] = []

    @property
    def active(self) -> bool:
        return _current is self

    def restore(self) -> None:
        """Puts back exactly what was there; does nothing the second time. Not while a forward is running.

        Raises:
            PatchConflictError: Somebody has since replaced one of the functions; nothing is put back then.
        """
        global _current
        with _lock:
            if not self.active:
                return
            if displaced := self.displaced() or self._displaced_loader():
                raise PatchConflictError(f"{displaced}, so it cannot be put back. Undo that patch first.")
            self._wrapper_class.forward = self._peft_forward
            for mapping, key, stock, _ in self._entries.values():
                mapping[key] = stock
            for owner, name, stock, _ in self._loaders:
                setattr(owner, name, stock)
            _current = None

    def displaced(self) -> str | None:
        """Which function of the forward is no longer the one put in place, and whose is; None while all are there."""
        found = [("ParamWrapper.forward", _param_wrapper().__dict__.get("forward"), self._our_forward)]
        found += [(what, mapping.get(key), ours) for what, (mapping, key, _, ours) in self._entries.items()]
        for what, there, ours in found:
            if there is not ours:
                return f"{what} was replaced by {_owner(there)} after peft_moe_compat was activated"
        return None

    def _displaced_loader(self) -> str | None:
        """The same for the functions that load and save."""
        for owner, name, _, ours in self._loaders:
            there = vars(owner).get(name)
            if there is not ours:
                return f"{owner.__name__}.{name} was replaced by {_owner(there)} after peft_moe_compat was activated"
        return None

    def _install(self) -> None:
        from ..model.probe import installed_rule
        from ..model.wrappers import TAKEN_IMPLEMENTATIONS
        from .loading import replacements

        self._wrapper_class = _param_wrapper()
        self._peft_forward = self._wrapper_class.__dict__["forward"]
        _refuse_foreign("ParamWrapper.forward", self._peft_forward, "peft.")
        for whose, registry in (("", experts_registry()), ("FP8 ", _fp8_experts_registry())):
            for key in TAKEN_IMPLEMENTATIONS if registry is not None else ():
                if key in registry:
                    what = f"transformers' {whose}experts implementation {key!r}"
                    _refuse_foreign(what, registry[key], "transformers.")
                    # In the layer that holds the entry, so that whoever registers another later is heard.
                    mapping = registry._local_mapping if key in registry._local_mapping else registry._global_mapping
                    self._entries[what] = mapping, key, registry[key], _registered(registry[key])
        for owner, name, home, make in replacements():
            stock = vars(owner)[name]
            _refuse_foreign(f"{owner.__name__}.{name}", stock, home)
            self._loaders.append((owner, name, stock, make(stock)))
        self.rule = installed_rule()  # after the foreign functions, which could make its probe fail in any way
        # Nothing has been touched up to here, so a refusal leaves no half-made activation.
        for mapping, key, _, ours in self._entries.values():
            mapping[key] = ours
        for owner, name, _, ours in self._loaders:
            setattr(owner, name, ours)
        self._our_forward = _wrapper_forward(self._peft_forward, self.rule)
        self._wrapper_class.forward = self._our_forward

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
    """The module a function or class method was written in; `functools.wraps` does not hide it."""
    function = getattr(function, "__func__", function)
    code_globals = getattr(function, "__globals__", {})
    return str(code_globals.get("__name__") or getattr(function, "__module__", None) or repr(function))


def _refuse_foreign(what: str, function: Any, home: str) -> None:
    owner = _owner(function)
    if not owner.startswith(home):
        raise PatchConflictError(
            f"{what} is already patched by {owner}, so peft_moe_compat stays inactive. Use one of the two: drop that "
            "patch, or set PEFT_MOE_COMPAT=0 in the environment, which keeps the import from activating."
        )


def _param_wrapper() -> Any:
    return importlib.import_module("peft.tuners.lora.layer").ParamWrapper


def experts_registry() -> Any:
    """transformers' `ALL_EXPERTS_FUNCTIONS`, or None where the installed transformers has none (before 5.0)."""
    from ..model.experts import REGISTRY_MODULE

    try:
        return importlib.import_module(REGISTRY_MODULE).ALL_EXPERTS_FUNCTIONS
    except ModuleNotFoundError as error:
        if error.name != REGISTRY_MODULE:
            raise
        return None


def _fp8_experts_registry() -> Any:
    """transformers' `ALL_FP8_EXPERTS_FUNCTIONS`, or None where there can be no FP8 experts."""
    from ..model.weights import FP8_MODULE

    try:
        module = importlib.import_module(FP8_MODULE)
    except ImportError:  # no such module, or no triton, which it needed up to transformers 5.5
        return None
    return getattr(module, "ALL_FP8_EXPERTS_FUNCTIONS", None)


def _wrapper_forward(peft_forward: Any, rule: LayoutRule) -> Any:
    from ..model.sharding import carry, check_zero3, refuse_native
    from ..model.wrappers import TAKES_LORA, Handover, active_adapters, experts_of, experts_reason, parameter_reason

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`ParamWrapper.forward` with peft_moe_compat active: hands itself down, or falls back to PEFT's own."""
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return peft_forward(self, x, *args, **kwargs)
        handover: Any = kwargs.get(KEYWORD)
        outermost = handover is None
        reason = None
        if outermost:
            handover = Handover(experts_of(self), rule)
            reason = experts_reason(handover.experts, handover.is_transposed)
        experts = handover.experts
        if reason := reason or parameter_reason(self, experts):
            refuse_native(experts, reason)
            return peft_forward(self, x, *args, **kwargs)
        check_zero3(self, x)
        names = active_adapters(self)
        if not names:
            return peft_forward(self, x, *args, **kwargs)
        handover.add(self, names)
        kwargs.pop("adapter_names", None)
        kwargs[KEYWORD] = handover
        base_layer = self._modules["base_layer"]
        if handover.exchanges and base_layer is experts:
            del kwargs[KEYWORD]
            with carry(handover):
                result = base_layer(x, *args, **kwargs)
        else:
            result = base_layer(x, *args, **kwargs)
        if outermost and not handover.arrived:
            raise PeftMoeCompatError(
                f"{type(self.get_base_layer()).__name__} ran without its LoRA: a hook or wrapper on it dropped the "
                f"keyword argument {KEYWORD!r}. Let it pass keyword arguments on, or call peft_moe_compat.deactivate()."
            )
        return result

    setattr(forward, TAKES_LORA, True)
    return forward


def _registered(stock: Any) -> Any:
    """The registry entry that consumes the factors; without any it is transformers' own function."""
    from ..forward.layer import experts_forward
    from ..model.sharding import carried, exchanges_tokens
    from ..model.wrappers import TAKES_LORA

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        handover = carried() if exchanges_tokens(self) else kwargs.pop(KEYWORD, None)
        if handover is None:
            return stock(self, *args, **kwargs)
        handover.arrived = True
        named = {_ARGUMENT_ALIASES.get(key, key): value for key, value in kwargs.items()}
        return experts_forward(self, handover, *args, **named)

    setattr(forward, TAKES_LORA, True)
    return forward


def is_active() -> bool:
    """Whether the library is active in this process."""
    return _current is not None


def inactive_reason() -> str | None:
    """Why a forward that could run fast would not: nobody activated, or somebody replaced what activation put there."""
    if _current is None:
        return "peft_moe_compat is not active: call peft_moe_compat.activate()"
    return _current.displaced()


def activate() -> Activation:
    """Puts the grouped-mm forward in place, importing peft. The same handle comes back while it is active.

    Raises:
        UnsupportedPeftError: The installed PEFT has no ParamWrapper, or an unknown layout.
        PatchConflictError: Another library has already patched a function this one replaces.
    """
    global _current
    # Before the lock: importing peft may activate by itself, and another thread may be in the middle of that.
    import peft

    from ..releases import parse_version, release_for

    release_for(parse_version(peft.__version__))  # before anything that only a PEFT with ParamWrapper has
    with _lock:
        if _current is None:
            handle = Activation()
            handle._install()
            _current = handle
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
    register_post_import_hook(_activate_or_warn, "peft")  # at once where peft is imported already


def _activate_or_warn(_peft: Any) -> None:
    with _lock:
        if not _waiting:
            return
        try:
            activate()
        except (PatchConflictError, UnsupportedPeftError) as error:
            warnings.warn(f"peft_moe_compat is inactive: {error}", CompatWarning, stacklevel=2)
