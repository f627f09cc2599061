"""torch's TCPStore, over which ranks find each other: what is stored and fetched there -> where each rank listens.

Of the clients' requests only what Gloo's ranks store about themselves counts; other keys are passed over. The rank on
the store's own host is never heard to store anything where each rank has a host, and a tap at one host hears no other
store either. But each rank fetches what all others stored: so the server's answers are read too, each beside the
request that it answers. Behind a hole, and where a stream lacks its start, listings are searched for: they are known
by their form. Both of torch's servers, the one with libuv and the older one, speak alike. Knows nothing of Gloo's own
connections: it writes what it learns into a `Directory`.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterator
from typing import Any, Final

from attack.capture.streams import Bytes, Flow
from attack.decode.listings import Listing, ListingSearch, parse_listing
from attack.decode.protocol import ProtocolReader
from attack.errors import DecodeError

_MAGIC: Final = b"\x00" + (0x3C85F7CE).to_bytes(4, "little")
"""Every client's first request: VALIDATE."""
_MAX_FIELD_BYTES: Final = 8 << 20
"""TCPStoreLibUvBackend.cpp: longest payload that a server takes."""
_MAX_KEYS: Final = 1 << 17


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

_ANSWERS: Final = {
    Request.VALIDATE: "",
    Request.SET: "",
    Request.COMPARE_SET: "s",
    Request.GET: "s",
    Request.ADD: "8",
    Request.CHECK: "1",
    Request.WAIT: "1",
    Request.GETNUMKEYS: "8",
    Request.DELETE_KEY: "8",
    Request.APPEND: "",
    Request.MULTI_SET: "",
    Request.PING: "4",
}
"""What the server answers, as in `_FIELDS`; to MULTI_GET, a string for each key. Of requests that are missing here
nobody has checked the answer: what follows one is not read."""
_MAX_PID: Final = 1 << 22
"""Linux gives no higher number to a process. A client's first PING carries its own, and the server sends it back."""
_MAX_CLIENTS: Final = 1 << 16
_MAX_EARLY_BYTES: Final = 1 << 20
"""Of answers whose requests were not captured yet: no more is kept."""
_MAX_ASKED: Final = 1 << 12
"""Requests whose answers were not captured yet: then only requests are read."""


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


