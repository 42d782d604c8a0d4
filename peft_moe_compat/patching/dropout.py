"""`lora_dropout` on expert weights, which PEFT's ParamWrapper refuses since its own forward has no input to drop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..errors import LayoutError
from ..model.experts import is_transposed
from ..model.wrappers import experts_reason, wrapper_chain
from ..reasons import Reason

__all__ = ["create_and_replace", "no_dropout"]


def no_dropout(parameter_name: str, reason: Reason) -> str:
    """For the error about a parameter whose LoRA runs in PEFT's own forward."""
    return (
        f"lora_dropout is not 0, and the LoRA of {parameter_name!r} runs in PEFT's own forward, which has none for "
        f"parameters: {reason}. Mend that, or pass lora_dropout=0."
    )


def create_and_replace(stock: Callable[..., None]) -> Callable[..., None]:
    """`LoraModel._create_and_replace`: a wrapper is made without its dropout, and given it as PEFT's Linear has it.

    An adapter loaded for inference may have one wherever it runs.
    """

    @wraps(stock)
    def replacement(
        self: Any, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any,
        parameter_name: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        where = adapter_name, target, target_name, parent, *args
        p = lora_config.lora_dropout
        if parameter_name is None or not p:
            stock(self, lora_config, *where, parameter_name=parameter_name, **kwargs)
            return
        experts = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        reason = experts_reason(experts, is_transposed(experts))
        if reason and not lora_config.inference_mode:
            raise LayoutError(no_dropout(parameter_name, reason))
        without = copy.copy(lora_config)
        without.lora_dropout = 0.0
        stock(self, without, *where, parameter_name=parameter_name, **kwargs)
        for module in (target, getattr(parent, target_name)):  # PEFT adds to a wrapper that is there, or makes one
            for wrapper in wrapper_chain(module):
                if wrapper.parameter_name == parameter_name and adapter_name in wrapper.lora_A:
                    wrapper.lora_dropout[adapter_name] = nn.Dropout(p)

    return replacement
