"""For Trainer, and the trainers of TRL, which are made from it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..showing import show

__all__ = ["ReportCallback"]


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
