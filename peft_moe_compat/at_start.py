"""What every start of Python runs where `peft-moe-compat enable` has been: it waits for PEFT to be imported.

The text of this module is the line of the .pth file, so it imports nothing that Python has not loaded by then, and goes
on working, as nothing at all, after the package has been uninstalled.
"""

import os
import sys

TYPE_CHECKING = False  # typing would take longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

__all__ = ["OFF", "install", "installed"]

OFF = ("0", "false", "no", "off")  # words for it in a variable of the environment


class PeftMoeCompatFinder:
    """Finds PEFT as all the others do, and gives it a loader that activates the package afterwards."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name != "peft":
            return None
        for finder in sys.meta_path:
            find = None if type(finder).__name__ == PeftMoeCompatFinder.__name__ else getattr(finder, "find_spec", None)
            spec = find and find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = PeftMoeCompatLoader(spec.loader)
                return spec
        return None


class PeftMoeCompatLoader:
    """PEFT's own loader in all but `exec_module`."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(vars(self)["loader"], name)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        activate()


def activate() -> None:
    """Imports the package, which activates it; whatever goes wrong is logged, since PEFT works without."""
    if os.environ.get("PEFT_MOE_COMPAT", "").lower() in OFF:
        return
    try:
        __import__("peft_moe_compat")
    except Exception as error:  # noqa: BLE001  # of a process that never asked for this package by itself
        if isinstance(error, ModuleNotFoundError) and error.name == "peft_moe_compat":
            return  # uninstalled
        import logging

        logging.getLogger("peft_moe_compat").warning(
            "peft_moe_compat, which `peft-moe-compat enable` switched on for this environment, is inactive: %s: %s. "
            "Update it, or switch it off: `peft-moe-compat disable`, or PEFT_MOE_COMPAT=0 for one process.",
            type(error).__name__,
            error,
        )


def installed() -> bool:
    """Whether the start of this process has run `install`."""
    return any(type(finder).__name__ == PeftMoeCompatFinder.__name__ for finder in sys.meta_path)


def install() -> None:
    """Activates the package when PEFT is imported, or now where that has happened."""
    if "peft" in sys.modules:
        activate()
    elif not installed():
        sys.meta_path.insert(0, PeftMoeCompatFinder())
