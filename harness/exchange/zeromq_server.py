"""A shard behind a ROUTER socket: reads what ranks send, lets `Shard` decide, sends what it answers.

It is the whole of a dedicated server (`serve`), and one half of a rank that serves the others, which calls `pump` from
its own loop. Knows nothing of sums or of whose turn it is. It binds loopback unless told otherwise.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import zmq

from harness.errors import DeadlineError, ExchangeError, PeerError
from harness.exchange.base import Traffic
from harness.exchange.curve import CurveKeys
from harness.exchange.message import Message
from harness.exchange.shard import Shard, name_ranks
from harness.exchange.transport import Watch, in_frame, keep_freed_memory, open_socket, receive, send, unpack
from harness.wire import SERVER_RANK, Header, Kind, WireError

logger = logging.getLogger(__name__)

REFUSALS = 64
"""Messages of strangers that are answered and logged; the rest are dropped in silence, so that none can fill memory."""
BURST = 1000
"""Messages that are taken before deadlines are looked at again, however many strangers talk."""
LAST_WORDS_S = 1.0
"""How long an ERROR may take to leave when a server ends."""


class ShardServer:
    """Server `index` of `servers` of a run; as a context manager it is closed at the end."""

    def __init__(
        self,
        *,
        run: bytes | None = None,
        world_size: int,
        bind: str = "tcp://127.0.0.1:0",
        index: int = 0,
        servers: int = 1,
        rank: int = SERVER_RANK,
        deadline_s: float = 30.0,
        keys: CurveKeys | None = None,
    ) -> None:
        """Binds at once; `endpoint` then says where.

        Args:
            run: 8 bytes that every rank of the run knows too; messages of other runs are dropped. None: the run of the
                first rank that says HELLO.
            bind: where to listen; port 0 takes a free one. Without keys nothing authenticates a peer: beyond loopback,
                let only the ranks reach it.
            rank: of the owner, where a rank serves this shard.
            deadline_s: longest time without a message while somebody waits.
            keys: with them, CURVE, and nobody but the ranks gets in.

        Raises: ExchangeError where the address cannot be bound.
        """
        keep_freed_memory()
        self.shard = Shard(run=run, world_size=world_size, index=index, servers=servers, rank=rank)
        self._own, self._deadline_s = rank, deadline_s
        self._connections: dict[int, int] = {}
        """File descriptor of each rank's connection -> the rank."""
        self._lost: set[int] = set()
        self._refused = 0
        self.traffic = Traffic()
        self._context = zmq.Context()
        self.socket = open_socket(self._context, zmq.ROUTER, deadline_s=deadline_s)
        self._keys = keys
        self._door = None if keys is None else keys.admit(self._context)
        if keys is not None:
            keys.secure(self.socket)
        self._watch = Watch(self.socket)
        self._poller = zmq.Poller()
        self.register(self._poller)
        try:
            self.socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ExchangeError(f"server {index}: cannot listen on {bind}: {error}; is the port in use?") from None
        self.endpoint: str = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def serve(self) -> None:
        """Serves until every rank has said BYE. Raises: ExchangeError, after the ranks have been told."""
        try:
            self._serve()
        except ExchangeError as error:
            told = type(error)(f"server {self.endpoint}, step {self.shard.step}: {error}")
            self.say_error(str(told))
            raise told from error

    def register(self, poller: zmq.Poller) -> None:
        """What to poll before the next `pump`."""
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._watch.socket, zmq.POLLIN)

    def pump(self, deliver: deque[Message] | None = None) -> bool:
        """Takes what has arrived, and answers it; does not block. Answers to the owner go to `deliver`.

        Returns: whether a rank of the run said something.
        Raises: PeerError where a rank broke the conversation or is gone.
        """
        progress = False
        self._drain_watch()
        for _ in range(BURST):
            if (frames := receive(self.socket)) is None:
                # Only now, as what a rank said before it went may have been in the queue: its BYE, for one.
                while lost := self._lost - self.shard.gone - self.shard.missing:
                    self._answer(self.shard.drop(lost), deliver)
                break
            sender = frames[0].bytes
            try:
                self._check_name(frames)
                message = unpack(frames[1:])
                answers = self.shard.receive(_rank_of(sender), message)
                if message.header.kind is Kind.HELLO:
                    self._meet(_rank_of(sender), connection=frames[-1].get(zmq.SRCFD))
                self._answer(answers, deliver)
                self.traffic.bytes_in += message.header.size
                progress = True
            except WireError as error:
                self._refuse(sender, error)
        return progress

    def offer(self, message: Message, deliver: deque[Message]) -> None:
        """Takes a message of the owner itself, which crosses no wire."""
        self._answer(self.shard.receive(self._own, message), deliver)

    def say_error(self, text: str) -> None:
        """Tells every rank that this server gives up, if they still listen."""
        for rank, message in self.shard.error(text):
            if rank != self._own:
                self._send(rank, message, must_arrive=False)

    def close(self, linger_s: float = LAST_WORDS_S) -> None:
        """Closes the socket; what is still queued gets at most `linger_s` to leave. A second call does nothing."""
        if not self._context.closed:
            self._watch.close()
            if self._door is not None:
                self._door.stop()
            self._context.destroy(linger=int(linger_s * 1000))

    def __enter__(self) -> ShardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        last = time.monotonic()
        while True:
            if self.pump():
                last = time.monotonic()
            if self.shard.finished:
                return
            wanted, left = self.shard.waits_for(), last + self._deadline_s - time.monotonic()
            if left <= 0 and (late := self.shard.late()):
                logger.warning("%s, step %d: goes on without %s", self.endpoint, self.shard.step, name_ranks(late))
                self._answer(self.shard.drop(late), None)
                last = time.monotonic()
                continue
            if wanted is not None and left <= 0:
                raise DeadlineError(f"no {wanted} within {self._deadline_s:g} s; it is gone or slow")
            # Between steps nobody waits, for as long as they like; the end of a rank's connection still wakes this.
            self._poller.poll(None if wanted is None else int(left * 1000))

    def _check_name(self, frames: list[zmq.Frame]) -> None:
        """Raises: WireError, where a rank goes by another one's name."""
        if self._keys is not None and self._keys.rank_of(str(frames[-1].get("User-Id"))) != _rank_of(frames[0].bytes):
            raise WireError("wanted a rank under its own key, got another one's")

    def _meet(self, rank: int, *, connection: int) -> None:
        """Remembers whose connection this is. What ended earlier under the same descriptor is forgotten first."""
        self._drain_watch()
        self._connections[connection] = rank

    def _drain_watch(self) -> None:
        self._lost.update(self._connections.pop(fd) for fd in self._watch.ended() if fd in self._connections)

    def _answer(self, outgoing: list[tuple[int, Message]], deliver: deque[Message] | None) -> None:
        framed: dict[int, Message] = {}
        for rank, message in outgoing:
            if id(message) not in framed:
                framed[id(message)] = in_frame(message)
            if rank == self._own and deliver is not None:
                deliver.append(framed[id(message)])
            else:
                self._send(rank, framed[id(message)])

    def _send(self, rank: int, message: Message, *, must_arrive: bool = True) -> None:
        try:
            send(self.socket, message, route=(identity(rank),))
            self.traffic.bytes_out += message.header.size
        except zmq.ZMQError as error:  # EHOSTUNREACH: nobody of that name is connected
            if self.shard.tolerant:
                self._lost.add(rank)
            elif must_arrive:
                raise PeerError(f"rank {rank} is gone: {error}") from None

    def _refuse(self, sender: bytes, error: WireError) -> None:
        """Drops a stranger's message, and says so to both sides while that is not a way to fill memory."""
        self._refused += 1
        if self._refused > REFUSALS:
            return
        logger.warning("%s: dropped a message of %s: %s", self.endpoint, sender[:16].hex(), error)
        text = str(error).encode()[:500]
        header = Header(kind=Kind.ERROR, run=bytes(8), rank=self._own, step=0, size=len(text))  # tells nothing of ours
        try:
            send(self.socket, Message(header, text), route=(sender,))
        except zmq.ZMQError:
            pass  # it did not wait for an answer


def identity(rank: int) -> bytes:
    """The routing identity of a rank's DEALER."""
    return rank.to_bytes(4, "big")


def _rank_of(sender: bytes) -> int:
    """The rank that a routing identity stands for; a number that no rank has where it is not one of ours."""
    return int.from_bytes(sender, "big") if len(sender) == 4 else SERVER_RANK
