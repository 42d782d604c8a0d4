"""For Axolotl: `plugins: [peft_moe_compat.integrations.axolotl.PeftMoeCompatPlugin]` in its YAML file."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from .transformers import ReportCallback

__all__ = ["PeftMoeCompatPlugin"]


class PeftMoeCompatPlugin(BasePlugin):  # type: ignore[misc]  # Any to mypy
    """Activates the library, by being imported, and logs the report when the first step has run.

    `PEFT_MOE_COMPAT=0` in the environment switches it off.
    """

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[ReportCallback]:  # noqa: ARG002
        return [ReportCallback()]
