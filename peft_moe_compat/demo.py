"""The main job in small: LoRA on the experts of two small models, with stock PEFT's forward and with this package's.

    prepare (trains a small base) -> "stock" and "ours" (LoRA on its experts) -> reload (stock PEFT reads both adapters)

Each stage is a process of its own (`python -m peft_moe_compat.demo <stage> ...`), so that peak memory belongs to one
run, and PEFT's forward is untouched wherever it is the one measured. This process only shows what they report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NoExpertParametersError, PeftMoeCompatError
from .releases import installed_versions, known_issues

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["DemoError", "Leg", "Outcome", "Settings", "run"]

MODELS = {"qwen3_moe": "Qwen3-MoE", "gpt_oss": "gpt-oss"}
LEGS = {"stock": "stock PEFT", "ours": "peft_moe_compat"}
VOCABULARY = 256  # bytes
SEQUENCE = 64  # bytes per training example
SEED = 0
WARM_UP_STEPS = 3  # left out of step times: first calls fill caches and make the optimizer's state
_MARK = "demo-event "
_LEGEND = (
    "loss: nats per byte, first and last step. step: median. peak: memory in training, above the wrapped model. "
    "reload: largest difference of a logit once stock PEFT has reloaded the adapter."
)


class DemoError(PeftMoeCompatError):
    """The demo cannot run as asked, or one of its stages failed."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. The experts' intermediate size is the hidden size; a token goes to up to four experts.

    Attributes:
        tokens: Per training step, a multiple of the 64 bytes of an example.
        tolerance: The most by which the losses of the two runs, and the logits of a reloaded adapter, may differ.
    """

    device: str = "cpu"
    steps: int = 60
    prepare_steps: int = 60
    hidden_size: int = 256
    experts: int = 64
    layers: int = 2
    rank: int = 8
    tokens: int = 512
    models: tuple[str, ...] = tuple(MODELS)
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise DemoError(f"--device {self.device!r} is none of 'cpu', 'cuda' and 'cuda:N'.")
        if unknown := [name for name in self.models if name not in MODELS]:
            raise DemoError(f"--models {unknown[0]!r} is none of {', '.join(MODELS)}.")
        units = {"tokens": SEQUENCE, "hidden_size": 8}
        units |= dict.fromkeys(("steps", "prepare_steps", "experts", "layers", "rank"), 1)
        for name, unit in units.items():
            value = getattr(self, name)
            if value < unit or value % unit:
                raise DemoError(f"--{name.replace('_', '-')} {value} is not a positive multiple of {unit}.")


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


@dataclass(frozen=True)
class _Job:
    """What a stage works on; `folder` holds what the model's stages leave for each other."""

    settings: Settings
    model: str
    folder: Path

    @property
    def device(self) -> str:
        """Device type, "cpu" or "cuda": a stage's process sees the one GPU it should use."""
        return self.settings.device.partition(":")[0]


def _emit(**event: Any) -> None:
    print(_MARK + json.dumps(event), file=sys.__stdout__, flush=True)


def _text(pattern: str) -> bytes:
    """The standard library's source files of a pattern, joined in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    text = b"\n".join(file.read_bytes() for file in files)
    if len(text) <= SEQUENCE:
        raise DemoError(f"This Python keeps no source files {pattern!r} of its standard library on disk to train on.")
    return text


def _windows(text: bytes, count: int) -> Any:
    """`count` random excerpts of a text as token ids, "count SEQUENCE", the same at every call."""
    import torch

    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(len(ids) - SEQUENCE, (count,), generator=torch.Generator().manual_seed(SEED))
    return torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()]).long()


def _base_model(job: _Job, prepared: bool = True) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    s = job.settings
    experts = {
        "qwen3_moe": ("num_experts", "moe_intermediate_size"),
        "gpt_oss": ("num_local_experts", "intermediate_size"),
    }
    num_experts, intermediate_size = experts[job.model]
    sizes = {num_experts: s.experts, intermediate_size: s.hidden_size, "num_experts_per_tok": min(4, s.experts)}
    config = AutoConfig.for_model(
        job.model,
        vocab_size=VOCABULARY,
        hidden_size=s.hidden_size,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=s.hidden_size // 4,
        use_cache=False,
        **sizes,
    )
    set_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).float()
    if prepared:
        model.load_state_dict(torch.load(job.folder / "base.pt", weights_only=True))
    if job.device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda was asked for, but torch.cuda.is_available() is False.")
    return model.to(job.device)


def _train(job: _Job, model: Any, text: bytes, steps: int, learning_rate: float) -> dict[str, Any]:
    """`steps` steps of transformers' Trainer, reported as they go: losses and seconds per step, digest, peak_bytes."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    losses: list[float] = []
    seconds: list[float] = []

    class ByteTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            digest.update(inputs["input_ids"].cpu().numpy().tobytes())
            loss = super().training_step(model, inputs, *args, **kwargs)
            losses.append(loss.item())  # not from the logs, which some transformers releases round to four digits
            return loss

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            if job.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            _emit(step=len(losses), loss=losses[-1])

    batch = job.settings.tokens // SEQUENCE
    arguments = TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=learning_rate,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=job.device == "cpu",
        seed=SEED,
    )
    data = [{"input_ids": window, "labels": window} for window in _windows(text, batch * steps)]
    trainer = ByteTrainer(model=model, args=arguments, train_dataset=data, callbacks=[Steps()])
    trainer.remove_callback(PrinterCallback)
    peak = _peak_above_now(job.device)
    trainer.train()
    return {"losses": losses, "step_seconds": seconds, "digest": digest.hexdigest(), "peak_bytes": peak()}


