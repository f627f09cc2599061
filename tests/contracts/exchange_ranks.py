"""Runs a job on every rank of an exchange, as real processes (threads for `local`), and brings back what each says.

An exchange is a row of `KINDS`; a job is a module-level function that takes a `Place` and returns what can be pickled.
"""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from harness.exchange import (
    AllReduceExchange,
    DDPExchange,
    Exchange,
    LocalExchange,
    Meeting,
    ShardServer,
    ZeroMQExchange,
)

KINDS = ("local", "zeromq ranks serve", "zeromq 1 server", "zeromq 2 servers", "allreduce", "ddp")
PATIENCE_S = 60.0
"""For all ranks together; a deadline inside is always much shorter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands, and what it needs to open its exchange."""

    kind: str
    rank: int
    world_size: int
    deadline_s: float
    store_port: int = 0
    run: bytes = b""
    servers: tuple[tuple[str, ...], ...] = ()
    """Of each server, where it listens in each round."""
    local: tuple[LocalExchange, ...] = ()
    """The ready end of each round, where ranks are threads."""

    def open(self, round: int = 0) -> Exchange:
        """This rank's end. Each round is a run of its own, opened once."""
        if self.kind == "local":
            return self.local[round]
        if self.servers:
            return ZeroMQExchange(
                rank=self.rank,
                world_size=self.world_size,
                run=self.run,
                endpoints=[endpoints[round] for endpoints in self.servers],
                deadline_s=self.deadline_s,
            )
        store = dist.PrefixStore(str(round), dist.TCPStore("127.0.0.1", self.store_port, is_master=False))
        meeting = Meeting(store=store, rank=self.rank, world_size=self.world_size, deadline_s=PATIENCE_S)
        if self.kind == "zeromq ranks serve":
            return ZeroMQExchange.among_ranks(meeting, deadline_s=self.deadline_s)
        return {"allreduce": AllReduceExchange, "ddp": DDPExchange}[self.kind](meeting, deadline_s=self.deadline_s)

    def meet(self) -> None:
        """Blocks until every rank is here. Once; not for `local`."""
        store = dist.TCPStore("127.0.0.1", self.store_port, is_master=False)
        store.set(f"rank {self.rank} is here", "")
        everyone = [f"rank {rank} is here" for rank in range(self.world_size)]
        store.wait(everyone, datetime.timedelta(seconds=PATIENCE_S))


def run_ranks(
    kind: str, world_size: int, job: Callable[..., Any], *arguments: Any, rounds: int = 1, deadline_s: float = 20.0
) -> tuple[list[Any], list[str]]:
    """What `job(place, *arguments)` returned on each rank (the exception that it raised; None where the process died),
    and the errors of the servers."""
    if kind == "local":
        return _run_threads(world_size, job, arguments, rounds, deadline_s), []
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "torch._dynamo"])  # which DDP imports, for seconds
    with ExitStack() as stack:

        def launch(work: Callable[..., None], *args: Any) -> Connection:
            ours, theirs = multiprocessing.Pipe()
            process = processes.Process(target=work, args=(theirs, *args), daemon=True)
            process.start()
            theirs.close()
            for ending in (process.close, process.join, process.kill, ours.close):
                stack.callback(ending)
            return ours

        run, servers = os.urandom(8), {"zeromq 1 server": 1, "zeromq 2 servers": 2}.get(kind, 0)
        served = [launch(_serve, run, world_size, index, servers, rounds, deadline_s) for index in range(servers)]
        listening = tuple(hear(pipe) for pipe in served)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = Place(
            kind=kind,
            rank=0,
            world_size=world_size,
            deadline_s=deadline_s,
            store_port=store.port,
            run=run,
            servers=listening,
        )
        ranks = [launch(_work, job, dataclasses.replace(place, rank=rank), arguments) for rank in range(world_size)]
        results = [hear(pipe) for pipe in ranks]
        return results, [hear(pipe) for pipe in served]


def hear(pipe: Connection) -> Any:
    """What a process says next; None where it has ended."""
    if not pipe.poll(PATIENCE_S):
        raise AssertionError(f"a process said nothing within {PATIENCE_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        return None


def _work(pipe: Connection, job: Callable[..., Any], place: Place, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(job(place, *arguments))
    except Exception as error:
        pipe.send(error)


def _serve(
    pipe: Connection, run: bytes, world_size: int, index: int, servers: int, rounds: int, deadline_s: float
) -> None:
    """Listens for all rounds at once, and serves them in turn."""
    with ExitStack() as stack:
        ends = [
            stack.enter_context(
                ShardServer(run=run, world_size=world_size, index=index, servers=servers, deadline_s=deadline_s)
            )
            for _ in range(rounds)
        ]
        pipe.send(tuple(end.endpoint for end in ends))
        try:
            for end in ends:
                end.serve()
            pipe.send("")
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _run_threads(
    world_size: int, job: Callable[..., Any], arguments: tuple[Any, ...], rounds: int, deadline_s: float
) -> list[Any]:
    results: list[Any] = [None] * world_size

    def work(place: Place) -> None:
        try:
            results[place.rank] = job(place, *arguments)
        except Exception as error:
            results[place.rank] = error

    groups = [LocalExchange.group(world_size, deadline_s=deadline_s) for _ in range(rounds)]
    places = [
        Place(kind="local", rank=rank, world_size=world_size, deadline_s=deadline_s, local=ends)
        for rank, ends in enumerate(zip(*groups, strict=True))
    ]
    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
        assert not thread.is_alive(), "a thread did not end"
    return results
