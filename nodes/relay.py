"""The relay: records TCP connections by standing between their ends, where no private network can be had.

In: endpoints to listen at, and where each leads. Out: the bytes, passed on as they are, and a pcapng file in which each
piece is a TCP/IP packet between the client and the endpoint that it meant. Those packets are made here: their bytes and
order are true, their sizes and handshakes are not those of the wire. Refuses to know what is said.

    python -m nodes.relay --route 127.0.0.1:6555=127.0.0.1:5555 --out wire.pcapng

talks to its caller as `nodes.tap` does: a ready line, SIGTERM or SIGINT, a line of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from attack.capture.pcapng import PcapngWriter
from nodes.errors import RecordError
from nodes.tap import LINK_TYPE_ETHERNET, TapResult, create, reason, say, stopped_by_signals, unwritable

Endpoint: TypeAlias = tuple[str, int]
"""An IPv4 address and a port."""

MAX_PAYLOAD = 65_495
"""What an IPv4 packet of 65,535 bytes holds behind 20 bytes each of IP and TCP."""

REACH_S = 10.0
"""How long a client waits for the other end. Without the relay it would be refused, and try again."""

ETHERNET = bytes(12) + b"\x08\x00"
"""As on loopback: no addresses; IPv4 follows."""
FIN, SYN, RST, PUSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
WINDOW = 65_535


class Recorder:
    """Writes made-up packets to a file, and counts them. Used by the threads of all connections."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.writer = PcapngWriter(file, interfaces=[("relay", LINK_TYPE_ETHERNET)], comment="recorded by a relay")
        self.packets = self.bytes = 0
        self.lock = threading.Lock()
        """Held while a packet is made and written, so that the file has them in the order of their times."""

    def write(self, frame: bytes) -> None:
        """Writes a packet. Raises: RecordError, and leaves the file with whole packets."""
        complete = self.file.tell()
        try:
            self.writer.write([(0, time.time_ns(), memoryview(frame), len(frame))])
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(complete)
            raise unwritable(Path(self.file.name), error) from error
        self.packets += 1
        self.bytes += len(frame)


class Connection:
    """The packets of one connection, numbered as TCP numbers them: SYN and FIN count as a byte, modulo 2**32."""

    def __init__(self, recorder: Recorder, *, client: Endpoint, server: Endpoint) -> None:
        """Records the handshake."""
        self.recorder = recorder
        self.ends = (client, server)
        self.sent = [0, 0]
        self.record(0, SYN)
        self.record(1, SYN | ACK)
        self.record(0, ACK)

    def record(self, sender: int, flags: int, payload: bytes = b"") -> None:
        """Records a packet of the client (0) or the server (1)."""
        source, destination = self.ends[sender], self.ends[1 - sender]
        with self.recorder.lock:
            acknowledged = self.sent[1 - sender] if flags & ACK else 0
            self.recorder.write(frame(source, destination, self.sent[sender], acknowledged, flags, payload))
            self.sent[sender] += len(payload) + bool(flags & (SYN | FIN))


def frame(
    source: Endpoint, destination: Endpoint, sequence: int, acknowledged: int, flags: int, payload: bytes
) -> bytes:
    """An Ethernet frame with an IPv4 and a TCP header (RFC 791, RFC 9293), both without options, checksums right."""
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    tcp_length = 20 + len(payload)
    # version and header length, service, length, id, flags (don't fragment), time to live, protocol, checksum
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + tcp_length, 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + addresses
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    ports = struct.pack(">HH", source[1], destination[1])
    numbers = struct.pack(">IIBBHHH", sequence % 2**32, acknowledged % 2**32, 5 << 4, flags, WINDOW, 0, 0)
    tcp = ports + numbers
    pseudo = addresses + struct.pack(">HH", socket.IPPROTO_TCP, tcp_length)
    tcp = tcp[:16] + struct.pack(">H", checksum(pseudo + tcp + payload)) + tcp[18:]
    return ETHERNET + ip + tcp + payload


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071): the complement of the one's complement sum of 16-bit words."""
    total = int(np.frombuffer(data + bytes(len(data) % 2), ">u2").sum(dtype=np.uint64))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


