"""Golden bytes: what real libzmq, and the project's own exchange over it, put on the wire; and how they were recorded.

    GRADTAP_WRITE_VECTORS=1 python -m pytest tests/attack/decode/test_vectors.py

records them again, through a TCP relay on loopback that copies what passes. They were made with pyzmq 27.3.0 (libzmq
4.3.5) on Linux. Under CURVE keys and boxes differ each time; read the rest of the difference before you commit it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import nn

from harness.exchange import ShardServer, ZeroMQExchange
from harness.exchange.base import state_tensors

FOLDER = Path(__file__).parents[2] / "vectors"
MECHANISMS = ("null", "plain", "curve")
LARGE = bytes(range(256)) * 64
MESSAGES = [[b"short"], [b"", b"two frames"], [b"header", LARGE], [b"x" * 255], [b"x" * 256]]
"""What the DEALER sends; the ROUTER answers each with the same frames in reverse order."""
RANKS, STEPS = 2, 3
SHAPES = ((5, 7), (5,), (5,), (5,), (3, 5), (3,))
ELEMENTS = 68


class Relay:
    """Copies what passes between whoever connects and one server: `writes` has (connection, is from client, bytes)."""

    def __init__(self, port: int) -> None:
        self.writes: list[tuple[int, bool, bytes]] = []
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(1000):
                client = self._listener.accept()[0]
                server = socket.create_connection(self._server, timeout=10)
                self._sockets += [client, server]
                for pump in ((client, server, number, True), (server, client, number, False)):
                    self._threads.append(threading.Thread(target=self._pump, args=pump))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, number: int, from_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.writes.append((number, from_client, data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends it, and everything that passes through it."""
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def relayed(port: int) -> Iterator[Relay]:
    """A relay in front of a port."""
    relay = Relay(port)
    try:
        yield relay
    finally:
        relay.close()


def record(mechanism: str) -> dict[str, bytes]:
    """A DEALER and a ROUTER talk; what each sent, as `client` and `server`."""
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    authenticator = context.socket(zmq.REP)
    authenticator.bind("inproc://zeromq.zap.01")
    if mechanism == "plain":
        router.plain_server = True
        dealer.plain_username, dealer.plain_password = b"rank", b"not a secret"
    if mechanism == "curve":
        public, secret = zmq.curve_keypair()
        router.curve_server, router.curve_secretkey = True, secret
        dealer.curve_serverkey = public
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    dealer.identity = b"\0\0\0\1"
    for end in (router, dealer):
        end.linger, end.rcvtimeo = 0, 10_000
    try:
        with relayed(router.bind_to_random_port("tcp://127.0.0.1")) as relay:
            dealer.connect(f"tcp://127.0.0.1:{relay.port}")
            if mechanism != "null":
                authenticator.rcvtimeo = 10_000
                request = authenticator.recv_multipart()
                authenticator.send_multipart([*request[:2], b"200", b"OK", b"user", b""])
            for frames in MESSAGES:
                dealer.send_multipart(frames)
                identity, *got = router.recv_multipart()
                router.send_multipart([identity, *reversed(got)])
                dealer.recv_multipart()
    finally:
        context.destroy(linger=0)
    return {
        name: b"".join(data for _, from_client, data in relay.writes if from_client is side)
        for name, side in (("client", True), ("server", False))
    }


def record_exchange() -> dict[str, np.ndarray]:
    """Two ranks and a server of the project's own exchange: what passed, in order, and what was meant to.

    `bytes` are all writes, one after the other; `lengths`, `connections` and `from_client` say of each what it is.
    """
    run = b"goldrun\0"
    gradients = np.random.default_rng(0).standard_normal((STEPS, RANKS, ELEMENTS)).astype(np.float32)
    averages = np.zeros((STEPS, ELEMENTS), np.float32)
    model = build_model()

    def train(rank: int, port: int) -> None:
        endpoints = [f"tcp://127.0.0.1:{port}"]
        with ZeroMQExchange(rank=rank, world_size=RANKS, run=run, endpoints=endpoints, deadline_s=20.0) as exchange:
            exchange.start(model if rank == 0 else build_model(), step=0)
            for step in range(STEPS):
                averages[step] = exchange.average(torch.from_numpy(gradients[step, rank]), step=step).numpy()

    with ShardServer(run=run, world_size=RANKS, deadline_s=20.0) as server:
        with relayed(int(server.endpoint.rpartition(":")[2])) as relay:
            ranks = [threading.Thread(target=train, args=(rank, relay.port)) for rank in range(RANKS)]
            for thread in ranks:
                thread.start()
            server.serve()
            for thread in ranks:
                thread.join(20)
    connections, from_client, writes = zip(*relay.writes, strict=True)
    return {
        "bytes": np.frombuffer(b"".join(writes), np.uint8),
        "lengths": np.array([len(data) for data in writes]),
        "connections": np.array(connections),
        "from_client": np.array(from_client),
        "gradients": gradients,
        "averages": averages,
        "state": torch.cat([tensor.detach().reshape(-1) for tensor in state_tensors(model)]).numpy(),
    }


def build_model() -> nn.Module:
    """Parameters and floating-point buffers."""
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
