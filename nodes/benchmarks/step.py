"""`bench step`: what a step of training takes with each defense, beside one without, in the lab.

Each chain trains the same job in a private network, all of them once a round, in turns; times are those that the ranks
write down. A defense may cost its own work, and nothing beside it: what is left of a step without its encoding is
compared with a whole step of a job without a defense.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from rich.progress import track

from harness.config import TrainConfig
from harness.errors import GradtapError
from nodes.benchmarks.base import Benchmark
from nodes.commands.base import Result
from nodes.commands.lab import Lab
from nodes.console import console, table

BASELINE = "none"
WARM_UP = 3
"""Steps of a job that are not counted: connections are made, memory is touched."""
ENCODING = "defense"
"""The part of a step that is the defense's own."""
LEFT_OUT = "truth"
"""The part that no job has but ours."""


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
    steps: int = 20
    """Of each job, the first three of which are not counted."""
    repetitions: int = 3
    """Rounds; in each, every chain trains once."""

    def run(self) -> Result:
        """Medians over rounds of each job's median step. Raises: GradtapError where a job failed."""
        self.check_positive("ranks", "steps", "repetitions")
        names = (BASELINE, *self.defenses)
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in track(range(self.repetitions), description="jobs", console=console, transient=True):
            for name in names:
                seen[name].append(self._train(name))
        plain = [step for step, _ in seen[BASELINE]]
        rows = []
        for name, found in seen.items():
            rest = [step - encoding for step, encoding in found]
            rows.append(
                {
                    "name": name,
                    "ranks": self.ranks,
                    "step_ms": 1e3 * statistics.median(step for step, _ in found),
                    "encoding_ms": 1e3 * statistics.median(encoding for _, encoding in found),
                    "rest_ratio": statistics.median(mine / its for mine, its in zip(rest, plain, strict=True)),
                }
            )
        head = ["chain", "step ms", "of it encoding ms", "rest / step without a defense"]
        body = [[row["name"], row["step_ms"], row["encoding_ms"], row["rest_ratio"]] for row in rows]
        return self.report(rows, table(head, body, title=f"bench step: {self.ranks} ranks, {self.exchange}"))

    def _train(self, name: str) -> tuple[float, float]:
        """Median seconds of a step, and of its encoding, of the rank that each took longest on."""
        train = TrainConfig(
            model=self.model,
            exchange=self.exchange,
            defense="" if name == BASELINE else name,
            steps=WARM_UP + self.steps,
            truth=False,
            tensorboard=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            result = Lab(out=run, num_workers=self.ranks, train=train).run()
            if not result.ok:
                raise GradtapError(f"bench step: {name}: {result.text}")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps: dict[int, list[tuple[float, float]]] = {}
        for line in lines:
            whole = sum(line["seconds"].values()) - line["seconds"].get(LEFT_OUT, 0.0)
            steps.setdefault(line["step"], []).append((whole, line["seconds"][ENCODING]))
        counted = [max(ranks) for step, ranks in sorted(steps.items()) if step >= WARM_UP]
        return statistics.median(whole for whole, _ in counted), statistics.median(own for _, own in counted)
