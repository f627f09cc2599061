"""Where, in the middle of a ZMTP stream, a message of the project's own format provably begins.

What comes in is a window of bytes with holes, out comes the first boundary that passes the proof. A gradient is
arbitrary bytes, so the proof must be one that they cannot give: the first key of a header at its place in a frame that
says MORE, a header that unpacks, directly behind it a last frame of exactly the payload's size, and a run id that is
known already or that a second such message, directly behind the first, repeats.
"""

from __future__ import annotations

from attack.decode.frames import Holes
from attack.decode.zmtp import LONG, MORE, Search
from harness.wire import MAGIC, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Header, WireError

_LONG_HEAD = 9
"""Flags and an eight-byte size; a short frame has flags and one byte."""
_BEFORE = _LONG_HEAD + 1
"""Most bytes of a message before MAGIC: a long frame's head, and the byte of msgpack that opens the map."""
_ONE_MESSAGE = _LONG_HEAD + MAX_HEADER_BYTES + _LONG_HEAD


class MessageAnchor:
    """Proves boundaries between messages; `runs` grows by each run id that was proven, here or by others."""

    span = 2 * _ONE_MESSAGE + MAX_PAYLOAD_BYTES

    def __init__(self, runs: set[bytes]) -> None:
        self._runs = runs

    def find(self, window: bytearray, holes: Holes) -> Search:
        """The first message in `window` that is proven to be one."""
        mark = window.find(MAGIC)
        while mark >= 0:
            for at in (mark - 3, mark - _BEFORE):  # behind a short frame's head, or a long one's
                if at >= 0 and (search := self._examine(window, holes, at)) is not None:
                    return search
            mark = window.find(MAGIC, mark + 1)
        tail = min(len(window), _BEFORE + len(MAGIC) - 1)  # it may hold the first bytes of a message
        return Search(at=len(window) - tail, found=False, wanted=tail + 1)

    def _examine(self, window: bytearray, holes: Holes, at: int) -> Search | None:
        """Whether a message begins at `at`: found, not decidable yet, or None where it is proven not to."""
        first = _read(window, holes, at)
        if isinstance(first, int):
            return Search(at=at, found=False, wanted=first - at)
        if first is None:
            return None
        header, end = first
        if header.run not in self._runs:
            second = _read(window, holes, end)
            if isinstance(second, int):
                return Search(at=at, found=False, wanted=second - at)
            if second is None or second[0].run != header.run:
                return None
            self._runs.add(header.run)
        return Search(at=at, found=True)


def _read(window: bytearray, holes: Holes, at: int) -> tuple[Header, int] | int | None:
    """The message at `at` as (header, its end); or the length that the window must have; or None: it is not one."""
    body = at + (_LONG_HEAD if window[at : at + 1] == bytes([MORE | LONG]) else 2)
    if len(window) < body:
        return body
    size = int.from_bytes(window[at + 1 : body], "big")
    if window[at] not in (MORE, MORE | LONG) or size > MAX_HEADER_BYTES:
        return None
    last = body + size  # the head of the payload's frame
    if len(window) <= last:
        return last + 1
    payload = last + (_LONG_HEAD if window[last] == LONG else 2)
    if len(window) < payload:
        return payload
    if window[last] not in (0, LONG) or any(start < payload and stop > at for start, stop in holes):
        return None
    try:
        header = Header.unpack(memoryview(window)[body:last])
    except WireError:
        return None
    if header.size != int.from_bytes(window[last + 1 : payload], "big"):
        return None
    return header, payload + header.size
