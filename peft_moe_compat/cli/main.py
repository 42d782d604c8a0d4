"""The command line: `peft-moe-compat check`, `demo`, `bench`, the switch, and the commands on adapter files.

torch, PEFT and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..errors import PeftMoeCompatError
from . import adapters, switch, trainers
from .check import examine, show

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="LoRA on Mixture-of-Experts models: one layout and one grouped-mm forward for every PEFT release.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-moe-compat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


adapters.register(app)
switch.register(app)
trainers.register(app)


@app.command()
def check(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Shows whether the package works here: versions, layout rule, probe, backends, known issues. Exit code 0 or 1."""
    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, Console())
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
    packed: Annotated[
        str,
        typer.Option(
            "--format",
            help="nf4, fp4, int8, fp8, mxfp4, torchao-int8 or torchao-float8: the experts packed so beside plain ones.",
        ),
    ] = "",
    dropout: Annotated[float, typer.Option(help="lora_dropout: this package with it beside without.")] = 0.0,
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
            format=packed,
            dropout=dropout,
        )
        layer_bench.run(settings, out, Console())
    except PeftMoeCompatError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
