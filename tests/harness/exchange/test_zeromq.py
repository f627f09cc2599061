"""ZeroMQ ends over real sockets: buffers that no one overwrites, and strangers that change nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import zmq
from torch import nn
from torch.distributed import HashStore

from harness.errors import ExchangeError, PeerError
from harness.exchange import Meeting, ShardServer, ZeroMQExchange
from harness.exchange.message import Message
from harness.exchange.transport import send
from harness.exchange.zeromq_server import identity
from harness.wire import MAX_PAYLOAD_BYTES, Header, Kind
from tests.harness.exchange.conversation import RUN, hello, layout

DEADLINE_S = 10.0


def together(*works: Callable[[], None]) -> None:
    """Runs each in a thread; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def model(elements: int) -> nn.Module:
    return nn.ParameterList([torch.zeros(elements)])


@pytest.mark.parametrize("servers", [0, 1])
def test_buffers_are_not_overwritten_while_they_are_being_sent(servers):
    """Ranks of very different pace reuse and overwrite all that they may; one wrong element would show."""
    world_size, elements, steps = 3, 300_000, 40

    def train(rank: int, exchange: ZeroMQExchange) -> None:
        pace = torch.Generator().manual_seed(rank)
        gradient = torch.empty(elements)
        with exchange:
            exchange.start(model(elements), step=0)
            for step in range(steps):
                gradient.copy_(torch.arange(elements) % 100).mul_(rank + 1).add_(step)
                mean = exchange.average(gradient, step=step)
                gradient.fill_(torch.nan)
                assert torch.equal(mean, (torch.arange(elements) % 100) * 2.0 + step)
                mean.fill_(torch.nan)  # it is the caller's until the next call
                if torch.rand((), generator=pace) < 0.3:
                    time.sleep(0.01)

    with ExitStack() as stack:
        if servers:
            server = stack.enter_context(ShardServer(run=RUN, world_size=world_size, deadline_s=DEADLINE_S))
            ends = [
                ZeroMQExchange(rank=rank, world_size=world_size, run=RUN, endpoints=[server.endpoint])
                for rank in range(world_size)
            ]
            together(server.serve, *(lambda end=end: train(end.rank, end) for end in ends))
        else:
            store = HashStore()

            def work(rank: int) -> None:
                train(rank, ZeroMQExchange.among_ranks(Meeting(store=store, rank=rank, world_size=world_size)))

            together(*(lambda rank=rank: work(rank) for rank in range(world_size)))


