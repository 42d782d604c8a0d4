"""One experts layer with LoRA on this machine: the frozen base, stock PEFT and this package, time and memory."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import releases
from ..adapters.base_model import DENSE_INTERMEDIATE, HIDDEN, INTERMEDIATE, NUM_EXPERTS
from ..errors import PeftMoeCompatError
from ..forward.backend import set_backend
from ..forward.fused import backend_of
from ..forward.grouped_mm import alignment
from ..model.wrappers import experts_of
from ..patching import activation
from .folders import check_writable, writing

__all__ = ["Row", "Settings", "Shape", "run", "shape_of_config", "token_counts"]

_DTYPES = ("bfloat16", "float16", "float32")
_METHODS = ("frozen base", "stock PEFT", "peft_moe_compat")
_SIZES = {
    "E": NUM_EXPERTS,
    "k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"),
    "H": HIDDEN[::-1],  # that of the experts before the model's
    "I": INTERMEDIATE + DENSE_INTERMEDIATE,
}


@dataclass(frozen=True)
class Shape:
    """Experts, experts per token, hidden size, intermediate size."""

    E: int
    k: int
    H: int
    I: int  # noqa: E741 (the letter of the shape legend)

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of "E,k,H,I"."""
        try:
            E, k, H, I = (int(part) for part in text.split(","))  # noqa: E741
        except ValueError:
            raise PeftMoeCompatError(f"--shape is {text!r}; four integers, E,k,H,I, were expected.") from None
        return cls(E, k, H, I)


def token_counts(text: str) -> tuple[int, ...]:
    """Of "512,2048"."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise PeftMoeCompatError(f"--tokens is {text!r}; integers with commas between them were expected.") from None


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    shape: Shape
    tokens: tuple[int, ...] = (512, 2048, 8192)
    rank: int = 16
    device: str = "cuda"
    dtype: str = "bfloat16"
    repeats: int = 9
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise PeftMoeCompatError(f"--dtype is {self.dtype!r}; one of {', '.join(_DTYPES)} was expected.")
        E, k, H, I = astuple(self.shape)  # noqa: E741
        if min(E, k, H, I, self.rank, self.repeats, *self.tokens) < 1 or k > E:
            raise PeftMoeCompatError("The shape, --tokens, --rank and --repeats must be positive, and k at most E.")
        if any(size % (unit := alignment(getattr(torch, self.dtype))) for size in (H, I)):
            raise PeftMoeCompatError(f"H and I are {H} and {I}; transformers' own experts take multiples of {unit}.")


@dataclass(frozen=True)
class Row:
    """One method at one number of tokens: medians in milliseconds, and the peak of a step above the weights in MiB."""

    method: str
    tokens: int
    both_ms: float
    forward_ms: float
    peak_mib: float


def shape_of_config(path: str) -> Shape:
    """The experts of a transformers config: a folder or a file of one, or a model's name.

    Raises:
        PeftMoeCompatError: The config names no such sizes.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path).get_text_config()
        every = {name: getattr(config, name, None) for names in _SIZES.values() for name in names}
    except Exception as error:  # each config class checks its fields in its own way
        raise PeftMoeCompatError(f"--model {path} cannot be read: {error}") from error
    found = {}
    for letter, names in _SIZES.items():
        values = [every[name] for name in names]
        # A list has a size for each kind of experts, those of text first.
        sizes = [value[0] if isinstance(value, list | tuple) and value else value for value in values]
        value = next((size for size in sizes if isinstance(size, int)), None)
        if value is None:
            raise PeftMoeCompatError(f"The config {path!r} has none of {names}: pass --shape E,k,H,I instead.")
        found[letter] = value
    return Shape(**found)


