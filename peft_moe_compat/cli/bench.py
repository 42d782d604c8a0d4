"""One experts layer with LoRA on this machine: the frozen base, stock PEFT and this package, time and memory."""

from __future__ import annotations

import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from .. import releases
from ..adapters.base_model import DENSE_INTERMEDIATE, HIDDEN, INTERMEDIATE, NUM_EXPERTS
from ..errors import PeftMoeCompatError
from ..forward.backend import set_backend
from ..forward.fused import backend_of
from ..forward.grouped_mm import alignment
from ..model.wrappers import experts_of
from ..quantising.mxfp4 import BLOCK
from . import results
from .layers import FORMATS, Shape, held_mib, make_experts

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
    format: str = ""  # the experts packed so as well
    dropout: float = 0.0  # this package with it as well

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise PeftMoeCompatError(f"--dtype is {self.dtype!r}; one of {', '.join(_DTYPES)} was expected.")
        E, k, H, I = astuple(self.shape)  # noqa: E741
        if min(E, k, H, I, self.rank, *self.tokens) < 1 or k > E:
            raise PeftMoeCompatError("The shape, --tokens and --rank must be positive, and k at most E.")
        if any(size % (unit := alignment(getattr(torch, self.dtype))) for size in (H, I)):
            raise PeftMoeCompatError(f"H and I are {H} and {I}; transformers' own experts take multiples of {unit}.")
        if self.format not in ("", *FORMATS):
            raise PeftMoeCompatError(f"--format is {self.format!r}; one of {', '.join(FORMATS)} was expected.")
        if self.format == "mxfp4" and (H % BLOCK or I % BLOCK):
            raise PeftMoeCompatError(f"H and I are {H} and {I}; mxfp4 has blocks of {BLOCK}.")
        if not 0 <= self.dropout < 1:
            raise PeftMoeCompatError(f"--dropout is {self.dropout}; a probability below 1 was expected.")

    def methods(self) -> tuple[str, ...]:
        return (*_METHODS, f"{_METHODS[-1]}, dropout {self.dropout:g}") if self.dropout else _METHODS


@dataclass(frozen=True)
class Row:
    """One method on one layer at one number of tokens: medians, and the peak of a step above the weights.

    Where it cannot be measured, these are None and `note` says why.
    """

    stored: str  # a dtype or a format
    weights_mib: float
    method: str
    tokens: int
    both_ms: float | None = None
    forward_ms: float | None = None
    peak_mib: float | None = None
    backend: str = ""  # of this package
    note: str = ""


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
    """Experts of any shape, with random weights, routing and hidden states."""

    def __init__(self, settings: Settings, packed: bool = False) -> None:
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        experts = make_experts(settings.shape, self.dtype, settings.device, settings.format, packed=packed)
        self.weights_mib = held_mib(experts)
        self.block = nn.ModuleDict({"experts": experts})

    def add_lora(self, dropout: float = 0.0) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["experts.gate_up_proj", "experts.down_proj"]
        rank = self.settings.rank
        config = LoraConfig(r=rank, target_modules=[], target_parameters=names, lora_dropout=dropout)
        inject_adapter_in_model(config, self.block)
        for name, parameter in self.block.named_parameters():
            if "lora_" in name:  # float8 as PEFT makes it of such a base; `get_peft_model` casts it
                parameter.data = parameter.data.to(self.dtype)
            parameter.requires_grad_("lora_" in name)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)

    def backend(self) -> str:
        """Of this package."""
        experts = experts_of(self.block["experts"])
        return " and ".join(dict.fromkeys(backend_of(experts, name)[0] for name in ("gate_up_proj", "down_proj")))

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
            lost = 0
            for parameter in self.block.parameters():
                lost += parameter.requires_grad and parameter.grad is None
                parameter.grad = None
            if lost:
                raise PeftMoeCompatError(f"{lost} of the LoRA weights get no gradient.")

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


