"""Shows `report(model)` where nobody can call it: `PEFT_MOE_COMPAT_REPORT=1` in the environment of a trainer."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .errors import CompatWarning

if TYPE_CHECKING:
    from torch import nn

__all__ = ["report_on_import", "show"]

logger = logging.getLogger("peft_moe_compat")


def report_on_import() -> None:
    """Has the report shown after the first forward of an adapted model, where the environment asks for it."""
    if os.environ.get("PEFT_MOE_COMPAT_REPORT", "").lower() in ("", "0", "false", "no", "off"):
        return
    from wrapt import register_post_import_hook

    register_post_import_hook(lambda _peft: FirstForward(), "peft")


_shown: WeakSet[nn.Module] = WeakSet()  # the first module with LoRA of each model, which wrappers around it leave


def show(model: nn.Module) -> None:
    """Logs the report, its warnings included, on the first process of a group alone; of each model once."""
    import torch

    from .reporting import report  # it needs torch

    known = [module for module in model.modules() if hasattr(module, "lora_A")][:1]
    if known and known[0] in _shown:
        return
    _shown.update(known)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if int(torch.distributed.get_rank() if grouped else os.environ.get("RANK", "0")):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)  # they stand below the table
        text = str(report(model))
    logger.warning("%s", text)


class FirstForward:
    """Waits for the first forward of a model with LoRA in it to end, shows the report, and takes its hooks away.

    The hooks are torch's for all modules; the module that is called while no other is running holds all that matters.
    """

    def __init__(self) -> None:
        from torch.nn.modules import module

        self._outermost: nn.Module | None = None
        self._hooks = [
            module.register_module_forward_pre_hook(self._enter),
            module.register_module_forward_hook(self._leave, always_call=True),
        ]
        self._shown = False

    def _enter(self, called: nn.Module, _args: Any) -> None:
        import torch

        if torch.compiler.is_compiling():  # in the graph, and not while it runs
            return
        if self._shown:  # not in `_leave`: after an error torch is still going through the hooks
            self.remove()
        elif self._outermost is None:
            self._outermost = called

    def _leave(self, called: nn.Module, _args: Any, _output: Any) -> None:
        import torch

        if torch.compiler.is_compiling() or called is not self._outermost or self._shown:
            return
        self._outermost = None
        if any(hasattr(module, "lora_A") for module in called.modules()):
            self._shown = True
            show(called)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
