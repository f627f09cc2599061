"""`bench labels`: how often each label is in a batch, read from the last layer's gradient, beside the truth.

Two ways: the likeliest counts, and exactly, where every example's features are found too. Untrained nets and trained
ones; the batch size is told to the first, and read by the second.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from attack.engine.context import Context
from attack.engine.features import NoFeatures, read_features
from attack.engine.labels import NoLabel, read_labels
from attack.engine.target import Target, prepare
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.subjects import SETS, Subject, dataset, stage
from nodes.commands.base import Result
from nodes.console import console, table

MODELS = (
    "lenet",
    "mlp",
    "mlp:hidden=200x100,activation=sigmoid",
    "mlp:hidden=200,activation=tanh",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(Benchmark):
    """How often each label is in a batch, read from the last layer's gradient, beside the truth.

    likeliest: by the mean probabilities, the batch size told. exact: with every example's features, batch size read.
    """

    batch_size: int = 8
    """Examples in a batch."""
    seeds: int = 5
    """Batches, each with weights of its own, for each net and data set."""
    trained: tuple[int, ...] = (0, 200)
    """Steps of training before the batch."""
    deadline_s: float = 5.0
    """Longest time for the exact way, in seconds."""

    def run(self) -> Result:
        """Every net, training, data set and seed."""
        self.check_positive("batch_size", "seeds")
        torch.set_num_threads(1)
        places = list(itertools.product(self.trained, MODELS, SETS, range(self.seeds)))
        rows = [
            self._case(
                Subject(model=model, data=data, batch_size=self.batch_size, trained=trained, observed="raw", seed=seed)
            )
            for trained, model, data, seed in track(places, description="labels", console=console, transient=True)
        ]
        cases = [
            _summary(trained, model, classes, rows)
            for trained in self.trained
            for model in (*MODELS, "all")
            for classes in (10, 100, "all")
        ]
        columns = ["trained", "model", "classes", "batches", "likeliest_right", "exact_right", "exact_wrong"]
        return self.report(cases, text=table(columns, [[case[column] for column in columns] for case in cases]))

    def _case(self, subject: Subject) -> dict[str, Any]:
        observation, knowledge, truth = stage(subject)
        target = prepare(observation, knowledge, device=torch.device("cpu"))
        wanted = truth.labels.sort().values
        likeliest = _likeliest(dataclasses.replace(target, batch_size=subject.batch_size))
        exact = _exactly(target, self.deadline_s)
        return {
            "trained": subject.trained,
            "model": subject.model,
            "classes": dataset(subject.data).classes,
            "likeliest_right": likeliest is not None and likeliest.equal(wanted),
            "exact_right": exact is not None and exact.equal(wanted),
            "exact_wrong": exact is not None and not exact.equal(wanted),
        }


def _likeliest(target: Target) -> Tensor | None:
    try:
        return read_labels(target)
    except NoLabel:
        return None


def _exactly(target: Target, deadline_s: float) -> Tensor | None:
    context = Context(generator=torch.Generator().manual_seed(0), deadline=time.monotonic() + deadline_s)
    try:
        return read_features(target, context).labels
    except NoFeatures:
        return None


def _summary(trained: int, model: str, classes: object, rows: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = {"trained": trained, "model": model, "classes": classes}
    mine = [row for row in rows if all(value in ("all", row[key]) for key, value in wanted.items())]
    counts = {key: sum(row[key] for row in mine) for key in ("likeliest_right", "exact_right", "exact_wrong")}
    share = counts["likeliest_right"] / len(mine)
    return wanted | {"batches": len(mine), "share": share} | counts
