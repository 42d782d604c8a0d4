"""The main job in small: LoRA on the experts of two small models, with stock PEFT's forward and with this package's.

A small base is trained, LoRA on its experts with the package inactive and active, and stock PEFT reads both adapters.
"""

from __future__ import annotations

import math
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import NoExpertParametersError, PeftMoeCompatError
from ..model.targets import expert_parameters
from ..releases import installed_versions
from ..reporting import report
from . import results

__all__ = ["Settings", "run"]

# Name -> title, and what its config calls the number of experts and their width.
MODELS = {
    "qwen3_moe": ("Qwen3-MoE", "num_experts", "moe_intermediate_size"),
    "gpt_oss": ("gpt-oss", "num_local_experts", "intermediate_size"),
}
LEGS = {"stock": "stock PEFT", "ours": "peft_moe_compat"}
TOLERANCE = 1e-4  # of the two runs' losses in the first half of the steps, and of a reloaded adapter's logits
# Of the losses afterwards. Rounding may send a token to another expert in one of two runs, and then the curves part by
# themselves; stock PEFT's own do from one run to the next.
LATER_TOLERANCE = 2e-2
LAYERS = 2
VOCABULARY = 256  # bytes
SEQUENCE = 64  # bytes per training example
SEED = 0
WARM_UP_STEPS = 3  # left out of step times: first calls fill caches and make the optimizer's state
_LEGEND = (
    "loss: nats per byte, first and last step. step: median. peak: memory of a forward and backward, above the wrapped "
    "model. reload: largest difference of a logit once stock PEFT has reloaded the adapter."
)
_LOOKS: tuple[dict[str, Any], ...] = ({"linewidth": 6, "alpha": 0.5}, {"linewidth": 1.6, "ls": "--"})


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. The experts' intermediate size is the hidden size; a token goes to up to four experts.

    Attributes:
        steps: Of the base's training and of each LoRA's.
        tokens: Per training step, a multiple of the 64 bytes of an example.
    """

    device: str
    steps: int
    hidden_size: int
    experts: int
    rank: int
    tokens: int
    models: tuple[str, ...]

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if name not in MODELS]:
            raise PeftMoeCompatError(f"--models {unknown[0]!r} is none of {', '.join(MODELS)}.")
        for name, unit in {"tokens": SEQUENCE, "hidden_size": 8, "steps": 1, "experts": 1, "rank": 1}.items():
            value = getattr(self, name)
            if value < unit or value % unit:
                raise PeftMoeCompatError(f"--{name.replace('_', '-')} {value} is not a positive multiple of {unit}.")


def _batches(settings: Settings, pattern: str, count: int) -> Sequence[Tensor]:
    """Random excerpts of the standard library's source files as token ids, "batch SEQUENCE", the same at every call."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))
    text = b"\n".join(file.read_bytes() for file in files)
    if len(text) <= SEQUENCE:
        raise PeftMoeCompatError(f"This Python keeps no source files {pattern!r} of its standard library to train on.")
    ids, batch = torch.frombuffer(bytearray(text), dtype=torch.uint8), settings.tokens // SEQUENCE
    starts = torch.randint(len(ids) - SEQUENCE, (batch * count,), generator=torch.Generator().manual_seed(SEED))
    windows = torch.stack([ids[start : start + SEQUENCE] for start in starts.tolist()]).long()
    return torch.split(windows.to(settings.device), batch)


