"""The public message format of the ZeroMQ exchange. A leaf: imports nothing else of the project.

Both ends of the wire import it: the ranks and servers to talk, the eavesdropper to read. It knows bytes and their
limits, and nothing of sockets, training or attacks.
"""

from harness.wire.layout import Layout
from harness.wire.message import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    SERVER_RANK,
    VERSION,
    Header,
    Kind,
    WireError,
)

__all__ = [
    "MAGIC",
    "MAX_HEADER_BYTES",
    "MAX_PAYLOAD_BYTES",
    "SERVER_RANK",
    "VERSION",
    "Header",
    "Kind",
    "Layout",
    "WireError",
]
