"""`bench sentences`: single sentences of real prose by the attacks on text, tokens by iteration.

Fresh weights and another sentence for each seed; gradients as a rank computes them. A search shows its best tokens,
as published ones do, whatever they are worth; `found` says whether `gradtap attack` would have given them as an answer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from attack.algorithms import TEXT_ONLY, Answer
from attack.engine.target import prepare
from attack.observation import Knowledge, Known, Observation
from attack.reconstruct import best_match, pick_device
from harness.data import load_data
from harness.data.text import TextSet
from harness.errors import ConfigError
from harness.gradients import mean_gradient
from harness.models import LOSSES, Tokens, load_model
from harness.seeding import derive, generator
from harness.training import resolve_model
from harness.types import Batch
from nodes.benchmarks.base import Benchmark
from nodes.commands.base import Result
from nodes.console import console, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences(Benchmark):
    """Single sentences of prose, by the attacks on text: tokens in their places by iteration."""

    model: str = "bert:hidden=96,depth=2,heads=4"
    """A text model, without its vocabulary and classes, which are the data's."""
    loss: str = "masked_lm"
    """masked_lm, causal_lm (for gpt2) or cross_entropy."""
    data: str = "prose:length=30"
    """Sentences."""
    methods: tuple[str, ...] = TEXT_ONLY
    """Of gradtap attack."""
    seeds: int = 4
    """Sentences, each with weights of its own."""
    first_seed: int = 0
    """The first of them."""
    iterations: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Behind which tokens are counted, at the last look before."""
    deadline_s: float = 1200.0
    """Longest time for one attack, in seconds."""

    def run(self) -> Result:
        """Every method and seed."""
        self.check_positive("seeds", "iterations")
        if unknown := set(self.methods) - set(TEXT_ONLY):
            raise ConfigError(f"bench: --methods: wanted some of {', '.join(TEXT_ONLY)}, got {', '.join(unknown)}")
        torch.set_num_threads(1)
        data = load_data(self.data)
        if not isinstance(data, TextSet):
            raise ConfigError(f"bench: --data: wanted sentences, got {self.data}")
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        rows = [
            self._case(data, method, seed)
            for seed in track(seeds, description="sentences", console=console, transient=True)
            for method in self.methods
        ]
        cases = [self._summary(method, [row for row in rows if row["method"] == method]) for method in self.methods]
        columns = [key for key in cases[0] if key != "by_iteration"]
        lines = [[case[key] for key in columns] + list(case["by_iteration"].values()) for case in cases]
        text = table([*columns, *(f"at {iteration}" for iteration in self.iterations)], lines)
        return self.report([*cases, *rows], text=text)

    def _case(self, data: TextSet, method: str, seed: int) -> dict[str, Any]:
        observation, knowledge, truth = self._stage(data, seed)
        begin = time.process_time()
        answer = best_match(observation, knowledge, method=method, seed=seed, deadline_s=self.deadline_s)
        cpu_s = time.process_time() - begin
        target = prepare(observation, knowledge, device=pick_device("cpu"))
        found, accuracy = False, 0.0
        if answer.inputs is not None and answer.labels is not None:
            found, accuracy = target.explained_by(answer.inputs, answer.labels), _accuracy(answer.inputs, truth)
        return {
            "method": method,
            "seed": seed,
            "length": truth.inputs.shape[1],
            "found": found,
            "token_accuracy": accuracy,
            "by_iteration": {str(at): _accuracy_at(answer, at, truth) for at in self.iterations},
            "cpu_s": round(cpu_s, 1),
            "reason": answer.reason,
        }

    def _stage(self, data: TextSet, seed: int) -> tuple[Observation, Knowledge, Batch]:
        """What a tap would have of one sentence, what it is told, and the truth."""
        spec = resolve_model(self.model, data, self.loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            model = load_model(spec)
        chosen = torch.randint(len(data), (1,), generator=generator(seed, "batch")).numpy()
        batch = data.take(chosen, loss=self.loss, seed=seed)
        gradient = mean_gradient(model, LOSSES[self.loss], batch).flat
        observation = Observation(
            rank=0,
            step=0,
            world_size=1,
            exchange="zeromq",
            gradient=gradient,
            known=torch.full(gradient.shape, Known.RAW, dtype=torch.uint8),
            weights=torch.nn.utils.parameters_to_vector(model.parameters()).detach(),
            shapes=tuple(tuple(parameter.shape) for parameter in model.parameters()),
        )
        tokens = Tokens(vocab=data.tokenizer.vocab, pad=data.tokenizer.pad)
        shape: Any = model.input_shape
        return observation, Knowledge(model=spec, loss=self.loss, input_shape=shape, tokens=tokens, batch_size=1), batch

    def _summary(self, method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": method,
            "sentences": len(rows),
            "found": sum(row["found"] for row in rows),
            "token_accuracy": round(statistics.fmean(row["token_accuracy"] for row in rows), 3),
            "median_cpu_s": statistics.median(row["cpu_s"] for row in rows),
            "by_iteration": {
                str(at): None
                if any(row["by_iteration"][str(at)] is None for row in rows)
                else round(statistics.fmean(row["by_iteration"][str(at)] for row in rows), 3)
                for at in self.iterations
            },
        }


def _accuracy(tokens: Tensor, truth: Batch) -> float:
    """Share of the sentence's tokens that are in their places, 0 to 1."""
    own, true = tokens[0].tolist(), truth.inputs[0].tolist()
    return sum(a == b for a, b in zip(own, true, strict=False)) / len(true)


def _accuracy_at(answer: Answer, iteration: int, truth: Batch) -> float | None:
    """The same at the last frame until an iteration; None where a method keeps none."""
    shown = [frame for at, frame in answer.film.frames if at <= iteration]
    return _accuracy(shown[-1].long(), truth) if shown else None
