"""Libraries that train with PEFT or patch it, and what each needs beside this one: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["OTHERS", "Other", "owner_of", "remedy"]


@dataclass(frozen=True)
class Other:
    """One library.

    Attributes:
        distribution: What pip calls it.
        package: What the names of its modules begin with.
        needs: What to do so that experts train in this library's forward, in a sentence or two.
        remedy: What to do where its forward has taken the place of this library's.
    """

    distribution: str
    package: str
    needs: str
    remedy: str = ""


_LIGER = 'set liger_kernel_config={"swiglu": False} beside use_liger_kernel'
_UNSLOTH = "Unsloth trains experts in a forward of its own; leave out its import or this library"

_ENABLE = "peft-moe-compat enable, once in this environment"

OTHERS = (
    Other("trl", "trl", f"From its command line: {_ENABLE}. In a script the import is enough."),
    Other(
        "axolotl",
        "axolotl",
        f"plugins: [peft_moe_compat.integrations.axolotl.PeftMoeCompatPlugin] in its YAML file, or {_ENABLE}.",
    ),
    Other(
        "ms-swift",
        "swift",
        f"--external_plugins with the path that peft-moe-compat plugin ms-swift prints, or {_ENABLE}.",
    ),
    Other(
        "llamafactory",
        "llamafactory",
        f"{_ENABLE}; it has no option for parameters: go on from what peft-moe-compat init writes.",
    ),
    Other("liger-kernel", "liger_kernel", f"{_LIGER}: its experts forward fails inside of PEFT.", _LIGER),
    Other("unsloth", "unsloth", f"{_UNSLOTH}.", _UNSLOTH),
    Other("unsloth_zoo", "unsloth", f"{_UNSLOTH}.", _UNSLOTH),
)


def owner_of(function: Any) -> str:
    """The module a function or class method was written in; `functools.wraps` does not hide it."""
    function = getattr(function, "func", function)  # of a partial
    function = getattr(function, "__func__", function)
    code_globals = getattr(function, "__globals__", {})
    return str(code_globals.get("__name__") or getattr(function, "__module__", None) or repr(function))


def remedy(owner: str) -> str:
    """What to do about a function of the module `owner` that is in the place of this library's."""
    package = owner.partition(".")[0]
    rows = (row.remedy for row in OTHERS if package.startswith(row.package) and row.remedy)
    return next(rows, "undo that, then call peft_moe_compat.activate()")
