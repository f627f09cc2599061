"""`bench certificate`: what attacks predict of their own error, beside the error that they have.

Draws cases at random from one seed - nets, training, pictures, batch sizes, and how the gradient was observed - and
attacks each as `gradtap attack` does, batch size and labels not told. Only the scoring sees the truth.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from typing import Any

import torch
from rich.progress import track

from attack.algorithms import Status
from attack.answer import to_plain
from attack.metrics import score
from attack.reconstruct import reconstruct
from harness.seeding import derive
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.subjects import OBSERVED, Subject, draw, stage
from nodes.commands.base import Result
from nodes.console import console, table

MODELS = {
    "lenet": (1,),
    "lenet:channels=8": (1,),
    "mlp": (1, 2, 4, 8, 16),
    "mlp:hidden=100": (1, 4, 8, 16),
    "mlp:hidden=200x100,activation=tanh": (1, 2, 4, 8),
    "mlp:hidden=200,activation=tanh": (1, 4, 8, 16),
    "mlp:hidden=200,activation=sigmoid": (1, 2, 4, 8),
    "mlp:hidden=200x100,activation=sigmoid": (1, 2, 4),
}
"""Nets, and the batch sizes for each: those for which there is an exact route."""
TRAINED = (0, 0, 20, 200)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate(Benchmark):
    """What attacks predict of their own mean squared error, beside the error that they have, on cases drawn at random.

    The ratio is predicted over true; covered is a case whose ratio is at least 1.
    """

    cases: int = 600
    """Cases drawn."""
    seed: int = 0
    """Fixes every case."""
    deadline_s: float = 60.0
    """Longest time for one case, in seconds."""
    method: str = "exact"
    """exact (what auto takes first: rgap for convolutions, spear for batches of ReLU nets, else unmix), or any of
    gradtap attack's methods."""

    def run(self) -> Result:
        """Attacks every case."""
        self.check_positive("cases")
        torch.set_num_threads(1)  # small matrices: two threads wait for each other most of the time
        rows = []
        for index in track(range(self.cases), description="certificate", console=console, transient=True):
            subject = draw(derive(self.seed, "certificate", index), models=MODELS, trained=TRAINED, observed=OBSERVED)
            rows.append(self._attack(subject))
        summary = summarize(rows)
        return self.report([to_plain(row) for row in (summary, *rows)], text=_text(summary, rows))

    def _attack(self, subject: Subject) -> dict[str, Any]:
        observation, knowledge, truth = stage(subject)
        method = self.method
        if method == "exact":
            connected = "unmix" if subject.batch_size == 1 or "activation" in subject.model else "spear"
            method = "rgap" if subject.model.startswith("lenet") else connected
        found = reconstruct(observation, knowledge, method=method, seed=self.seed, deadline_s=self.deadline_s)
        true = None
        if found.inputs is not None and found.labels is not None:
            same = found.inputs.shape == truth.inputs.shape
            span = knowledge.input_range
            true = score(found.inputs, found.labels, truth.inputs, truth.labels, input_range=span).mse if same else None
        return dataclasses.asdict(subject) | {
            "status": found.status.value,
            "method": found.method,
            "reason": found.reason,
            "gradient_residual": found.gradient_residual,
            "predicted_mse": found.predicted_mse,
            "true_mse": true,
            "cpu_s": found.cpu_seconds,
        }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the prediction held, and how far it was off, over the converged cases.

    A converged answer of another batch size than the true one counts as not covered; one without a prediction, as not
    predicted.
    """
    converged = [row for row in rows if row["status"] == Status.CONVERGED]
    predicted = [row for row in converged if row["predicted_mse"] is not None]
    ratios = sorted(map(_ratio, predicted))
    covered = sum(ratio >= 1 for ratio in ratios)
    return {
        "name": "certificate",
        "cases": len(rows),
        "converged": len(converged),
        "predicted": len(predicted),
        "covered": covered,
        "coverage": covered / len(predicted) if predicted else None,
        "median_ratio": statistics.median(ratios) if ratios else None,
        "ratio_quantiles": {str(q): ratios[round(q * (len(ratios) - 1))] for q in QUANTILES} if ratios else {},
        "cpu_s": sum(row["cpu_s"] for row in rows),
    }


def _ratio(row: dict[str, Any]) -> float:
    if row["true_mse"] is None:
        return 0.0
    return row["predicted_mse"] / row["true_mse"] if row["true_mse"] else math.inf


def _text(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    groups: Counter[tuple[str, str]] = Counter()
    lines = []
    for row in rows:
        groups[row["model"], row["observed"]] += 1
    for model, observed in sorted(groups):
        part = summarize([row for row in rows if (row["model"], row["observed"]) == (model, observed)])
        lines.append(
            [model, observed, *(part[key] for key in ("cases", "converged", "predicted", "covered", "median_ratio"))]
        )
    head = ["model", "observed", "cases", "converged", "predicted", "covered", "median ratio"]
    return "\n".join(
        [
            table(head, lines),
            f"{summary['converged']} of {summary['cases']} converged, {summary['predicted']} with a prediction, "
            f"{summary['covered']} covered; median ratio {summary['median_ratio']}",
            "quantiles of the ratio: " + ", ".join(f"{q}: {v:.2g}" for q, v in summary["ratio_quantiles"].items()),
        ]
    )
