"""What a rank stores about itself in torch's TCPStore: where it listens. Parsed, and found again behind a hole.

    u64 length, host | u64 136 | sockaddr_storage 128 B, i64 | i64 for each rank of the group, or none

A key names the group and the rank. What clients fetch comes without one: then it says of an address only that a rank
of some group listens there. Knows nothing of requests and answers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from attack.capture.streams import Bytes

_AF_INET, _AF_INET6 = 2, 10
_SOCKADDR_BYTES: Final = 128
_ENTRY_BYTES: Final = _SOCKADDR_BYTES + 8
_KEY: Final = re.compile(rb"(.*//cpu//\d+)/(\d+)", re.DOTALL)
_MARK: Final = re.compile(re.escape(_ENTRY_BYTES.to_bytes(8, "little")) + rb"[\x02\x0a]\0", re.DOTALL)
_MAX_NAME_BYTES: Final = 255
"""Of a host and of a key, in a search."""
_MAX_VALUE_BYTES: Final = 1 << 19
_BEFORE: Final = 2 * (_MAX_NAME_BYTES + 8) + 8
"""Bytes of a request before the mark, which is of 10."""


class Listing(NamedTuple):
    """A rank listens."""

    address: str
    """As flows spell it."""
    world: int | None
    """Ranks of its group, where it says so."""
    group: str | None = None
    rank: int | None = None
    """None, as the group is, where there was no key."""


def parse_listing(value: bytes, key: bytes | None = None) -> Listing | None:
    """One value; None where it, or its key, is something else."""
    if len(value) < 8:
        return None
    start = 8 + int.from_bytes(value[:8], "little") + 8
    end = start + _ENTRY_BYTES
    if len(value) < end or int.from_bytes(value[start - 8 : start], "little") != _ENTRY_BYTES:
        return None
    address, world = _address(value[start:end]), (len(value) - end) // 8 or None
    if address is None:
        return None
    if key is None:
        return Listing(address, world)
    if (match := _KEY.fullmatch(key)) is None:
        return None
    return Listing(address, world, match[1].decode("utf-8", "replace"), int(match[2]))


class ListingSearch:
    """Takes bytes of which nobody knows where a request or an answer begins."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def gap(self) -> None:
        """A hole: nothing reaches across it."""
        self._rest.clear()

    def receive(self, data: Bytes) -> Iterator[Listing]:
        """The listings that are whole by now."""
        self._rest += data
        at, keep = 0, max(0, len(self._rest) - _BEFORE - 10)
        while (match := _MARK.search(self._rest, at)) is not None:
            at = match.end()
            found = _around(self._rest, match.start())
            if isinstance(found, int) and found > len(self._rest):
                keep = min(keep, max(0, match.start() - _BEFORE))  # its end is still to come
                break
            if isinstance(found, Listing):
                yield found
        del self._rest[:keep]


def _around(data: bytearray, mark: int) -> Listing | int | None:
    """The listing whose entry begins behind a mark; where it is not whole, where it will end; None: it is none."""
    for host in range(1, _MAX_NAME_BYTES + 1):
        start = mark - host - 8  # of the value
        if start < 8:
            return None
        if int.from_bytes(data[start : start + 8], "little") != host:
            continue
        size = int.from_bytes(data[start - 8 : start], "little")
        least = mark + 8 + _ENTRY_BYTES - start
        if not least <= size <= _MAX_VALUE_BYTES or (size - least) % 8:
            return None
        if start + size > len(data):
            return start + size
        value = bytes(data[start : start + size])
        for length in range(1, _MAX_NAME_BYTES + 1):
            at = start - 8 - length
            if at >= 8 and int.from_bytes(data[at - 8 : at], "little") == length:
                if (keyed := parse_listing(value, bytes(data[at : at + length]))) is not None:
                    return keyed
        return parse_listing(value)
    return None


def _address(sockaddr: bytes) -> str | None:
    """A sockaddr as flows spell it; the port is big endian, an IPv6 address begins at byte 8."""
    family, port = int.from_bytes(sockaddr[:2], "little"), int.from_bytes(sockaddr[2:4], "big")
    if family == _AF_INET:
        return f"{ipaddress.IPv4Address(sockaddr[4:8])}:{port}"
    if family == _AF_INET6:
        return f"[{ipaddress.IPv6Address(sockaddr[8:24])}]:{port}"
    return None