def _model(settings: Settings, name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    _, num_experts, intermediate_size = MODELS[name]
    config = AutoConfig.for_model(
        name,
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden_size // 4,
        num_experts_per_tok=min(4, settings.experts),
        use_cache=False,
        **{num_experts: settings.experts, intermediate_size: settings.hidden_size},
    )
    set_seed(SEED)
    return AutoModelForCausalLM.from_config(config).float().to(settings.device)


def _train(settings: Settings, model: Any, pattern: str, learning_rate: float) -> dict[str, Any]:
    """Trains, the learning rate falling to 0: the losses, and the median milliseconds of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Rounding may send a token to another expert in one of two runs. With the usual 1e-8, Adam would turn that
    # expert's first small gradient into a step of full size, and the runs would part.
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, eps=1e-4, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, settings.steps)
    batches, losses, seconds = _batches(settings, pattern, settings.steps), [], []
    model.train()
    for ids in batches:
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "step_ms": 1000 * statistics.median(seconds[WARM_UP_STEPS:] or seconds)}


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


def _prepare(settings: Settings, name: str) -> dict[str, Tensor]:
    """The weights of a base that has read some Python, so that routing and experts are not random."""
    model = _model(settings, name)
    expert_parameters(model)  # refuses a model without fused experts before the work
    with results.active(False):
        _train(settings, model, "*.py", learning_rate=2e-3)
    return dict(model.state_dict())


def _leg(settings: Settings, name: str, base: dict[str, Tensor], ours: bool) -> dict[str, Any]:
    """One run, as in `demo.json`: LoRA for the codec tables of `encodings`, which look like no other Python source."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    model, again = _model(settings, name), _model(settings, name)
    model.load_state_dict(base)
    again.load_state_dict(base)
    config = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules=[], target_parameters=expert_parameters(model)
    )
    with results.active(ours), tempfile.TemporaryDirectory() as folder:
        set_seed(SEED)
        model = get_peft_model(model, config)
        rows = [parameter for experts in report(model).rows for parameter in experts.parameters]
        training = _train(settings, model, "encodings/*.py", learning_rate=1e-2)
        ids = _batches(settings, "encodings/*.py", 1)[0]
        peak = results.peak_mib(lambda: model(input_ids=ids, labels=ids).loss.backward(), settings.device)
        logits = _logits(model, ids)
        model.save_pretrained(folder)
        with results.active(False):
            again = PeftModel.from_pretrained(again, folder)
            reload_difference = float((_logits(again, ids) - logits).abs().max())
    path, reason = (sorted({getattr(row, key) for row in rows} - {""}) for key in ("path", "reason"))
    measured = {"peak_mib": peak, "reload_difference": reload_difference}
    return training | measured | {"path": ", ".join(path), "reason": "; ".join(reason)}


def _run_model(settings: Settings, name: str, console: Console) -> dict[str, Any]:
    """What one model showed, as in `demo.json`: with `skipped`, why it was left out, or with its runs."""
    title, legs = MODELS[name][0], {}
    try:
        with console.status(f"{title}: prepare the base"):
            base = _prepare(settings, name)
    except NoExpertParametersError as error:
        console.print(f"{title} was left out: {error}", markup=False)
        return {"model": name, "skipped": str(error)}
    for leg, run_title in LEGS.items():
        with console.status(f"{title}: LoRA, {run_title}"):
            legs[leg] = _leg(settings, name, base, ours=leg == "ours")
    pairs = zip(*(leg["losses"] for leg in legs.values()), strict=True)
    apart = [abs(a - b) for a, b in pairs]
    half = (len(apart) + 1) // 2
    early, late = (max(part, key=_nan_last, default=0.0) for part in (apart[:half], apart[half:]))
    return {"model": name, "skipped": "", "legs": legs, "loss_difference": early, "later_difference": late}


