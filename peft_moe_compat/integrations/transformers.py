"""For Trainer, and the trainers of TRL, which are made from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..handover import AdapterStream, adapter_tensors
from ..showing import show

__all__ = ["HandoverCallback", "ReportCallback"]


class ReportCallback(TrainerCallback):  # type: ignore[misc]  # Any to mypy
    """Logs `report(model)`, its warnings included, when the first step has run, on the first process alone.

    Example: `Trainer(..., callbacks=[peft_moe_compat.ReportCallback()])`
    """

    def __init__(self) -> None:
        self._shown = False

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the first batch, where a step has several."""
        self.on_step_end(args, state, control, model, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if not self._shown:
            self._shown = True
            show(model)


class HandoverCallback(TrainerCallback):  # type: ignore[misc]  # Any to mypy
    """Hands the adapter over to a server after every optimiser step, in the server's form, from memory.

    Example: `GRPOTrainer(..., callbacks=[peft_moe_compat.HandoverCallback(load_into_server, "vllm")])`

    Args:
        take: Called with the stream and the number of the step, on every process; see `AdapterStream`.
        to: The reader, as `adapter_tensors` takes it.
        every: Steps from one time to the next.
        options: Further ones of `adapter_tensors`.

    Raises:
        ValueError: `every` is no positive integer.
    """

    def __init__(self, take: Callable[[AdapterStream, int], None], to: str, *, every: int = 1, **options: Any) -> None:
        if every != int(every) or every < 1:
            raise ValueError(f"every={every!r}: a number of steps was needed, 1 or more.")
        self._take, self._to, self._every, self._options = take, to, every, options
        self._stream: AdapterStream | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """What cannot be handed over is refused before the first step; see `adapter_tensors`."""
        self._stream = adapter_tensors(model, self._to, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._stream is not None and state.global_step % self._every == 0:
            self._take(self._stream, state.global_step)
