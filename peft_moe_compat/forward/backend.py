"""Which implementation runs the experts: the choice the user made.

triton   the fused forward and backward of `kernels`: CUDA devices of compute capability 8.0 and newer
torch    grouped products by `torch.nn.functional.grouped_mm`, everything else by torch
loop     one product per expert, on any device and for any dtype
auto     the first of these that serves the device and the layer; triton for bfloat16 and float16 weights alone
"""

from __future__ import annotations

from ..errors import PeftMoeCompatError

__all__ = ["BACKENDS", "BackendChoice", "chosen", "set_backend"]

BACKENDS = ("auto", "triton", "torch", "loop")

_chosen = "auto"


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
