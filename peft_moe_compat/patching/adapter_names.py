"""Several adapters in one batch while a model trains, which PEFT leaves to inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

from ..model.wrappers import is_param_wrapper

__all__ = ["enable_peft_forward_hooks"]

# What has a module computed again: of transformers' layers, and of torch's CheckpointWrapper.
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def enable_peft_forward_hooks(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LoraModel._enable_peft_forward_hooks`, for a model with LoRA on experts in training mode too.

    What hands the names to the layers is gone when a checkpoint computes them again, and is put back for that.
    """

    @wraps(stock)
    @contextmanager
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        asked = kwargs.get("adapter_names") is not None and self.training
        if not (asked and any(map(is_param_wrapper, self.modules()))):
            with stock(self, *args, **kwargs):
                yield
            return
        hooks = partial(_in_training, stock, self, *args, **kwargs)
        checkpoints = [
            (module, name, vars(module)[name])
            for module in self.modules()
            for name in _CHECKPOINTS
            if name in vars(module)
        ]
        for module, name, checkpoint in checkpoints:
            setattr(module, name, _again_within(hooks, checkpoint))
        try:
            with hooks():
                yield
        finally:
            for module, name, checkpoint in checkpoints:
                setattr(module, name, checkpoint)

    return replacement


@contextmanager
def _in_training(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """PEFT's hooks, on whose entering it asks the model's own flag."""
    hooks, training = stock(model, *args, **kwargs), model.training
    model.training = False
    try:
        hooks.__enter__()
    finally:
        model.training = training
    try:
        yield
    finally:
        hooks.__exit__(None, None, None)


def _again_within(hooks: Callable[[], AbstractContextManager[None]], checkpoint: Any) -> Callable[..., Any]:
    """A checkpoint whose function runs within the hooks when it is computed again; the first time it does already."""

    def replacement(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        runs = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return function(*args, **kwargs)
            with hooks():
                return function(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    return replacement
