"""One message of `harness.wire` in memory: its header and its payload, whoever carries it. Knows no socket."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from harness.wire import Header
from harness.wire.codec import decode


class Message(NamedTuple):
    """What one side says to the other."""

    header: Header
    payload: Any
    """Any buffer. A writable one is given away: whoever receives the message may compute in it. One that the sender
    still needs is read-only."""

    def values(self) -> np.ndarray:
        """What the payload says, as float32: a view of it where it is dense and aligned, else memory of its own.

        Raises: WireError where it is not what the header says.
        """
        return decode(self.header.codec, self.header.count, self.header.params, self.payload).values

    def words(self) -> str:
        """The payload of an ERROR as one short line, whatever the peer sent."""
        return " ".join(bytes(memoryview(self.payload)[:1000]).decode(errors="replace").split())
