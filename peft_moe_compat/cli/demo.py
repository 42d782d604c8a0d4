"""The main job in small: LoRA on the experts of two small models, with stock PEFT's forward and with this package's.

    prepare (trains a small base) -> "stock" and "ours" (LoRA on its experts) -> reload (stock PEFT reads both adapters)

Each stage is a process of its own (`demo_stages`), so that peak memory belongs to one
run, and PEFT's forward is untouched wherever it is the one measured. This process only shows what they report.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NoExpertParametersError
from ..releases import installed_versions, known_issues
from . import demo_stages
from .demo_stages import LEGS, MARK, MODELS, DemoError, Job, Settings
from .folders import check_writable, writing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["DemoError", "Leg", "Outcome", "Settings", "run"]

WARM_UP_STEPS = 3  # left out of step times: first calls fill caches and make the optimizer's state
_LEGEND = (
    "loss: nats per byte, first and last step. step: median. peak: memory in training, above the wrapped model. "
    "reload: largest difference of a logit once stock PEFT has reloaded the adapter."
)


@dataclass(frozen=True)
class Leg:
    """One fine-tuning run.

    Attributes:
        path: Of the experts' forward, as `report(model)` has it: "grouped_mm" or "peft".
        reason: Why it is PEFT's own, empty for "grouped_mm".
        digest: Of the fresh adapter and of every batch in order: equal where two runs had the same start and data.
        losses: Nats per byte, one per step.
        step_seconds: One per step.
        peak_bytes: Highest memory in training above that of the wrapped model; None where it cannot be measured.
    """

    path: str
    reason: str
    digest: str
    losses: list[float]
    step_seconds: list[float]
    peak_bytes: int | None

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a step."""
        return 1000 * statistics.median(self.step_seconds[WARM_UP_STEPS:] or self.step_seconds)

    @property
    def peak_mib(self) -> float | None:
        return None if self.peak_bytes is None else self.peak_bytes / 2**20


@dataclass(frozen=True)
class Outcome:
    """What one model showed.

    Attributes:
        skipped: Why the model was left out; empty where it ran.
        reload_difference: Run -> largest difference of a logit after stock PEFT reloaded that run's adapter.
    """

    model: str
    skipped: str = ""
    legs: dict[str, Leg] = field(default_factory=dict)
    reload_difference: dict[str, float] = field(default_factory=dict)

    @property
    def loss_difference(self) -> float:
        """Largest difference of the two runs' losses over all steps; nan if there is one."""
        pairs = zip(self.legs["stock"].losses, self.legs["ours"].losses, strict=True)
        return max((abs(a - b) for a, b in pairs), key=lambda d: math.inf if math.isnan(d) else d)

    def problems(self, tolerance: float) -> Iterator[str]:
        """What the demo claims and this model contradicts."""
        if self.skipped:
            return
        title = MODELS[self.model]
        if len({leg.digest for leg in self.legs.values()}) > 1:
            yield f"{title}: the two runs did not start from the same adapter and data."
        # `not <=`, so that a nan is a problem too.
        if not self.loss_difference <= tolerance:
            yield f"{title}: the loss curves differ by up to {self.loss_difference:.1e}; {tolerance:g} is allowed."
        for leg, difference in self.reload_difference.items():
            if not difference <= tolerance:
                yield (
                    f"{title}: reloaded by stock PEFT, the adapter of {LEGS[leg]} gives logits that differ by up to "
                    f"{difference:.1e}; {tolerance:g} is allowed."
                )

    def to_dict(self) -> dict[str, Any]:
        compared = {} if self.skipped else {"loss_difference": self.loss_difference}
        return asdict(self) | compared


def _environment(settings: Settings, ours: bool) -> dict[str, str]:
    # Threads that wait by spinning make steps up to twenty times as long where other work shares the cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ)
    environment |= {"PEFT_MOE_COMPAT": "1" if ours else "0", "HF_HUB_OFFLINE": "1"}
    if settings.device != "cpu":
        # One visible GPU: the Trainer would spread a model over all it sees.
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = int(settings.device.partition(":")[2] or 0)
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return environment


