"""Coded gradients over `torch.distributed`: what is not dense cannot be summed on the way, so every rank gets them all.

    all-gather of 8 bytes          little-endian: how many bytes this rank's messages take
    all-gather of that many        the messages, one after the other, zeros behind them up to the longest rank's
    one message                    u32 length of the header, header, payload, as `harness.wire` writes them: a GRADIENT
                                   for each chunk; at first a HELLO with the model's layout, and, where gradients are
                                   masked, a KEY alone before them

Every rank then adds what the codes say in rank order and divides, as a server would: the same bits everywhere. Knows
messages and sums; nothing of buckets or of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from harness.errors import PeerError
from harness.exchange.base import Traffic
from harness.exchange.chunks import Chunk
from harness.exchange.message import Message
from harness.wire import Header, Kind, Layout, WireError
from harness.wire.coded import Coded, Float32
from harness.wire.masked import Words, average_of, read_words


class Gathering:
    """One rank's part in averaging coded vectors, chunk by chunk."""

    def __init__(self, *, run: bytes, rank: int, layout: Layout, traffic: Traffic) -> None:
        self.run, self._rank, self._layout, self._traffic = run, rank, layout.pack(), traffic
        self._world_size = layout.world
        self._greeted = False

    def average(self, coded: Coded, chunks: list[Chunk], *, step: int, into: Float32) -> None:
        """Writes the mean over the ranks of these chunks to their places in `into`, float32, shape (elements,).

        Raises: RuntimeError of torch; PeerError where a rank sent something else.
        """
        masked: dict[Chunk, Words] = {}
        unit = 0.0
        for rank, messages in self._swap(b"".join(self._pack(coded, chunk, step) for chunk in chunks), step):
            got = [(message.header.step, message.header.at, message.header.count) for message in messages]
            if got != [(step, chunk.at, chunk.size) for chunk in chunks]:
                raise PeerError(f"rank {self._rank}, step {step}: rank {rank} sent other chunks, e.g. {got[:1]}")
            for chunk, message in zip(chunks, messages, strict=True):
                where, header = slice(chunk.at, chunk.at + chunk.size), message.header
                if header.codec == "masked":
                    words, unit = read_words(header.count, header.params, message.payload)
                    masked[chunk] = masked[chunk] + words if rank else words
                else:
                    into[where] = message.values() if rank == 0 else into[where] + message.values()
        for chunk in chunks:
            where = slice(chunk.at, chunk.at + chunk.size)
            if chunk in masked:
                into[where] = average_of(masked[chunk], unit, self._world_size)
            else:
                into[where] /= np.float32(self._world_size)

    def meet(self, key: bytes, *, step: int) -> list[bytes]:
        """All ranks' public keys, for their masks. Raises: as `average`."""
        header = Header(kind=Kind.KEY, run=self.run, rank=self._rank, step=step, size=len(key))
        said = [messages for _, messages in self._swap(_framed(header, key), step)]
        if any([message.header.kind for message in messages] != [Kind.KEY] for messages in said):
            raise PeerError(f"rank {self._rank}, step {step}: wanted every rank's key: do all defend themselves alike?")
        return [bytes(messages[0].payload) for messages in said]

    def _swap(self, mine: bytes, step: int) -> Iterator[tuple[int, list[Message]]]:
        """What every rank has to say, in rank order; the first time, all say what they train."""
        greeted, self._greeted = self._greeted, True
        for rank, theirs in enumerate(self._gather(mine if greeted else self._hello(step) + mine)):
            try:
                messages = list(_unpack(theirs))
            except WireError as error:
                raise PeerError(f"rank {self._rank}, step {step}: of rank {rank}: {error}") from error
            if not greeted and messages and bytes(messages.pop(0).payload) != self._layout:
                raise PeerError(f"ranks {self._rank} and {rank} train different models")
            yield rank, messages

    def _hello(self, step: int) -> bytes:
        header = Header(kind=Kind.HELLO, run=self.run, rank=self._rank, step=step, size=len(self._layout))
        return _framed(header, self._layout)

    def _pack(self, coded: Coded, chunk: Chunk, step: int) -> bytes:
        codec, params, payload = coded.part(chunk.at, chunk.size)
        body = bytes(payload)
        header = Header(
            kind=Kind.GRADIENT,
            run=self.run,
            rank=self._rank,
            step=step,
            at=chunk.at,
            count=chunk.size,
            total=coded.size,
            codec=codec,
            params=params,
            size=len(body),
        )
        return _framed(header, body)

    def _gather(self, mine: bytes) -> list[memoryview]:
        sizes = _all_gather(torch.tensor([len(mine)]), self._world_size)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        gathered = _all_gather(padded, self._world_size)
        moved = (self._world_size - 1) * (8 + longest)
        self._traffic.bytes_out += moved
        self._traffic.bytes_in += moved
        return [all_.numpy().data[: int(size)] for all_, size in zip(gathered, sizes, strict=True)]


def _framed(header: Header, payload: bytes) -> bytes:
    packed = header.pack()
    return len(packed).to_bytes(4, "little") + packed + payload


def _all_gather(mine: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    theirs = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(theirs, mine)
    return theirs


def _unpack(data: memoryview) -> Iterator[Message]:
    at = 0
    while at < len(data):
        begin = at + 4
        end = begin + int.from_bytes(data[at:begin], "little")
        header = Header.unpack(data[begin:end])
        at = end + header.size
        if at > len(data):
            raise WireError(f"wanted {header.size} bytes of payload, got {len(data) - end}")
        yield Message(header, data[end:at])