def _nan_last(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _problems(outcome: dict[str, Any]) -> Iterator[str]:
    """What the demo claims and this model contradicts."""
    title = MODELS[outcome["model"]][0]
    for half, key, allowed in (
        ("first", "loss_difference", TOLERANCE),
        ("second", "later_difference", LATER_TOLERANCE),
    ):
        # `not <=`, so that a nan is a problem too.
        if not outcome[key] <= allowed:
            yield (
                f"{title}: the loss curves differ by up to {outcome[key]:.1e} in the {half} half of the steps; "
                f"{allowed:g} is allowed."
            )
    for name, leg in outcome["legs"].items():
        if not leg["reload_difference"] <= TOLERANCE:
            yield (
                f"{title}: reloaded by stock PEFT, the adapter of {LEGS[name]} gives logits that differ by up to "
                f"{leg['reload_difference']:.1e}; {TOLERANCE:g} is allowed."
            )


def run(settings: Settings, out: Path, console: Console) -> list[str]:
    """Runs the demo, prints its table, and writes `demo.json` and, with matplotlib, `demo.png` into `out`.

    Returns:
        What contradicts the demo's claims; empty where all of them hold.

    Raises:
        PeftMoeCompatError: No model could run, the device is not there, or `out` cannot be written.
    """
    results.check(settings.device, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, to PEFT
        outcomes = [_run_model(settings, name, console) for name in settings.models]
    shown = [outcome for outcome in outcomes if not outcome["skipped"]]
    if not shown:
        raise PeftMoeCompatError("None of the models has fused experts here, so there is nothing to compare.")
    problems = [problem for outcome in shown for problem in _problems(outcome)]
    _show(shown, console)
    versions = installed_versions("peft", "transformers", "torch")
    document = {"settings": asdict(settings), "versions": versions, "models": outcomes, "problems": problems}
    written = results.save(out, "demo", document, lambda figure: _draw(figure, shown, settings))
    console.print(written, markup=False, highlight=False)
    return problems


def _show(outcomes: list[dict[str, Any]], console: Console) -> None:
    """Prints the table, and what follows from it for each model. Fits 80 columns."""
    table = Table(title="LoRA on the experts", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("model", "run", "forward", "loss", "step", "peak", "reload"):
        table.add_column(heading, justify="left" if heading in ("model", "run", "forward") else "right")
    notes = []
    for outcome in outcomes:
        title, (stock, ours) = MODELS[outcome["model"]][0], outcome["legs"].values()
        for name, leg in outcome["legs"].items():
            losses = f"{leg['losses'][0]:.2f} -> {leg['losses'][-1]:.2f}"
            cells = f"{leg['step_ms']:.0f} ms", f"{leg['peak_mib']:.0f} MiB", f"{leg['reload_difference']:.0e}"
            table.add_row(title, LEGS[name], leg["path"], losses, *cells)
        note = f"both runs took PEFT's own forward: {ours['reason']}"
        if ours["path"] != stock["path"]:
            faster, smaller = stock["step_ms"] / ours["step_ms"], ours["peak_mib"] / stock["peak_mib"]
            note = f"{faster:.1f}x as fast, {smaller:.0%} of the memory"
        early, late = outcome["loss_difference"], outcome["later_difference"]
        apart = f"{max(early, late):.0e}"
        if late > TOLERANCE >= early:
            apart = f"{early:.0e} up to half of the steps ({late:.0e} after rounding sent a token to another expert)"
        notes.append(f"{title}: the losses differ by at most {apart}; {note}.")
    console.print(table)
    console.print(_LEGEND, style="dim", highlight=False)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _draw(figure: Any, outcomes: list[dict[str, Any]], settings: Settings) -> None:
    """The two loss curves of each model, the step times and the peak memory."""
    figure.set_size_inches(4.5 * len(outcomes) + 7, 4)
    figure.suptitle(
        f"LoRA of rank {settings.rank} on {LAYERS} x {settings.experts} experts (layers x experts), hidden size "
        f"{settings.hidden_size}, {settings.tokens} tokens a step, float32, {settings.device}"
    )
    *curves, times, memory = figure.subplots(1, len(outcomes) + 2)
    for axes, outcome in zip(curves, outcomes, strict=True):
        early, late = outcome["loss_difference"], outcome["later_difference"]
        axes.set_title(f"{MODELS[outcome['model']][0]}: losses differ by {early:.0e}, later {late:.0e}")
        axes.set(xlabel="step", ylabel="loss (nats per byte)")
        for (name, leg), look in zip(outcome["legs"].items(), _LOOKS, strict=True):
            axes.plot(leg["losses"], label=f"{LEGS[name]}, forward: {leg['path']}", **look)
        axes.legend(fontsize=7, loc="upper right")
    titles = [MODELS[outcome["model"]][0] for outcome in outcomes]
    for axes, title, key in ((times, "median step, ms", "step_ms"), (memory, "peak memory, MiB", "peak_mib")):
        heights = {name: [outcome["legs"][leg][key] for outcome in outcomes] for leg, name in LEGS.items()}
        results.bars(axes, title, titles, heights)