def _run_stage(stage: str, job: Job, on_step: Callable[[int, float | None], None]) -> dict[str, Any]:
    """Runs one stage in a process of its own and returns its result.

    Raises:
        NoExpertParametersError: The model has no fused experts under this transformers release.
        DemoError: The stage failed.
    """
    command = [
        sys.executable,
        "-m",
        demo_stages.__name__,
        stage,
        job.model,
        str(job.folder),
        json.dumps(asdict(job.settings)),
    ]
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        environment = _environment(job.settings, ours=stage == "ours")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:  # noqa: S603
            for line in process.stdout or ():
                if line.startswith(MARK):
                    last = json.loads(line.removeprefix(MARK))
                    if "step" in last:
                        on_step(last["step"], last.get("loss"))
        errors.seek(0)
        if "refused" in last:
            kind = NoExpertParametersError if last["kind"] == NoExpertParametersError.__name__ else DemoError
            raise kind(last["refused"])
        if "result" not in last:
            raise DemoError(_why_failed(stage, job.model, process.returncode, errors.read()))
    return dict(last["result"])


def _why_failed(stage: str, model: str, code: int, errors: str) -> str:
    last = errors.rpartition("Traceback (most recent call last):")[2].splitlines()
    said = [line for line in last if line.strip() and not line.startswith("  ")][-8:]  # the indented ones are code
    message = "\n".join([f"The stage {stage!r} of {MODELS[model]} failed (exit code {code}):", *said])
    for issue in known_issues(**installed_versions("peft", "transformers")):
        message += f"\nKnown of this PEFT and transformers: {issue.symptom}. Remedy: {issue.remedy}."
    return message


def _run_model(model: str, settings: Settings, scratch: Path, progress: Progress) -> Outcome:
    steps = {"prepare": settings.prepare_steps, "stock": settings.steps, "ours": settings.steps, "reload": len(LEGS)}
    says = {"prepare": "prepare the base", **{k: f"LoRA, {v}" for k, v in LEGS.items()}, "reload": "reload, stock PEFT"}
    tasks = {
        stage: progress.add_task(f"{MODELS[model]}: {says[stage]}", total=total, start=False, loss="")
        for stage, total in steps.items()
    }
    job = Job(settings, model, scratch / model)
    job.folder.mkdir()
    results = {}
    for stage, task in tasks.items():
        progress.start_task(task)

        def on_step(step: int, loss: float | None, task: Any = task) -> None:
            progress.update(task, completed=step, loss="" if loss is None else f"loss {loss:.3f}")

        try:
            results[stage] = _run_stage(stage, job, on_step)
        except NoExpertParametersError as error:
            for other in tasks.values():
                progress.remove_task(other)
            return Outcome(model, skipped=str(error))
    legs = {name: Leg(**results[name]) for name in LEGS}
    return Outcome(model, legs=legs, reload_difference=results["reload"])