@contextmanager
def dealer(endpoint: str, name: bytes) -> Iterator[zmq.Socket]:
    """A peer that may say anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.routing_id = name
        peer.linger = 0
        peer.rcvtimeo = 5000
        peer.connect(endpoint)
        yield peer


def send_garbage_greeting(endpoint: str) -> None:
    host, port = endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: gradtap\r\n\r\n" + bytes(1000))


def send_as_stranger(frames: list[bytes], name: bytes = b"stranger", *, answered: bool = True) -> Callable[[str], None]:
    def attack(endpoint: str) -> None:
        with dealer(endpoint, name) as peer:
            peer.send_multipart(frames)
            if answered:
                assert Header.unpack(peer.recv_multipart()[0]).kind is Kind.ERROR
            else:
                time.sleep(0.2)

    return attack


HELLO = hello(1, layout(1000, world=2))


@pytest.mark.parametrize(
    "attack",
    [
        send_garbage_greeting,
        send_as_stranger([b"garbage"]),
        send_as_stranger([b""]),
        send_as_stranger([b"\x81\xa7gradtap\x01", b""]),
        send_as_stranger([HELLO.header.pack(), HELLO.payload]),
        send_as_stranger([HELLO.header.pack(), HELLO.payload], name=identity(7)),
        send_as_stranger([HELLO.header.pack(), HELLO.payload[:-1]], name=identity(7)),
        send_as_stranger([HELLO.header.pack(), *[bytes(1000)] * 200]),
        send_as_stranger([b"", bytes(MAX_PAYLOAD_BYTES + 1)], answered=False),
        send_as_stranger([hello(0, layout(1000, world=2), run=b"another!").header.pack(), HELLO.payload]),
    ],
    ids=[
        "not ZMTP",
        "one frame",
        "empty frame",
        "half a header",
        "no rank",
        "rank out of range",
        "payload too short",
        "too many frames",
        "oversize",
        "another run",
    ],
)
def test_a_stranger_is_refused_and_the_run_goes_on(attack):
    with ShardServer(run=RUN, world_size=2, deadline_s=DEADLINE_S) as server:

        def train(rank: int) -> None:
            with ZeroMQExchange(rank=rank, world_size=2, run=RUN, endpoints=[server.endpoint]) as exchange:
                exchange.start(model(1000), step=0)
                for step in range(5):
                    mean = exchange.average(torch.full((1000,), float(rank + 1)), step=step)
                    assert torch.equal(mean, torch.full((1000,), 1.5))
                    if rank == 0 and step == 2:
                        attack(server.endpoint)

        together(server.serve, lambda: train(0), lambda: train(1))


def test_a_flood_of_refusals_is_answered_only_so_often():
    with ShardServer(run=RUN, world_size=1, deadline_s=1.0) as server, dealer(server.endpoint, b"stranger") as peer:
        for _ in range(500):
            peer.send_multipart([b"garbage", b""])

        def serve() -> None:
            with pytest.raises(ExchangeError, match="no HELLO from rank 0 within 1 s"):
                server.serve()

        together(serve)
        answers = 0
        while peer.poll(200):
            peer.recv_multipart()
            answers += 1
        assert 0 < answers <= 64


def test_a_rank_of_another_run_is_told_so():
    with ShardServer(run=RUN, world_size=1, deadline_s=1.0) as server:

        def join() -> None:
            with (
                ZeroMQExchange(rank=0, world_size=1, run=b"another!", endpoints=[server.endpoint]) as exchange,
                pytest.raises(PeerError, match=r"rank 0, step 0: tcp://.* gave up: wanted run .*another job uses this"),
            ):
                exchange.start(model(10), step=0)

        def serve() -> None:
            with pytest.raises(ExchangeError, match="no HELLO from rank 0"):
                server.serve()

        together(serve, join)


@pytest.mark.parametrize(
    "frames",
    [[b"garbage", b""], [b"a", b"b", b"c"], [Header(kind=Kind.WELCOME, run=b"another!", rank=-1, step=0).pack(), b""]],
)
def test_a_server_that_talks_nonsense_is_named(frames):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        endpoint = f"tcp://127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}"

        def answer() -> None:
            name, *_ = server.recv_multipart()
            server.send_multipart([name, *frames])

        def join() -> None:
            with (
                ZeroMQExchange(rank=0, world_size=1, run=RUN, endpoints=[endpoint], deadline_s=5.0) as exchange,
                pytest.raises(PeerError, match=f"rank 0, step 0: {endpoint} "),
            ):
                exchange.start(model(10), step=0)

        together(answer, join)


def test_a_port_in_use_is_one_line():
    with (
        ShardServer(run=RUN, world_size=1) as server,
        pytest.raises(ExchangeError, match=f"cannot listen on {server.endpoint}: .*; is the port in use"),
    ):
        ShardServer(run=RUN, world_size=1, bind=server.endpoint)


def test_a_broken_rank_ends_the_run_and_all_are_told_its_name():
    with (
        ShardServer(run=RUN, world_size=2, deadline_s=DEADLINE_S) as server,
        dealer(server.endpoint, identity(1)) as peer,
    ):

        def misbehave() -> None:
            send(peer, hello(1, layout(10, world=2)))
            peer.recv_multipart()
            send(peer, Message(Header(kind=Kind.GRADIENT, run=RUN, rank=1, step=99, count=0, total=10), b""))

        def train() -> None:
            with (
                ZeroMQExchange(rank=0, world_size=2, run=RUN, endpoints=[server.endpoint]) as exchange,
                pytest.raises(PeerError, match=r"gave up: server tcp.*rank 1: wanted a chunk of step 0, got gradient"),
            ):
                exchange.start(model(10), step=0)
                exchange.average(torch.zeros(10), step=0)

        def serve() -> None:
            with pytest.raises(PeerError, match="rank 1: wanted"):
                server.serve()

        together(serve, misbehave, train)
