"""What one server of the ZeroMQ exchange does, without a socket: messages of ranks in, messages to ranks out.

It owns one shard of the vectors. It waits for all ranks, hands on rank 0's initial state, then adds each chunk in rank
order, whatever the order of arrival, and answers the average. What it holds is bounded: of each rank at most a window
of chunks. A sum lies in memory that came with one of its parts, or is new, and is never used again, so an answer may
still be in the sending queue while later steps are added up.

Whom it blames: a message that does not come from a rank of this run (`WireError`) is a stranger's, is dropped, and
changes nothing. A rank of this run that breaks the conversation (`PeerError`) ends it, as no right average can follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from harness.errors import PeerError
from harness.exchange.chunks import WINDOW, Chunk, shard_chunks
from harness.exchange.message import Message
from harness.exchange.secure_server import SecureShard
from harness.wire import SERVER_RANK, Header, Kind, Layout, WireError
from harness.wire.codec import READERS

Outgoing = tuple[int, Message]
"""A message, and the rank that it is for."""


class Shard:
    """The logic of server `index` of `servers`, in a run of `world_size` ranks."""

    def __init__(
        self, *, run: bytes | None = None, world_size: int, index: int = 0, servers: int = 1, rank: int = SERVER_RANK
    ) -> None:
        """
        Args:
            run: 8 bytes that every rank of the run knows; None: what the first rank that says HELLO calls it.
            rank: what its messages say of their sender: the owner's, where a rank serves this shard.
        """
        self.ranks = range(world_size)
        self.gone: set[int] = set()
        """Ranks that said BYE."""
        self.joined: dict[int, Layout] = {}
        self.step = 0
        """The step whose chunks are being added."""
        self.run = run
        self._rank, self._index, self._servers = rank, index, servers
        self._weights: dict[Chunk, None] | None = None
        """Chunks of the initial state that rank 0 still has to send; None before all have joined."""
        self._secure: SecureShard | None = None
        """Where gradients are masked; from the first key on."""
        self._open: dict[Chunk, ChunkSum] = {}
        """Chunks of this step that some rank has sent, and not all."""
        self._untouched: dict[Chunk, None] = {}
        """Chunks of this step that no rank has sent."""

    @property
    def finished(self) -> bool:
        """Whether every rank has said BYE, or is not missed."""
        return self.gone | self.missing == set(self.ranks)

    @property
    def missing(self) -> set[int]:
        """Ranks that are out of the run, which goes on without them."""
        return set() if self._secure is None else self._secure.missing

    @property
    def tolerant(self) -> bool:
        """Whether the run goes on without a rank that is lost: where gradients are masked, once all keys are known."""
        return self._secure is not None and self._secure.agreed

    def receive(self, sender: int, message: Message) -> list[Outgoing]:
        """What to send now that `sender` (by its connection, whatever the header says) sent this message.

        Raises: WireError where it is no message of this run, PeerError where it is one that ends the run.
        """
        header = message.header
        if sender not in self.ranks or header.rank != sender:
            raise WireError(f"wanted a rank below {len(self.ranks)} under its own name, got {header.rank} as {sender}")
        if self.run is None and header.kind is Kind.HELLO:
            self.run = header.run
        if header.run != self.run:
            wanted = "a HELLO first" if self.run is None else f"run {self.run.hex()}"
            raise WireError(f"wanted {wanted}, got run {header.run.hex()}; another job uses this port?")
        if sender in self.missing:
            return [(sender, self._error(f"rank {sender} is out of the run: it was lost, or late"))]
        if header.kind is Kind.ERROR:
            if self.tolerant:
                return self.drop({sender})
            raise PeerError(f"rank {sender} gave up: {message.words()}")
        if header.kind is Kind.HELLO:
            return self._join(sender, message)
        if sender not in self.joined or sender in self.gone:
            raise self._broken(sender, header, "nothing before its HELLO or after its BYE")
        if header.kind is Kind.BYE:
            return self._leave(sender)
        if header.kind is Kind.WEIGHTS:
            return self._hand_on(sender, message)
        if header.kind is Kind.GRADIENT:
            return (self._add_masked if header.codec == "masked" else self._add)(sender, message)
        if header.kind is Kind.KEY:
            return self._swap_keys(sender, message)
        if header.kind is Kind.RELEASE:
            return self._take_seeds(sender, message)
        raise self._broken(sender, header, "a message of a rank")

    def waits_for(self) -> str | None:
        """What somebody is waiting for, as the end of a sentence that begins with "no"; None where nobody waits."""
        if self._weights is None:
            return f"HELLO from {name_ranks(set(self.ranks) - set(self.joined))}"
        if self._weights:
            return f"weights for {next(iter(self._weights))} from rank 0"
        if late := self.late():
            return f"masked gradient, or its seeds, from {name_ranks(late)}"
        for chunk, total in self._open.items():
            return f"gradient for {chunk} from {name_ranks(set(self.ranks) - total.given)}"
        return None

    def error(self, text: str) -> list[Outgoing]:
        """Tells every rank that has joined, and not left, that this server gives up."""
        message = self._error(text)
        return [(rank, message) for rank in self.joined if rank not in self.gone]

    def late(self) -> list[int]:
        """Ranks without which the others may go on, and for whose masked vectors or seeds they wait."""
        return self._secure.late() if self._secure is not None and self._secure.waiting else []

    def drop(self, ranks: Iterable[int]) -> list[Outgoing]:
        """Goes on without these ranks. Raises: PeerError where that cannot be."""
        if self._secure is None or not self.tolerant:
            raise PeerError(f"{name_ranks(ranks)} closed the connection without a BYE")
        self._secure.drop(ranks)
        told = [(rank, self._error(f"rank {rank} is out of the run: it was lost, or late")) for rank in ranks]
        return [*told, *self._go_on()]

    def _join(self, sender: int, message: Message) -> list[Outgoing]:
        header = message.header
        if sender in self.joined:
            raise self._broken(sender, header, "one HELLO of each rank")
        try:
            layout = Layout.unpack(message.payload)
        except WireError as error:
            raise PeerError(f"rank {sender}: {error}") from error
        if layout.world != len(self.ranks):
            raise PeerError(f"rank {sender}: wanted a run of {len(self.ranks)} ranks, got {layout.world}")
        for other, agreed in self.joined.items():
            if layout != agreed:
                raise PeerError(
                    f"ranks {other} and {sender} train different models: {agreed.parameter_count} parameters in "
                    f"{len(agreed.parameters)} tensors, {layout.parameter_count} in {len(layout.parameters)}"
                )
            if header.step != self.step:
                raise PeerError(f"rank {other} starts at step {self.step}, rank {sender} at step {header.step}")
        self.joined[sender], self.step = layout, header.step
        if len(self.joined) < len(self.ranks):
            return []
        self._weights = dict.fromkeys(self._chunks(layout.parameter_count + layout.buffer_count))
        self._untouched = dict.fromkeys(self._chunks(layout.parameter_count))
        welcome = Message(self._header(Kind.WELCOME), b"")
        return [(rank, welcome) for rank in self.ranks]

    def _hand_on(self, sender: int, message: Message) -> list[Outgoing]:
        header, chunk = message.header, Chunk(message.header.at, message.header.count)
        if sender != 0 or not self._weights or chunk not in self._weights or not self._fits(header, weights=True):
            raise self._broken(sender, header, "weights of rank 0, each chunk once")
        del self._weights[chunk]
        answer = Message(self._header(Kind.WEIGHTS, like=header), message.payload)
        return [(rank, answer) for rank in self.ranks if rank != 0]

    def _add(self, sender: int, message: Message) -> list[Outgoing]:
        header, chunk = message.header, Chunk(message.header.at, message.header.count)
        if self._weights is None or self._weights or not self._fits(header, weights=False):
            raise self._broken(sender, header, f"a chunk of step {self.step}")
        if chunk in self._untouched:
            del self._untouched[chunk]
            self._open[chunk] = ChunkSum(len(self.ranks))
        if chunk not in self._open or sender in self._open[chunk].given:
            raise self._broken(sender, header, "a chunk of its shard, each once")
        if sum(sender in other.given for other in self._open.values()) == WINDOW:
            raise self._broken(sender, header, f"at most {WINDOW} chunks unanswered")
        if self.gone:
            raise PeerError(f"{name_ranks(self.gone)} left before step {self.step}, rank {sender} did not")
        try:
            average = self._open[chunk].add(sender, message)
        except WireError as error:
            raise PeerError(f"rank {sender}: a gradient of step {self.step} for {chunk}: {error}") from error
        if average is None:
            return []
        del self._open[chunk]
        if not self._open and not self._untouched:
            self.step += 1
            self._untouched = dict.fromkeys(self._chunks(header.total))
        answer = Message(self._header(Kind.AVERAGE, like=header), average)
        return [(rank, answer) for rank in self.ranks]

    def _leave(self, sender: int) -> list[Outgoing]:
        self.gone.add(sender)
        if self._secure is not None and self.tolerant:
            self._secure.drop({sender})
            return self._go_on()
        if self.waits_for() is not None:
            raise PeerError(f"rank {sender} left while others waited for its part")
        return []

    def _swap_keys(self, sender: int, message: Message) -> list[Outgoing]:
        if self._servers != 1 or self._rank != SERVER_RANK:
            raise PeerError("secure aggregation needs one server of its own, got several, or ranks that serve")
        if self._secure is None:
            chunks = self._chunks(self.joined[0].parameter_count)
            self._secure = SecureShard(world_size=len(self.ranks), chunks=chunks)
        keys = self._secure.add_key(sender, bytes(message.payload))
        if keys is None:
            return []
        answer = Message(self._header(Kind.KEY, size=len(keys)), keys)
        return [(rank, answer) for rank in self.ranks]

    def _add_masked(self, sender: int, message: Message) -> list[Outgoing]:
        header = message.header
        if self._secure is None or not self.tolerant or self._weights or not self._fits(header, weights=False):
            raise self._broken(sender, header, f"a masked chunk of step {self.step}, after all keys")
        try:
            self._secure.add(sender, message)
        except WireError as error:
            raise PeerError(f"rank {sender}: a gradient of step {self.step}: {error}") from error
        return self._go_on()

    def _take_seeds(self, sender: int, message: Message) -> list[Outgoing]:
        if self._secure is None or message.header.step != self.step:
            raise self._broken(sender, message.header, "nothing before its masked gradient")
        try:
            self._secure.release(sender, bytes(message.payload))
        except WireError as error:
            raise PeerError(f"rank {sender}: step {self.step}: {error}") from error
        return self._go_on()

    def _go_on(self) -> list[Outgoing]:
        """With masked vectors: asks those that are present for their seeds, and answers when all have come."""
        secure = self._secure
        assert secure is not None
        outgoing: list[Outgoing] = []
        if present := secure.call():
            payload = np.array(present, "<u4").tobytes()
            call = Message(self._header(Kind.RELEASE, size=len(payload)), payload)
            outgoing += [(rank, call) for rank in present]
        if (answer := secure.finish()) is not None:
            said = {"ranks": ",".join(map(str, answer.ranks))}
            for chunk in self._chunks(answer.average.size):
                values = answer.average[chunk.at : chunk.at + chunk.size]
                header = self._header(
                    Kind.AVERAGE,
                    params=said,
                    at=chunk.at,
                    count=chunk.size,
                    total=answer.average.size,
                    size=values.nbytes,
                )
                message = Message(header, values)
                outgoing += [(rank, message) for rank in self.ranks if rank not in self.missing | self.gone]
            self.step += 1
        return outgoing

    def _error(self, text: str) -> Message:
        payload = text.encode()[:1000]
        return Message(self._header(Kind.ERROR, size=len(payload)), payload)

    def _chunks(self, total: int) -> list[Chunk]:
        return shard_chunks(total, index=self._index, servers=self._servers)

    def _fits(self, header: Header, *, weights: bool) -> bool:
        """Whether a chunk is one of the vector that this model has; a gradient may be coded."""
        layout = self.joined[0]
        total = layout.parameter_count + (layout.buffer_count if weights else 0)
        agreed = (header.step, header.total, header.dtype)
        return agreed == (self.step, total, "float32") and header.codec in (("dense",) if weights else READERS)

    def _header(self, kind: Kind, *, like: Header | None = None, **fields: Any) -> Header:
        """Of this step; `like` a chunk that it answers with float32."""
        assert self.run is not None  # nobody is spoken to before somebody has said HELLO
        if like is not None:
            fields = {"at": like.at, "count": like.count, "total": like.total, "size": 4 * like.count}
        step = self.step if like is None else like.step
        return Header(kind=kind, run=self.run, rank=self._rank, step=step, **fields)

    def _broken(self, sender: int, header: Header, wanted: str) -> PeerError:
        chunk = f" for {Chunk(header.at, header.count)} of {header.total}" if header.count else ""
        return PeerError(f"rank {sender}: wanted {wanted}, got {header.kind} of step {header.step}{chunk}")


class ChunkSum:
    """One chunk of one step, added in rank order whatever the order of arrival, in the memory of a part if it may."""

    def __init__(self, world_size: int) -> None:
        self.given: set[int] = set()
        """Ranks whose part has arrived."""
        self._world_size = world_size
        self._early: dict[int, Message] = {}
        """Parts that wait for a lower rank's."""
        self._added = 0
        self._sum: np.ndarray | None = None
        self._payload: Any = None
        """The buffer in which the sum lies."""

    def add(self, rank: int, message: Message) -> Any:
        """The payload of the average once all ranks' parts are there, before that None. Nothing else will write it."""
        self.given.add(rank)
        self._early[rank] = message
        while self._added in self._early:
            self._add_next(self._early.pop(self._added))
        if self._sum is None or self._added < self._world_size:
            return None
        if not self._sum.flags.writeable:
            self._payload = self._sum = self._sum.copy()
        np.divide(self._sum, np.float32(self._world_size), out=self._sum)
        return self._payload

    def _add_next(self, message: Message) -> None:
        part = message.values()
        # Memory of its own, where the frame was not aligned or not dense.
        payload = message.payload if message.header.codec == "dense" and part.base is not None else part
        self._added += 1
        if self._sum is None:
            self._sum, self._payload = part, payload
        elif self._sum.flags.writeable:
            np.add(self._sum, part, out=self._sum)
        elif part.flags.writeable:
            self._sum, self._payload = np.add(self._sum, part, out=part), payload
        else:
            self._sum = self._payload = self._sum + part


def name_ranks(ranks: Iterable[int]) -> str:
    """As a person reads it: "rank 2", "ranks 1, 3"."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"