def run(settings: Settings, out: Path, console: Console) -> list[str]:
    """Runs the demo, prints its table, and writes `demo.json` and `demo.png`.

    Args:
        settings: Sizes and models.
        out: Folder for the two files; made if missing.
        console: Where progress and table go.

    Returns:
        What contradicts the demo's claims; empty where all of them hold.

    Raises:
        DemoError: A stage failed, no model could run, or something the demo needs is not installed.
        PeftMoeCompatError: `out` cannot be written.
    """
    from rich import progress as bars

    for name, version in installed_versions("matplotlib", "accelerate", "torch", "peft", "transformers").items():
        if version == "not installed":
            raise DemoError(f'The demo needs {name}: pip install "peft-moe-compat[demo]"')
    check_writable(out)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[loss]}"),
        bars.TimeElapsedColumn(),
    )
    with tempfile.TemporaryDirectory() as scratch, bars.Progress(*columns, console=console) as progress:
        outcomes = [_run_model(model, settings, Path(scratch), progress) for model in settings.models]
    for outcome in outcomes:
        if outcome.skipped:
            console.print(f"{MODELS[outcome.model]} was left out: {outcome.skipped}", markup=False)
    shown = [outcome for outcome in outcomes if not outcome.skipped]
    if not shown:
        raise DemoError("None of the models has fused experts here, so there is nothing to compare.")
    problems = [problem for outcome in shown for problem in outcome.problems(settings.tolerance)]
    show(shown, console)
    versions = installed_versions("peft", "transformers", "torch")
    document = {"settings": asdict(settings), "versions": versions, "models": [o.to_dict() for o in outcomes]}
    with writing(out):
        (out / "demo.json").write_text(json.dumps(document | {"problems": problems}, indent=2), encoding="utf-8")
        draw(shown, settings, out / "demo.png")
    console.print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}", markup=False, highlight=False)
    return problems


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the table, and what follows from it for each model. Fits 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(title="LoRA on the experts", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("model", "run", "forward", "loss", "step", "peak", "reload"):
        table.add_column(heading, justify="left" if heading in ("model", "run", "forward") else "right")
    for outcome in outcomes:
        for name, leg in outcome.legs.items():
            losses = f"{leg.losses[0]:.2f} -> {leg.losses[-1]:.2f}"
            peak = "-" if leg.peak_mib is None else f"{leg.peak_mib:.0f} MiB"
            reloaded = f"{outcome.reload_difference[name]:.0e}"
            table.add_row(MODELS[outcome.model], LEGS[name], leg.path, losses, f"{leg.step_ms:.0f} ms", peak, reloaded)
    console.print(table)
    console.print(_LEGEND, style="dim", highlight=False)
    for outcome in outcomes:
        stock, ours = outcome.legs["stock"], outcome.legs["ours"]
        note = f"both runs took PEFT's own forward: {ours.reason}"
        if ours.path != stock.path:
            note = f"{stock.step_ms / ours.step_ms:.1f}x as fast"
            note += f", {ours.peak_mib / stock.peak_mib:.0%} of the memory" if ours.peak_mib and stock.peak_mib else ""
        message = f"{MODELS[outcome.model]}: the losses differ by at most {outcome.loss_difference:.0e}; {note}."
        console.print(message, markup=False, highlight=False)


def draw(outcomes: list[Outcome], settings: Settings, path: Path) -> None:
    """Writes the picture: per model the two loss curves, the step times and the peak memory."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = {"stock": "#f4a259", "ours": "#1d3557"}
    lines: dict[str, dict[str, Any]] = {
        "stock": {"linewidth": 6, "alpha": 0.75},
        "ours": {"linewidth": 1.6, "ls": "--"},
    }
    s = settings
    figure: Any = Figure(figsize=(13, 3.7 * len(outcomes) + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(
        f"LoRA of rank {s.rank} on {s.layers} x {s.experts} experts (layers x experts), hidden size {s.hidden_size}, "
        f"{s.tokens} tokens a step, float32, {s.device}"
    )
    grid = figure.subplots(len(outcomes), 3, squeeze=False, width_ratios=(2, 1, 1))
    for (curve, times, memory), outcome in zip(grid, outcomes, strict=True):
        for name, leg in outcome.legs.items():
            label = f"{LEGS[name]}, forward: {leg.path}"
            curve.plot(range(1, len(leg.losses) + 1), leg.losses, color=colours[name], label=label, **lines[name])
        curve.set_title(f"{MODELS[outcome.model]}: losses differ by at most {outcome.loss_difference:.1e}", fontsize=11)
        curve.set(xlabel="step", ylabel="loss (nats per byte)")
        curve.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        curve.legend(frameon=False)
        _bars(times, "median step time", "ms", {name: leg.step_ms for name, leg in outcome.legs.items()}, colours)
        _bars(memory, "peak memory in training", "MiB", {n: leg.peak_mib for n, leg in outcome.legs.items()}, colours)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, title: str, unit: str, heights: dict[str, float | None], colours: dict[str, str]) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(unit)
    known = {name: height for name, height in heights.items() if height is not None}
    if not known:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    labels, fills = [LEGS[name] for name in known], [colours[name] for name in known]
    bars = axes.bar(labels, list(known.values()), color=fills, width=0.55)
    axes.bar_label(bars, fmt=f"%.0f {unit}", padding=3)
    axes.margins(x=0.2, y=0.15)
