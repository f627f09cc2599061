"""ZeroMQ sockets with the limits that they do not have by default, and messages of `harness.wire` over them.

In go headers and arrays, out come headers and buffers, nothing copied on the way. Knows no step, shard or rank's duty.

What is bounded: a frame (`MAXMSGSIZE`, checked by libzmq before it allocates), the frames that are kept of a message,
messages read ahead for each peer (`RCVHWM`, whole messages), the time of a handshake. What cannot be bounded here:
libzmq collects a message of any number of frames before it shows the first, so whoever can connect can make it grow.
Hence loopback by default; on a network, let only the ranks reach the port.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator

import zmq
from zmq.utils.monitor import recv_monitor_message

from harness.exchange.message import Message
from harness.wire import MAX_PAYLOAD_BYTES, Header, WireError

HANDSHAKE_MS = 5000
"""libzmq's 30 s would let a port scanner hold a connection that long; a greeting takes milliseconds."""
COPIED_BYTES = 512 << 10
"""A shorter payload is copied when it is sent: quicker than the word between pyzmq's threads that says when a shared
one may be freed, and for which they take turns at the interpreter."""
READ_AHEAD = 8
"""Messages that libzmq takes from a peer before we read them: twice the credit window."""


def open_socket(context: zmq.Context, kind: int, *, deadline_s: float) -> zmq.Socket:
    """A ROUTER or DEALER with every limit set, neither bound nor connected."""
    socket = context.socket(kind)
    socket.maxmsgsize = MAX_PAYLOAD_BYTES
    socket.copy_threshold = COPIED_BYTES
    socket.rcvhwm = READ_AHEAD
    # Not bounded here, because the conversation bounds it (a window for each rank, and once the initial state), and
    # a ROUTER at its mark would drop what it sends.
    socket.sndhwm = 0
    socket.handshake_ivl = HANDSHAKE_MS
    socket.linger = 0
    socket.sndtimeo = int(1000 * deadline_s)  # a DEALER that was refused has nobody to send to, and would wait forever
    # A host that vanishes without a FIN is noticed even while nobody waits for it.
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = max(1, int(deadline_s / 2))
    socket.tcp_keepalive_intvl = max(1, int(deadline_s / 6))
    socket.tcp_keepalive_cnt = 3
    if kind == zmq.ROUTER:
        socket.router_mandatory = 1  # an error, not silence, where a peer is gone
    return socket


def send(socket: zmq.Socket, message: Message, route: tuple[bytes, ...] = ()) -> None:
    """Queues a message without copying a large payload, which must not be written until it has been sent; a frame, of
    whatever length, is handed on as it is."""
    # Frame by frame: `send_multipart` looks at every frame first, which costs as much as sending the small ones.
    for name in route:
        socket.send(name, zmq.SNDMORE)
    socket.send(message.header.pack(), zmq.SNDMORE)
    socket.send(message.payload, copy=False)


def in_frame(message: Message) -> Message:
    """The message with its payload in a frame of libzmq's, which several sends share."""
    if isinstance(message.payload, zmq.Frame):
        return message
    return Message(message.header, zmq.Frame(message.payload, copy_threshold=COPIED_BYTES))


def receive(socket: zmq.Socket) -> list[zmq.Frame] | None:
    """The frames of the next message, at most four of them; None when none has arrived yet."""
    try:
        frame = socket.recv(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None
    frames = [frame]
    while frame.more:
        frame = socket.recv(copy=False)
        if len(frames) < 4:  # one more than any message of ours, so that too many is seen as such
            frames.append(frame)
    return frames


def unpack(frames: list[zmq.Frame]) -> Message:
    """The message in its two frames. Raises: WireError for anything that is not one."""
    if len(frames) != 2:
        raise WireError(f"wanted a header and a payload, got {len(frames)} frames or more")
    header, payload = Header.unpack(frames[0].buffer), frames[1]
    if len(payload) != header.size:
        raise WireError(f"{header.kind}: wanted {header.size} bytes of payload, got {len(payload)}")
    return Message(header, payload)


class Watch:
    """What happens to the connections of one socket: they come, and they go."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._watched = socket
        self.socket = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def ended(self) -> Iterator[int]:
        """File descriptors (as in a frame's `SRCFD`) of the connections that have ended since the last call."""
        while self.socket.poll(0):
            event = recv_monitor_message(self.socket)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                yield int(event["value"])

    def close(self) -> None:
        """Stops watching; the watched socket stays open."""
        self._watched.disable_monitor()


def keep_freed_memory() -> None:
    """Tells glibc's malloc, for the whole process, to keep freed blocks of up to 32 MiB instead of unmapping them.

    libzmq allocates every large frame afresh, and by default each is a mapping of its own whose pages fault in one by
    one: that costs more than the copy into them. Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; 32 MiB is the most that older versions accept
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
