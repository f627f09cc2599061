"""The public message format of the ZeroMQ exchange. A leaf: imports nothing else of the project.

Both ends of the wire import it: the ranks and servers to talk, the eavesdropper to read. It knows bytes and their
limits, and nothing of sockets, training or attacks.

The conversation. A *server* owns a shard: a contiguous slice of the flat vectors. It is a process of its own (it says
`rank = SERVER_RANK`), or a rank that serves the others (it says its own rank, and its own contribution to its own
shard never crosses the wire). Shards are cut so: server s of S owns elements [s * total // S, (s + 1) * total // S).
Ranks are DEALER sockets, servers ROUTER sockets; the routing identity is the rank as four bytes, big endian.

    rank r -> every server   HELLO     payload: the Layout
    server -> every rank     WELCOME   once all ranks have said HELLO with the same layout and run
    rank 0 -> every server   WEIGHTS   step s0: the initial state of the server's shard, in chunks
    server -> other ranks    WEIGHTS   the same chunks
    then for each step, for each chunk (a rank has at most a window of chunks unanswered):
    rank r -> server         GRADIENT  step, at, count, total
    server -> rank r         AVERAGE   the same step, at, count: ranks' chunks added in rank order, divided by the ranks
    rank r -> every server   BYE

Of masked gradients a server has a rank's all at once, and asks for seeds before it answers: `harness.exchange.secure`.

Chunks may arrive in any order. The weights' vector is all parameters, then all floating-point buffers; a gradient's is
the parameters alone, so the two have different totals and different shard borders. Either side may send ERROR and go.

Weights and averages are dense. A GRADIENT may be coded (`codec`), each rank as it likes; `params` then says what a
reader needs beside the payload, and of a defended one, under `defense`, the chain of defenses that made it.
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
