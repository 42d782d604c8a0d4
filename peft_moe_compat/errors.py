"""What can go wrong, as types. Every message says what was needed, what was found and what to do."""

from __future__ import annotations

__all__ = [
    "CompatWarning",
    "LayoutError",
    "NoExpertParametersError",
    "PatchConflictError",
    "PeftMoeCompatError",
    "UnsupportedPeftError",
]


class PeftMoeCompatError(Exception):
    """Base class of every error this package raises on purpose."""


class UnsupportedPeftError(PeftMoeCompatError):
    """The PEFT release has no `ParamWrapper`, or lays out its LoRA factors in a way no known rule describes."""


class LayoutError(PeftMoeCompatError, ValueError):
    """lora_A, lora_B and the expert parameter they belong to do not fit together."""


class PatchConflictError(PeftMoeCompatError, RuntimeError):
    """Somebody else patched, or re-patched, a function this package needs to replace or to put back."""


class NoExpertParametersError(PeftMoeCompatError, ValueError):
    """A model holds no routed expert parameter that PEFT's `target_parameters` could reach."""


class CompatWarning(UserWarning):
    """The package stays inactive, or something about the model will not train as its owner expects."""
