"""Which implementation runs the experts: the choice the user made, and what each device can do.

triton   the fused forward and backward of `kernels`: CUDA devices of compute capability 8.0 and newer
torch    grouped products by `torch.nn.functional.grouped_mm`, everything else by torch
loop     one product per expert, on any device and for any dtype
auto     the first of these that serves the device and the layer; triton for bfloat16 and float16 weights alone
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from ..errors import CompatWarning, PeftMoeCompatError
from ..model.dynamo import constant_when_compiled
from .kernels.interface import on_device

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "chosen",
    "device_reason",
    "fastest",
    "give_up",
    "set_backend",
    "trial_reason",
    "triton_errors",
]

BACKENDS = ("auto", "triton", "torch", "loop")

_chosen = "auto"
_given_up: dict[torch.device, str] = {}
_tried: set[tuple[torch.device, torch.dtype]] = set()
_TRIAL_ERROR = 0.03  # of a tensor's largest entry; bfloat16 rounds each intermediate to 0.004


class BackendChoice:
    """What `set_backend` replaced; as a context manager it brings that back at the end of the block."""

    def __init__(self, before: str) -> None:
        self.before = before

    def __enter__(self) -> BackendChoice:
        return self

    def __exit__(self, *exc: object) -> None:
        global _chosen
        _chosen = self.before


def set_backend(name: str) -> BackendChoice:
    """Chooses the implementation for every experts layer of this process, from the next forward on.

    Args:
        name: `"auto"`, `"triton"`, `"torch"` or `"loop"`. What cannot run a layer leaves it to the next one in this
            order; `peft_moe_compat.report(model)` says which runs.

    Returns:
        A handle; `with set_backend("torch"):` is for the block alone.

    Raises:
        PeftMoeCompatError: Another name.
    """
    global _chosen
    if name not in BACKENDS:
        raise PeftMoeCompatError(f"backend is {name!r}; one of {BACKENDS} was expected.")
    before, _chosen = _chosen, name
    return BackendChoice(before)


def chosen() -> str:
    """The name last given to `set_backend`."""
    return _chosen


@constant_when_compiled
def device_reason(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on a device, None where they can."""
    if device in _given_up:
        return _given_up[device]
    return _unsupported(device)


@cache
def _unsupported(device: torch.device) -> str | None:
    """The same of what does not change while a process runs."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels are for CUDA devices"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0"
    return None


@constant_when_compiled
def trial_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a trial of the fused kernels on a device failed, None where it gave the numbers it should.

    The first question about a device and dtype tries them, forward and backward, so that a kernel that cannot be built
    is found out before a backward needs it.
    """
    if device in _given_up:
        return _given_up[device]
    if (device, dtype) in _tried:
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "they have not been tried yet, and cannot be while a CUDA graph is captured"
    try:
        # A thread of its own has none of the caller's autocast, grad mode, saved-tensor hooks and dispatch modes.
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(_trial, device, dtype).result()
        if not error <= _TRIAL_ERROR:
            raise ArithmeticError(f"{dtype} results of a trial are off by {error:.2g}")  # noqa: TRY301
    except Exception as error:  # noqa: BLE001 (whatever it is, torch computes the same)
        give_up(device, error)
        return _given_up[device]
    _tried.add((device, dtype))
    return None


def _trial(device: torch.device, dtype: torch.dtype) -> float:
    from .kernels.trial import worst_error

    with on_device(device):
        return worst_error(device, dtype)


def fastest(device: torch.device) -> str:
    """The backend of layers on a device, as far as the device and `set_backend` decide it."""
    from .grouped_mm import device_backend

    fused = _chosen in ("auto", "triton") and device_reason(device) is None
    return "triton" if fused else device_backend(device)


def give_up(device: torch.device, error: Exception) -> None:
    """Notes, with one warning, that a kernel did not compile or launch on a device; it is not tried again there."""
    reason = f"a kernel failed on {device}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _given_up[device] = reason
    warnings.warn(
        f"peft_moe_compat runs without its fused kernels from here on, with the same numbers but slower: {reason}",
        CompatWarning,
        stacklevel=3,
    )


def triton_errors() -> tuple[Any, ...]:
    """What triton raises where a kernel cannot be compiled for a device or does not fit it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError
