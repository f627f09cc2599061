"""One message of `harness.wire` in memory: its header and its payload, whoever carries it. Knows no socket."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from harness.wire import Header


class Message(NamedTuple):
    """What one side says to the other."""

    header: Header
    payload: Any
    """Any buffer. A writable one is given away: whoever receives the message may compute in it. One that the sender
    still needs is read-only."""

    def values(self) -> np.ndarray:
        """The payload as float32: a view where it is aligned, as small frames lie anywhere in libzmq's own buffer."""
        values = np.frombuffer(self.payload, "<f4")
        return values if values.flags.aligned else values.copy()

    def words(self) -> str:
        """The payload of an ERROR as one short line, whatever the peer sent."""
        return " ".join(bytes(memoryview(self.payload)[:1000]).decode(errors="replace").split())
