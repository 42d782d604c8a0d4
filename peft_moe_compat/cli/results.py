"""What `bench` and `demo` share: what they check first, the memory of a step, and where their results go."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import PeftMoeCompatError
from ..patching import activation

__all__ = ["active", "bars", "check", "peak_mib", "save"]


@contextmanager
def active(wanted: bool) -> Iterator[None]:
    """The package active, or not, whatever it was before."""
    was = activation.is_active()
    (activation.activate if wanted else activation.deactivate)()
    try:
        yield
    finally:
        (activation.activate if was else activation.deactivate)()


def peak_mib(step: Callable[[], object], device: str) -> float:
    """Highest sum of live allocations during one step, above what is in use before it."""
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


def check(device: str, folder: Path) -> None:
    """Raises `PeftMoeCompatError` unless there is such a device and the folder can be made and written."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise PeftMoeCompatError(f"--device is {device!r}; cpu, cuda or cuda:N was expected.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise PeftMoeCompatError(f"--device is {device}, but torch sees no CUDA device. Pass --device cpu.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PeftMoeCompatError(f"--out {folder} cannot be written: {error}") from error


def save(folder: Path, name: str, document: Mapping[str, Any], draw: Callable[[Any], None]) -> str:
    """Writes `name.json`, and as `name.png` the matplotlib figure that `draw` fills; says what was written."""
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"written: {folder / f'{name}.json'} (no picture: matplotlib is not installed)"
    figure = Figure(layout="constrained")
    draw(figure)
    figure.savefig(folder / f"{name}.png", dpi=120)
    return f"written: {folder / f'{name}.json'}, {folder / f'{name}.png'}"


def bars(axes: Any, title: str, groups: Sequence[str], heights: Mapping[str, Sequence[float]]) -> None:
    """Draws a bar for each label in each group: label -> one height a group."""
    step = min(0.27, 0.81 / max(1, len(heights)))
    for i, (label, values) in enumerate(heights.items()):
        drawn = axes.bar([x + step * i for x in range(len(groups))], values, width=0.93 * step, label=label)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks([x + step * (len(heights) - 1) / 2 for x in range(len(groups))], groups)
    axes.set_title(title)
    axes.margins(y=0.35)
    axes.legend(fontsize=7, loc="upper left")
