"""`bench exchange`: one gradient averaged over Gloo, over ZeroMQ three ways, and over a parameter server that pickles.

Starts all processes of a world, has them take turns within every repetition, and ends them. Knows no socket.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from rich.progress import track

from harness.errors import ExchangeError, GradtapError
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.contenders import (
    BASELINE,
    PICKLE,
    Report,
    Setting,
    run_pickle_server,
    run_rank,
    run_shard_server,
)
from nodes.benchmarks.timing import Case
from nodes.commands.base import Result
from nodes.console import console

WARM_UP = 2
"""Repetitions before the timed ones: the first touches every page, the second finds them in place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange(Benchmark):
    """One flat gradient averaged by Gloo's all_reduce (the baseline), by ZeroMQ where ranks serve or servers do, and by
    a parameter server that pickles.
    """

    numel: int = 10_000_000
    """Elements of the gradient (float32)."""
    worlds: tuple[int, ...] = (2, 4)
    """Numbers of ranks."""
    repetitions: int = 15
    """Timed rounds; in each, every case has one turn."""

    def run(self) -> Result:
        """Every way's times for each number of ranks.

        Raises: GradtapError where a sum is wrong or a process ends early.
        """
        self.check_positive("numel", "worlds", "repetitions")
        cases = []
        for world_size in self.worlds:
            with World(world_size, self.numel) as world:
                cases += world.time(self.repetitions)
        return self.report_times(cases)


class World:
    """All processes of one number of ranks; ended, whatever happens, when the block ends."""

    def __init__(self, world_size: int, numel: int) -> None:
        self._world_size, self._numel = world_size, numel
        # Forked from a process that has torch, they start in milliseconds, and inherit neither threads nor sockets.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["nodes.benchmarks.contenders"])
        self._stack = ExitStack()

    def __enter__(self) -> World:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def time(self, repetitions: int) -> list[Case]:
        """The cases, after `repetitions` rounds in which every way had its turn, in a new order each time."""
        order = random.Random(0)
        seconds: dict[str, list[float]] = {case: [] for case in self._ranks}
        cpu_s = dict.fromkeys(seconds, 0.0)
        title = f"{self._world_size} ranks, {self._numel} floats"
        for step in track(range(WARM_UP + repetitions), description=title, console=console, transient=True):
            for case in order.sample(sorted(seconds), len(seconds)):
                reports = self._exchange_once(case, step)
                if step >= WARM_UP:
                    seconds[case].append(max(r.end_s for r in reports) - min(r.begin_s for r in reports))
                    cpu_s[case] += sum(r.cpu_s for r in reports) / repetitions
        for case, used_s in self._finish().items():
            cpu_s[case] += used_s / (WARM_UP + repetitions)
        return [
            Case.of(
                case,
                seconds[case],
                baseline=(BASELINE, seconds[BASELINE]),
                setting={"ranks": self._world_size, "floats": self._numel},
                cpu_s=cpu_s[case],
            )
            for case in seconds
        ]

    def _start(self) -> None:
        world_size, run = self._world_size, os.urandom(8)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._servers: dict[str, list[Connection]] = {}
        endpoints: dict[str, list[str]] = {}
        for count in sorted({1, world_size}):
            case = f"zeromq, {count} server{'s' if count > 1 else ''}"
            self._servers[case] = [
                self._launch(run_shard_server, world_size, run, index, count) for index in range(count)
            ]
            endpoints[case] = [_hear(pipe) for pipe in self._servers[case]]
        self._servers[PICKLE] = [self._launch(run_pickle_server, world_size)]
        pickle_endpoints = {PICKLE: _hear(self._servers[PICKLE][0])}
        self._ranks: dict[str, list[Connection]] = {}
        """Case -> the pipes of the ranks that do it."""
        for pickled, servers in ((False, endpoints), (True, pickle_endpoints)):
            setting = Setting(world_size=world_size, numel=self._numel, store_port=store.port, run=run, servers=servers)
            pipes = [self._launch(run_rank, rank, setting, pickled=pickled) for rank in range(world_size)]
            ways = [_hear(pipe) for pipe in pipes]
            self._ranks.update(dict.fromkeys(ways[0], pipes))
        self._stack.callback(lambda: store)  # which serves as long as it is referenced

    def _launch(self, work: Callable[..., None], *arguments: Any, **options: Any) -> Connection:
        ours, theirs = multiprocessing.Pipe()
        process = self._processes.Process(target=work, args=(theirs, *arguments), kwargs=options, daemon=True)
        process.start()
        theirs.close()
        self._stack.callback(process.close)
        self._stack.callback(process.join)
        self._stack.callback(process.kill)
        self._stack.callback(ours.close)
        return ours

    def _exchange_once(self, case: str, step: int) -> list[Report]:
        pipes = self._ranks[case]
        for message in ((case, step), "go"):
            for pipe in pipes:
                pipe.send(message)
            answers = [_hear(pipe) for pipe in pipes]
        for rank, report in enumerate(answers):
            if not report.exact:
                raise ExchangeError(f"{case}: rank {rank} of {len(pipes)} got a wrong mean at step {step}")
        return answers

    def _finish(self) -> dict[str, float]:
        """Lets all ranks go; the CPU seconds that each case's servers used."""
        for pipe in {id(pipe): pipe for pipes in self._ranks.values() for pipe in pipes}.values():
            pipe.send(None)
        return {case: sum(_hear(pipe) for pipe in pipes) for case, pipes in self._servers.items()}


def _hear(pipe: Connection) -> Any:
    """What a process says next. Raises: GradtapError where it has ended instead."""
    try:
        return pipe.recv()
    except EOFError:
        raise GradtapError("bench exchange: a process ended early; standard error says why") from None
