"""The command line: `peft-moe-compat check`, `demo`, `bench`, and the commands of `cli_adapters`.

torch, PEFT and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__, releases
from ..errors import CompatWarning, PatchConflictError, PeftMoeCompatError, UnsupportedPeftError
from ..patching import activation as patch
from . import adapters as cli_adapters

__all__ = ["Findings", "app", "examine"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="LoRA on Mixture-of-Experts models: one layout and one grouped-mm forward for every PEFT release.",
)

cli_adapters.register(app)

_BACKENDS = {"triton": "fused kernels", "torch": "torch's grouped_mm", "loop": "one product per expert"}


@dataclass
class Findings:
    """What `check` found in this Python environment.

    Attributes:
        versions: Distribution -> version, `"not installed"` where there is none.
        known_issues: Faults of this (PEFT, transformers) pair that this package cannot mend.
        reason: Why the package cannot work here; empty where it can.
        switched_off: Whether `PEFT_MOE_COMPAT=0` keeps the import from activating.
        rule: The layout rule in force.
        probe: What a probe of the installed `ParamWrapper` said of that rule.
        taken: The experts implementations that get the grouped-mm forward; None without an experts registry.
        backends: Device -> backend of its grouped products.
    """

    versions: dict[str, str]
    known_issues: list[releases.KnownIssue] = field(default_factory=list)
    reason: str = ""
    switched_off: bool = False
    rule: releases.LayoutRule | None = None
    probe: str = ""
    taken: list[str] | None = None
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """For JSON: versions and version ranges as text."""
        rule = self.rule and {
            "since": str(self.rule.since),
            "axis_plain": self.rule.axis_plain,
            "axis_transposed": self.rule.axis_transposed,
            "reads_swap_flag": self.rule.reads_swap_flag,
        }
        issues = [
            {"peft": str(i.peft), "transformers": str(i.transformers), "symptom": i.symptom, "remedy": i.remedy}
            for i in self.known_issues
        ]
        return {
            "ok": self.ok,
            "reason": self.reason,
            "switched_off": self.switched_off,
            "versions": self.versions,
            "rule": rule,
            "probe": self.probe,
            "experts_registry": self.ok and self.taken is not None,
            "taken": self.taken or [],
            "backends": self.backends,
            "known_issues": issues,
        }


def examine() -> Findings:
    """Activates the package and looks at what it then works with; whatever keeps it from working is the `reason`."""
    needed = releases.installed_versions("torch", "peft", "transformers")
    found = Findings({"peft-moe-compat": __version__, "python": platform.python_version(), **needed})
    missing = [name for name, version in needed.items() if version == "not installed"]
    if missing:
        found.reason = f"{', '.join(missing)} is needed but not installed. Install it with pip."
        return found
    try:
        found.known_issues = releases.known_issues(needed["peft"], needed["transformers"])
        _look_closer(found, needed["peft"])
    except ImportError as error:
        found.reason = f"PEFT {needed['peft']} does not import beside transformers {needed['transformers']}: {error}"
    except (UnsupportedPeftError, PatchConflictError) as error:
        found.reason = str(error)
    return found


def _look_closer(found: Findings, peft_version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)  # activate() below raises what the import only warns of
        importlib.import_module("peft")
    was_active = patch.is_active()
    handle = patch.activate()
    found.switched_off = patch.switched_off()
    if found.switched_off and not was_active:
        handle.restore()

    import torch

    from ..forward.backend import fastest
    from ..model.wrappers import TAKEN_IMPLEMENTATIONS

    found.rule = handle.rule
    expected = releases.release_for(peft_version)
    found.probe = (
        "the installed ParamWrapper follows this rule"
        if handle.rule.agrees_with(expected)
        else f"this development build follows this rule, not yet that of {expected.since}"
    )
    registry = patch.experts_registry()
    found.taken = None if registry is None else [name for name in TAKEN_IMPLEMENTATIONS if name in registry]
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    found.backends = {str(device): fastest(device) for device in devices}


def _show(found: Findings, console: Console) -> None:
    table = Table(title="peft_moe_compat check", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, version in found.versions.items():
        table.add_row(name, version)
    table.add_section()
    for name, value in _state(found):
        table.add_row(name, escape(value))
    console.print(table)
    if found.known_issues:
        issues = Table(title="Known issues of this PEFT and transformers", show_lines=True)
        issues.add_column("symptom", overflow="fold")
        issues.add_column("remedy", overflow="fold")
        for issue in found.known_issues:
            issues.add_row(escape(issue.symptom), escape(issue.remedy))
        console.print(issues)
    else:
        console.print("No issue is known of this PEFT and transformers.")


def _state(found: Findings) -> list[tuple[str, str]]:
    """(name, value) of everything but versions."""
    if found.rule is None:
        return [("state", f"unusable: {found.reason}")]
    registry = (
        f"{' and '.join(found.taken)} get the grouped-mm forward"
        if found.taken is not None
        else "none: this transformers has no experts registry, so PEFT's own forward is used everywhere"
    )
    return [
        ("state", "works, but switched off by PEFT_MOE_COMPAT=0" if found.switched_off else "works: active on import"),
        ("layout rule", f"since PEFT {found.rule.since}: {found.rule}"),
        ("probe", found.probe),
        ("experts registry", registry),
        *((f"backend, {device}", f"{name}: {_BACKENDS.get(name, name)}") for device, name in found.backends.items()),
    ]


@app.command()
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Shows whether the package works here: versions, layout rule, probe, backends, known issues. Exit code 0 or 1."""
    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, Console())
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Steps of each run, and of the base's.")] = 60,
    hidden_size: Annotated[int, typer.Option(help="Also the experts' width.")] = 256,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 64,
    rank: Annotated[int, typer.Option(help="LoRA rank of one expert.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 512,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "qwen3_moe,gpt_oss",
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-output"),
) -> None:
    """Fine-tunes LoRA on the experts of two small models, with stock PEFT and with this package, and compares.

    Exit code 1 if the loss curves differ, or if stock PEFT reads another model from a saved adapter.
    """
    # Threads that wait by spinning make steps up to twenty times as long where other work shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from . import demo as small_job

    try:
        settings = small_job.Settings(
            device=device,
            steps=steps,
            hidden_size=hidden_size,
            experts=experts,
            rank=rank,
            tokens=tokens,
            models=tuple(dict.fromkeys(name.strip() for name in models.split(","))),
        )
        problems = small_job.run(settings, out, Console())
    except PeftMoeCompatError as error:
        problems = [str(error)]
    for problem in problems:
        Console(stderr=True).print(f"error: {problem}", style="red", markup=False, highlight=False)
    raise typer.Exit(1 if problems else 0)


@app.command()
def bench(
    shape: Annotated[
        str,
        typer.Option(help="E,k,H,I: experts, experts per token, hidden, intermediate; 128,8,2048,768 without --model."),
    ] = "",
    model: Annotated[str, typer.Option(help="Take the shape of this transformers config instead.")] = "",
    tokens: Annotated[str, typer.Option(help="Tokens per step, comma-separated.")] = "512,2048,8192",
    rank: Annotated[int, typer.Option(help="LoRA rank of one expert.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, triton, torch or loop, of this package.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-output"),
) -> None:
    """Times one experts layer on this machine: the frozen base, stock PEFT and this package, forward and backward."""
    import torch

    from . import bench as layer_bench

    try:
        if model:
            sizes = layer_bench.shape_of_config(model)
        else:
            sizes = layer_bench.Shape(*layer_bench.integers("--shape", shape or "128,8,2048,768", 4))
        settings = layer_bench.Settings(
            shape=sizes,
            tokens=tuple(dict.fromkeys(layer_bench.integers("--tokens", tokens))),
            rank=rank,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            backend=backend,
        )
        layer_bench.run(settings, out, Console())
    except PeftMoeCompatError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