class _Layer:
    """Qwen3-MoE experts of any shape, with random weights, routing and hidden states."""

    def __init__(self, settings: Settings) -> None:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.settings, shape = settings, settings.shape
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        config = Qwen3MoeConfig(
            hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.k
        )
        config._experts_implementation = "grouped_mm"
        with torch.device(settings.device):
            experts = Qwen3MoeExperts(config).to(self.dtype)
        self.block = nn.ModuleDict({"experts": experts})
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)

    def add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["experts.gate_up_proj", "experts.down_proj"]
        inject_adapter_in_model(
            LoraConfig(r=self.settings.rank, target_modules=[], target_parameters=names), self.block
        )
        for name, parameter in self.block.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)

    def backends(self) -> list[str]:
        """What this package computes its products in, once it has LoRA."""
        experts = experts_of(self.block["experts"])
        return list(dict.fromkeys(backend_of(experts, name)[0] for name in ("gate_up_proj", "down_proj")))

    def steps(self, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """(forward and backward, forward) over fresh inputs."""
        shape, device = self.settings.shape, self.settings.device
        hidden = torch.randn(tokens, shape.H, device=device, dtype=self.dtype)
        logits = torch.randn(tokens, shape.E, device=device)
        weights, index = torch.topk(logits.softmax(-1), shape.k)
        weights, gradient = weights.to(self.dtype), torch.randn_like(hidden)

        def both() -> None:
            h = hidden.detach().requires_grad_()
            out: Tensor = self.block["experts"](h, index, weights)
            out.backward(gradient)  # type: ignore[no-untyped-call]
            for parameter in self.block.parameters():
                parameter.grad = None

        def forward() -> None:
            with torch.no_grad():
                self.block["experts"](hidden, index, weights)

        return both, forward


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _median_ms(step: Callable[[], None], settings: Settings) -> float:
    times = []
    for i in range(settings.repeats + 2):
        _synchronize(settings.device)
        start = time.perf_counter()
        step()
        _synchronize(settings.device)
        if i >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _peak_mib(step: Callable[[], None], device: str) -> float:
    """Highest sum of live allocations during one step."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


@contextlib.contextmanager
def _active(wanted: bool) -> Iterator[None]:
    """The package active, or not, whatever it was before."""
    was = activation.is_active()
    if wanted:
        activation.activate()
    else:
        activation.deactivate()
    try:
        yield
    finally:
        if was:
            activation.activate()
        else:
            activation.deactivate()


def _measure(layer: _Layer) -> Iterator[Row]:
    settings = layer.settings
    for method in _METHODS:
        if method == "stock PEFT":
            layer.add_lora()
        with _active(method == "peft_moe_compat"):
            for tokens in settings.tokens:
                both, forward = layer.steps(tokens)
                times = _median_ms(both, settings), _median_ms(forward, settings)
                yield Row(method, tokens, *times, _peak_mib(both, settings.device))


def run(settings: Settings, out: Path, console: Console) -> list[Row]:
    """Measures, prints a table, and writes bench.json and, with matplotlib, bench.png into `out`.

    Raises:
        PeftMoeCompatError: The device is not there, the backend has another name, or `out` cannot be written.
    """
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise PeftMoeCompatError(f"--device is {settings.device!r}; cpu, cuda or cuda:N was expected.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PeftMoeCompatError("--device is cuda, but torch sees no CUDA device. Pass --device cpu.")
    check_writable(out)
    torch.manual_seed(0)
    with set_backend(settings.backend):
        layer = _Layer(settings)
        rows = list(_measure(layer))
        backend = " and ".join(layer.backends())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    versions = releases.installed_versions("torch", "peft", "transformers")
    title = f"{settings.shape}, r={settings.rank}, {settings.dtype}, {where}, backend {backend}"
    table = Table(title=title)
    for heading in ("tokens", "", "forward + backward ms", "forward ms", "peak MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in sorted(rows, key=lambda row: row.tokens):
        table.add_row(str(row.tokens), row.method, f"{row.both_ms:.2f}", f"{row.forward_ms:.2f}", f"{row.peak_mib:.0f}")
    console.print(table)
    found = {"device": where, "versions": versions, "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    with writing(out):
        (out / "bench.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        plot = _plot(rows, title, out / "bench.png")
    console.print(f"written: {out / 'bench.json'}{plot}", markup=False)
    return rows


def _plot(rows: list[Row], title: str, path: Path) -> str:
    """Draws the rows; says what was written, or that matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return " (no picture: matplotlib is not installed)"
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    tokens = sorted({row.tokens for row in rows})
    panels = (("forward + backward, ms", "both_ms"), ("forward, ms", "forward_ms"), ("peak, MiB", "peak_mib"))
    for axes, (label, name) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, method in enumerate(_METHODS):
            values = [getattr(row, name) for row in rows if row.method == method]
            axes.bar([x + (i - 1) * 0.27 for x in range(len(tokens))], values, width=0.25, label=method)
        axes.set_xticks(range(len(tokens)), [str(n) for n in tokens])
        axes.set_xlabel("tokens")
        axes.set_title(label, fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return f", {path}"