class _Answers:
    """The server's answers on one connection, each beside its request."""

    def __init__(self) -> None:
        self.asked: collections.deque[tuple[Request, list[bytes]]] = collections.deque()
        self.rest = bytearray()
        self.readable = True

    def ask(self, request: Request, fields: list[bytes]) -> None:
        """A request was made."""
        if _ANSWERS.get(request) != "":
            self.asked.append((request, fields))
        if len(self.asked) > _MAX_ASKED:
            self.stop()

    def stop(self) -> None:
        """Nothing more is read."""
        self.readable = False
        self.asked.clear()
        self.rest.clear()

    def settle(self) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values of requests that are answered whole. Raises: DecodeError."""
        while self.asked:
            request, fields = self.asked[0]
            pattern = "s" * len(fields) if request is Request.MULTI_GET else _ANSWERS.get(request)
            if pattern is None:
                raise DecodeError(f"an answer to {request.name} is not read")
            if (answer := self._take(pattern)) is None:
                break
            self.asked.popleft()
            if request is Request.PING and answer != fields:
                raise DecodeError("a PING came back with another number")
            if request is Request.WAIT and answer != [b"\0"]:
                raise DecodeError("a WAIT was cancelled")
            if request in (Request.GET, Request.MULTI_GET):
                yield from zip(fields, answer, strict=True)
        if not self.asked and len(self.rest) > _MAX_EARLY_BYTES:
            raise DecodeError("answers without requests")

    def _take(self, pattern: str) -> list[bytes] | None:
        """Fields from the front; None, and nothing taken, where they are not whole."""
        at, fields = 0, []
        for field in pattern:
            size = int(field) if field != "s" else 8
            if len(self.rest) < at + size:
                return None
            if field == "s":
                at, size = at + 8, int.from_bytes(self.rest[at : at + 8], "little")
                if size > _MAX_FIELD_BYTES:
                    raise DecodeError(f"wanted at most {_MAX_FIELD_BYTES} bytes of a value, got {size}")
                if len(self.rest) < at + size:
                    return None
            fields.append(bytes(self.rest[at : at + size]))
            at += size
        del self.rest[:at]
        return fields


class TcpStoreReader(ProtocolReader):
    """All TCPStore connections of a capture."""

    name = "tcpstore"
    joins = True
    marks_start = False
    """The middle of another stream could begin as a server's answers do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._heads: dict[Flow, bytearray] = {}
        self._clients: dict[Flow, _Client] = {}
        self._answers: dict[Flow, _Answers] = {}  # by the client's flow
        self._searches: dict[Flow, ListingSearch] = {}
        self._doubted: set[Flow] = set()
        self._recognized: set[Flow] = set()

    @staticmethod
    def sniff(head: bytes) -> bool | None:
        """A client: VALIDATE and its magic number. The server: the number of a first PING, and how many clients it has
        counted by their first ADD."""
        if _MAGIC.startswith(head[: len(_MAGIC)]):
            return True if len(head) >= len(_MAGIC) else None
        if len(head) >= 4 and not 0 < int.from_bytes(head[:4], "little") < _MAX_PID:
            return False
        return 0 < int.from_bytes(head[4:12], "little") < _MAX_CLIENTS if len(head) >= 12 else None

    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A client's requests begin, or a server's answers: the first bytes say which."""
        if from_start:
            self._heads[flow] = bytearray()
            self._recognized.add(flow)
        else:
            self._searches[flow] = ListingSearch()

    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Reads requests and answers; of a stream that goes wrong, no more than listings."""
        if (search := self._searches.get(flow)) is not None:
            if flow not in self._doubted:
                for listing in search.receive(data):
                    self._recognized.add(flow)
                    self._learn(listing, flow.source)
            return
        if (head := self._heads.get(flow)) is not None:
            head += data
            if len(head) < len(_MAGIC):
                return
            data = self._heads.pop(flow)
            if data.startswith(_MAGIC):
                self._clients[flow] = _Client(flow)
        if (client := self._clients.get(flow)) is not None:
            self._ask(client, data)
            self._settle(flow)
        else:
            answers = self._answers.setdefault(flow.reverse, _Answers())
            if answers.readable and flow.reverse not in self._searches:
                answers.rest += data
                self._settle(flow.reverse)
            else:
                self._searches[flow] = ListingSearch()
                self.receive(flow, time, data)

    def gap(self, flow: Flow, time: float, length: int) -> None:
        """Neither side can be told which answer is whose any more."""
        if (search := self._searches.get(flow)) is not None:
            search.gap()
            return
        self._heads.pop(flow, None)
        self._searches[flow] = ListingSearch()
        if self._clients.pop(flow, None) is not None:
            self.notes.add(
                f"flow {flow}: a hole in a rendezvous store's requests; behind it, listings are searched for"
            )
        self._give_up(flow)

    def doubt(self, flow: Flow, start: int, stop: int) -> None:
        """Answers are believed only where there is nothing to doubt."""
        super().doubt(flow, start, stop)
        self._doubted.add(flow)
        self._give_up(flow)

    def close(self, flow: Flow, *, finished: bool) -> None:
        """Forgets a client, whose answers may still be on their way, or a server's answers."""
        self._heads.pop(flow, None)
        self._searches.pop(flow, None)
        if self._clients.pop(flow, None) is None:
            self._answers.pop(flow.reverse, None)

    def recognizes(self, flow: Flow) -> bool:
        """A stream seen from its start was sniffed; in another, a listing must have been found."""
        return flow in self._recognized

    def _ask(self, client: _Client, data: Bytes) -> None:
        answers = self._answers.setdefault(client.flow, _Answers())
        try:
            for kind, fields in client.receive(data):
                if kind in (Request.SET, Request.MULTI_SET):
                    for key, value in zip(fields[::2], fields[1::2], strict=True):
                        self._learn(parse_listing(value, key), client.flow.source)
                if answers.readable:
                    answers.ask(kind, fields)
        except DecodeError as error:
            self.notes.add(f"not read further: {error}")
            self._give_up(client.flow)
            del self._clients[client.flow]

    def _settle(self, flow: Flow) -> None:
        """Learns from the answers to a client. What goes wrong there costs the answers only."""
        answers = self._answers[flow]
        try:
            for key, value in answers.settle():
                self._learn(parse_listing(value, key))
        except DecodeError:
            answers.stop()

    def _give_up(self, flow: Flow) -> None:
        """Tells no more which answer is whose, on a connection: neither way need be the server's."""
        for client in (flow, flow.reverse):
            self._answers.setdefault(client, _Answers()).stop()

    def _learn(self, listing: Listing | None, owner: str | None = None) -> None:
        if listing is None:
            return
        if listing.group is None or listing.rank is None:
            self.directory.mention(listing.address, listing.world)
        else:
            self.directory.add(listing.group, listing.rank, listing.address, listing.world, owner)
