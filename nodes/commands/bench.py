"""`gradtap bench NAME`: runs one of the project's benchmarks and prints its cases."""

from __future__ import annotations

import dataclasses
import platform
from typing import Annotated, Literal

import torch
import tyro
import zmq

from harness.errors import ConfigError
from nodes.benchmarks.decode import bench_decode
from nodes.benchmarks.exchange import bench_exchange
from nodes.benchmarks.timing import Case, as_json, as_text
from nodes.commands.base import Command, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Runs a benchmark: everything that it compares takes turns in one run, and ratios are paired.

    exchange: one flat gradient averaged by Gloo's all_reduce (the baseline), by ZeroMQ where ranks serve or servers do,
    and by a parameter server that pickles.
    decode: captures of Gloo's and of ZeroMQ's traffic decoded to every rank's gradient, beside a plain read of the
    file.
    """

    name: Annotated[Literal["exchange", "decode"], tyro.conf.Positional]
    """Which benchmark."""
    numel: int = 10_000_000
    """Elements of the gradient (float32)."""
    worlds: tuple[int, ...] = (2, 4)
    """Numbers of ranks."""
    repetitions: int = 15
    """Timed rounds; in each, every case has one turn."""
    steps: int = 4
    """Steps of a capture (decode)."""

    def run(self) -> Result:
        """Checks the options, runs it, and says on what."""
        for flag, value in (
            ("--numel", self.numel),
            ("--repetitions", self.repetitions),
            ("--steps", self.steps),
            *(("--worlds", world) for world in self.worlds),
        ):
            if value < 1:
                raise ConfigError(f"bench: {flag}: wanted at least 1, got {value}")
        cases = self._cases()
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "zeromq": zmq.zmq_version()}
        return Result(
            json={"benchmark": self.name, "cases": as_json(cases), "versions": versions, "machine": machine},
            text=as_text(cases, title=f"bench {self.name}"),
        )

    def _cases(self) -> list[Case]:
        if self.name == "exchange":
            return bench_exchange(numel=self.numel, worlds=self.worlds, repetitions=self.repetitions)
        return bench_decode(numel=self.numel, worlds=self.worlds, repetitions=self.repetitions, steps=self.steps)
