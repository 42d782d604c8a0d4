"""PEFT's `prepare_model_for_kbit_training` casts to float32 whatever is in half precision and no `Params4bit`.

Fused experts are cast with it: the 58 GB of a Qwen3-30B whose linear layers are in 4 bits become 116. While the library
is active, experts that run in its forward keep their dtype there; norms, embeddings and the head are PEFT's as before.

It is the function's code that is replaced, and not the function under its names in PEFT: scripts, TRL and Axolotl have
imported it by name, many of them before this library is active, and would go on calling the other one. What they hold
is the same object before, meanwhile and afterwards; its signature is PEFT's at all times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from ..model.experts import is_transposed, routed_experts
from ..model.wrappers import experts_reason

__all__ = ["put_code", "take_over"]

_stock: FunctionType | None = None  # PEFT's function as it was released; of one function there is one


def _taken_over(*args: Any, **kwargs: Any) -> Any:
    """In PEFT's module, whose names it sees: everything is imported here."""
    from peft_moe_compat.patching.kbit import prepare

    return prepare(*args, **kwargs)


def take_over(function: FunctionType, code: CodeType) -> CodeType:
    """PEFT's function and its code -> the code to be there while the library is active."""
    global _stock
    _stock = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    return _taken_over.__code__


def put_code(function: FunctionType, code: CodeType) -> None:
    """Gives a function its code, and the signature that belongs to it."""
    function.__code__ = code
    vars(function).pop("__wrapped__", None)
    if code is _taken_over.__code__:
        vars(function)["__wrapped__"] = _stock  # where `inspect.signature` looks, as TRL does


def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """PEFT's function, with the parameters of experts that this library runs frozen, and as wide as they were."""
    stock: Callable[..., Any] = _stock  # type: ignore[assignment]
    with _kept_from_it(model):
        return stock(model, *args, **kwargs)


@contextmanager
def _kept_from_it(model: nn.Module) -> Iterator[None]:
    """Takes stacks and biases in half precision out of the modules that hold them, and puts them back in order."""
    held = {}
    for _, experts, _ in routed_experts(model):
        if experts_reason(experts, is_transposed(experts)) is None:  # another forward may want one dtype everywhere
            held[experts] = dict(experts._parameters)
            for name, parameter in held[experts].items():
                if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.requires_grad_(False)
                    del experts._parameters[name]
    try:
        yield
    finally:
        for experts, parameters in held.items():
            experts._parameters.clear()
            experts._parameters.update(parameters)
