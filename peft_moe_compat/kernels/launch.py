"""Launching kernels with little work for the processor, which small batches and the start of every step wait for."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Kernel", "kernel"]


def _specialization(argument: Any) -> Any:
    """All that triton compiles differently for: at least as fine as its own distinction."""
    kind = type(argument)
    if kind is int:
        return argument if argument <= 1 else (argument & 15 == 0) + 2 * (argument >= 2**31) + 2
    if kind is float:
        return 0.0
    if kind is TensorDescriptor:
        return argument.base.dtype, *argument.block_shape
    return argument.dtype, argument.data_ptr() & 15


class Kernel:
    """A jitted function whose compiled form is found by a short key.

    triton's own launch binds, hashes and formats every argument, about 30 us; this takes a third of that.
    """

    def __init__(self, function: Any, do_not_specialize: tuple[str, ...]) -> None:
        self.jit = triton.jit(function, do_not_specialize=do_not_specialize)
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        """Launches over `grid` on the current device, which holds the tensors.

        Takes the kernel's arguments by position, its constants and options by name, always in the same order.
        """
        if isinstance(self.jit, triton.JITFunction):
            device = next(a for a in arguments if isinstance(a, Tensor)).get_device()
            key = (device, *map(_specialization, arguments), *meta.values())
            found = self._compiled.get(key)
            if found is not None:
                compiled, constants = found
                compiled[grid](*arguments, *constants)
                return
        compiled = self.jit[grid](*arguments, **meta)
        if compiled is not None:  # None from triton's interpreter
            constants = tuple(meta[name] for name in self.jit.arg_names[len(arguments) :])
            self._compiled[key] = compiled, constants


def kernel(*do_not_specialize: str) -> Any:
    """Decorates a kernel; the integers named are left out of what triton compiles for."""
    return lambda function: Kernel(function, do_not_specialize)
