"""The commands on adapter files: inspect, convert, verify. Exit code 2 for input that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import PeftMoeCompatError

if TYPE_CHECKING:
    from ..adapters.conclusions import Conclusion, ExpertsSummary, Inspection
    from ..adapters.convert import Conversion
    from ..adapters.verify import Verification

__all__ = ["register"]

_Adapter = Annotated[str, typer.Argument(help="Folder of an adapter, or a Hub id.", show_default=False)]
_Model = Annotated[
    str | None, typer.Option("--model", help="The base model's config: a folder, a config.json or a Hub id.")
]
_WrittenBy = Annotated[
    str | None, typer.Option("--written-by", help="peft==VERSION[,transformers==VERSION], where the file is silent.")
]
_Orientation = Annotated[str | None, typer.Option(help="linear or reversed, where neither shapes nor writer tell.")]
_Packing = Annotated[str | None, typer.Option(help="rank_major or grouped, where the file does not show it.")]
_Nesting = Annotated[
    str | None, typer.Option(help="Parameters, innermost wrapper first, with commas; where the shapes do not tell.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

_MARKS = {"reads": "[green]reads it[/]", "wrong": "[red]wrong, silently[/]", "fails": "fails", "unknown": "?"}


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(inspect)
    app.command()(convert)
    app.command()(verify)


def inspect(
    adapter: _Adapter,
    model: _Model = None,
    written_by: _WrittenBy = None,
    orientation: _Orientation = None,
    packing: _Packing = None,
    nesting: _Nesting = None,
    as_json: _Json = False,
) -> None:
    """Says who wrote an adapter, how its experts' LoRA is laid out, how sure that is, and who can read it."""
    with _errors(as_json):
        from ..adapters.inspect import inspect_adapter

        found = inspect_adapter(
            adapter,
            model=model,
            written_by=written_by,
            orientation=orientation,
            packing=packing,
            nesting=_names(nesting),
        )
        if as_json:
            typer.echo(found.to_json())
        else:
            _show_inspection(found, Console())


def convert(
    adapter: _Adapter,
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="peft (the one installed), peft==VERSION[,transformers==VERSION], per-expert, vllm, sglang, llama.cpp."
        ),
    ] = "peft",
    model: _Model = None,
    written_by: _WrittenBy = None,
    orientation: _Orientation = None,
    packing: _Packing = None,
    nesting: _Nesting = None,
    fill_missing: Annotated[bool, typer.Option(help="Give experts without LoRA one of zeros.")] = False,
    allow_lossy: Annotated[bool, typer.Option(help="Leave out what the reader cannot take.")] = False,
    as_json: _Json = False,
) -> None:
    """Writes an adapter in the form a reader takes. The input is never changed, and nothing is overwritten."""
    with _errors(as_json):
        from ..adapters.convert import convert_adapter

        with _progress("converting") as advance:
            done = convert_adapter(
                adapter,
                out,
                to=to,
                model=model,
                written_by=written_by,
                orientation=orientation,
                packing=packing,
                nesting=_names(nesting),
                fill_missing=fill_missing,
                allow_lossy=allow_lossy,
                progress=advance,
            )
        if as_json:
            typer.echo(json.dumps(done.to_dict(), indent=2))
        else:
            _show_conversion(done, Console())


def verify(
    adapter: _Adapter,
    other: Annotated[
        str | None, typer.Argument(help="What became of it: a folder or a Hub id.", show_default=False)
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Compare the merged with the unmerged experts instead; needs --model.")
    ] = False,
    model: _Model = None,
    written_by: _WrittenBy = None,
    orientation: _Orientation = None,
    packing: _Packing = None,
    nesting: _Nesting = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference that counts as the same; 1e-6, with --merged 1e-5."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Compares two adapters by the updates they make to each expert, or an adapter with itself merged.

    Exit code 1 where they differ.
    """
    with _errors(as_json):
        said = {
            "model": model,
            "written_by": written_by,
            "orientation": orientation,
            "packing": packing,
            "nesting": _names(nesting),
        }
        found = _verified(adapter, other, merged, said, tolerance)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        else:
            _show_verification(found, Console())
        raise typer.Exit(0 if found.same else 1)


def _verified(
    adapter: str, other: str | None, merged: bool, said: Mapping[str, Any], tolerance: float | None
) -> Verification:
    if merged == (other is not None):
        raise typer.BadParameter("give either a second adapter or --merged")
    allowed: dict[str, Any] = {} if tolerance is None else {"tolerance": tolerance}
    with _progress("comparing") as advance:
        if merged:
            from ..adapters.merged import verify_merged

            return verify_merged(adapter, **said, **allowed, progress=advance)
        from ..adapters.verify import verify_adapters

        return verify_adapters(adapter, str(other), **said, **allowed, progress=advance)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turns this package's errors into a message, or a JSON object, and exit code 2."""
    try:
        yield
    except PeftMoeCompatError as error:
        if as_json:
            typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=2))
        else:
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None


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


