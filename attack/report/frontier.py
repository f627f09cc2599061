"""Rows of a sweep over defenses -> plots, and one HTML page with the pictures that came back under each.

Reads what `attack.frontier` measured and summed up; measures and decides nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attack.files import write_atomically
from attack.frontier.leak import Attacker
from attack.frontier.summary import LEAKED, STAGES, TEXT, below, key
from attack.report.page import number

PAGE = "index.html"
NAMES = 6
"""Defenses in a line of a plot's key."""
NEAR = 0.04
"""Of a plot's width and height, within which points share a label."""
LEAST_SPAN = 5.0
"""Percentage points of accuracy that a plot shows, so that next to equal ones do not look far apart."""
SHOWN = 6
"""Pictures of one defense and stage on the page."""
COLORS = {Attacker.NAIVE: "#b9770e", Attacker.ADAPTIVE: "#0b6e8c"}
STAGE_NAMES = {"initial": "At initialization", "trained": "After training"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """What came back under one defense, in one stage."""

    stage: str
    pictures: tuple[Mapping[str, Any], ...]
    """Data URIs and PSNRs, as a cell has them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One defense of the page."""

    row: Mapping[str, Any]
    galleries: tuple[Gallery, ...]
    sentences: tuple[Mapping[str, Any], ...]
    """Texts, as a cell has them."""


def write_frontier(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], made: Mapping[str, Any], out: Path
) -> Path:
    """Writes `out/index.html`, which opens offline, and, where something was trained, its plots as `out/leak-*.svg`.

    Args:
        rows: of `attack.frontier.summary.summarize`.
        cells: what they were made of.
        made: `question`, `versions` and counts, to print.

    Returns: the page's path.
    """
    plots: dict[str, bytes] = {}
    if _plotted(rows):
        plots["leak-accuracy.svg"] = _plot(rows, "accuracy", "accuracy after training, %", 100.0)
        title = "bytes sent, % of a plain gradient's"
        plots["leak-bytes.svg"] = _plot(rows, "bytes_share", title, 100.0, logarithmic=True)
    for name, drawn in plots.items():
        write_atomically(out / name, drawn)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attack.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": _percent}
    page = environment.get_template("frontier.html.j2").render(
        sections=[_section(row, cells) for row in rows],
        plots=["data:image/svg+xml;base64," + base64.b64encode(drawn).decode() for drawn in plots.values()],
        made=made,
        stages=STAGES,
        text=TEXT,
        read=any(row[key(TEXT, Attacker.ADAPTIVE, "sentences")] for row in rows),
        stage_names=STAGE_NAMES,
        attackers=[attacker.value for attacker in Attacker],
        key=key,
        leaked=below(LEAKED),
        threshold=f"{LEAKED:g}",
    )
    write_atomically(out / PAGE, page)
    return out / PAGE


def _section(row: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Section:
    def shown(stage: str) -> tuple[Mapping[str, Any], ...]:
        of_stage = (cell for cell in cells if (cell["defense"] or "none") == row["defense"] and cell["stage"] == stage)
        pictures = [picture for cell in of_stage if "failed" not in cell for picture in cell["pictures"]]
        return tuple(pictures[:SHOWN])

    galleries = tuple(Gallery(stage=stage, pictures=shown(stage)) for stage in STAGES if shown(stage))
    return Section(row=row, galleries=galleries, sentences=shown(TEXT))


def _percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _plotted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stages of which there is something to draw: a training, and pictures that were attacked."""
    trained = [row for row in rows if row["accuracy"] is not None]
    leaks = {stage: key(stage, Attacker.ADAPTIVE, below(LEAKED)) for stage in STAGES}
    return [stage for stage, column in leaks.items() if any(row[column] is not None for row in trained)]


def _plot(rows: Sequence[Mapping[str, Any]], what: str, title: str, unit: float, *, logarithmic: bool = False) -> bytes:
    """An SVG of a panel for each stage: the share of pictures read back over `what`, both attackers of a defense joined
    by a line."""
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9, "svg.hashsalt": "gradtap"}):
        figure = Figure(figsize=(10.5, 4.9), layout="constrained")
        stages = _plotted(rows)
        panels = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
        for stage, axes in zip(stages, panels, strict=True):
            _panel(axes, rows, stage, what, unit)
            axes.set_title(STAGE_NAMES[stage])
            axes.set_xlabel(title)
            if logarithmic:
                axes.set_xscale("log")
                axes.set_xticks([2, 5, 10, 20, 50, 100])
                axes.xaxis.set_major_formatter("{x:g}")
                axes.minorticks_off()
        if not logarithmic:
            left, right = panels[0].get_xlim()
            lack = max(0.0, LEAST_SPAN - (right - left)) / 2
            panels[0].set_xlim(left - lack, right + lack)
        for stage, axes in zip(stages, panels, strict=True):  # now that all axes are what they will be
            _label(axes, rows, stage, what, unit)
        panels[0].set_ylabel(f"pictures with mean squared error below {LEAKED:g}, %")
        names = [f"{place} {row['defense']}" for place, row in enumerate(rows, 1)]
        lines = ["    ".join(names[first : first + NAMES]) for first in range(0, len(names), NAMES)]
        figure.supxlabel("\n".join(lines), fontsize=8, color="#5c6670")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], stage: str, what: str, unit: float) -> None:
    column = key(stage, Attacker.ADAPTIVE, below(LEAKED))
    shown = [row for row in rows if row[what] is not None and row[column] is not None]
    for attacker in Attacker:
        column = key(stage, attacker, below(LEAKED))
        x, y = [unit * row[what] for row in shown], [100 * row[column] for row in shown]
        low = [max(0.0, 100 * (row[column] - row[f"{column}_low"])) for row in shown]
        high = [max(0.0, 100 * (row[f"{column}_high"] - row[column])) for row in shown]
        axes.errorbar(x, y, yerr=(low, high), fmt="none", ecolor=COLORS[attacker], alpha=0.25, linewidth=1)
        marker, order = ("o", 3) if attacker is Attacker.ADAPTIVE else ("x", 4)  # a cross on a dot shows both
        axes.plot(x, y, marker, color=COLORS[attacker], markersize=6, label=f"{attacker} attacker", zorder=order)
    for row in shown:
        naive, adaptive = (100 * row[key(stage, attacker, below(LEAKED))] for attacker in Attacker)
        axes.plot([unit * row[what]] * 2, [naive, adaptive], color="#9aa5b1", linewidth=0.8, zorder=1)
    axes.set_ylim(-4, 112)
    axes.margins(x=0.06)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(color="#dcdfe3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _label(axes: Axes, rows: Sequence[Mapping[str, Any]], stage: str, what: str, unit: float) -> None:
    """The rows' numbers at the adaptive attacker's points, those of points that lie on each other together."""
    groups: list[tuple[float, float, list[int]]] = []
    for place, row in enumerate(rows, 1):
        share = row[key(stage, Attacker.ADAPTIVE, below(LEAKED))]
        if row[what] is None or share is None:
            continue
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((unit * row[what], 100 * share)))
        near = [group for group in groups if abs(group[0] - across) < NEAR and abs(group[1] - up) < NEAR]
        if near:
            near[0][2].append(place)
        else:
            groups.append((across, up, [place]))
    for across, up, places in groups:
        axes.annotate(
            ", ".join(map(str, places)),
            (across, up),
            xycoords="axes fraction",
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=8,
            color="#1d2126",
        )
