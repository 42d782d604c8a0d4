"""What can go wrong, as types. Every message says what was needed, what was found and what to do."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AmbiguousAdapterError",
    "CompatWarning",
    "LayoutError",
    "LossyConversionError",
    "NoExpertParametersError",
    "ParallelismError",
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
    """Somebody else patched, or re-patched, a function this package needs to replace."""


class NoExpertParametersError(PeftMoeCompatError, ValueError):
    """A model holds no routed expert parameter that PEFT's `target_parameters` could reach."""


class ParallelismError(PeftMoeCompatError, RuntimeError):
    """The experts are spread over processes in a way that their LoRA cannot follow."""


class AdapterError(PeftMoeCompatError, ValueError):
    """An adapter file, or the model it is for, cannot be read or turned into what was asked for."""


class AdapterFileError(AdapterError):
    """A file of an adapter is damaged, incomplete, or not what its name says."""


class AmbiguousAdapterError(AdapterError):
    """The evidence does not settle what an adapter holds; the message names the flag that would."""


class LossyConversionError(AdapterError):
    """The reader asked for cannot hold everything the adapter has, and `allow_lossy` was not given."""


class CompatWarning(UserWarning):
    """The package stays inactive, or something about the model will not train as its owner expects."""
