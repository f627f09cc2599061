"""All-gathers of the project's coded gradients -> steps: each message in them says itself whose part of what it is.

    all-gather of 8 bytes, each rank's       how many bytes its messages take
    all-gather of as many as the most take   messages one behind the other, then zeros
    one message                              u32 length of the header, header, payload, as `harness.wire` writes them: a
                                             GRADIENT for each chunk; at the job's first step a HELLO before them

Gloo passes each rank's block on from rank to rank, to the next higher one, in two halves. So a message may begin in one
payload and end in the one behind it, and with more than two ranks each is seen several times. Knows the words of
`harness.wire`; nothing of what was set up before, or of the shapes.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attack.capture.streams import Flow
from attack.decode.chunk import defense_of, implausible, piece_of, place_of
from attack.decode.gloo.framing import Message as Payload
from attack.decode.gloo.head import Kind as Collective
from attack.decode.gloo.network import Link, Seen
from attack.decode.messages import Message
from attack.decode.notes import Notes
from attack.decode.proof import DecodedStep, StepChunks, prove
from attack.decode.vector import Origin, Piece, Place, Vector
from harness.wire import MAGIC, MAX_HEADER_BYTES, Header, Kind, Layout, WireError
from harness.wire.coded import Decoded
from harness.wire.masked import Words, average_of, read_words

_BEFORE_MAGIC = 5
"""Bytes of a message before it: the length, and the map that begins the header."""


class Word(NamedTuple):
    """One message of one link."""

    flow: Flow
    author: int | None
    """Whose it must be, by its place; None: not certain."""
    not_by: int
    """The rank that gets it here, which nobody sends its own."""
    message: Message


def words_of(links: Mapping[int, Link], tag: int, *, world: int) -> list[Word]:
    """The messages that an all-gather's payloads hold, in the order of each link; none where it is none of ours.

    Args:
        links: by sender, to the next rank.
        world: ranks of the group.
    """
    words = []
    for rank, link in links.items():
        seen = link.slots.get((Collective.ALLGATHER, tag), [])
        whole = len(seen) == 2 * (world - 1)
        for index, message in _messages(seen):
            author = (rank - index // 2) % world if whole or world == 2 else None
            words.append(Word(link.flow, author, (rank + 1) % world, message))
    return words


def totals_of(words: Sequence[Word]) -> list[int]:
    """Elements of a gradient, as each message says it that does."""
    totals = [word.message.header.total for word in words if word.message.header.count]
    for word in words:
        if word.message.header.kind is Kind.HELLO and not word.message.holes:
            try:
                totals.append(Layout.unpack(memoryview(word.message.payload)).parameter_count)
            except WireError:
                continue
    return totals


def _messages(seen: Sequence[Seen]) -> Iterator[tuple[int, Message]]:
    """Each with the index of the payload in which it begins."""
    first = 0
    for _, run in itertools.groupby(seen, key=lambda one: one.epoch):
        payloads = [one.message for one in run]
        for index, message in _in_a_row(payloads):
            yield first + index, message
        first += len(payloads)


def _in_a_row(payloads: Sequence[Payload]) -> Iterator[tuple[int, Message]]:
    """Of payloads between which nothing was missed."""
    begins = list(itertools.accumulate((len(one.payload) for one in payloads), initial=0))
    stream = payloads[0].payload if len(payloads) == 1 else bytearray().join(one.payload for one in payloads)
    holes = [(begin + a, begin + b) for begin, one in zip(begins, payloads, strict=False) for a, b in one.holes]
    end = 0
    while (found := stream.find(MAGIC, end + _BEFORE_MAGIC)) >= 0:
        at, end = found - _BEFORE_MAGIC, found
        index = bisect.bisect_right(begins, at) - 1
        limit = begins[min(index + 2, len(payloads))]
        body = at + 4 + int.from_bytes(stream[at : at + 4], "little")
        if body > min(limit, at + 4 + MAX_HEADER_BYTES) or any(a < body and b > at for a, b in holes):
            continue
        try:
            header = Header.unpack(memoryview(stream)[at + 4 : body])
        except WireError:
            continue
        if body + header.size > limit:
            continue
        end = body + header.size
        offset = payloads[index].offset + at - begins[index]
        missing = tuple((max(a, body) - body, min(b, end) - body) for a, b in holes if a < end and b > body)
        yield (
            index,
            Message(
                offset=offset,
                payload_at=offset + body - at,
                header=header,
                payload=stream[body:end],
                holes=missing,
            ),
        )


class GatheredSteps:
    """Puts steps together from all-gathers, taken in the order of their tags."""

    def __init__(self, notes: Notes) -> None:
        self.total: int | None = None
        """Elements of a gradient."""
        self.layout: Layout | None = None
        """As every HELLO so far says it; None where none was seen, or two disagree."""
        self._layout_disputed = False
        self._notes = notes
        self._run: bytes | None = None
        self._open: StepChunks | None = None
        self._next = 0  # steps below this have been given out
        self._unsure = False  # something of the open step was missed
        self._masked: dict[Place, dict[int, Words]] = {}  # of the open step, by place and rank

    def begins(self, words: Sequence[Word]) -> bool:
        """Whether these belong to another step than those before."""
        return self._open is None or words[0].message.header.step != self._open.step

    def add(self, words: Sequence[Word], *, world: int, unsure: bool) -> None:
        """Takes in one all-gather.

        Args:
            unsure: whether some of its bytes were missed.
        """
        headers = [word.message.header for word in words]
        if len({(header.run, header.step) for header in headers}) > 1 or headers[0].step < self._next:
            self._notes.add(f"step {headers[0].step}: an all-gather of messages of several steps: not believed")
            return
        self._run = self._run or headers[0].run
        step = self._open = self._open or StepChunks(headers[0].step)
        self._unsure = self._unsure or unsure
        for word in words:
            header = word.message.header
            add = {
                Kind.HELLO: self._greet,
                Kind.KEY: lambda *_: None,  # public, and of no use to who has no other
                Kind.GRADIENT: self._add_masked if header.codec == "masked" else self._add_chunk,
            }.get(header.kind, self._refuse)
            if (why := self._unwanted(word, world) or add(step, word)) is not None:
                self._notes.add(f"flow {word.flow}: rank {header.rank}, step {header.step}, {place_of(header)}: {why}")

    def finish(self, *, world: int) -> DecodedStep | None:
        """The step that is open, of which nothing more comes."""
        step, self._open = self._open, None
        if step is None or self.total is None:
            return None
        self._next = step.step + 1
        believed = {place for place, flows in step.named.items() if len(flows) > 1 or self._unsure}
        for place in sorted(step.named.keys() - believed):
            self._notes.add(f"step {step.step}: {place} named by one rank alone: not believed")
        self._unsure = False
        self._bare(step, world)
        return prove(step, believed, world_size=world, total=self.total, notes=self._notes)

    def _add_masked(self, step: StepChunks, word: Word) -> str | None:
        """A part of a sum; what was not seen whole is left to other copies."""
        header, holes = word.message.header, word.message.holes
        if (why := implausible(header, self.total)) is not None:
            return why
        try:
            words, unit = read_words(header.count, header.params, word.message.payload)
        except WireError as error:
            return str(error)
        if step.unit not in (None, unit):
            return f"masked words of unit {unit:g}, the others' is {step.unit:g}"
        step.unit, step.defense, self.total = unit, defense_of(header), header.total
        place = place_of(header)
        step.named.setdefault(place, set()).add(word.flow)
        if holes:
            return None
        ranks = self._masked.setdefault(place, {})
        if not np.array_equal(ranks.setdefault(header.rank, words), words):
            ranks[header.rank] = np.empty(0, np.uint32)  # never believed again
            return "an earlier copy that says otherwise"
        return None

    def _bare(self, step: StepChunks, world: int) -> None:
        """Where all ranks' masked words were seen, the masks cancel, and the mean is what every rank made of them."""
        masked, self._masked = self._masked, {}
        if step.unit is None:
            return
        step.taken.add(tuple(range(world)))
        for place, ranks in masked.items():
            if len(ranks) == world and all(words.size == place.size for words in ranks.values()):
                total = np.zeros(place.size, np.uint32)
                for words in ranks.values():
                    total += words
                said = Decoded(average_of(total, step.unit, world))
                origin = Origin(next(iter(step.named[place])), 0, 0, 0)
                step.averages.add(Piece(place, said, (), None, origin))

    def _unwanted(self, word: Word, world: int) -> str | None:
        """Why a message cannot be what it says, if so."""
        header = word.message.header
        if header.run != self._run:
            return f"a message of run {header.run.hex()}"
        if not 0 <= header.rank < world or header.rank == word.not_by or word.author not in (None, header.rank):
            return "not a message of the rank that sent it"
        return None

    def _greet(self, step: StepChunks, word: Word) -> str | None:
        if word.message.holes or self._layout_disputed:
            return "a layout with a hole" if word.message.holes else None
        try:
            layout = Layout.unpack(memoryview(word.message.payload))
        except WireError as error:
            return str(error)
        if self.layout not in (None, layout) or self.total not in (None, layout.parameter_count):
            self.layout, self._layout_disputed = None, True
            return "ranks disagree on the model's layout: shapes are not believed"
        self.layout, self.total = layout, layout.parameter_count
        return None

    def _refuse(self, step: StepChunks, word: Word) -> str | None:
        return f"wanted a hello or a gradient, got {word.message.header.kind}"

    def _add_chunk(self, step: StepChunks, word: Word) -> str | None:
        header = word.message.header
        if (why := implausible(header, self.total)) is not None:
            return why
        try:
            piece = piece_of(word.flow, word.message, tag=defense_of(header))
        except WireError as error:
            return str(error)
        self.total = header.total
        step.named.setdefault(piece.place, set()).add(word.flow)
        return step.gradients.setdefault(header.rank, Vector()).add(piece)
