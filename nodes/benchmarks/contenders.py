"""The processes of `bench exchange`: ranks that exchange when they are told to, and the servers that some ways need.

A rank is told a case and a step over a pipe, makes its gradient, waits for the word, and reports when it began and
ended, its CPU seconds, and whether the sum is right to the bit. Knows nothing of statistics.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import zmq
from torch import Tensor, nn

from harness.exchange import AllReduceExchange, Exchange, Meeting, ShardServer, ZeroMQExchange

DEADLINE_S = 120.0

BASELINE = "gloo all_reduce"
PICKLE = "pickle parameter server"

Way = Callable[[Tensor, int], Tensor]
"""Gradient and step -> the mean of all ranks' gradients; the baseline gives their sum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What every process of a group is told."""

    world_size: int
    numel: int
    store_port: int
    """Of a TCPStore on loopback, where the ranks meet."""
    run: bytes
    servers: dict[str, list[str]]
    """Case -> endpoints of its dedicated servers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How one exchange went on one rank. Times are of the machine's monotonic clock, the same in all processes."""

    begin_s: float
    end_s: float
    cpu_s: float
    exact: bool


def gradient_of(rank: int, step: int, numel: int) -> Tensor:
    """Whole numbers small enough that float32 adds them exactly in any order, different at every step and rank."""
    return (torch.arange(numel) % 1000).float() * (rank + 1) + step


def mean_of_all(step: int, setting: Setting) -> Tensor:
    """What every rank must get: the sum is exact, and there is one division."""
    world_size = setting.world_size
    total = gradient_of(world_size * (world_size + 1) // 2 - 1, step * world_size, setting.numel)
    return total / world_size


def run_rank(pipe: Connection, rank: int, setting: Setting, *, pickled: bool) -> None:
    """A rank of all the ways, or of the pickle server alone: the others change malloc for their whole process."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        ways = {PICKLE: pickle_way(rank, setting, stack)} if pickled else exchange_ways(rank, setting, stack)
        pipe.send(list(ways))
        while (order := pipe.recv()) is not None:
            case, step = order
            gradient = gradient_of(rank, step, setting.numel)
            pipe.send("set")
            pipe.recv()
            cpu, begin = time.process_time(), time.perf_counter()
            mean = ways[case](gradient, step)
            end, cpu = time.perf_counter(), time.process_time() - cpu
            if case == BASELINE:
                mean = mean / setting.world_size  # the bare sum is timed: the hardest baseline
            exact = torch.equal(mean, mean_of_all(step, setting))
            pipe.send(Report(begin_s=begin, end_s=end, cpu_s=cpu, exact=exact))


def exchange_ways(rank: int, setting: Setting, stack: ExitStack) -> dict[str, Way]:
    """Gloo and ZeroMQ, all open at once."""
    store = dist.TCPStore("127.0.0.1", setting.store_port, is_master=False)
    meeting = Meeting(store=store, rank=rank, world_size=setting.world_size, deadline_s=DEADLINE_S)
    buckets = stack.enter_context(AllReduceExchange(meeting, deadline_s=DEADLINE_S))
    zeromq = {"zeromq, ranks serve": ZeroMQExchange.among_ranks(meeting, deadline_s=DEADLINE_S)}
    for case, endpoints in setting.servers.items():
        zeromq[case] = ZeroMQExchange(
            rank=rank, world_size=setting.world_size, run=setting.run, endpoints=endpoints, deadline_s=DEADLINE_S
        )
    for end in (buckets, *zeromq.values()):
        end.start(nn.ParameterList([torch.zeros(setting.numel)]), step=0)

    def all_reduce(gradient: Tensor, step: int) -> Tensor:
        dist.all_reduce(gradient)
        return gradient

    for exchange in zeromq.values():
        stack.enter_context(exchange)
    averages = {"gloo, 25 MB buckets": buckets, **zeromq}
    return {BASELINE: all_reduce} | {case: _average_of(exchange) for case, exchange in averages.items()}


def _average_of(exchange: Exchange) -> Way:
    return lambda gradient, step: exchange.average(gradient, step=step)


def run_shard_server(pipe: Connection, world_size: int, run: bytes, index: int, servers: int) -> None:
    """Says where it listens, serves, and says what CPU seconds that took."""
    with ShardServer(run=run, world_size=world_size, index=index, servers=servers, deadline_s=DEADLINE_S) as server:
        pipe.send(server.endpoint)
        cpu = time.process_time()
        server.serve()
        pipe.send(time.process_time() - cpu)


def pickle_way(rank: int, setting: Setting, stack: ExitStack) -> Way:
    """The few lines that people write first: `send_pyobj` and `recv_pyobj`."""
    socket = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.REQ))
    socket.connect(setting.servers[PICKLE][rank])
    socket.rcvtimeo = int(DEADLINE_S * 1000)

    def push_and_pull(gradient: Tensor, step: int) -> Tensor:
        socket.send_pyobj(gradient.numpy())
        return torch.from_numpy(socket.recv_pyobj())

    stack.callback(lambda: socket.send_pyobj(None))
    return push_and_pull


def run_pickle_server(pipe: Connection, world_size: int) -> None:
    """Averages whatever its ranks send until they send None. It unpickles: its peers are this benchmark's own."""
    with zmq.Context() as context, ExitStack() as stack:
        sockets = [stack.enter_context(context.socket(zmq.REP)) for _ in range(world_size)]
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
        pipe.send([f"tcp://127.0.0.1:{port}" for port in ports])
        cpu = time.process_time()
        while (gradients := [socket.recv_pyobj() for socket in sockets])[0] is not None:
            mean = sum(gradients[1:], start=gradients[0]) / len(gradients)
            for socket in sockets:
                socket.send_pyobj(mean.astype("float32"))
        pipe.send(time.process_time() - cpu)