def _show_inspection(found: Inspection, console: Console) -> None:
    table = Table(title=escape(found.path), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    megabytes = found.total_bytes / 2**20
    table.add_row("files", escape(", ".join(found.files)))
    table.add_row("tensors", f"{found.num_tensors}, {megabytes:.1f} MiB; {found.other_tensors} of them not on experts")
    table.add_row("form", found.form)
    if found.model_type:
        table.add_row("base model", escape(found.model_type))
    for name in ("writer", "orientation", "packing", "nesting"):
        table.add_section()
        _add_conclusion(table, name, getattr(found, name))
    console.print(table)
    if found.modules:
        console.print(_modules_table(found.modules))
    readers = Table(title="What each reader would do with it", show_header=False)
    readers.add_column()
    readers.add_column()
    readers.add_column(overflow="fold")
    for reader, verdict in found.readers.items():
        readers.add_row(reader, _MARKS[verdict.verdict], escape(verdict.why))
    console.print(readers)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _add_conclusion(table: Table, name: str, conclusion: Conclusion) -> None:
    value = escape(conclusion.value) if conclusion.value is not None else "[yellow]not settled[/]"
    table.add_row(name, f"[bold]{value}[/] ({conclusion.confidence})" if conclusion.decided else value)
    for reason in conclusion.evidence:
        table.add_row("", f"[dim]{escape(str(reason))}[/]")
    if conclusion.settle:
        table.add_row("", f"[yellow]{escape(f'settle it with {conclusion.remedy}')}[/]")


def _modules_table(modules: tuple[ExpertsSummary, ...]) -> Table:
    """Modules that look alike share a row."""
    table = Table(title="LoRA on experts")
    for column in ("module", "E", "projection", "rank", "scaling", "in", "out"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for module in modules:
        alike.setdefault((module.num_experts, module.projections), []).append(module.path)
    for (count, projections), paths in alike.items():
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        for index, p in enumerate(projections):
            cells = (p.name, p.rank, None if p.scaling is None else f"{p.scaling:g}", p.in_features, p.out_features)
            shown = ["?" if cell is None else str(cell) for cell in cells]
            first = (escape(where), "?" if count is None else str(count)) if index == 0 else ("", "")
            table.add_row(*first, *map(escape, shown))
    return table


_EXACTNESS = {
    "bits": "every factor is kept bit for bit",
    "round-off": "exact up to float32 round-off, where scalings were folded",
    "lossy": "something was left out",
}


def _show_conversion(done: Conversion, console: Console) -> None:
    console.print(f"{done.out}: for {done.target}; {_EXACTNESS[done.exactness]}.", markup=False, highlight=False)
    for step in done.steps:
        console.print(f"  {step}", markup=False, highlight=False)


def _show_verification(found: Verification, console: Console) -> None:
    table = Table(title="Differences of the updates")
    for column in ("module", "projection", "max", "relative", ""):
        table.add_column(column, overflow="fold")
    rows = sorted(found.rows, key=lambda row: -row.relative_difference)
    for row in rows[:20]:
        table.add_row(
            escape(row.name),
            escape(row.projection),
            f"{row.max_difference:.2g}",
            f"{row.relative_difference:.2g}",
            escape(row.note),
        )
    console.print(table)
    if len(rows) > 20:
        console.print(f"and {len(rows) - 20} more with smaller differences")
    verdict = "the same" if found.same else "[red]not the same[/]"
    console.print(f"{verdict}: largest relative difference {found.worst:.2g}, tolerance {found.tolerance:g}")
