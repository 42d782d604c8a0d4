"""What `peft-moe-compat check` finds out and shows: versions, the layout rule in force, backends, known issues."""

from __future__ import annotations

import importlib
import platform
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__, releases
from ..at_start import installed
from ..errors import CompatWarning, PatchConflictError, UnsupportedPeftError
from ..others import OTHERS, Other
from ..patching import activation

__all__ = ["Findings", "examine", "show"]

_BACKENDS = {"triton": "fused kernels", "torch": "torch's grouped_mm", "loop": "one product per expert"}


@dataclass
class Findings:
    """What `check` found in this Python environment.

    Attributes:
        versions: Distribution -> version, `"not installed"` where there is none.
        known_issues: Faults of this (PEFT, transformers) pair that this package cannot mend.
        untested: Of PEFT and transformers, what is newer than any tested release -> the newest that was tested.
        reason: Why the package cannot work here; empty where it can.
        switched_off: Whether `PEFT_MOE_COMPAT=0` keeps the import from activating.
        enabled: Whether `enable` has been here, so that every process that imports PEFT is active.
        rule: The layout rule in force.
        probe: What a probe of the installed `ParamWrapper` said of that rule.
        taken: The experts implementations that get the grouped-mm forward; None without an experts registry.
        backends: Device -> backend of its grouped products.
        others: Of the installed trainers and libraries beside them, distribution -> what it needs.
    """

    versions: dict[str, str]
    known_issues: list[releases.KnownIssue] = field(default_factory=list)
    untested: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    switched_off: bool = False
    enabled: bool = False
    rule: releases.LayoutRule | None = None
    probe: str = ""
    taken: list[str] | None = None
    backends: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """For JSON: versions and version ranges as text."""
        rule = self.rule and asdict(self.rule) | {"since": str(self.rule.since)}
        issues = [
            asdict(issue) | {"peft": str(issue.peft), "transformers": str(issue.transformers)}
            for issue in self.known_issues
        ]
        registry = {"experts_registry": self.ok and self.taken is not None, "taken": self.taken or []}
        return {"ok": self.ok} | asdict(self) | registry | {"rule": rule, "known_issues": issues}


def examine() -> Findings:
    """Activates the package and looks at what it then works with; whatever keeps it from working is the `reason`."""
    needed = releases.installed_versions("torch", "peft", "transformers")
    found = Findings({"peft-moe-compat": __version__, "python": platform.python_version(), **needed})
    found.others = {row.distribution: row.needs for row in OTHERS if _installed(row)}
    missing = [name for name, version in needed.items() if version == "not installed"]
    if missing:
        found.reason = f"{', '.join(missing)} is needed but not installed. Install it with pip."
        return found
    try:
        found.known_issues = releases.known_issues(needed["peft"], needed["transformers"])
        found.untested = releases.newer_than_tested(needed["peft"], needed["transformers"])
        _look_closer(found, needed["peft"])
    except ImportError as error:
        found.reason = f"PEFT {needed['peft']} does not import beside transformers {needed['transformers']}: {error}"
    except (UnsupportedPeftError, PatchConflictError) as error:
        found.reason = str(error)
    return found


def _installed(row: Other) -> bool:
    return releases.installed_versions(row.distribution)[row.distribution] != "not installed"


def _look_closer(found: Findings, peft_version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)  # activate() below raises what the import only warns of
        importlib.import_module("peft")
    was_active = activation.is_active()
    handle = activation.activate()
    found.switched_off, found.enabled = activation.switched_off(), installed()
    if found.switched_off and not was_active:
        handle.restore()

    import torch

    from ..forward.fused import fastest
    from ..model.wrappers import TAKEN_IMPLEMENTATIONS
    from ..patching.forward import experts_registry

    found.rule = handle.rule
    expected = releases.release_for(peft_version)
    found.probe = (
        "the installed ParamWrapper follows this rule"
        if handle.rule.agrees_with(expected)
        else f"this development build follows this rule, not yet that of {expected.since}"
    )
    registry = experts_registry()
    found.taken = None if registry is None else [name for name in TAKEN_IMPLEMENTATIONS if name in registry]
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    found.backends = {str(device): fastest(device) for device in devices}


def show(found: Findings, console: Console) -> None:
    table = Table(title="peft_moe_compat check", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, version in found.versions.items():
        tested = found.untested.get(name)
        table.add_row(name, version if tested is None else f"{version}, newer than any tested release ({tested})")
    table.add_section()
    for name, value in _state(found):
        table.add_row(name, escape(value))
    console.print(table)
    if found.known_issues:
        issues = Table(title="Known issues of this PEFT and transformers", show_lines=True)
        issues.add_column("symptom", overflow="fold")
        issues.add_column("remedy", overflow="fold")
        for issue in found.known_issues:
            issues.add_row(escape(("" if issue.certain else "may still hold: ") + issue.symptom), escape(issue.remedy))
        console.print(issues)
    else:
        console.print("No issue is known of this PEFT and transformers.")
    if found.others:
        others = Table(title="What is installed beside them, and needs something", show_lines=True)
        others.add_column("library", no_wrap=True)
        others.add_column("needs", overflow="fold")
        for name, needs in found.others.items():
            others.add_row(name, escape(needs))
        console.print(others)


def _state(found: Findings) -> list[tuple[str, str]]:
    """(name, value) of everything but versions."""
    if found.rule is None:
        return [("state", f"unusable: {found.reason}")]
    registry = (
        f"{' and '.join(found.taken)} get the grouped-mm forward"
        if found.taken is not None
        else "none: this transformers has no experts registry, so most experts run in PEFT's own forward"
    )
    on = "in every process that imports PEFT (enable)" if found.enabled else "on import"
    return [
        ("state", "works, but switched off by PEFT_MOE_COMPAT=0" if found.switched_off else f"works: active {on}"),
        ("layout rule", f"since PEFT {found.rule.since}: {found.rule}"),
        ("probe", found.probe),
        ("experts registry", registry),
        *((f"backend, {device}", f"{name}: {_BACKENDS.get(name, name)}") for device, name in found.backends.items()),
    ]
