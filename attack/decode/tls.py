"""TLS: recognized and named; of its records, sizes and times alone are read.

Knows the five bytes in front of a record (RFC 8446, section 5.1) and the two handshake types that tell the sides apart.
"""

from __future__ import annotations

from typing import Any

from attack.capture.streams import Bytes, Flow
from attack.decode.protocol import ProtocolReader
from attack.decode.sealed import SealedTraffic

_HANDSHAKE, _APPLICATION_DATA = 22, 23
_CLIENT_HELLO, _SERVER_HELLO = 1, 2
_HEAD_BYTES = 5
_MAX_RECORD_BYTES = (1 << 14) + 2048
"""RFC 5246, section 6.2.3; TLS 1.3 allows less."""
_TAG_BYTES = 17
"""What TLS 1.3 with any of its common ciphers adds to a record: the type, and a tag of 16."""


class _Records:
    """One direction: where the next record begins."""

    def __init__(self) -> None:
        self.traffic = SealedTraffic("TLS", overhead=_TAG_BYTES)
        self.head = bytearray()
        self.skip = 0
        self.lost = False

    def receive(self, time: float, data: memoryview) -> None:
        while len(data) and not self.lost:
            if self.skip:
                step = min(self.skip, len(data))
                self.skip -= step
            else:
                step = min(_HEAD_BYTES - len(self.head), len(data))
                self.head += data[:step]
                if len(self.head) == _HEAD_BYTES:
                    self._begin_record(time)
            data = data[step:]

    def gap(self, length: int) -> None:
        self.lost = self.lost or length > self.skip
        self.skip = max(0, self.skip - length)

    def _begin_record(self, time: float) -> None:
        """type, 1 byte | version, 2 bytes | length, 2 bytes, big endian."""
        size = int.from_bytes(self.head[3:], "big")
        self.lost = not (20 <= self.head[0] <= 24 and self.head[1] == 3 and size <= _MAX_RECORD_BYTES)
        if not self.lost and self.head[0] == _APPLICATION_DATA:
            self.traffic.add(size, time)
        self.head.clear()
        self.skip = size


class TlsReader(ProtocolReader):
    """All TLS connections of a capture."""

    name = "tls"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._records: dict[Flow, _Records] = {}

    @staticmethod
    def sniff(head: bytes) -> bool | None:
        """A handshake record whose first message is a ClientHello or a ServerHello."""
        if not (b"\x16\x03".startswith(head[:2]) and (len(head) < 3 or head[2] <= 4)):
            return False
        return head[5] in (_CLIENT_HELLO, _SERVER_HELLO) if len(head) > 5 else None

    def open(self, flow: Flow, *, from_start: bool) -> None:
        """A stream begins; its first record says which side it is."""
        self._records[flow] = _Records()

    def receive(self, flow: Flow, time: float, data: Bytes) -> None:
        """Counts the records that begin in these bytes."""
        records = self._records[flow]
        view = memoryview(data)
        if records.traffic.is_server is None and len(view) > _HEAD_BYTES and not records.head:
            records.traffic.is_server = view[_HEAD_BYTES] == _SERVER_HELLO
        records.receive(time, view)

    def gap(self, flow: Flow, time: float, length: int) -> None:
        """A hole inside a record changes nothing; one that covers a head ends the counting."""
        self._records[flow].gap(length)

    def close(self, flow: Flow, *, finished: bool) -> None:
        """Nothing to do."""

    def sealed(self) -> list[dict[str, Any]]:
        """One entry a flow."""
        return [
            {"source": flow.source, "destination": flow.destination, **records.traffic.figures()}
            for flow, records in self._records.items()
        ]
