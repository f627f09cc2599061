"""A capture file as a stream of packets, or of the TCP segments in them.

In comes a path, out go packets and, at any time, what is known besides them. Refuses to know about connections, and to
guess: what is not a capture is one `CaptureError`.

The file is mapped, not read: packets are views of the mapping, which stay valid for as long as anybody holds them, and
the memory is handed back behind the reader's heels, to be filled from the file again should a view be looked at later.
So a capture of any length needs little memory. The file must not be made shorter meanwhile; it may grow, unseen.
"""

from __future__ import annotations

import collections
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attack.capture.packets import Packet, Segment, Skip, parse_segment
from attack.capture.pcap import MAGICS, read_pcap
from attack.capture.pcapng import BLOCK_SECTION
from attack.capture.pcapng_reader import read_pcapng
from attack.capture.statistics import CaptureStatistics, Progress
from attack.errors import CaptureError

_RELEASE_BYTES: Final = 32 << 20
"""Mapped memory is handed back in pieces of this size: seldom enough to cost nothing."""

_OTHER_FILES: Final = {
    b"\x1f\x8b": "gzip, as it seems: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd, as it seems: unpack it first",
    b"\x04\x22\x4d\x18": "lz4, as it seems: unpack it first",
    b"PK": "a zip archive, as it seems: unpack it first",
    b"\xfd7zXZ": "xz, as it seems: unpack it first",
}


class CaptureReader:
    """A pcap or pcapng file. Iterating gives its packets, and starts at the beginning each time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file.

        Raises: CaptureError where it is not there, not readable, empty, or not a capture.
        """
        self.path = Path(path)
        self._map = _map(self.path)
        self._capture = memoryview(self._map)
        magic = bytes(self._capture[:4])
        if magic in MAGICS:
            self._read = read_pcap
        elif magic == BLOCK_SECTION.to_bytes(4):
            self._read = read_pcapng
        else:
            raise CaptureError(f"{self.path}: not a capture: wanted pcapng or pcap, got {_describe(self._capture)}")
        self._progress = Progress()
        self._packets = self._bytes = 0
        self._skipped: collections.Counter[Skip] = collections.Counter()

    @property
    def statistics(self) -> CaptureStatistics:
        """Of the newest pass, as far as it has come."""
        return CaptureStatistics(
            packets=self._packets,
            bytes=self._bytes,
            dropped=self._progress.dropped,
            skipped={str(reason): count for reason, count in self._skipped.items()},
            cut_at=self._progress.cut_at,
        )

    def __iter__(self) -> Iterator[Packet]:
        """The packets in the order of the file.

        Raises: CaptureError where the file is damaged, after the packets before. A file that just ends in the middle of
            a record is not damaged: `statistics` says so.
        """
        self._progress = progress = Progress()
        self._packets = self._bytes = 0
        self._skipped.clear()
        released = 0
        try:
            for packet in self._read(self._capture, progress):
                self._packets += 1
                self._bytes += len(packet.data)
                yield packet
                if progress.position - released > _RELEASE_BYTES:
                    released = self._release(released, progress.position)
        except CaptureError as error:
            raise CaptureError(f"{self.path}: {error}") from None

    def segments(self) -> Iterator[Segment]:
        """The TCP segments in the order of the file; `statistics` counts the packets that have none.

        Raises: CaptureError as iterating does.
        """
        for packet in self:
            segment = parse_segment(packet)
            if isinstance(segment, Skip):
                self._skipped[segment] += 1
            else:
                yield segment

    def _release(self, start: int, end: int) -> int:
        """Hands mapped memory back, in whole pages, and returns up to where."""
        end -= end % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        return end


def _map(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise CaptureError(f"{path}: wanted a regular file; record to one, then read that")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise CaptureError(f"{path}: the file is empty: the recorder has not written to it, or could not")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror or error}") from None


def _describe(capture: memoryview) -> str:
    head = bytes(capture[:16])
    for magic, what in _OTHER_FILES.items():
        if head.startswith(magic):
            return what
    return f"a file that begins with {head!r}"
