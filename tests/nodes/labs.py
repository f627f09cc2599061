"""Small labs for tests: scripts that talk, what a capture says that they said, and what a lab left behind."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import dpkt

from nodes.lab import LabConfig
from nodes.node import Node

TOKEN = "GRADTAP_TEST_TOKEN"
"""Every process of a test's lab inherits this variable, by which it is found."""

LISTEN = """
import socket, sys
host, port, clients, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
with socket.create_server((host, port)) as server:
    for _ in range(clients):
        with server.accept()[0] as peer:
            received = 0
            while received < size:
                received += len(peer.recv(65536))
            peer.sendall(b"thank you")
            assert peer.recv(1) == b""
"""
"""Takes `size` bytes from each of its clients, and thanks."""

TALK = """
import socket, sys, time
host, port, letter, size = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for _ in range(200):
    try:
        peer = socket.create_connection((host, port), timeout=20)
        break
    except OSError:
        time.sleep(0.05)
peer.sendall(letter.encode() * size)
assert peer.recv(100) == b"thank you"
"""
"""Says `size` times its letter."""

LINGER = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
print("up", flush=True)
time.sleep(600)
"""
"""Leaves a grandchild in a session of its own that no polite signal ends."""


def script(name: str, source: str, *arguments: object, host: str | None = None, service: bool = False) -> Node:
    """A node that runs a piece of Python."""
    argv = (sys.executable, "-c", source, *map(str, arguments))
    return Node(name=name, argv=argv, host=host, service=service)


def small_lab(run: Path, *nodes: Node, **more: Any) -> LabConfig:
    """A lab that is quick to start and cannot hang."""
    fields: dict[str, Any] = {"ring_mib": 32, "deadline_s": 30.0, "grace_s": 1.0} | more
    return LabConfig(nodes=nodes, run=run, **fields)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a capture holds, read with dpkt, which shares no code with this project."""

    num_packets: int
    payloads: dict[tuple[str, int, str, int], bytes]
    """Source, its port, destination, its port -> the bytes sent, in the order of their sequence numbers."""


def said(file: IO[bytes]) -> Said:
    """Reads a capture of IPv4 TCP; whatever else is in it is only counted. Fails where a packet is there twice."""
    segments: dict[tuple[str, int, str, int], dict[int, bytes]] = defaultdict(dict)
    packets: set[tuple[tuple[str, int, str, int], int, int]] = set()
    num_packets = 0
    for _, frame in dpkt.pcapng.Reader(file):
        num_packets += 1
        packet = dpkt.ethernet.Ethernet(frame).data
        if isinstance(packet, dpkt.ip.IP) and isinstance(packet.data, dpkt.tcp.TCP) and packet.data.data:
            tcp, (source, destination) = packet.data, (".".join(map(str, end)) for end in (packet.src, packet.dst))
            flow = source, tcp.sport, destination, tcp.dport
            # A busy kernel may say something again, perhaps cut differently; that is another packet, with its own id.
            assert (flow, tcp.seq, packet.id) not in packets, f"{source}: the same packet twice"
            packets.add((flow, tcp.seq, packet.id))
            segments[flow][tcp.seq] = max(segments[flow].get(tcp.seq, b""), tcp.data, key=len)
    return Said(num_packets, {flow: joined(parts) for flow, parts in segments.items()})


def joined(segments: dict[int, bytes]) -> bytes:
    """The bytes of segments by sequence number: they may overlap, but leave no hole."""
    if max(segments) - min(segments) > 2**31:  # the numbers began again at 0
        segments = {at + 2**32 if at < 2**31 else at: data for at, data in segments.items()}
    data, start = b"", min(segments)
    for at in sorted(segments):
        assert at - start <= len(data), "a hole"
        data = data[: at - start] + segments[at] + data[at - start + len(segments[at]) :]
    return data


def to_port(heard: Said, port: int) -> dict[str, bytes]:
    """What each source said to this port."""
    return {source: data for (source, _, _, target), data in heard.payloads.items() if target == port}


def from_port(heard: Said, port: int) -> dict[str, bytes]:
    """What each destination was told from this port."""
    return {target: data for (_, source, target, _), data in heard.payloads.items() if source == port}


def living(token: str) -> list[str]:
    """Command lines of the processes that carry the token; zombies carry nothing."""
    mark = f"{TOKEN}={token}".encode()
    return [
        (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        for process in processes()
        if mark in read(process / "environ").split(b"\0")
    ]


def processes() -> Iterator[Path]:
    """Every process but this one."""
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid())


def read(file: Path) -> bytes:
    """The bytes of a file of /proc; none where its process has just ended, or is somebody else's."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object], *, patience_s: float = 15.0) -> None:
    """Waits for a condition, and fails if it does not come."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
