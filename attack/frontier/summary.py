"""Cells of a sweep -> a row for each defense: leak, accuracy, bytes and time, with 95 % confidence intervals.

A picture that an attacker did not give counts as one that it did not read. Knows no file and no page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import scipy.stats

from attack.frontier.leak import Attacker

THRESHOLDS = (1e-2, 1e-3, 1e-4)
"""Mean squared errors, pictures from 0 to 1, below which one counts: recognizable, clear, hard to tell from it."""
LEAKED = 1e-3
"""The threshold that plots and tables for people go by."""
STAGES, TEXT = ("initial", "trained"), "text"
"""Pictures, at fresh weights, and at those that training under the defense itself ended with; sentences."""
CONFIDENCE = 0.95


def summarize(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each defense, in the order in which they come first.

    Args:
        cells: each with `defense`, `seed`, `stage` (`training`, or one of `STAGES`), and either `failed` or what was
            measured: of training `accuracy`, `bytes_per_step`, `plain_bytes`, `step_ms` and `defense_ms`; of a stage
            `victims[]` (`attack.frontier.leak.measure`).

    Returns: rows; None where nothing was measured. Of shares of a few pictures, Wilson's score interval; of means over
        seeds, Student's t.
    """
    by_defense: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_defense.setdefault(cell["defense"], []).append(cell)
    return [_row(defense, found) for defense, found in by_defense.items()]


def key(stage: str, attacker: str, what: str) -> str:
    """A column's name, e.g. `initial_adaptive_below_1e-3`."""
    return f"{stage}_{attacker}_{what}"


def below(threshold: float) -> str:
    """`below_1e-3`."""
    return f"below_1e{math.log10(threshold):.0f}"


def wilson(count: int, total: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927), which does not shrink to nothing at 0 and 1."""
    interval = scipy.stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _row(defense: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    good = [cell for cell in cells if "failed" not in cell]
    failures = sorted({cell["failed"] for cell in cells if "failed" in cell})
    trained = [cell for cell in good if cell["stage"] == "training"]
    row: dict[str, Any] = {"defense": defense or "none", "failed": "; ".join(failures) or None}
    row |= _mean("accuracy", [cell["accuracy"] for cell in trained])
    for name in ("bytes_per_step", "plain_bytes", "step_ms", "defense_ms"):
        row[name] = statistics.median(cell[name] for cell in trained) if trained else None
    row["bytes_share"] = row["bytes_per_step"] / row["plain_bytes"] if trained else None
    for stage in STAGES:
        victims = [victim for cell in good if cell["stage"] == stage for victim in cell["victims"]]
        for attacker in Attacker:
            row |= _leak(stage, attacker, [victim for victim in victims if victim["attacker"] == attacker])
    victims = [victim for cell in good if cell["stage"] == TEXT for victim in cell["victims"]]
    for attacker in Attacker:
        row |= _read(attacker, [victim for victim in victims if victim["attacker"] == attacker])
    return row


def _read(attacker: str, victims: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of sentences: one that an attacker did not give counts as none of its tokens read."""
    total, exact = len(victims), sum(victim["exact"] for victim in victims)
    low, high = wilson(exact, total) if total else (None, None)
    found: dict[str, Any] = {"sentences": total, "exact": exact / total if total else None}
    found |= {"exact_low": low, "exact_high": high}
    for name in ("token_accuracy", "rougeL"):
        values = [victim[name] for victim in victims if victim[name] is not None]
        found[name] = statistics.fmean(values) if values else None
    found["median_cpu_s"] = statistics.median(victim["cpu_seconds"] for victim in victims) if victims else None
    return {key(TEXT, attacker, name): value for name, value in found.items()}


def _leak(stage: str, attacker: str, victims: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total, answers = len(victims), [victim for victim in victims if victim["mse"] is not None]
    found: dict[str, Any] = {"pictures": total, "answers": len(answers)}
    for threshold in THRESHOLDS:
        count = sum(victim["mse"] < threshold for victim in answers)
        low, high = wilson(count, total) if total else (None, None)
        name = below(threshold)
        found |= {name: count / total if total else None, f"{name}_low": low, f"{name}_high": high}
    for name in ("psnr_db", "ssim"):
        values = [victim[name] for victim in answers if victim[name] is not None]
        found[f"median_{name}"] = statistics.median(values) if values else None
    right = sum(victim["label_ok"] for victim in victims)
    low, high = wilson(right, total) if total else (None, None)
    found |= {"label_accuracy": right / total if total else None, "label_accuracy_low": low}
    found |= {"label_accuracy_high": high}
    found["median_cpu_s"] = statistics.median(victim["cpu_seconds"] for victim in victims) if victims else None
    return {key(stage, attacker, name): value for name, value in found.items()}


def _mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    mean, low, high = statistics.fmean(values), None, None
    if len(values) > 1:
        reach = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        low, high = max(0.0, mean - float(reach)), min(1.0, mean + float(reach))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
