"""What repeated timings say: medians, spread, and ratios to a baseline that was timed beside them.

Takes numbers, gives a row; knows nothing of what was timed. An absolute time alone proves nothing on a shared machine:
only the ratio of two things that were timed in the same repetition does.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One way, timed several times beside its baseline."""

    name: str
    baseline: str
    """Name of the case of the same setting that ratios refer to."""
    setting: dict[str, int]
    """What was held equal with the baseline."""
    repetitions: int
    median_s: float
    fastest_s: float
    quartiles_s: tuple[float, float]
    ratio: float
    """Median over the repetitions of this case's time over the baseline's of the same repetition."""
    ratio_quartiles: tuple[float, float]
    cpu_s: float
    """CPU seconds of all processes, mean of the repetitions."""
    mb_per_cpu_s: float | None = None
    """Megabytes (10**6) of its file that it handles in a CPU second; None where there is no file."""
    limit: float | None = None
    """What the ratio should not be above; None where nothing was set."""

    @classmethod
    def of(
        cls,
        name: str,
        seconds: Sequence[float],
        *,
        baseline: tuple[str, Sequence[float]],
        setting: dict[str, int],
        cpu_s: float,
        mb_per_cpu_s: float | None = None,
        limit: float | None = None,
    ) -> Case:
        """Of the times of one case, and the baseline's in the same repetitions."""
        ratios = [mine / its for mine, its in zip(seconds, baseline[1], strict=True)]
        return cls(
            name=name,
            baseline=baseline[0],
            setting=setting,
            repetitions=len(seconds),
            median_s=statistics.median(seconds),
            fastest_s=min(seconds),
            quartiles_s=quartiles(seconds),
            ratio=statistics.median(ratios),
            ratio_quartiles=quartiles(ratios),
            cpu_s=cpu_s,
            mb_per_cpu_s=mb_per_cpu_s,
            limit=limit,
        )


def as_json(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The rows of `cases[]`."""
    return [dataclasses.asdict(case) for case in cases]


def as_text(cases: Sequence[Case], *, title: str) -> str:
    """A table for people."""
    table = Table(title=title, title_justify="left")
    for name in cases[0].setting:
        table.add_column(name, justify="right")
    table.add_column("case")
    for name in ("median ms", "quartiles ms", "fastest ms", "ratio", "quartiles", "CPU ms"):
        table.add_column(name, justify="right")
    if any(case.mb_per_cpu_s is not None for case in cases):
        table.add_column("MB / CPU s", justify="right")
    if any(case.limit is not None for case in cases):
        table.add_column("limit", justify="right")
    for case in cases:
        (low, high), (least, most) = case.quartiles_s, case.ratio_quartiles
        table.add_row(
            *map(str, case.setting.values()),
            case.name,
            f"{case.median_s * 1e3:.1f}",
            f"{low * 1e3:.1f} to {high * 1e3:.1f}",
            f"{case.fastest_s * 1e3:.1f}",
            f"{case.ratio:.2f}",
            f"{least:.2f} to {most:.2f}",
            f"{case.cpu_s * 1e3:.1f}",
            *([] if case.mb_per_cpu_s is None else [f"{case.mb_per_cpu_s:.0f}"]),
            *([] if case.limit is None else [f"{case.limit:g}"]),
        )
    page = io.StringIO()
    Console(file=page, width=120).print(table)
    baselines = sorted({case.baseline for case in cases})
    return f"{page.getvalue()}ratio: median of the paired ratios to {', '.join(baselines)}"


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half lies."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
