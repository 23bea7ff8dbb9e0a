"""What people see: results on `out` (stdout), progress and logs on `console` (stderr).

On a terminal both have colour and shape; anywhere else they are plain text that can be pasted, cut and grepped. Rich
honours NO_COLOR by itself.
"""

import re
import sys
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 200  # columns of a table that goes to a file or a pipe: no terminal limits it

out = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, soft_wrap=not sys.stdout.isatty())
console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: Sequence[str] = (),
    as_markdown: bool = False,
) -> None:
    """Print a result on stdout: names to the left, numbers to the right, `notes` below."""
    if as_markdown:
        _print_markdown_table(title, columns, rows)
    elif out.is_terminal:
        _print_rich_table(title, columns, rows)
    else:
        _print_plain_table(title, columns, rows)
    for note in notes:
        out.print(note, markup=False, style="dim")


class Status:
    """What is going on, on stderr: a live bar on a terminal, elsewhere one line for each stage."""

    def __init__(self) -> None:
        self._bar, self._stage = _progress_bar(), ""
        self._num_total: int | None = None
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, stage: str, num_done: int = 0, num_total: int | None = None, detail: str = "") -> None:
        if num_total != self._num_total:  # Rich would keep the old one where there is none now
            self._bar.remove_task(self._task)
            self._task, self._num_total = self._bar.add_task("", total=num_total), num_total
        self._bar.update(self._task, description=f"{stage}  {detail}", completed=num_done)
        if stage != self._stage and not console.is_terminal:
            console.print(stage, markup=False)
        self._stage = stage

    def show_share(self, stage: str, share: float) -> None:
        self.show(stage, round(share * 100), 100)


def _progress_bar() -> Progress:
    """A live bar on stderr: description, bar, done of total, time; nothing at all off a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def format_seconds(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 75 -> '1 min 15 s'"""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _print_rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if _is_numeric(rows, index) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    out.print(table)


def _print_plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    if title:
        out.print(title, markup=False)
    for cells in _aligned(columns, rows):
        out.print("  ".join(cells).rstrip(), markup=False)


def _print_markdown_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    if title:
        out.print(f"{title}\n", markup=False)
    head, *lines = _aligned(columns, rows)
    rule = ["-" * (len(cell) - 1) + (":" if _is_numeric(rows, i) else "-") for i, cell in enumerate(head)]
    for cells in (head, rule, *lines):
        out.print(f"| {' | '.join(cells)} |", markup=False, soft_wrap=True)


def _aligned(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[list[str]]:
    """Head and rows as text, the cells of a column all of one width."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    right = [_is_numeric(rows, index) for index in range(len(columns))]
    return [
        [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        for row in cells
    ]


def _is_numeric(rows: Sequence[Sequence[object]], index: int) -> bool:
    """A column of numbers, written ones too: 1,234 and +3.5% and 12 ± 1.5."""
    cells = [cell for row in rows if (cell := _cell(row[index])) != "-"]
    return bool(cells) and all(re.fullmatch(r"[-+]?[\d,.]+(e[-+]\d+)?%?( ± [\d,.]+)?", cell) for cell in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