class Relay:
    """Passes bytes on, each way of each connection in a thread."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.failure: RecordError | None = None
        self._failed, self._fail = os.pipe()

    def run(self, routes: dict[Endpoint, Endpoint], *, stop: int) -> None:
        """Relays until `stop` becomes readable. Raises: RecordError."""
        with contextlib.ExitStack() as stack:
            poll = select.poll()
            listeners = {}
            for endpoint in routes:
                listener = stack.enter_context(listen(endpoint))
                listeners[listener.fileno()] = listener, endpoint
            for descriptor in (stop, self._failed, *listeners):
                poll.register(descriptor, select.POLLIN)
            say({"ready": True})
            while True:
                ready = [descriptor for descriptor, _ in poll.poll()]
                if stop in ready or self._failed in ready:
                    break
                for descriptor in ready:
                    listener, endpoint = listeners[descriptor]
                    _start(self._connect, listener.accept()[0], endpoint, routes[endpoint])
        self.recorder.lock.acquire()  # for good: threads that still pass bytes on write no half packet at the exit
        if self.failure is not None:
            raise self.failure

    def _connect(self, client: socket.socket, meant: Endpoint, to: Endpoint) -> None:
        server = reach(to)
        if server is None:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a relay must not hold back what was sent
        try:
            connection = Connection(self.recorder, client=client.getpeername(), server=meant)
        except RecordError as error:
            self._stop(error)
            return
        _start(self._pass_on, connection, 1, server, client)
        self._pass_on(connection, 0, client, server)

    def _pass_on(self, connection: Connection, sender: int, source: socket.socket, destination: socket.socket) -> None:
        try:
            while data := source.recv(MAX_PAYLOAD):
                connection.record(sender, PUSH | ACK, data)  # first: an answer must not stand before its question
                destination.sendall(data)
            connection.record(sender, FIN | ACK)
            destination.shutdown(socket.SHUT_WR)
        except RecordError as error:
            self._stop(error)
        except OSError:  # one end is gone, and the other is told so
            with contextlib.suppress(RecordError):
                connection.record(sender, RST | ACK)
            for end in (source, destination):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _stop(self, error: RecordError) -> None:
        self.failure = self.failure or error
        os.write(self._fail, b"!")


def _start(target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def reach(endpoint: Endpoint) -> socket.socket | None:
    """A connection to an end that may only just be starting; None where it stays away."""
    end = time.monotonic() + REACH_S
    while time.monotonic() < end:
        try:
            return socket.create_connection(endpoint)
        except OSError:
            time.sleep(0.05)
    return None


def listen(endpoint: Endpoint) -> socket.socket:
    """Raises: RecordError."""
    try:
        return socket.create_server(endpoint)
    except OSError as error:
        raise RecordError(f"relay: cannot listen at {endpoint[0]}:{endpoint[1]}: {reason(error)}") from error


def parse_route(text: str) -> tuple[Endpoint, Endpoint]:
    """`127.0.0.1:6555=127.0.0.1:5555` -> where to listen, and where that leads. Raises: ValueError."""
    here, there = ((host, int(port)) for host, port in (end.rsplit(":", 1) for end in text.split("=")))
    return here, there


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nodes.relay", description="Record TCP connections in passing.")
    parser.add_argument("--route", action="append", required=True, type=parse_route, help="HOST:PORT=HOST:PORT")
    parser.add_argument("--out", type=Path, required=True, help="the pcapng file to write")
    options = parser.parse_args()
    with stopped_by_signals(until_exit=True) as stop:
        try:
            with create(options.out) as file:
                recorder = Recorder(file)
                Relay(recorder).run(dict(options.route), stop=stop)
        except RecordError as error:
            print(f"relay: {error}", file=sys.stderr, flush=True)
            return 1
        say(dataclasses.asdict(TapResult(packets=recorder.packets, bytes=recorder.bytes, dropped=0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
