"""`bench step`: what a step of training takes with each defense, beside one without, in the lab.

A defense may cost its own work, and nothing beside it. So what is left of a step without its encoding is compared with
a whole step of a job without a defense, in wall time, and in CPU time of all ranks, which other work on the machine
hardly changes. Each chain trains the same job once a round, in turns, every other round in reverse, so that a load that
grows falls on all alike; a second job without a defense shows how far apart two equal ones come out. Ranks serve each
other and nobody listens, so that all that a step takes is a rank's; times are those that they write down.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from harness.config import TrainConfig
from harness.errors import GradtapError
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.timing import quartiles
from nodes.commands.base import Result
from nodes.commands.lab import Lab
from nodes.console import console, table

BASELINE, AGAIN = "none", "none, again"
WARM_UP = 3
"""Steps of a job that are not counted: connections are made, memory is touched."""
ENCODING = "defense"
"""The part of a step that is the defense's own."""


class Job(NamedTuple):
    """Medians over the steps of one job, in seconds; of a step's wall time, the rank's that took longest."""

    step: float
    encoding: float
    rest: float
    """Of a step, without its encoding."""
    cpu_step: float
    """Of all ranks."""
    cpu_encoding: float
    cpu_rest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Benchmark):
    """The step time of a job in the lab with each defense, without its encoding, beside a job without a defense."""

    defenses: tuple[str, ...] = ("noise-gaussian:1e-3", "fp16", "int8:rounding=stochastic", "sign", "topk-dgc:0.99")
    """Chains to compare."""
    exchange: str = "zeromq"
    """zeromq, allreduce or ddp."""
    model: str = "mlp:hidden=1000"
    """What is trained; the built-in's 3 million parameters are 12 MB a step and rank."""
    ranks: int = 4
    """Ranks of the job."""
    steps: int = 40
    """Of each job, counted; three more come before."""
    repetitions: int = 5
    """Rounds; in each, every chain trains once."""

    def run(self) -> Result:
        """Medians over rounds, each round's ratios to its own job without a defense. Raises: GradtapError where a job
        failed."""
        self.check_positive("ranks", "steps", "repetitions")
        names = (BASELINE, *self.defenses, AGAIN)
        seen: dict[str, list[Job]] = {name: [] for name in names}
        for turn in track(range(self.repetitions), description="jobs", console=console, transient=True):
            for name in names[:: -1 if turn % 2 else 1]:
                seen[name].append(self._train(name))
        rows = [self._row(name, found, seen[BASELINE]) for name, found in seen.items()]
        head = ["chain", "step ms", "of it encoding", "rest / plain", "CPU ms", "of it encoding", "rest / plain"]
        title = (
            f"bench step: {self.ranks} ranks, {self.exchange}; CPU time of all ranks\n"
            "plain: the whole step of none, in the same round; medians and quartiles of the rounds"
        )
        return self.report(rows, table(head, map(_cells, rows), title=title))

    def _row(self, name: str, found: Sequence[Job], plain: Sequence[Job]) -> dict[str, Any]:
        ratios = [mine.rest / its.step for mine, its in zip(found, plain, strict=True)]
        cpu_ratios = [mine.cpu_rest / its.cpu_step for mine, its in zip(found, plain, strict=True)]
        return {
            "name": name,
            "ranks": self.ranks,
            "step_ms": 1e3 * statistics.median(job.step for job in found),
            "encoding_ms": 1e3 * statistics.median(job.encoding for job in found),
            "rest_ratio": statistics.median(ratios),
            "rest_ratio_quartiles": quartiles(ratios),
            "cpu_ms": 1e3 * statistics.median(job.cpu_step for job in found),
            "encoding_cpu_ms": 1e3 * statistics.median(job.cpu_encoding for job in found),
            "cpu_rest_ratio": statistics.median(cpu_ratios),
            "cpu_rest_ratio_quartiles": quartiles(cpu_ratios),
        }

    def _train(self, name: str) -> Job:
        train = TrainConfig(
            model=self.model,
            exchange=self.exchange,
            defense="" if name in (BASELINE, AGAIN) else name,
            steps=WARM_UP + self.steps,
            truth=False,
            tensorboard=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            lab = Lab(out=run, num_workers=self.ranks, num_servers=0, tap="none", quiet=True, train=train)
            result = lab.run()
            if not result.ok:
                raise GradtapError(f"bench step: {name}: {result.text}")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [[line for line in lines if line["step"] == step] for step in range(WARM_UP, WARM_UP + self.steps)]
        slowest = [max((line["seconds"] for line in ranks), key=_whole) for ranks in steps]
        cpu = [[line["cpu_seconds"] for line in ranks] for ranks in steps]
        return Job(
            step=statistics.median(map(_whole, slowest)),
            encoding=statistics.median(parts[ENCODING] for parts in slowest),
            rest=statistics.median(_whole(parts) - parts[ENCODING] for parts in slowest),
            cpu_step=statistics.median(sum(map(_whole, ranks)) for ranks in cpu),
            cpu_encoding=statistics.median(sum(parts[ENCODING] for parts in ranks) for ranks in cpu),
            cpu_rest=statistics.median(sum(_whole(parts) - parts[ENCODING] for parts in ranks) for ranks in cpu),
        )


def _whole(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _cells(row: dict[str, Any]) -> list[object]:
    def spread(name: str) -> str:
        low, high = row[f"{name}_quartiles"]
        return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"

    return [
        row["name"],
        *(row["step_ms"], row["encoding_ms"], spread("rest_ratio")),
        *(row["cpu_ms"], row["encoding_cpu_ms"], spread("cpu_rest_ratio")),
    ]
