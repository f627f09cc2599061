"""`bench patterns`: one picture through ReLU and max pooling, or through a residual network, beside Inverting Gradients
as published.

Fresh weights and another picture for each seed. Ours is judged without the truth: where it did not converge it gives no
picture, and has no score; the reference gets the better of its two runs, chosen by the truth, and the cost of one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from attack.algorithms import Status
from attack.answer import to_plain
from attack.metrics import score
from attack.observation import Knowledge, Observation
from attack.reconstruct import reconstruct
from harness.models import load_model
from harness.seeding import generator
from harness.types import Batch
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.published import inverting_gradients, read_label
from nodes.benchmarks.subjects import Subject, stage
from nodes.commands.base import Result
from nodes.console import console, table

VARIATIONS = (1e-2, 1e-3)
"""Weights of total variation with which the reference runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns(Benchmark):
    """One picture through ReLU and max pooling, by `gradtap attack` and by Inverting Gradients as published."""

    model: str = "convnet"
    """A net, without the input's shape and the classes; e.g. resnet:depth=18,norm=frozen with --method residual."""
    data: tuple[str, ...] = ("photos", "cifar100")
    """Data sets."""
    seeds: int = 6
    """Pictures, each with weights of its own, of each data set."""
    first_seed: int = 0
    """The first of them."""
    method: str = "patterns"
    """Ours: any method of gradtap attack."""
    iterations: int = 4000
    """Of the reference; 0 leaves it out."""
    deadline_s: float = 300.0
    """Longest time for one attack of ours, in seconds."""

    def run(self) -> Result:
        """Every data set and seed."""
        self.check_positive("seeds")
        torch.set_num_threads(1)
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        places = [(data, seed) for data in self.data for seed in seeds]
        rows = [self._case(*place) for place in track(places, description="patterns", console=console, transient=True)]
        summary = summarize(rows)
        keys = ("data", "seed", "status", "psnr_db", "cpu_s", "reference_psnr_db", "reference_cpu_s")
        lines = [[row[key] for key in keys] for row in rows]
        text = table(list(keys), lines) + "\n" + ", ".join(f"{key} {value}" for key, value in summary.items())
        return self.report([to_plain(row) for row in (summary, *rows)], text=text)

    def _case(self, data: str, seed: int) -> dict[str, Any]:
        subject = Subject(model=self.model, data=data, batch_size=1, trained=0, observed="raw", seed=seed)
        observation, knowledge, truth = stage(subject)
        found = reconstruct(observation, knowledge, method=self.method, seed=seed, deadline_s=self.deadline_s)
        row = {
            "data": data,
            "seed": seed,
            "status": found.status.value,
            "psnr_db": None if found.inputs is None else round(_psnr(found.inputs, truth), 1),
            "cpu_s": round(found.cpu_seconds, 1),
            "predicted_mse": found.predicted_mse,
            "reason": found.reason,
            "reference_psnr_db": None,
            "reference_cpu_s": None,
        }
        if self.iterations:
            runs = [self._reference(observation, knowledge, truth, variation, seed) for variation in VARIATIONS]
            row["reference_psnr_db"] = round(max(psnr for psnr, _ in runs), 1)
            row["reference_cpu_s"] = round(statistics.mean(cpu for _, cpu in runs), 1)
        return row

    def _reference(
        self, observation: Observation, knowledge: Knowledge, truth: Batch, variation: float, seed: int
    ) -> tuple[float, float]:
        """PSNR and CPU seconds of one run."""
        model = load_model(knowledge.model)
        assert observation.weights is not None
        nn.utils.vector_to_parameters(observation.weights, model.parameters())
        if observation.buffers is not None:
            statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            nn.utils.vector_to_parameters(observation.buffers, statistics)
        sizes = [parameter.numel() for parameter in model.parameters()]
        parts = zip(observation.gradient.split(sizes), model.parameters(), strict=True)
        gradients = [part.view_as(parameter) for part, parameter in parts]
        begin = time.process_time()
        inputs = inverting_gradients(
            model,
            gradients,
            knowledge.input_shape,
            read_label(gradients),
            total_variation=variation,
            generator=generator(seed, "reference"),
            iterations=self.iterations,
        )
        return _psnr(inputs, truth), time.process_time() - begin


def _psnr(inputs: Tensor, truth: Batch) -> float:
    scored = score(inputs, truth.labels, truth.inputs, truth.labels, input_range=(0.0, 1.0))
    return float(scored.psnr_db)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many came back, and how they and their cost compare with the reference."""
    found = [row for row in rows if row["status"] == Status.CONVERGED]
    compared = [row for row in rows if row["reference_psnr_db"] is not None]
    return {
        "name": "patterns",
        "cases": len(rows),
        "converged": len(found),
        "above_60_db": sum(row["psnr_db"] > 60 for row in found),
        "above_reference": sum((row["psnr_db"] or 0) > row["reference_psnr_db"] for row in compared),
        "cheaper_than_reference": sum(row["cpu_s"] <= row["reference_cpu_s"] for row in compared),
        "median_cpu_s": statistics.median(row["cpu_s"] for row in rows),
    }
