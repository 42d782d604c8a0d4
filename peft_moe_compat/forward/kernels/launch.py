"""Launching kernels with little work for the processor, which small batches and the start of every step wait for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import triton
from packaging.version import Version
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["LAUNCH_ERRORS", "Kernel", "Repeated", "compiled_together", "kernel"]

# What triton raises where a kernel cannot be compiled for a device or does not fit it.
LAUNCH_ERRORS = CompilationError, OutOfResources, PTXASError


# Up to the last release whose `CompiledKernel.run` was read: that of 3.5, 3.6 and 3.9 takes the same.
_RUN_IS_KNOWN = Version(triton.__version__).release[:2] < (3, 10)
_together: ContextVar[bool] = ContextVar("peft_moe_compat_together", default=False)


@contextmanager
def compiled_together() -> Iterator[bool]:
    """Has launches of this thread compile, side by side, and run nothing; False in triton's interpreter, where they
    run. Raises what a compilation raises."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield False
        return
    token = _together.set(True)
    try:
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            yield True
    finally:
        _together.reset(token)


def _is_set(hook: Any) -> bool:
    """Of a chain of hooks, as triton has, or None or a function, as somebody may set in its place."""
    return bool(getattr(hook, "calls", hook))


class _Launch(NamedTuple):
    """A launch that has been, to be repeated over any grid with arguments that triton compiles the same for."""

    compiled: Any
    constants: tuple[Any, ...]
    device: int

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        compiled, constants, device = self
        hooks = knobs.runtime
        if not _RUN_IS_KNOWN or _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook):
            compiled[grid](*arguments, *constants)
            return
        # What that does, but for a dict of what hooks would read and the call of two that do nothing: 5 us.
        how = driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(*grid, *how, *arguments, *constants)


class Kernel:
    """A jitted function whose compiled form is found by a short key.

    triton's own launch binds, hashes and formats every argument, about 30 us; this takes a third of that. An integer
    counts by its value, so those that change from step to step belong among `do_not_specialize`.
    """

    def __init__(self, function: Any, do_not_specialize: tuple[str, ...], fuse: bool) -> None:
        self.jit = triton.jit(function, do_not_specialize=do_not_specialize)
        self.fuse = fuse
        self._unspecialized = do_not_specialize
        self._compiled: dict[Any, _Launch] = {}
        # Which arguments are tensors, tensor descriptors, and integers that count: the first one's type tells.
        self._places: dict[type, tuple[list[int], list[int], list[int]]] = {}

    def _find_places(self, arguments: tuple[Any, ...]) -> tuple[list[int], list[int], list[int]]:
        named = list(enumerate(zip(self.jit.arg_names, arguments, strict=False)))
        return (
            [i for i, (_, argument) in named if isinstance(argument, Tensor)],
            [i for i, (_, argument) in named if isinstance(argument, TensorDescriptor)],
            [i for i, (name, argument) in named if type(argument) is int and name not in self._unspecialized],
        )

    def _key(self, arguments: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, ...]:
        """All that triton compiles differently for: at least as fine as its own distinction."""
        places = self._places.get(type(arguments[0]))
        if places is None:
            places = self._places[type(arguments[0])] = self._find_places(arguments)
        tensors, descriptors, integers = places
        key = [arguments[tensors[0]].get_device(), *meta.values()]
        key += [arguments[i] for i in integers]
        together = 0
        for i in tensors:
            tensor = arguments[i]
            key.append(tensor.dtype)
            together |= tensor.data_ptr()
        if together & 15:  # else all of them start on 16 bytes
            key += [arguments[i].data_ptr() & 15 for i in tensors]
        for i in descriptors:
            key += arguments[i].base.dtype, *arguments[i].block_shape
        return tuple(key)

    def found(self, arguments: tuple[Any, ...], meta: dict[str, Any]) -> _Launch | None:
        """One that has been; None in triton's interpreter."""
        return self._compiled.get(self._key(arguments, meta)) if self._compiled else None

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        """Launches over `grid` on the current device, which holds the tensors.

        Takes the kernel's arguments by position, its constants and options by name, always in the same order.
        """
        if _together.get():
            self.jit.warmup(*arguments, grid=grid, enable_fp_fusion=self.fuse, **meta)
            return
        if isinstance(self.jit, triton.JITFunction):
            key = self._key(arguments, meta)
            found = self._compiled.get(key)
            if found is not None:
                found(grid, arguments)
                return
        # Fusion by name, since triton 3.10 changes its default.
        compiled = self.jit[grid](*arguments, enable_fp_fusion=self.fuse, **meta)
        if compiled is not None:  # None from triton's interpreter
            constants = tuple(meta[name] for name in self.jit.arg_names[len(arguments) :])
            self._compiled[key] = _Launch(compiled, constants, key[0])


class Repeated:
    """Launches of a kernel whose arguments differ in nothing that triton compiles for: found once, for all of them."""

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], **meta: Any) -> None:
        self._kernel, self._grid, self._meta = kernel, grid, meta
        self._found: _Launch | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._found is not None:
            self._found(self._grid, arguments)
            return
        self._kernel(self._grid, *arguments, **self._meta)
        self._found = self._kernel.found(arguments, self._meta)


def kernel(*do_not_specialize: str, fuse: bool = True) -> Any:
    """Decorates a kernel; the integers named are left out of what triton compiles for.

    Args:
        fuse: Whether a product and a sum may be rounded once.
    """
    return lambda function: Kernel(function, do_not_specialize, fuse)
