"""torch's TCPStore, over which ranks find each other: what its clients say -> where each rank listens.

Only the clients' requests are read, and of them only what Gloo's ranks store about themselves; other keys are passed
over. Both of torch's servers, the one with libuv and the older one, take the same requests. Knows nothing of Gloo's own
connections: it writes what it learns into a `Directory`.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterator
from typing import Any, Final

from attack.capture.streams import Bytes, Flow
from attack.decode.protocol import ProtocolReader
from attack.errors import DecodeError

_MAGIC: Final = b"\x00" + (0x3C85F7CE).to_bytes(4, "little")
"""Every client's first request: VALIDATE."""
_MAX_FIELD_BYTES: Final = 8 << 20
"""TCPStoreLibUvBackend.cpp: longest payload that a server takes."""
_MAX_KEYS: Final = 1 << 17
_AF_INET, _AF_INET6 = 2, 10
_SOCKADDR_BYTES: Final = 128
_GLOO_KEY: Final = re.compile(rb"(.*//cpu//\d+)/(\d+)", re.DOTALL)


class Request(enum.IntEnum):
    """The byte that a request begins with (TCPStoreBackend.hpp)."""

    VALIDATE = 0
    SET = 1
    COMPARE_SET = 2
    GET = 3
    ADD = 4
    CHECK = 5
    WAIT = 6
    GETNUMKEYS = 7
    DELETE_KEY = 8
    APPEND = 9
    MULTI_GET = 10
    MULTI_SET = 11
    CANCEL_WAIT = 12
    PING = 13
    QUEUE_PUSH = 14
    QUEUE_POP = 15
    QUEUE_LEN = 16


_FIELDS: Final = {
    Request.VALIDATE: "4",
    Request.SET: "ss",
    Request.COMPARE_SET: "sss",
    Request.GET: "s",
    Request.ADD: "s8",
    Request.CHECK: "*s",
    Request.WAIT: "*s",
    Request.GETNUMKEYS: "",
    Request.DELETE_KEY: "s",
    Request.APPEND: "ss",
    Request.MULTI_GET: "*s",
    Request.MULTI_SET: "*ss",
    Request.CANCEL_WAIT: "",
    Request.PING: "4",
    Request.QUEUE_PUSH: "ss",
    Request.QUEUE_POP: "s",
    Request.QUEUE_LEN: "s",
}
"""What follows: `s` a u64 length and so many bytes; a digit, so many bytes; `*` a u64 count, then the rest so often."""


class _Client:
    """One client's requests, as far as they came."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.rest = bytearray()
        self.offset = 0  # of the first byte of `rest`

    def receive(self, data: Bytes) -> Iterator[tuple[Request, list[bytes]]]:
        """Whole requests, with their strings. Raises: DecodeError."""
        self.rest += data
        while self.rest and (request := self._parse()) is not None:
            kind, fields, end = request
            del self.rest[:end]
            self.offset += end
            yield kind, fields

    def _parse(self) -> tuple[Request, list[bytes], int] | None:
        """The first request and its length; None where it is not whole."""
        try:
            kind = Request(self.rest[0])
        except ValueError:
            raise DecodeError(
                f"flow {self.flow}, byte {self.offset}: wanted a request of TCPStore, got {self.rest[0]}"
            ) from None
        at, fields, pattern = 1, [], _FIELDS[kind]
        if pattern.startswith("*"):
            if (count := self._number(at, _MAX_KEYS)) is None:
                return None
            at, pattern = at + 8, pattern[1:] * count
        for field in pattern:
            size: int | None = int(field) if field != "s" else self._number(at, _MAX_FIELD_BYTES)
            if size is None:
                return None
            start = at + (8 if field == "s" else 0)
            at = start + size
            if len(self.rest) < at:
                return None
            fields.append(bytes(self.rest[start:at]))
        return kind, fields, at

    def _number(self, at: int, most: int) -> int | None:
        if len(self.rest) < at + 8:
            return None
        number = int.from_bytes(self.rest[at : at + 8], "little")
        if number > most:
            raise DecodeError(f"flow {self.flow}, byte {self.offset + at}: wanted at most {most}, got {number}")
        return number


class TcpStoreReader(ProtocolReader):
    """All TCPStore connections of a capture."""

    name = "tcpstore"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._clients: dict[Flow, _Client] = {}

    @staticmethod
    def sniff(head: bytes) -> bool | None:
        """VALIDATE and its magic number."""
        if not _MAGIC.startswith(head[: len(_MAGIC)]):
            return False
        return True if len(head) >= len(_MAGIC) else None

    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A client's requests begin."""
        self._clients[flow] = _Client(flow)

    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Reads requests; the rest of a stream that goes wrong is not read."""
        if (client := self._clients.get(flow)) is None:
            return
        try:
            for kind, fields in client.receive(data):
                if kind in (Request.SET, Request.MULTI_SET):
                    for key, value in zip(fields[::2], fields[1::2], strict=True):
                        self._learn(key, value)
        except DecodeError as error:
            self.notes.add(f"not read further: {error}")
            del self._clients[flow]

    def gap(self, flow: Flow, time: float, length: int) -> None:
        """Requests have nothing by which they could be found again."""
        if self._clients.pop(flow, None) is not None:
            self.notes.add(f"flow {flow}: a hole in a rendezvous store's requests; what follows it is not read")

    def close(self, flow: Flow) -> None:
        """Forgets the client."""
        self._clients.pop(flow, None)

    def _learn(self, key: bytes, value: bytes) -> None:
        """`PREFIX//cpu//N/RANK` = u64 length, host | u64 136 | sockaddr_storage, i64 | i64 for each rank, or none."""
        if (match := _GLOO_KEY.fullmatch(key)) is None or len(value) < 8:
            return
        start = 8 + int.from_bytes(value[:8], "little") + 8
        end = start + _SOCKADDR_BYTES + 8
        if len(value) < end or int.from_bytes(value[start - 8 : start], "little") != _SOCKADDR_BYTES + 8:
            return
        if (address := _address(value[start:end])) is not None:
            world = (len(value) - end) // 8 or None
            self.directory.add(match[1].decode("utf-8", "replace"), int(match[2]), address, world)


def _address(sockaddr: bytes) -> str | None:
    """A sockaddr as flows spell it; the port is big endian, an IPv6 address begins at byte 8."""
    family, port = int.from_bytes(sockaddr[:2], "little"), int.from_bytes(sockaddr[2:4], "big")
    if family == _AF_INET:
        return f"{ipaddress.IPv4Address(sockaddr[4:8])}:{port}"
    if family == _AF_INET6:
        return f"[{ipaddress.IPv6Address(sockaddr[8:24])}]:{port}"
    return None