def _peak_above_now(device: str) -> Callable[[], int | None]:
    """A function that tells the highest memory since, in bytes above what is in use now.

    Resident memory of the process on the CPU, which only Linux lets a process read and reset; tensors on a GPU.
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - allocated
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, to what is resident now
    except OSError:
        return lambda: None
    resident = _status_bytes("VmRSS")
    return lambda: _status_bytes("VmHWM") - resident


def _status_bytes(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _logits(job: _Job, model: Any) -> Any:
    """Logits of a fixed batch, "batch SEQUENCE VOCABULARY", on the CPU."""
    import torch

    with torch.no_grad():
        ids = _windows(_text("encodings/*.py"), job.settings.tokens // SEQUENCE)
        return model.eval()(input_ids=ids.to(job.device)).logits.float().cpu()


def _prepare(job: _Job) -> dict[str, Any]:
    """A base that has read some Python, so that routing and experts are not random. Kept as base.pt."""
    import torch

    from .discovery import expert_parameters

    model = _base_model(job, prepared=False)
    expert_parameters(model)  # refuses a model without fused experts before the work
    _train(job, model, _text("*.py"), job.settings.prepare_steps, learning_rate=2e-3)
    torch.save(model.state_dict(), job.folder / "base.pt")
    return {}


def _leg(job: _Job, name: str) -> dict[str, Any]:
    """LoRA on the experts for the codec tables of `encodings`, which look like no other Python source."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from . import activate, discovery

    if name == "ours":
        activate()  # the import alone would only warn where it cannot
    model = _base_model(job)
    r = job.settings.rank
    targets = discovery.expert_parameters(model)
    set_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=targets))
    rows = [parameter for experts in discovery.report(model).rows for parameter in experts.parameters]
    training = _train(job, model, _text("encodings/*.py"), job.settings.steps, learning_rate=3e-3)
    torch.save(_logits(job, model), job.folder / f"{name}-logits.pt")
    model.save_pretrained(job.folder / name)
    paths, reasons = {row.path for row in rows}, {row.reason for row in rows if row.reason}
    return training | {"path": ", ".join(sorted(paths)), "reason": "; ".join(sorted(reasons))}


def _reload(job: _Job) -> dict[str, float]:
    """Run -> largest difference of a logit between the run itself and its adapter reloaded here, by stock PEFT."""
    import torch
    from peft import PeftModel

    differences = {}
    for step, name in enumerate(LEGS, start=1):
        model = PeftModel.from_pretrained(_base_model(job), job.folder / name)
        before = torch.load(job.folder / f"{name}-logits.pt", weights_only=True)
        differences[name] = float((_logits(job, model) - before).abs().max())
        _emit(step=step)
    return differences


def _stage(stage: str, model: str, folder: str, settings: str) -> int:
    """The whole of a stage's process: its result, or a refusal of ours, goes out as the last event."""
    stages: dict[str, Callable[[_Job], dict[str, Any]]] = {
        "prepare": _prepare,
        "stock": lambda job: _leg(job, "stock"),
        "ours": lambda job: _leg(job, "ours"),
        "reload": _reload,
    }
    options = json.loads(settings)
    job = _Job(Settings(**options | {"models": tuple(options["models"])}), model, Path(folder))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = stages[stage](job)
    except PeftMoeCompatError as error:
        _emit(refused=str(error), kind=type(error).__name__)
        return 1
    _emit(result=result)
    return 0


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


def _run_stage(stage: str, job: _Job, on_step: Callable[[int, float | None], None]) -> dict[str, Any]:
    """Runs one stage in a process of its own and returns its result.

    Raises:
        NoExpertParametersError: The model has no fused experts under this transformers release.
        DemoError: The stage failed.
    """
    command = [sys.executable, "-m", __name__, stage, job.model, str(job.folder), json.dumps(asdict(job.settings))]
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        environment = _environment(job.settings, ours=stage == "ours")
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:  # noqa: S603
            for line in process.stdout or ():
                if line.startswith(_MARK):
                    last = json.loads(line.removeprefix(_MARK))
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
    job = _Job(settings, model, scratch / model)
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
    """
    from rich import progress as bars

    for name, version in installed_versions("matplotlib", "accelerate", "torch", "peft", "transformers").items():
        if version == "not installed":
            raise DemoError(f'The demo needs {name}: pip install "peft-moe-compat[demo]"')
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
    out.mkdir(parents=True, exist_ok=True)
    versions = installed_versions("peft", "transformers", "torch")
    document = {"settings": asdict(settings), "versions": versions, "models": [o.to_dict() for o in outcomes]}
    (out / "demo.json").write_text(json.dumps(document | {"problems": problems}, indent=2), encoding="utf-8")
    draw(shown, settings, out / "demo.png")
    show(shown, console)
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
        curve.xaxis.set_major_locator(MaxNLocator(integer=True))
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


if __name__ == "__main__":
    sys.exit(_stage(*sys.argv[1:]))
