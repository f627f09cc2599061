"""An encrypted network between the ranks' hosts: what enters its interface leaves the host inside TLS 1.3.

    job --- gradtap0 (10.78.0.1) --- this process === TLS over TCP === that process --- gradtap0 (10.78.0.2) --- job

For jobs whose own transport cannot encrypt, as torch's Gloo: they are told to use the interface, and nothing else of
them changes. Each rank connects to each other one, and sends over its own connection alone, so that no connection is
read and written at once. Packets travel as they are: IPv4 says its own length. What comes from a rank must come from
that rank's address. Needs the right to make a network interface (CAP_NET_ADMIN), and /dev/net/tun. Knows no job.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from harness.errors import ConfigError
from nodes.certificates import certificate_of, context_of
from nodes.errors import NetworkError

logger = logging.getLogger(__name__)

INTERFACE = "gradtap0"
PORT = 7700
MTU = 65_000
"""Few large packets: each costs a call here, and a record of TLS has 16 KiB whatever we do."""
MAX_RANKS = 254

# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_RETRY_S = 0.1
_LOOK_UP_MS = 200
"""How long the end of a tunnel goes unnoticed."""
_IPV4_HEAD = 20


def address_of(rank: int) -> str:
    """A rank's address inside."""
    return f"10.78.0.{rank + 1}"


