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
from .patch import Activation, activate, activate_on_import, deactivate, is_active

if TYPE_CHECKING:
    from .adapters.convert import Conversion, convert_adapter
    from .adapters.inspection import Inspection
    from .adapters.inspector import inspect_adapter
    from .adapters.merged import verify_merged
    from .adapters.verify import Verification, verify_adapters
    from .backends import set_backend
    from .discovery import Report, expert_parameters, report
    from .families import declare_layout
    from .layout import ExpertLora
    from .releases import LayoutRule, release_for
    from .understand import written_by
    from .wrappers import expert_loras

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
    "verify_merged",
    "written_by",
]

# Public names that would slow the import down, most of them by needing torch, and the modules they come from.
_LAZY = {
    "Conversion": "adapters.convert",
    "ExpertLora": "layout",
    "Inspection": "adapters.inspection",
    "LayoutRule": "releases",
    "Report": "discovery",
    "Verification": "adapters.verify",
    "convert_adapter": "adapters.convert",
    "declare_layout": "families",
    "expert_loras": "wrappers",
    "expert_parameters": "discovery",
    "inspect_adapter": "adapters.inspector",
    "release_for": "releases",
    "report": "discovery",
    "set_backend": "backends",
    "verify_adapters": "adapters.verify",
    "verify_merged": "adapters.merged",
    "written_by": "understand",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


activate_on_import()
