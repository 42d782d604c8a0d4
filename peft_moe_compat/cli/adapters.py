"""The commands on adapter files: inspect, convert, merge, verify. Exit code 2 for input that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import PeftMoeCompatError
from .adapter_tables import (
    plain,
    show_conversion,
    show_inspection,
    show_merge,
    show_merge_verification,
    show_verification,
)

__all__ = ["register"]

_Adapter = Annotated[str, typer.Argument(help="Folder of an adapter, or a Hub id.", show_default=False)]
# What the caller knows of an adapter, beside it: an option of every command.
_STATED = {
    "model": Annotated[
        str | None, typer.Option("--model", help="The base model's config: a folder, a config.json or a Hub id.")
    ],
    "written_by": Annotated[
        str | None,
        typer.Option("--written-by", help="peft==X[,transformers==Y], where the file is silent."),
    ],
    "orientation": Annotated[
        str | None, typer.Option(help="linear or reversed, where neither shapes nor writer tell.")
    ],
    "packing": Annotated[str | None, typer.Option(help="rank_major or grouped, where the file does not show it.")],
    "nesting": Annotated[
        str | None, typer.Option(help="Parameters, innermost wrapper first, with commas; where the shapes do not tell.")
    ],
}
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (inspect, convert, merge, verify):
        app.command()(_with_stated(command))


def _with_stated(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `_STATED` for its parameter `stated`, and with exit code 2 for this package's
    errors, which become a message or a JSON object.
    """
    own = list(signature(command, eval_str=True).parameters.values())
    at = [parameter.name for parameter in own].index("stated")
    options = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=a) for name, a in _STATED.items()]
    parameters = [*own[:at], *options, *own[at + 1 :]]

    @wraps(command)
    def with_options(**given: Any) -> None:
        stated = {name: given.pop(name) for name in _STATED}
        if stated["nesting"] is not None:
            stated["nesting"] = [name.strip() for name in stated["nesting"].split(",")]
        try:
            command(**given, stated=stated)
        except PeftMoeCompatError as error:
            if given["as_json"]:
                typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=2))
            else:
                Console(stderr=True).print(plain(f"error: {error}"), style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None

    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def inspect(
    adapter: _Adapter,
    *,
    stated: dict[str, Any],
    content: Annotated[bool, typer.Option(help="Read every tensor and say what is wrong with the numbers.")] = True,
    as_json: _Json = False,
) -> None:
    """Says who wrote an adapter, how its experts' LoRA is laid out, who can read it, and what its numbers show."""
    from ..adapters.inspect import inspect_adapter

    with _progress("reading") as advance:
        found = inspect_adapter(adapter, **stated, content=content, progress=advance)
    _answer(found, show_inspection, as_json)


def convert(
    adapter: _Adapter,
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.", show_default=False)],
    *,
    to: Annotated[
        str,
        typer.Option(
            help="peft (the one installed), peft==X[,transformers==Y], per-expert, vllm (right in every release from "
            "0.28 on), vllm==X, sglang, llama.cpp, shared-outer."
        ),
    ] = "peft",
    stated: dict[str, Any],
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Part of module paths -> what the model calls it, as backbone=model.",
        ),
    ] = None,
    fill_missing: Annotated[bool, typer.Option(help="Give experts without LoRA one of zeros.")] = False,
    allow_lossy: Annotated[bool, typer.Option(help="Leave out what the reader cannot take.")] = False,
    as_json: _Json = False,
) -> None:
    """Writes an adapter in the form a reader takes. The input is never changed, and nothing is overwritten."""
    from ..proving import convert_adapter

    stated |= {"rename": rename or (), "fill_missing": fill_missing, "allow_lossy": allow_lossy}
    with _progress("converting") as advance:
        done = convert_adapter(adapter, out, to=to, **stated, progress=advance)
    _answer(done, show_conversion, as_json)


def merge(
    base: Annotated[str, typer.Argument(help="Folder of the base model, with safetensors, or a Hub id.")],
    adapter: _Adapter,
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.", show_default=False)],
    *,
    stated: dict[str, Any],
    as_json: _Json = False,
) -> None:
    """Writes the base model with the adapter in its weights, in the base's own dtypes and packed formats."""
    from ..adapters.merge import merge_adapter

    with _progress("merging") as advance:
        done = merge_adapter(base, adapter, out, **stated, progress=advance)
    _answer(done, show_merge, as_json)


def verify(
    adapter: _Adapter,
    other: Annotated[str, typer.Argument(help="What became of it: a folder or a Hub id.", show_default=False)],
    *,
    stated: dict[str, Any],
    base: Annotated[
        str | None, typer.Option(help="The other is this base model with the adapter merged: compare the outputs.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference that counts as the same.")] = 1e-6,
    as_json: _Json = False,
) -> None:
    """Compares two adapters, or a merged model, by the updates made to each expert. Exit code 1 where they differ."""
    from ..adapters.verify import verify_adapters
    from ..adapters.verify_merge import verify_merge

    if base is not None:
        with _progress("comparing") as advance:
            merged = verify_merge(base, adapter, other, **stated, progress=advance)
        _answer(merged, show_merge_verification, as_json)
        raise typer.Exit(0 if merged.same else 1)
    with _progress("comparing") as advance:
        found = verify_adapters(adapter, other, **stated, tolerance=tolerance, progress=advance)
    _answer(found, show_verification, as_json)
    raise typer.Exit(0 if found.same else 1)


def _answer(found: Any, show: Callable[[Any, Console], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show(found, Console())


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's standard error, shown once there is something to wait for."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
