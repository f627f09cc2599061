"""`bench sentences`: sentences of real prose read back out of recorded traffic by the attacks on text.

Each job trains some steps in the lab; its capture is decoded, and every method attacks the gradients and the weights
that were decoded, one after the other: no more than one is in memory. Only the scoring opens the truth, behind the
attack. The batch size is told to all but `dager`, which reads it.

A search shows its best tokens over iterations, as published ones do, whatever they are worth. All else counts only what
`gradtap attack` gives as an answer: a batch without one has no token right.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from attack.algorithms import TEXT_ONLY, Answer, Reconstruction
from attack.answer import to_plain
from attack.decode.recording import Recording
from attack.observation import Knowledge
from attack.reconstruct import attempt
from attack.text_metrics import ROUGE, TextScore, score_text
from attack.truth import FOLDER, read_truth
from harness.config import TrainConfig
from harness.data import load_data
from harness.data.text import TextSet
from harness.errors import ConfigError, GradtapError
from harness.models import Tokenizer, Tokens, load_model
from harness.seeding import derive
from harness.training import resolve_model
from nodes.benchmarks.base import Benchmark
from nodes.commands.base import Result
from nodes.commands.lab import Lab
from nodes.console import console, table
from nodes.lab import CAPTURE_NAME

RANKS = 2
SEARCHES = ("lamp", "tag")
"""Methods that have iterations."""
COUNTING = ("dager",)
"""Methods that read the batch size."""
COLUMNS = (
    "method", "batch", "batches", "most_tokens", "bound", "beyond", "converged", "wrong", "exact_share", "token_share",
    "rougeL", "median_cpu_s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences(Benchmark):
    """Sentences of prose read back from captures of real jobs, by the attacks on text.

    bound: tokens of a batch that can be told apart, by the model's width; beyond: batches with more. Shares and ROUGE
    are of the batches within. wrong: answers that are not the truth. by_iteration: tokens in their places that a search
    shows, whether it converges or not.
    """

    model: str = "bert:hidden=96,depth=2,heads=4"
    """A text model, without its vocabulary and classes, which are the data's."""
    loss: str = "masked_lm"
    """masked_lm, causal_lm (for gpt2) or cross_entropy."""
    data: str = "prose:length=30"
    """Sentences."""
    exchange: str = "zeromq"
    """What the jobs talk over: zeromq, allreduce or ddp."""
    defense: str = ""
    """What the jobs' ranks do to their gradients (docs/defenses.md)."""
    optimizer: str = "sgd:lr=0.01"
    """The jobs' update rule, which the attack is told."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sentences of a rank's batch; each size is a case."""
    sentences: int = 8
    """For each size, rounded up to whole jobs."""
    steps: int = 2
    """Of a job, each of which shows a batch of each of two ranks. The next job has its own weights and sentences."""
    seed: int = 0
    """Fixes weights, sentences and starts."""
    methods: tuple[str, ...] = ("dager", *SEARCHES)
    """Of gradtap attack."""
    iterations: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Behind which a search's tokens are counted, at the last look before."""
    deadline_s: float = 1200.0
    """Longest time for one attack, in CPU seconds."""

    def run(self) -> Result:
        """Records, attacks, scores. Raises: GradtapError where a job fails."""
        self.check_positive("sentences", "steps", "batch_sizes", "iterations")
        if unknown := set(self.methods) - set(TEXT_ONLY):
            raise ConfigError(f"bench: --methods: wanted some of {', '.join(TEXT_ONLY)}, got {', '.join(unknown)}")
        torch.set_num_threads(1)
        data = load_data(self.data)
        if not isinstance(data, TextSet):
            raise ConfigError(f"bench: --data: wanted sentences, got {self.data}")
        jobs = [
            (size, job)
            for size in self.batch_sizes
            for job in range(math.ceil(self.sentences / (RANKS * self.steps * size)))
        ]
        rows: list[dict[str, Any]] = []
        for size, job in track(jobs, description="sentences", console=console, transient=True):
            for row in self._job(data, size, job):
                rows.append(row)
                if not console.is_terminal:
                    console.print(_line(row), markup=False)
        cases = [
            self._summary(method, size, [row for row in rows if (row["method"], row["batch"]) == (method, size)])
            for method, size in itertools.product(self.methods, self.batch_sizes)
        ]
        columns = [f"at {iteration}" for iteration in self.iterations if set(SEARCHES) & set(self.methods)]
        lines = [[case[key] for key in COLUMNS] + list(case["by_iteration"].values())[: len(columns)] for case in cases]
        return self.report([to_plain(case) for case in (*cases, *rows)], text=table([*COLUMNS, *columns], lines))

    def _job(self, data: TextSet, size: int, job: int) -> Iterator[dict[str, Any]]:
        """Every method on every rank's gradients of one job."""
        seed = derive(self.seed, "bench sentences", size, job) % 2**31
        spec = resolve_model(self.model, data, self.loss)
        model: Any = load_model(spec)
        width = next(value.shape[1] for value in model.parameters() if len(value) == model.tokens.vocab)
        train = TrainConfig(
            model=spec,
            loss=self.loss,
            data=self.data,
            exchange=self.exchange,
            defense=self.defense,
            optimizer=self.optimizer,
            batch_size=size,
            steps=self.steps,
            seed=seed,
            tensorboard=False,
        )
        knowledge = Knowledge(
            model=spec,
            loss=self.loss,
            input_shape=tuple(model.input_shape),
            tokens=model.tokens,
            optimizer=self.optimizer,
        )
        with tempfile.TemporaryDirectory(prefix="gradtap-bench-") as folder:
            run = Path(folder) / "run"
            recorded = Lab(out=run, num_workers=RANKS, quiet=True, train=train).run()
            if not recorded.ok:
                raise GradtapError(f"bench sentences: {recorded.text}")
            began = time.process_time()
            for seen in Recording(run / CAPTURE_NAME, optimizer=self.optimizer).observations():
                where = {"batch": size, "seed": seed, "step": seen.step, "rank": seen.rank, "bound": width - 2}
                reading_s = time.process_time() - began
                for method in self.methods:
                    told = knowledge if method in COUNTING else dataclasses.replace(knowledge, batch_size=size)
                    answer, found = attempt(
                        seen, told, method=method, seed=seed, deadline_s=self.deadline_s, clock=time.process_time
                    )
                    row = self._score(answer, found, model.tokens, run / FOLDER, data.tokenizer)
                    yield {"method": method, **where, **row, "reading_cpu_s": round(reading_s, 2)}
                began = time.process_time()

    def _score(
        self,
        answer: Answer,
        found: Reconstruction,
        tokens: Tokens,
        truth: Path,
        reader: Tokenizer,
    ) -> dict[str, Any]:
        inputs, labels = read_truth(truth, rank=found.rank, step=found.step, tokens=tokens)

        def score(own: Tensor, own_labels: Tensor) -> TextScore:
            return score_text(own, own_labels, inputs, labels, tokens=tokens, reader=reader)

        scored = None if found.inputs is None or found.labels is None else score(found.inputs, found.labels)
        metrics = ("token_accuracy", "exact", *ROUGE, "label_ok")
        return {
            "status": found.status.value,
            "reason": found.reason,
            "gradient_residual": found.gradient_residual,
            "tokens": sum(map(len, tokens.rows(inputs))),
            **{name: None if scored is None else getattr(scored, name) for name in metrics},
            "by_iteration": {str(at): _shown(answer, at, score) for at in self.iterations},
            "cpu_s": round(found.cpu_seconds, 2),
        }

    def _summary(self, method: str, size: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise GradtapError(
                f"bench sentences: wanted ranks' gradients, the captures of jobs with batch size {size} show none "
                f"(exchange {self.exchange}, defense {self.defense or 'none'}); ask gradtap inspect what one shows"
            )
        within = [row for row in rows if row["tokens"] <= row["bound"]]
        answered = [row for row in within if row["exact"] is not None]
        tokens = sum(row["tokens"] for row in within)
        by_iteration = {
            str(at): [row["by_iteration"][str(at)] for row in within if row["by_iteration"][str(at)] is not None]
            for at in self.iterations
        }

        def mean(name: str) -> float | None:
            return sum(row[name] for row in answered) / len(within) if within else None

        return {
            "name": f"{method}/{size}",
            "method": method,
            "batch": size,
            "batches": len(rows),
            "sentences": size * len(rows),
            "tokens": sum(row["tokens"] for row in rows),
            "most_tokens": max(row["tokens"] for row in rows),
            "bound": rows[0]["bound"],
            "beyond": len(rows) - len(within),
            "converged": sum(row["exact"] is not None for row in rows),
            "wrong": sum(row["exact"] is not None and not (row["exact"] == size and row["label_ok"]) for row in rows),
            "exact_share": sum(row["exact"] for row in answered) / (size * len(within)) if within else None,
            "token_share": sum(row["token_accuracy"] * row["tokens"] for row in answered) / tokens if tokens else None,
            **{name: None if any(row[name] is None for row in answered) else mean(name) for name in ROUGE},
            "by_iteration": {at: statistics.fmean(shares) if shares else None for at, shares in by_iteration.items()},
            "median_cpu_s": statistics.median(row["cpu_s"] for row in rows),
            "reading_cpu_s": sum(row["reading_cpu_s"] for row in rows),
        }


def _shown(answer: Answer, iteration: int, score: Callable[[Tensor, Tensor], TextScore]) -> float | None:
    """Share of tokens in their places, 0 to 1, at the last frame until an iteration; None where there are no frames."""
    shown = [frame for at, frame in answer.film.frames if at <= iteration]
    return score(shown[-1].long(), answer.labels).token_accuracy if shown and answer.labels is not None else None


def _line(row: dict[str, Any]) -> str:
    told = f"{row['exact']} of {row['batch']} exact" if row["exact"] is not None else row["reason"]
    where = f"{row['method']}, batch {row['batch']}, seed {row['seed']}, step {row['step']}, rank {row['rank']}"
    return f"{where}: {row['status']}, {row['tokens']} tokens, {row['cpu_s']} CPU s: {told}"
