"""A rank's end of the ZeroMQ exchange: cuts vectors into chunks, sends each to the server that owns it, lands answers.

Two topologies speak the same conversation (see `harness.wire`). With *dedicated servers* the rank is a client of every
server. Where *ranks serve*, it owns a shard too and is a client of the others; its own part of its own shard meets the
others' in memory. Either way one thread does all, within the calls of `Exchange`: between them nothing moves, and
nothing needs to, as nobody can be further than this rank is.

Knows nothing of how a server adds, nor what the vectors mean.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import zmq
from torch import Tensor, nn

from harness.defenses.secure import Private, private_of
from harness.errors import DeadlineError, ExchangeError, PeerError
from harness.exchange.base import Exchange, Traffic, as_coded, flat_state, layout_of, load_flat_state
from harness.exchange.chunks import WINDOW, Chunk, Landing
from harness.exchange.curve import CurveKeys
from harness.exchange.message import Message
from harness.exchange.rendezvous import Meeting
from harness.exchange.secure import KEY_BYTES, Member
from harness.exchange.transport import Watch, keep_freed_memory, open_socket, receive, send, unpack
from harness.exchange.zeromq_server import LAST_WORDS_S, ShardServer, identity
from harness.wire import Header, Kind, WireError
from harness.wire.coded import Coded, Defended
from harness.wire.dense import Dense

NOTHING = Dense(np.empty(0, np.float32))


class ZeroMQExchange(Exchange):
    """One rank among `world_size`, averaging over the servers at `endpoints`."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        run: bytes,
        endpoints: Sequence[str],
        deadline_s: float = 30.0,
        own: ShardServer | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        """Connects in the background; `start` waits for it.

        Args:
            run: 8 bytes, the same for every rank and server of the run.
            endpoints: of all servers, in the order of their shards, as `tcp://host:port`.
            deadline_s: longest time without progress in any call.
            own: the server of shard `rank`, where ranks serve; this end then works it and closes it.
            keys: this rank's, for CURVE; None: everything crosses the wire in clear.
        """
        keep_freed_memory()
        self.rank, self.world_size, self.traffic = rank, world_size, Traffic()
        self._run, self._endpoints, self._deadline_s, self._own = run, list(endpoints), deadline_s, own
        if own is not None:
            self.traffic = own.traffic  # what it serves leaves this rank too
        self._keys = keys
        self._servers = [*range(rank, len(self._endpoints)), *range(min(rank, len(self._endpoints)))]
        """In the order in which this rank turns to them: each begins elsewhere, so that not all crowd the first."""
        self._step, self._kind = 0, Kind.WEIGHTS
        """What is being done now, and the kind of chunk that servers answer it with."""
        self._greeted = self._failed = False
        self._welcomed: set[int] = set()
        self._lost: set[int] = set()
        """Servers whose connection has ended."""
        self._delivered: deque[Message] = deque()
        """What the own server said to its owner."""
        self._gradient: Coded = NOTHING
        self._member: Member | None = None
        """This rank in secure aggregation, from the first masked gradient on; and whether it has met the others."""
        self._met = False
        self._result = np.empty(0, np.float32)
        self._landing = Landing(self._result, servers=len(self._endpoints))
        self._context, self._poller = zmq.Context(), zmq.Poller()
        self._sockets: dict[int, zmq.Socket] = {}
        self._watches: dict[int, Watch] = {}
        for server, endpoint in enumerate(self._endpoints):
            if own is None or server != rank:
                self._connect(server, endpoint)
        if own is not None:
            own.register(self._poller)

    @classmethod
    def among_ranks(
        cls, meeting: Meeting, *, host: str = "127.0.0.1", deadline_s: float = 30.0, keys: Path | None = None
    ) -> Self:
        """The exchange in which every rank serves a shard; the ranks find each other, and agree on a run, in `meeting`.

        Args:
            host: the address of this rank that the others reach it by; it binds there, at a free port.
            keys: folder with this rank's keys and the others' public ones, for CURVE.
        """
        run, rank, world_size = meeting.agree_on_run(), meeting.rank, meeting.world_size
        name, names = f"rank{rank}", [f"rank{other}" for other in range(world_size)]
        own = ShardServer(
            run=run,
            world_size=world_size,
            bind=f"tcp://{host}:0",
            index=rank,
            servers=world_size,
            rank=rank,
            deadline_s=deadline_s,
            keys=None if keys is None else CurveKeys.of_server(keys, num_ranks=world_size, name=name),
        )
        try:
            return cls(
                rank=rank,
                world_size=world_size,
                run=run,
                endpoints=meeting.swap("endpoint", own.endpoint),
                deadline_s=deadline_s,
                own=own,
                keys=None if keys is None else CurveKeys.of_rank(keys, rank=rank, servers=names),
            )
        except BaseException:
            own.close()
            raise

    def start(self, model: nn.Module, *, step: int) -> None:
        layout = layout_of(model, world_size=self.world_size)
        total, hello = layout.parameter_count + layout.buffer_count, layout.pack()
        self._step, self._kind = step, Kind.WEIGHTS
        self._landing = Landing(np.empty(total, np.float32), servers=len(self._endpoints))
        with self._telling_peers():
            self._greeted = True
            for server in self._servers:
                self._say(server, Message(self._header(Kind.HELLO, size=len(hello)), hello))
            self._run_until(lambda: self._welcomed.issuperset(self._servers))
            if self.rank == 0:
                state = as_coded(flat_state(model))
                for server in self._servers:
                    while (chunk := self._landing.next_to_send(server)) is not None:
                        self._say(server, self._chunk(state, chunk))
            else:
                self._run_until(lambda: self._landing.missing() is None)
                load_flat_state(model, torch.from_numpy(self._landing.vector))
        self._result = np.empty(layout.parameter_count, np.float32)

    def average(self, gradient: Tensor | Coded, *, step: int) -> Tensor:
        self._step, self._kind = step, Kind.AVERAGE
        # Nothing reads the caller's gradient once every average is here, as those were made of it; and nothing but
        # this copies into the result, so that both may be used again in the next step.
        self._landing = Landing(self._result, servers=len(self._endpoints))
        private = private_of(gradient)
        with self._telling_peers():
            self._gradient = as_coded(gradient) if private is None else self._masked(gradient, private)
            for _ in range(WINDOW):
                for server in self._servers:
                    self._send_next(server)
            while private is not None and self._send_next(0):
                pass  # a masked vector is answered once all of it has come
            # Of masked vectors, two deadlines may pass at the server before it goes on without a rank.
            self._run_until(lambda: self._landing.missing() is None, deadlines=1 if private is None else 3)
        self._gradient = NOTHING  # the caller's memory is the caller's: not kept, nor freed later on
        average = torch.from_numpy(self._result)
        return average.to(gradient.device) if isinstance(gradient, Tensor) else average

    def close(self) -> None:
        if self._context.closed:
            return
        for server, socket in self._sockets.items():
            if server in self._lost:
                socket.linger = 0
            elif self._greeted and not self._failed:
                self._say(server, Message(self._header(Kind.BYE), b""))
        # No answer is waited for, only that the kernel takes what is queued: peers may still need our last averages.
        linger_s = LAST_WORDS_S if self._failed else self._deadline_s
        if self._own is not None:
            self._own.close(linger_s)
        for socket in self._sockets.values():
            socket.close(None if socket.linger == 0 else int(linger_s * 1000))
        self._context.destroy()

    def _masked(self, gradient: Tensor | Coded, private: Private) -> Coded:
        """What may be sent of a vector; at the first one, after all ranks' keys have come."""
        if self._own is not None or len(self._endpoints) != 1:
            raise ExchangeError(f"{self._where}: secure-aggregation needs one server of its own (lab: --num-servers 1)")
        if self._member is None:
            self._member = Member(run=self._run, rank=self.rank, world_size=self.world_size)
            key = self._member.public_key
            self._say(0, Message(self._header(Kind.KEY, size=len(key)), key))
            self._run_until(lambda: self._met)
        masked = self._member.mask(private, step=self._step)
        return Defended(masked, gradient.defense) if isinstance(gradient, Defended) else masked

    def _hear_secret(self, message: Message) -> None:
        """Other ranks' keys, or a question for seeds."""
        assert self._member is not None, "nobody asks before"
        said = bytes(message.payload)
        if message.header.kind is Kind.KEY:
            self._member.meet([said[at : at + KEY_BYTES] for at in range(0, len(said), KEY_BYTES)])
            self._met = True
        else:
            present = np.frombuffer(said, "<u4").tolist()
            seeds = self._member.release(present, step=message.header.step)
            self._say(0, Message(self._header(Kind.RELEASE, size=len(seeds)), seeds))

    def _connect(self, server: int, endpoint: str) -> None:
        socket = self._sockets[server] = open_socket(self._context, zmq.DEALER, deadline_s=self._deadline_s)
        socket.routing_id = identity(self.rank)
        if self._keys is not None:
            self._keys.secure(socket, server=server)
        watch = self._watches[server] = Watch(socket)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ExchangeError(f"rank {self.rank}: cannot connect to {endpoint}: {error}") from None
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(watch.socket, zmq.POLLIN)

    @contextmanager
    def _telling_peers(self) -> Iterator[None]:
        """If this rank gives up, the others hear at once why, not when their own deadlines pass."""
        try:
            yield
        except ExchangeError as error:
            self._failed = True
            words = str(error).encode()[:1000]
            for server, socket in self._sockets.items():
                socket.sndtimeo = 0
                with suppress(DeadlineError):
                    self._say(server, Message(self._header(Kind.ERROR, size=len(words)), words))
            if self._own is not None:
                self._own.say_error(str(error))
            raise

    @contextmanager
    def _naming_this_rank(self) -> Iterator[None]:
        """What the own server says of a peer lacks who says it, and when."""
        try:
            yield
        except PeerError as error:
            raise PeerError(f"{self._where}: {error}") from error

    def _run_until(self, done: Callable[[], bool], *, deadlines: int = 1) -> None:
        """Takes what arrives until `done`. Raises: DeadlineError after too long without a message of a peer."""
        last = time.monotonic()
        while True:
            if self._take():
                last = time.monotonic()
            if done():
                return
            if (left := last + deadlines * self._deadline_s - time.monotonic()) <= 0:
                raise DeadlineError(f"{self._where}: no {self._missing()}")
            self._poller.poll(int(left * 1000))

    def _take(self) -> bool:
        """Handles all that has arrived, without blocking; returns whether anything has."""
        self._lost.update(server for server, watch in self._watches.items() for _ in watch.ended())
        progress = False
        for server, socket in self._sockets.items():
            while (frames := receive(socket)) is not None:
                try:
                    message = unpack(frames)
                except WireError as error:
                    raise PeerError(f"{self._where}: {self._endpoints[server]} sent no message: {error}") from error
                self.traffic.bytes_in += message.header.size
                self._hear(server, message)
                progress = True
        if self._own is not None:
            with self._naming_this_rank():
                progress |= self._own.pump(self._delivered)
        while self._delivered:
            self._hear(self.rank, self._delivered.popleft())
            progress = True
        for server in self._lost:  # only now, as its last messages may have been in the queue
            if server in self._welcomed and self._landing.awaits(server):
                raise PeerError(f"{self._where}: {self._endpoints[server]} closed the connection; no {self._missing()}")
        return progress

    def _hear(self, server: int, message: Message) -> None:
        header, name = message.header, self._endpoints[server]
        if header.kind is Kind.ERROR:
            raise PeerError(f"{self._where}: {name} gave up: {message.words()}")
        if header.run != self._run:
            raise PeerError(f"{self._where}: {name} serves run {header.run.hex()}, wanted {self._run.hex()}")
        if header.kind is Kind.WELCOME:
            self._welcomed.add(server)
            return
        if header.kind in (Kind.KEY, Kind.RELEASE) and self._member is not None:
            self._hear_secret(message)
            return
        chunk, got = Chunk(header.at, header.count), f"{header.kind} of step {header.step}"
        if (header.kind, header.step) != (self._kind, self._step) or header.codec != "dense":
            raise PeerError(f"{self._where}: {name}: wanted {self._kind} of this step, got {got}")
        if not self._landing.land(server, chunk, message.values()):
            raise PeerError(f"{self._where}: {name}: {got} for {chunk} was not awaited")
        if header.kind is Kind.AVERAGE:
            self._send_next(server)

    def _send_next(self, server: int) -> bool:
        """Whether there was still a chunk to be sent."""
        if (chunk := self._landing.next_to_send(server)) is not None:
            self._say(server, self._chunk(self._gradient, chunk))
        return chunk is not None

    def _say(self, server: int, message: Message) -> None:
        if self._own is not None and server == self.rank:
            with self._naming_this_rank():
                self._own.offer(message, self._delivered)
        else:
            try:
                send(self._sockets[server], message)
            except zmq.Again:
                raise DeadlineError(f"{self._where}: no connection to send on; no {self._missing()}") from None
            self.traffic.bytes_out += message.header.size

    def _chunk(self, vector: Coded, chunk: Chunk) -> Message:
        codec, params, payload = vector.part(chunk.at, chunk.size)
        header = self._header(
            Kind.WEIGHTS if self._kind is Kind.WEIGHTS else Kind.GRADIENT,
            at=chunk.at,
            count=chunk.size,
            total=vector.size,
            codec=codec,
            params=params,
            size=memoryview(payload).nbytes,
        )
        return Message(header, payload)

    def _header(self, kind: Kind, **fields: Any) -> Header:
        return Header(kind=kind, run=self._run, rank=self.rank, step=self._step, **fields)

    @property
    def _where(self) -> str:
        return f"rank {self.rank}, step {self._step}"

    def _missing(self) -> str:
        """What this rank waits for, from whom, how long at most, and what may be wrong."""
        limit = f"within {self._deadline_s:g} s"
        if self._own is not None and (wanted := self._own.shard.waits_for()) is not None:
            return f"{wanted} {limit}; it is gone or slow"
        if unwelcome := sorted(set(self._servers) - self._welcomed):
            keys = "" if self._keys is None else ", with these keys"
            return f"welcome from {self._endpoints[unwelcome[0]]} {limit}; is it running, and every rank started{keys}?"
        server, chunk = self._landing.missing() or (0, Chunk(0, 0))
        return f"{self._kind} for {chunk} from {self._endpoints[server]} {limit}; the server or another rank is gone"
