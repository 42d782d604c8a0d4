"""Launching kernels with little work for the processor, which small batches and the start of every step wait for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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

__all__ = ["LAUNCH_ERRORS", "Form", "Kernel", "Repeated", "compiled_together", "kernel"]

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


# triton's own chains of hooks, to which most who want one add it. Others put theirs in the place of a chain, maybe
# before this is imported: on the instance, so that the class keeps the chains.
_ENTER, _EXIT = (getattr(type(knobs.runtime), f"launch_{when}_hook") for when in ("enter", "exit"))
_ENTERED, _EXITED = (getattr(chain, "calls", ()) for chain in (_ENTER, _EXIT))


class _Launch(NamedTuple):
    """A launch that has been, to be repeated over any grid with arguments that triton compiles the same for."""

    compiled: Any
    run: Any
    how: tuple[Any, ...]
    constants: tuple[Any, ...]
    device: int

    @staticmethod
    def of(compiled: Any, constants: tuple[Any, ...], device: int) -> _Launch:
        how = compiled.function, compiled.packed_metadata, None, None, None  # neither metadata for hooks nor hooks
        return _Launch(compiled, compiled.run, how, constants, device)

    def over(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        compiled, run, how, constants, device = self
        hooks = knobs.runtime
        unhooked = _RUN_IS_KNOWN and not (_ENTERED or _EXITED)
        if unhooked and hooks.launch_enter_hook is _ENTER and hooks.launch_exit_hook is _EXIT:
            # What the public way does, but for a dict of what hooks would read and two that do nothing: 5 us.
            run(*grid, driver.active.get_current_stream(device), *how, *arguments, *constants)
        else:
            compiled[grid](*arguments, *constants)


class Kernel:
    """A jitted function whose compiled form is found by a short key.

    triton's own launch binds, hashes and formats every argument, about 30 us. An integer counts by its value, so those
    that change from step to step belong among `do_not_specialize`.
    """

    def __init__(self, function: Any, do_not_specialize: tuple[str, ...], fuse: bool) -> None:
        self.jit = triton.jit(function, do_not_specialize=do_not_specialize)
        self.fuse = fuse
        self._unspecialized = do_not_specialize
        self._forms: dict[tuple[Any, ...], Form] = {}
        self._keys: dict[type, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {}

    def key(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that triton compiles differently for, constants aside: at least as fine as its own distinction."""
        key_of = self._keys.get(type(arguments[0]))  # which tells what the others are
        if key_of is None:
            key_of = self._keys[type(arguments[0])] = self._key_of(arguments)
        return key_of(arguments)

    def _key_of(self, arguments: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """The key's function, of arguments as these are tensors, tensor descriptors and integers that count: one
        expression, a third faster than loops over them."""
        named = list(enumerate(zip(self.jit.arg_names, arguments, strict=False)))
        tensors = [f"a[{i}]" for i, (_, argument) in named if isinstance(argument, Tensor)]
        addresses = [f"{tensor}.data_ptr()" for tensor in tensors]
        parts = [f"{tensors[0]}.get_device()"]
        parts += [f"a[{i}]" for i, (name, x) in named if type(x) is int and name not in self._unspecialized]
        parts += [f"{tensor}.dtype" for tensor in tensors]
        # 0 where all of them start on 16 bytes.
        parts += [f"({'|'.join(addresses)}) & 15 and ({', '.join(f'{at} & 15' for at in addresses)},)"]
        for i in [i for i, (_, argument) in named if isinstance(argument, TensorDescriptor)]:
            parts += [f"a[{i}].base.dtype", f"*a[{i}].block_shape"]
        return eval(f"lambda a: ({', '.join(parts)})")  # type: ignore[no-any-return]  # noqa: S307

    def with_constants(self, **meta: Any) -> Form:
        """The kernel with its constants and options, by name and always in the same order: the same one each time, for
        those who do not keep it."""
        values = tuple(meta.values())
        form = self._forms.get(values)
        if form is None:
            form = self._forms[values] = Form(self, meta)
        return form

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        """`with_constants` and its launch; a dozen names take as long again as a launch without."""
        self.with_constants(**meta)(grid, *arguments)


class Form:
    """A kernel with its constants and options."""

    def __init__(self, kernel: Kernel, meta: dict[str, Any]) -> None:
        self.kernel, self.meta = kernel, meta
        self._compiled: dict[tuple[Any, ...], _Launch] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launches over `grid` on the current device, which holds the tensors."""
        if _together.get():
            self.kernel.jit.warmup(*arguments, grid=grid, enable_fp_fusion=self.kernel.fuse, **self.meta)
            return
        key = self.kernel.key(arguments)
        found = self._compiled.get(key)
        if found is not None:
            found.over(grid, arguments)
            return
        # Fusion by name, since triton 3.10 changes its default.
        compiled = self.kernel.jit[grid](*arguments, enable_fp_fusion=self.kernel.fuse, **self.meta)
        if compiled is not None:  # None from triton's interpreter
            constants = tuple(self.meta[name] for name in self.kernel.jit.arg_names[len(arguments) :])
            self._compiled[key] = _Launch.of(compiled, constants, key[0])

    def found(self, arguments: tuple[Any, ...]) -> _Launch | None:
        """A launch that has been; None in triton's interpreter."""
        return self._compiled.get(self.kernel.key(arguments)) if self._compiled else None


class Repeated:
    """Launches of a kernel whose arguments differ in nothing that triton compiles for: found once, for all of them."""

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], **meta: Any) -> None:
        self._form, self._grid = kernel.with_constants(**meta), grid
        self._found: _Launch | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._found is not None:
            self._found.over(self._grid, arguments)
            return
        self._form(self._grid, *arguments)
        self._found = self._form.found(arguments)


def kernel(*do_not_specialize: str, fuse: bool = True) -> Callable[[Any], Kernel]:
    """Decorates a kernel; the integers named are left out of what triton compiles for.

    Args:
        fuse: Whether a product and a sum may be rounded once.
    """
    return lambda function: Kernel(function, do_not_specialize, fuse)
