"""LoRA on Mixture-of-Experts models: every PEFT release read into one form and run through one grouped-mm forward.

Importing this package activates it, once peft is imported; `PEFT_MOE_COMPAT=0` in the environment imports without
activating. The import itself drags in neither torch, peft nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    AdapterFileError,
    AmbiguousAdapterError,
    CompatWarning,
    LayoutError,
    LossyConversionError,
    NoExpertParametersError,
    ParallelismError,
    PatchConflictError,
    PeftMoeCompatError,
    UnsupportedPeftError,
)
from .patching.activation import Activation, activate, activate_on_import, deactivate, is_active

if TYPE_CHECKING:
    from .adapters.conclusions import Inspection
    from .adapters.convert import Conversion, convert_adapter
    from .adapters.inspect import inspect_adapter
    from .adapters.verify import Verification, verify_adapters
    from .forward.backend import set_backend
    from .layout import ExpertLora
    from .model.experts import declare_layout
    from .model.targets import expert_parameters
    from .model.wrappers import expert_loras
    from .patching.opening import written_by
    from .releases import LayoutRule, release_for
    from .reporting import Report, report

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "AdapterError",
    "AdapterFileError",
    "AmbiguousAdapterError",
    "CompatWarning",
    "Conversion",
    "ExpertLora",
    "Inspection",
    "LayoutError",
    "LayoutRule",
    "LossyConversionError",
    "NoExpertParametersError",
    "ParallelismError",
    "PatchConflictError",
    "PeftMoeCompatError",
    "Report",
    "UnsupportedPeftError",
    "Verification",
    "__version__",
    "activate",
    "convert_adapter",
    "deactivate",
    "declare_layout",
    "expert_loras",
    "expert_parameters",
    "inspect_adapter",
    "is_active",
    "release_for",
    "report",
    "set_backend",
    "verify_adapters",
    "written_by",
]

# Public names that would slow the import down, most of them by needing torch, and the modules they come from.
_LAZY = {
    "Conversion": "adapters.convert",
    "ExpertLora": "layout",
    "Inspection": "adapters.conclusions",
    "LayoutRule": "releases",
    "Report": "reporting",
    "Verification": "adapters.verify",
    "convert_adapter": "adapters.convert",
    "declare_layout": "model.experts",
    "expert_loras": "model.wrappers",
    "expert_parameters": "model.targets",
    "inspect_adapter": "adapters.inspect",
    "release_for": "releases",
    "report": "reporting",
    "set_backend": "forward.backend",
    "verify_adapters": "adapters.verify",
    "written_by": "patching.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


activate_on_import()
