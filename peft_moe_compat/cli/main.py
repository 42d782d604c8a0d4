"""The command line: `peft-moe-compat check`, `demo`, `bench`, and the commands on adapter files.

torch, PEFT and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import PeftMoeCompatError
from . import demo as demo_run
from .adapters import register
from .check import examine, show

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="LoRA on Mixture-of-Experts models: one layout and one grouped-mm forward for every PEFT release.",
)

register(app)


@app.command()
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Shows whether the package works here: versions, layout rule, probe, backends, known issues. Exit code 0 or 1."""
    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, Console())
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = demo_run.Settings.device,
    steps: Annotated[int, typer.Option(help="LoRA steps of each run.")] = demo_run.Settings.steps,
    prepare_steps: Annotated[int, typer.Option(help="Steps to train the base.")] = demo_run.Settings.prepare_steps,
    hidden_size: Annotated[int, typer.Option(help="Also the experts' width.")] = demo_run.Settings.hidden_size,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = demo_run.Settings.experts,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = demo_run.Settings.layers,
    rank: Annotated[int, typer.Option(help="LoRA rank of one expert.")] = demo_run.Settings.rank,
    tokens: Annotated[int, typer.Option(help="Tokens per step.")] = demo_run.Settings.tokens,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(demo_run.Settings.models),
    tolerance: Annotated[float, typer.Option(help="Allowed difference.")] = demo_run.Settings.tolerance,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-output"),
) -> None:
    """Fine-tunes LoRA on the experts of two small models, with stock PEFT and with this package, and compares.

    Exit code 1 if the loss curves differ, or if stock PEFT reads another model from a saved adapter.
    """
    try:
        settings = demo_run.Settings(
            device=device,
            steps=steps,
            prepare_steps=prepare_steps,
            hidden_size=hidden_size,
            experts=experts,
            layers=layers,
            rank=rank,
            tokens=tokens,
            models=tuple(dict.fromkeys(name.strip() for name in models.split(","))),
            tolerance=tolerance,
        )
        problems = demo_run.run(settings, out, Console())
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
    repeats: Annotated[int, typer.Option(help="Runs of which the median is taken.")] = 9,
    backend: Annotated[str, typer.Option(help="auto, triton, torch or loop, of this package.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("bench-output"),
) -> None:
    """Times one experts layer on this machine: the frozen base, stock PEFT and this package, forward and backward."""
    import torch

    from . import bench as layer_bench

    try:
        sizes = layer_bench.shape_of_config(model) if model else layer_bench.Shape.parse(shape or "128,8,2048,768")
        settings = layer_bench.Settings(
            shape=sizes,
            tokens=layer_bench.token_counts(tokens),
            rank=rank,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            repeats=repeats,
            backend=backend,
        )
        layer_bench.run(settings, out, Console())
    except PeftMoeCompatError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
