"""What encrypted traffic still gives away: how much, when, in which direction, and how it repeats.

In go sizes and times of sealed messages of one direction, out come figures, and estimates that say that they are some.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import numpy as np

MAX_MESSAGES = 1 << 20
"""Sizes and times that are kept of a direction, 12 bytes each: what comes later is counted only."""
SMALL_BYTES = 128
"""Heartbeats, empty messages and Gloo's announcements, 48 bytes, are smaller, sealed; their order varies."""
MAX_PERIOD = 4096
"""Messages of a step that are looked for: headers and payloads of 512 MiB in chunks of 256 KiB."""


class SealedTraffic:
    """Sealed messages of one direction."""

    def __init__(self, mechanism: str, *, overhead: int) -> None:
        """`overhead` is what sealing adds to a message, in bytes."""
        self.mechanism = mechanism
        self.is_server: bool | None = None
        """Whether the sender is the server of the connection; None where it was not seen."""
        self.messages = 0
        self.bytes = 0
        self._overhead = overhead
        self._sizes, self._times = array("L"), array("d")

    def add(self, size: int, time: float) -> None:
        """Counts a message."""
        self.messages += 1
        self.bytes += size
        if len(self._sizes) < MAX_MESSAGES:
            self._sizes.append(size)
            self._times.append(time)

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "mechanism": self.mechanism,
            "server": self.is_server,
            "messages": self.messages,
            "bytes": self.bytes,
            "sizes": [
                {"size": size, "messages": count} for size, count in Counter(self._sizes.tolist()).most_common(10)
            ],
            "first_time": self._times[0] if self._times else None,
            "last_time": self._times[-1] if self._times else None,
            "estimate": self._estimate(),
        }

    def _estimate(self) -> dict[str, Any] | None:
        """Steps, from the shortest period with which the sizes of messages repeat; None where they do not.

        A guess: a vector whose chunks are all of one size looks like that many steps of one chunk. The bytes of a step
        are its headers and payloads, without what sealing adds.
        """
        sizes, times = np.array(self._sizes), np.array(self._times)
        large = sizes > SMALL_BYTES
        sizes, times = sizes[large], times[large]
        start = len(sizes) // 4  # the first ones are a handshake and the initial state
        sizes, times = sizes[start:], times[start:]
        for period in range(1, min(len(sizes) // 3, MAX_PERIOD) + 1):
            if np.mean(sizes[period:] == sizes[:-period]) > 0.95:
                last = sizes[-period:]
                return {
                    "messages_per_step": period,
                    "bytes_per_step": int(last.sum()) - period * self._overhead,
                    "step_seconds": float(np.median(times[period:] - times[:-period])),
                    "steps": round(self._matching(last) / period),
                }
        return None

    def _matching(self, step: np.ndarray[Any, np.dtype[np.uint64]]) -> int:
        """Messages, of all, whose size occurs in a step."""
        return int(np.isin(np.array(self._sizes), step).sum())
