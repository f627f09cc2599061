"""`bench batches`: whole batches read back, batch size and labels not told; pictures matched to the truth afterwards.

Fresh weights for every batch, whose labels may repeat. Only the scoring sees the truth.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from attack.answer import to_plain
from attack.metrics import score
from attack.reconstruct import reconstruct
from harness.errors import ConfigError
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.subjects import Subject, dataset, stage
from nodes.commands.base import Result
from nodes.console import console, table

EXACT_DB = 60.0
GOOD_MSE = 1e-3
COLUMNS = (
    "model", "batch", "batches", "converged", "filled", "exact_share", "good_share", "median_mse", "median_psnr_db",
    "worst_psnr_db", "labels_right", "covered", "median_cpu_s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches(Benchmark):
    """Whole batches read back, batch size and labels not told.

    exact_share: of the batches whose every picture has at least 60 dB. good_share: of the pictures with a mean squared
    error below 1e-3; those of a batch without an answer count as bad. covered: batches whose predicted_mse is not less
    than the true one.
    """

    models: tuple[str, ...] = (
        "mlp:hidden=200x200/8",
        "mlp:hidden=200x200/16",
        "mlp:hidden=200x200/32",
        "lenet:channels=48/8",
        "lenet/2",
        "lenet/4",
        "lenet/8",
    )
    """MODEL/BATCH: each net, and the size of its batches."""
    data: tuple[str, ...] = ("cifar100+photos",)
    """Data sets that pictures are drawn from; a plus joins several, and +mirrored adds every picture's mirror image."""
    seeds: int = 10
    """Batches for each of them, each with weights of its own."""
    seed: int = 0
    """The first of them."""
    deadline_s: float = 1200.0
    """Longest time for one batch, in seconds."""
    method: str = "auto"
    """As in gradtap attack."""
    steps: int = 1
    """Steps that have the same batch, solved together."""
    rate: float = 0.1
    """Learning rate of the SGD between them."""

    def run(self) -> Result:
        """Every net, data set and seed."""
        self.check_positive("seeds", "steps")
        torch.set_num_threads(1)
        plan = [_parse(text) for text in self.models]
        places = list(itertools.product(plan, self.data, range(self.seed, self.seed + self.seeds)))
        rows = []
        for (model, size), data, seed in track(places, description="batches", console=console, transient=True):
            if size > len(dataset(data).labels):
                raise ConfigError(f"bench: {data} has fewer than {size} pictures")
            rows.append(self._attack(model, size, data, seed))
            if not console.is_terminal:
                console.print(_line(rows[-1]), markup=False)
        cases = [_summary(model, size, rows) for model, size in plan]
        text = table(COLUMNS, [[case[column] for column in COLUMNS] for case in cases])
        return self.report([to_plain(case) for case in (*cases, *rows)], text=text)

    def _attack(self, model: str, size: int, data: str, seed: int) -> dict[str, Any]:
        subject = Subject(model=model, data=data, batch_size=size, trained=0, observed="raw", seed=seed)
        observation, knowledge, truth = stage(subject, steps=self.steps, rate=self.rate)
        found = reconstruct(observation, knowledge, method=self.method, seed=seed, deadline_s=self.deadline_s)
        errors, labels_ok = None, None
        if found.inputs is not None and found.labels is not None and found.inputs.shape == truth.inputs.shape:
            true = score(found.inputs, found.labels, truth.inputs, truth.labels, input_range=knowledge.input_range)
            errors, labels_ok = [(example.mse, example.psnr_db) for example in true.examples], true.label_ok
        return {
            "model": model,
            "batch": size,
            "data": data,
            "seed": seed,
            "steps": len(found.steps),
            "status": found.status.value,
            "method": found.method,
            "route": found.route,
            "reason": found.reason,
            "gradient_residual": found.gradient_residual,
            "predicted_mse": found.predicted_mse,
            "mse": None if errors is None else [mse for mse, _ in errors],
            "psnr_db": None if errors is None else [psnr for _, psnr in errors],
            "labels_right": labels_ok,
            "cpu_s": found.cpu_seconds,
        }


def _parse(text: str) -> tuple[str, int]:
    model, slash, size = text.rpartition("/")
    if not slash or not size.isdigit() or int(size) < 1:
        raise ConfigError(f"bench: --models: wanted MODEL/BATCH such as lenet/8, got {text}")
    return model, int(size)


def _line(row: dict[str, Any]) -> str:
    worst = "-" if row["mse"] is None else f"{max(row['mse']):.1e}"
    return f"{row['model']} batch {row['batch']}, {row['data']} {row['seed']}: {row['status']}, worst MSE {worst}"


def _summary(model: str, size: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if (row["model"], row["batch"]) == (model, size)]
    answered = [row for row in mine if row["mse"] is not None]
    mse = [each for row in answered for each in row["mse"]]
    psnr = [each for row in answered for each in row["psnr_db"]]
    statuses = Counter(row["status"] for row in mine)
    covered = sum((row["predicted_mse"] or 0.0) >= statistics.fmean(row["mse"]) for row in answered)
    return {
        "name": f"{model}/{size}",
        "model": model,
        "batch": size,
        "batches": len(mine),
        "converged": statuses["converged"],
        "filled": statuses["filled"],
        "exact_share": sum(min(row["psnr_db"]) >= EXACT_DB for row in answered) / len(mine),
        "good_share": sum(each < GOOD_MSE for each in mse) / (len(mine) * size),
        "median_mse": statistics.median(mse) if mse else None,
        "median_psnr_db": statistics.median(psnr) if psnr else None,
        "worst_psnr_db": min(psnr, default=None),
        "labels_right": sum(bool(row["labels_right"]) for row in answered),
        "covered": covered,
        "median_cpu_s": statistics.median(row["cpu_s"] for row in mine),
    }
