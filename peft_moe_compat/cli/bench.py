"""One experts layer with LoRA on this machine: the frozen base, stock PEFT and this package, time and memory."""

from __future__ import annotations

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
from . import results

__all__ = ["Row", "Settings", "Shape", "integers", "run", "shape_of_config"]

_WARM_UP, _REPEATS = 2, 9
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


def integers(option: str, text: str, count: int | None = None) -> tuple[int, ...]:
    """The integers of an option, as in "512,2048": so many of them, or any number."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or count not in (None, len(found)):
        raise PeftMoeCompatError(
            f"{option} is {text!r}; {count or 'any number of'} integers with commas were expected."
        )
    return found


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    shape: Shape
    tokens: tuple[int, ...] = (512, 2048, 8192)
    rank: int = 16
    device: str = "cuda"
    dtype: str = "bfloat16"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise PeftMoeCompatError(f"--dtype is {self.dtype!r}; one of {', '.join(_DTYPES)} was expected.")
        E, k, H, I = astuple(self.shape)  # noqa: E741
        if min(E, k, H, I, self.rank, *self.tokens) < 1 or k > E:
            raise PeftMoeCompatError("The shape, --tokens and --rank must be positive, and k at most E.")
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
        found[letter] = next((size for size in sizes if isinstance(size, int)), 0)
        if not found[letter]:
            raise PeftMoeCompatError(f"The config {path!r} has none of {names}: pass --shape E,k,H,I instead.")
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
            self.block = nn.ModuleDict({"experts": Qwen3MoeExperts(config).to(self.dtype)})
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)

    def add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=self.settings.rank, target_modules=[], target_parameters=names)
        inject_adapter_in_model(config, self.block)
        for name, parameter in self.block.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)

    def steps(self, tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """(forward and backward, forward) over fresh inputs."""
        shape, device = self.settings.shape, self.settings.device
        hidden = torch.randn(tokens, shape.H, device=device, dtype=self.dtype)
        weights, index = torch.randn(tokens, shape.E, device=device).softmax(-1).topk(shape.k)
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


def _median_ms(step: Callable[[], None], device: str) -> float:
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[_WARM_UP:])


def _measure(layer: _Layer) -> Iterator[Row]:
    settings = layer.settings
    for method in _METHODS:
        if method == "stock PEFT":
            layer.add_lora()
        with results.active(method == "peft_moe_compat"):
            for tokens in settings.tokens:
                both, forward = layer.steps(tokens)
                times = _median_ms(both, settings.device), _median_ms(forward, settings.device)
                yield Row(method, tokens, *times, results.peak_mib(both, settings.device))


def run(settings: Settings, out: Path, console: Console) -> list[Row]:
    """Measures, prints a table, and writes bench.json and, with matplotlib, bench.png into `out`.

    Raises:
        PeftMoeCompatError: The device is not there, the backend has another name, or `out` cannot be written.
    """
    results.check(settings.device, out)
    torch.manual_seed(0)
    with set_backend(settings.backend):
        layer = _Layer(settings)
        rows = list(_measure(layer))
        experts = experts_of(layer.block["experts"])
        used = dict.fromkeys(backend_of(experts, name)[0] for name in ("gate_up_proj", "down_proj"))
    on_cpu = settings.device == "cpu"
    where = f"cpu, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(settings.device)
    versions = releases.installed_versions("torch", "peft", "transformers")
    title = f"{settings.shape}, r={settings.rank}, {settings.dtype}, {where}, backend {' and '.join(used)}"
    table = Table(title=title)
    for heading in ("tokens", "", "forward + backward ms", "forward ms", "peak MiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in sorted(rows, key=lambda row: row.tokens):
        table.add_row(str(row.tokens), row.method, f"{row.both_ms:.2f}", f"{row.forward_ms:.2f}", f"{row.peak_mib:.0f}")
    console.print(table)
    found = {"device": where, "versions": versions, "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    console.print(results.save(out, "bench", found, lambda figure: _draw(figure, rows, title)), markup=False)
    return rows


def _draw(figure: Any, rows: list[Row], title: str) -> None:
    figure.set_size_inches(11, 4)
    figure.suptitle(title, fontsize=10)
    groups = list(dict.fromkeys(f"{row.tokens} tokens" for row in rows))
    panels = (("forward + backward, ms", "both_ms"), ("forward, ms", "forward_ms"), ("peak, MiB", "peak_mib"))
    for axes, (label, name) in zip(figure.subplots(1, 3), panels, strict=True):
        heights = {method: [getattr(row, name) for row in rows if row.method == method] for method in _METHODS}
        results.bars(axes, label, groups, heights)
