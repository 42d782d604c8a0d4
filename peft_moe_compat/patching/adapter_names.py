"""Several adapters in one batch while a model trains, which PEFT leaves to inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ..errors import LayoutError
from ..model.wrappers import is_param_wrapper

__all__ = ["enable_peft_forward_hooks"]


def enable_peft_forward_hooks(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraModel._enable_peft_forward_hooks`, for a model with LoRA on experts in training mode too.

    Not with gradient checkpointing: what hands the names to the layers is gone when they are computed again.
    """

    @wraps(stock)
    @contextmanager
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        lifted = names is not None and self.training and any(map(is_param_wrapper, self.modules()))
        if lifted and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise LayoutError(
                "adapter_names in training does not go with gradient checkpointing: the recomputation would not know "
                "them. Call model.gradient_checkpointing_disable()."
            )
        hooks = stock(self, *args, **kwargs)
        if lifted:
            self.training = False  # its own flag alone, which PEFT asks on entering
        try:
            hooks.__enter__()
        finally:
            if lifted:
                self.training = True
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)

    return replacement
