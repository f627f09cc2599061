"""Where people read: progress and logs on standard error, so that standard output stays for the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

console = Console(stderr=True, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> str:
    """A table as text, numbers to the right. What cannot be said (None) is a dash."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    body = [["-" if cell is None else _text(cell) for cell in row] for row in rows]
    raw = list(zip(*body, strict=True)) if body else [()] * len(columns)
    for name, cells in zip(columns, raw, strict=True):
        numbers = all(
            cell in ("-", "yes", "no") or cell.replace(".", "", 1).lstrip("+-")[:1].isdigit() for cell in cells
        )
        drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in body:
        drawn.add_row(*row)
    # A fixed width where nobody looks: what is written to a file must not depend on the terminal.
    out = Console(highlight=False, markup=False, width=None if Console().is_terminal else 120)
    with out.capture() as captured:
        out.print(drawn)
    return captured.get().rstrip()


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)