class Tunnel:
    """One rank's end. As a context manager, it is up within, and gone behind."""

    def __init__(self, *, keys: Path, rank: int, hosts: Sequence[str], deadline_s: float = 60.0) -> None:
        """
        Args:
            keys: folder with this rank's key and all ranks' certificates.
            hosts: where each rank's host is reached, in rank order; `HOST` or `HOST:PORT`.
            deadline_s: for all ranks to be there.

        Raises: ConfigError.
        """
        if not 0 <= rank < len(hosts) <= MAX_RANKS:
            raise ConfigError(f"tunnel: wanted a rank of {len(hosts)} hosts, of at most {MAX_RANKS}, got {rank}")
        self.rank, self._deadline_s = rank, deadline_s
        self._places = [_place(host) for host in hosts]
        self._others = [other for other in range(len(hosts)) if other != rank]
        self._certificates = {other: certificate_of(keys, other) for other in self._others}
        self._server, self._client = (
            context_of(keys, rank, num_ranks=len(hosts), server_side=side) for side in (True, False)
        )
        self._inside = {socket.inet_aton(address_of(other)): other for other in self._others}
        self._out: dict[int, ssl.SSLSocket] = {}
        self._came: set[int] = set()
        self._changed = threading.Condition()
        self._listener: socket.socket | None = None
        self._closing = False

    def __enter__(self) -> Tunnel:
        """Blocks until every rank is reached. Raises: NetworkError."""
        self._device = _make_device(self.rank)
        try:
            self._listener = socket.create_server(self._places[self.rank], backlog=2 * len(self._places))
            threading.Thread(target=self._accept, daemon=True).start()
            self._reach_all(time.monotonic() + self._deadline_s)
        except BaseException:
            self.__exit__()
            os.close(self._device)
            raise
        threading.Thread(target=self._carry_out, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for the next connection
            self._listener.close()
        for connection in list(self._out.values()):
            connection.close()

    def _reach_all(self, until: float) -> None:
        for other in self._others:
            self._out[other] = self._connect(other, until)
        with self._changed:
            if not self._changed.wait_for(lambda: self._came == set(self._others), until - time.monotonic()):
                missing = sorted(set(self._others) - self._came)
                raise NetworkError(f"tunnel: rank {missing[0]} did not connect within {self._deadline_s:g} s")

    def _connect(self, other: int, until: float) -> ssl.SSLSocket:
        while True:
            try:
                return self._try(other, timeout=max(_RETRY_S, until - time.monotonic()))
            except ssl.SSLCertVerificationError as error:
                raise NetworkError(f"tunnel: who answers for rank {other} has no certificate of it: {error}") from error
            except OSError as error:
                if time.monotonic() > until:
                    place = "{}:{}".format(*self._places[other])
                    raise NetworkError(f"tunnel: rank {other} at {place} is not reached: {error}") from error
                time.sleep(_RETRY_S)

    def _try(self, other: int, *, timeout: float) -> ssl.SSLSocket:
        """Raises: OSError; NetworkError, where another one answers."""
        plain = socket.create_connection(self._places[other], timeout=timeout)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._client.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise
        if connection.getpeercert(binary_form=True) != self._certificates[other]:
            connection.close()
            raise NetworkError(f"tunnel: who answers for rank {other} has not its certificate")
        connection.settimeout(None)
        return connection

    def _accept(self) -> None:
        while not self._closing and self._listener is not None:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._receive, args=(plain,), daemon=True).start()

    def _receive(self, plain: socket.socket) -> None:
        """Of whoever connected: who it is, then its packets, until it ends."""
        try:
            plain.settimeout(self._deadline_s)
            connection = self._server.wrap_socket(plain, server_side=True)
        except OSError as error:
            plain.close()
            logger.warning("tunnel: somebody was refused: %s", error)
            return
        with connection:
            shown = connection.getpeercert(binary_form=True)
            ranks = [other for other in self._others if self._certificates[other] == shown]
            if not ranks:
                return
            with self._changed:
                self._came.update(ranks)
                self._changed.notify_all()
            connection.settimeout(None)
            self._carry_in(connection, socket.inet_aton(address_of(ranks[0])))

    def _carry_in(self, connection: ssl.SSLSocket, source: bytes) -> None:
        waiting = bytearray()
        while True:
            try:
                data = connection.recv(1 << 18)
            except OSError:
                return
            if not data:
                return
            waiting += data
            at = 0
            while len(waiting) - at >= _IPV4_HEAD:
                size = int.from_bytes(waiting[at + 2 : at + 4], "big")
                if waiting[at] >> 4 != 4 or size < _IPV4_HEAD:
                    logger.warning("tunnel: a rank sent what is no packet: not heard any more")
                    return
                if len(waiting) - at < size:
                    break
                if waiting[at + 12 : at + 16] == source:
                    self._deliver(waiting[at : at + size])
                at += size
            del waiting[:at]

    def _deliver(self, packet: bytearray) -> None:
        try:
            os.write(self._device, packet)
        except OSError:
            pass  # as any network may lose one: the kernel refuses what it cannot take

    def _carry_out(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        while not self._closing:
            if not poll.poll(_LOOK_UP_MS):
                continue
            packet = os.read(self._device, 1 << 16)
            other = self._inside.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if other is None or other not in self._out:
                continue  # what every network hears besides, such as IPv6's questions for routers
            try:
                self._out[other].sendall(packet)
            except OSError:
                self._out.pop(other).close()  # it has ended
        os.close(self._device)


def _make_device(rank: int) -> int:
    """The interface, up, with this rank's address; it lasts as long as the descriptor. Raises: NetworkError."""
    try:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
        with IPRoute() as route:
            index = route.link_lookup(ifname=INTERFACE)[0]
            route.link("set", index=index, mtu=MTU)
            route.addr("add", index=index, address=address_of(rank), prefixlen=24)
            route.link("set", index=index, state="up")
    except (OSError, NetlinkError) as error:
        reason = error.args[1] if len(error.args) > 1 else error
        raise NetworkError(f"tunnel: {INTERFACE} cannot be made: {reason}; run it as root, or in the lab") from error
    return device


def _place(host: str) -> tuple[str, int]:
    name, _, port = host.rpartition(":") if ":" in host else (host, "", str(PORT))
    if not name or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"tunnel: hosts: wanted HOST or HOST:PORT, got {host}")
    return name, int(port)
