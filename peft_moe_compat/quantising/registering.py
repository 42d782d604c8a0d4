"""Makes packed experts known to transformers as soon as its quantisers are imported, so that what was saved loads."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from ..errors import CompatWarning

__all__ = ["register_on_import"]


def register_on_import() -> None:
    """Registers `BitsAndBytesExpertsConfig` and its quantiser now, or when `transformers.quantizers` is imported.

    That is transformers' own place for others' quantisers. Nothing of theirs is replaced, and nothing is done without
    activation either.
    """
    from wrapt import register_post_import_hook

    register_post_import_hook(_register, "transformers.quantizers.auto")


def _register(_auto: Any) -> None:
    if importlib.util.find_spec("transformers.core_model_loading") is None:
        return  # transformers 4, whose loader does not convert checkpoints
    try:
        from . import experts  # noqa: F401  # it needs transformers, and registers itself
    except ImportError as error:
        warnings.warn(
            f"peft_moe_compat cannot load packed experts with this transformers: {error}", CompatWarning, stacklevel=2
        )
