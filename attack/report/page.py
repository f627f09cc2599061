"""Chapters -> one HTML file without a single reference to a network: pictures, plots and style live inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2

from attack.files import write_atomically
from attack.report import plot
from attack.report.chapter import Chapter, View, view

PAGE = "index.html"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Over all chapters."""

    victims: int
    converged: int
    filled: int
    read_back: int


def write_report(recordings: Sequence[Chapter], out: Path) -> Path:
    """Writes `out/index.html`.

    Returns: its path.

    Raises: AnswerError: a file of a chapter is missing or damaged.
    """
    views = [view(chapter) for chapter in recordings]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attack.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template("page.html.j2").render(views=views, totals=_totals(views), plot_box=plot)
    write_atomically(out / PAGE, page)
    return out / PAGE


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people: `96.2`, `3.1 × 10⁻⁷`; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 10.0**-digits:
        return f"{value:.{digits}f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def _totals(views: Sequence[View]) -> Totals:
    return Totals(
        victims=sum(view.counts["victims"] for view in views),
        converged=sum(view.counts["converged"] for view in views),
        filled=sum(view.counts["filled"] for view in views),
        read_back=sum(view.counts["read_back"] for view in views),
    )
