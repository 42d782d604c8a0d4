"""What the commands on adapter files print: tables and sentences, with what a file holds in escapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

if TYPE_CHECKING:
    from ..adapters.conclusions import Conclusion, ExpertsSummary, Finding, Inspection, ReaderVerdict
    from ..adapters.convert import Conversion
    from ..adapters.merge import Merge, Rounding
    from ..adapters.verify import Verification
    from ..adapters.verify_merge import MergedWeight, MergeVerification

__all__ = [
    "escape",
    "plain",
    "show_conversion",
    "show_inspection",
    "show_merge",
    "show_merge_verification",
    "show_verification",
]


def plain(text: object) -> str:
    """A text with all that is none to print, as a file may hold it, in escapes: it could steer the terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def escape(text: str) -> str:
    """The same, to stand in rich's markup."""
    return escape_markup(plain(text))


_MARKS = {"reads": "[green]reads it[/]", "wrong": "[red]may load wrongly[/]", "fails": "fails", "unknown": "?"}


def show_inspection(found: Inspection, console: Console) -> None:
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
    if found.content is not None:
        console.print(_contents_table(found.content) if found.content else "content: nothing out of the ordinary")
    pair = f" (PEFT beside transformers {found.transformers})" if found.transformers else ""
    readers = Table(title=f"What each reader would do with it{pair}", show_header=False)
    readers.add_column()
    readers.add_column()
    readers.add_column(overflow="fold")
    for reader, verdict in _folded(found.readers):
        readers.add_row(reader, _MARKS[verdict.verdict], escape(verdict.why))
    console.print(readers)
    for note in found.notes:
        console.print(plain(f"note: {note}"), markup=False, highlight=False)


def _folded(readers: Mapping[str, ReaderVerdict]) -> Iterator[tuple[str, ReaderVerdict]]:
    """The verdicts, one for neighbouring releases of which the same is to be said."""

    def alike(item: tuple[str, ReaderVerdict]) -> tuple[str, ReaderVerdict | None]:
        return (item[0].partition(" >=")[0] if item[1].in_general else item[0]), item[1].in_general

    for (_, general), group in groupby(readers.items(), key=alike):
        (first, verdict), *more = group
        if general is not None and more:
            start, end = first.partition(", <")[0], more[-1][0].partition(", <")[1:]
            yield start + "".join(end), general
        else:
            yield first, verdict


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


_LEVELS = {"error": "[red]error[/]", "warning": "[yellow]warning[/]", "note": "note"}


def _contents_table(content: tuple[Finding, ...]) -> Table:
    """Modules about which the same is to be said share a row."""
    table = Table(title="What the numbers show", show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    alike: dict[tuple[str, str | None], list[Finding]] = {}
    for finding in content:
        alike.setdefault((finding.code, finding.projection), []).append(finding)
    for (_, projection), group in alike.items():
        first, *more = group
        where = first.path if not more else f"{first.path} and {len(more)} more"
        table.add_row(_LEVELS[first.level], escape(where), escape(projection or ""), escape(str(first)))
    return table


_EXACTNESS = {
    "bits": "every factor is kept bit for bit",
    "round-off": "exact up to float32 round-off, where scalings were folded",
    "lossy": "something was left out",
}

_KNOWN = {"model": "proof", "rules": "judged", "none": "unproven"}


def show_conversion(done: Conversion, console: Console) -> None:
    console.print(plain(f"{done.out}: for {done.target}; {_EXACTNESS[done.exactness]}."), markup=False, highlight=False)
    for step in done.steps:
        console.print(plain(f"  {step}"), markup=False, highlight=False)
    console.print(plain(f"{_KNOWN[done.proof.by]}: {done.proof}."), markup=False, highlight=False)


def show_verification(found: Verification, console: Console) -> None:
    table = Table(title="Differences of the updates")
    columns = ["module", "projection", "max", "relative"]
    if any(row.note for row in found.rows):
        columns.append("not compared")
    for column in columns:
        table.add_column(column, overflow="fold")
    rows = sorted(found.rows, key=lambda row: -row.relative_difference)
    for row in rows[:20]:
        numbers = f"{row.max_difference:.2g}", f"{row.relative_difference:.2g}"
        table.add_row(
            escape(row.name), escape(row.projection), *numbers, *[escape(row.note)] * (len(table.columns) - 4)
        )
    console.print(table)
    if len(rows) > 20:
        console.print(f"and {len(rows) - 20} more with smaller differences")
    verdict = "the same" if found.same else "[red]not the same[/]"
    console.print(f"{verdict}: largest relative difference {found.worst:.2g}, tolerance {found.tolerance:g}")


def show_merge(done: Merge, console: Console) -> None:
    table = Table(title="What rounding to the base's format changes, relative to the update")
    for column in ("module", "projection", "format", "overall", "worst"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, str], list[Rounding]] = {}
    for row in done.rows:
        alike.setdefault((row.projection, row.format), []).append(row)
    for (projection, form), rows in alike.items():
        where = rows[0].path if len(rows) == 1 else f"{rows[0].path} and {len(rows) - 1} more"
        update = sum(row.update**2 for row in rows) ** 0.5
        error = sum((row.relative * row.update) ** 2 for row in rows) ** 0.5
        worst = max(row.relative for row in rows)
        cells = escape(where), escape(projection), form, f"{error / (update or 1):.2g}", f"{worst:.2g}"
        table.add_row(*cells)
    console.print(table)
    if done.replaced:
        whole = ", ".join(done.replaced)
        console.print(plain(f"taken whole from the adapter: {whole}"), markup=False, highlight=False)
    if done.left_adapter:
        console.print("An adapter lay beside the base: its files are left out, and it is not merged.")
    console.print(plain(f"{done.out}: written."), markup=False, highlight=False)


def show_merge_verification(found: MergeVerification, console: Console) -> None:
    table = Table(
        title="The merged weights against base and adapter, of each projection where it is worst",
        caption="error: norm of merged - base - update, right up to the rounding. rounding: what the base's format "
        "costs at most. update: norm of what the adapter adds.",
    )
    notes = ("note",) * any(row.note for row in found.rows)
    for column in ("module", "projection", "error", "rounding", "update", *notes):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, str], list[MergedWeight]] = {}
    for row in sorted(found.rows, key=lambda row: (row.same, -row.error)):
        alike.setdefault((row.projection, row.note), []).append(row)
    for (projection, note), rows in alike.items():
        worst = max(rows, key=lambda row: row.excess)
        where = worst.name if len(rows) == 1 else f"{worst.name} and {len(rows) - 1} more"
        numbers = ("", "", "") if note else (f"{worst.error:.2g}", f"{worst.explained:.2g}", f"{worst.update:.2g}")
        table.add_row(escape(where), escape(projection), *numbers, *[escape(note)] * len(notes))
    console.print(table)
    if found.absent:
        console.print("The adapter is in none of the weights compared: is this the base, or another merge?")
    console.print("merged as it should be" if found.same else "[red]not merged as it should be[/]")