def _measure(settings: Settings, method: str, packed: bool) -> Iterator[Row]:
    """On a layer of its own: PEFT's forward leaves something behind on packed weights."""
    torch.manual_seed(0)
    ours = method.startswith("peft_moe_compat")
    with results.active(ours):
        layer = _Layer(settings, packed)
        if method != "frozen base":
            layer.add_lora(0.0 if method in _METHODS else settings.dropout)
        note = ""
        for tokens in settings.tokens:
            row = Row(settings.format if packed else settings.dtype, layer.weights_mib, method, tokens)
            if ours:
                row = replace(row, backend=layer.backend(), **_figures(layer, tokens))
            elif not note:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # PEFT's, of a screen each
                        row = replace(row, **_figures(layer, tokens))
                except Exception as error:  # noqa: BLE001 (whatever transformers' and PEFT's own forward trip over)
                    note = _sentence(error)
            yield replace(row, note=note)


def _figures(layer: _Layer, tokens: int) -> dict[str, Any]:
    device = layer.settings.device
    both, forward = layer.steps(tokens)
    return {
        "both_ms": _median_ms(both, device),
        "forward_ms": _median_ms(forward, device),
        "peak_mib": results.peak_mib(both, device),
    }


def _sentence(error: Exception) -> str:
    kind = "" if isinstance(error, PeftMoeCompatError) else f"{type(error).__name__}: "
    return textwrap.shorten(f"not measured: {kind}{error}", 200, placeholder=" ...")


def run(settings: Settings, out: Path, console: Console) -> list[Row]:
    """Measures, prints a table, and writes bench.json and, with matplotlib, bench.png into `out`.

    Raises:
        PeftMoeCompatError: The device or what packs the experts is not there, the backend has another name, `out`
            cannot be written.
    """
    results.check(settings.device, out)
    # A small one first, so that what is not installed is said at once.
    make_experts(Shape(1, 1, 32, 32), torch.float32, "cpu", settings.format, packed=bool(settings.format))
    layers = (False, True) if settings.format else (False,)
    with set_backend(settings.backend):
        rows = [row for packed in layers for method in settings.methods() for row in _measure(settings, method, packed)]
    used = dict.fromkeys(row.backend for row in rows if row.backend)
    on_cpu = settings.device == "cpu"
    where = f"cpu, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(settings.device)
    versions = releases.installed_versions("torch", "peft", "transformers")
    title = f"{settings.shape}, r={settings.rank}, {settings.dtype}, {where}, backend {' and '.join(used)}"
    table = Table(title=title)
    for heading in ("tokens", "weights", "", "forward + backward ms", "forward ms", "peak MiB"):
        table.add_column(heading, justify="left" if heading in ("weights", "") else "right")
    for row in sorted(rows, key=lambda row: row.tokens):
        figures = (_shown(row.both_ms, 2), _shown(row.forward_ms, 2), _shown(row.peak_mib, 0))
        method = Text("\n".join(filter(None, (row.method, row.note))))
        table.add_row(str(row.tokens), f"{row.stored}, {row.weights_mib:.1f} MiB", method, *figures)
    console.print(table)
    found = {"device": where, "versions": versions, "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
    console.print(results.save(out, "bench", found, lambda figure: _draw(figure, rows, title)), markup=False)
    return rows


def _shown(figure: float | None, digits: int) -> str:
    return "" if figure is None else f"{figure:.{digits}f}"


def _draw(figure: Any, rows: list[Row], title: str) -> None:
    figure.set_size_inches(11, 4)
    figure.suptitle(title, fontsize=10)
    groups = list(dict.fromkeys(f"{row.tokens} tokens" for row in rows))
    panels = (("forward + backward, ms", "both_ms"), ("forward, ms", "forward_ms"), ("peak, MiB", "peak_mib"))
    several = len({row.stored for row in rows}) > 1
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(f"{row.method}, {row.stored}" if several else row.method, []).append(row)
    measured = {label: of for label, of in series.items() if not any(row.note for row in of)}
    for axes, (label, name) in zip(figure.subplots(1, 3), panels, strict=True):
        results.bars(axes, label, groups, {label: [getattr(row, name) for row in of] for label, of in measured.items()})
