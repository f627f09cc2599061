"""`bench codec`: what each defense takes to encode a gradient, beside a copy of it in memory.

Every way takes its turn in each repetition, on one core, in CPU seconds: from the gradient to the payloads of all
messages of a step, with what it remembers brought up to date.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
from rich.progress import track

from harness.defenses import Chain, Sizes, State, load_defense
from harness.defenses.secure import private_of
from harness.exchange.base import as_coded
from harness.exchange.chunks import shard_chunks
from harness.exchange.secure import Member
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.timing import Case
from nodes.commands.base import Result
from nodes.console import console
from nodes.memory import keep_freed_memory

BASELINE = "memory copy"
LIMITS = {
    "fp16": 1.2,
    "bf16": 1.2,
    "topk-dgc:0.999": 3.5,
    "topk-dgc:0.99": 3.5,
    "topk:0.99": 9.0,
    "prune:0.99": 9.0,
    "int8:rounding=stochastic": 4.5,
    "sign": 3.5,
    "ternary": 8.0,
    "noise-gaussian:1e-3": 9.0,
    "secure-aggregation": 7.0,
}
"""Memory copies that encoding may take, of a chain that has a limit."""
WARM_UP = 2
"""Repetitions before the timed ones: the first touches every page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(Benchmark):
    """Encoding of one gradient by each defense, on one core, as multiples of a memory copy in the same run."""

    numel: int = 10_000_000
    """Elements of the gradient (float32)."""
    layers: int = 20
    """Tensors that it is made of, of one size, each with 500 more elements in a tensor of their own, as biases are."""
    defenses: tuple[str, ...] = tuple(LIMITS)
    """Chains to time; those of which a limit is set show it."""
    repetitions: int = 15
    """Timed rounds; in each, every case has one turn."""

    def run(self) -> Result:
        """Every chain's CPU time beside that of the copy."""
        self.check_positive("numel", "layers", "repetitions")
        torch.set_num_threads(1)
        keep_freed_memory()
        encoders = {spec: Encoder(load_defense(spec), self._sizes()) for spec in self.defenses}
        gradient = _gradient(self._sizes())
        source, target = gradient.numpy(), np.empty(gradient.numel(), np.float32)
        seconds: dict[str, list[float]] = {spec: [] for spec in encoders}
        copies: dict[str, list[float]] = {spec: [] for spec in encoders}
        rounds = range(WARM_UP + self.repetitions)
        for step in track(rounds, description="codecs", console=console, transient=True):
            for spec, encoder in encoders.items():
                begin = time.process_time()
                np.copyto(target, source)
                between = time.process_time()
                encoder.encode(gradient, step)
                end = time.process_time()
                if step >= WARM_UP:
                    copies[spec].append(between - begin)
                    seconds[spec].append(end - between)
        cases = [
            Case.of(
                spec,
                seconds[spec],
                baseline=(BASELINE, copies[spec]),
                setting={"floats": self.numel},
                cpu_s=sum(seconds[spec]) / self.repetitions,
                limit=LIMITS.get(spec),
            )
            for spec in encoders
        ]
        return self.report_times(cases)

    def _sizes(self) -> Sizes:
        bias = min(500, self.numel // (2 * self.layers))
        weights = [
            self.numel * (at + 1) // self.layers - self.numel * at // self.layers - bias for at in range(self.layers)
        ]
        return tuple(size for weight in weights for size in (weight, bias))


class Encoder:
    """A chain of one of two ranks, with what it remembers."""

    def __init__(self, chain: Chain, sizes: Sizes) -> None:
        self._chain, self._sizes = chain, sizes
        self._state: State = chain.begin(sizes)
        self._chunks = shard_chunks(sum(sizes), index=0, servers=1)
        self._member, other = (Member(run=bytes(8), rank=rank, world_size=2) for rank in range(2))
        self._member.meet([self._member.public_key, other.public_key])

    def encode(self, gradient: torch.Tensor, step: int) -> int:
        """Payload bytes of the step's messages."""
        sent, self._state = self._chain(gradient, self._sizes, self._state, seed=0, rank=0, step=step)
        private = private_of(sent)
        coded = as_coded(sent) if private is None else self._member.mask(private, step=step)
        return sum(memoryview(coded.part(chunk.at, chunk.size).payload).nbytes for chunk in self._chunks)


def _gradient(sizes: Sizes) -> torch.Tensor:
    """With the heavy tails of real ones, and tensors of different scales."""
    generator = np.random.default_rng(0)
    parts = []
    for at, size in enumerate(sizes):
        drawn = generator.standard_normal(size, np.float32) * np.exp(generator.standard_normal(size, np.float32))
        parts.append(torch.from_numpy(drawn * np.float32(10.0 ** -(1 + at % 3))))
    return torch.cat(parts)
