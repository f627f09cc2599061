"""Coded gradients over `torch.distributed`: what is not dense cannot be summed on the way, so every rank gets them all.

    all-gather of 8 bytes          little-endian: how many bytes this rank's messages take
    all-gather of that many        the messages, one after the other, zeros behind them up to the longest rank's
    one message                    u32 length of the header, header, payload, as `harness.wire` writes them: a GRADIENT
                                   for each chunk; before a rank's first ones, a HELLO with the model's layout

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


class Gathering:
    """One rank's part in averaging coded vectors, chunk by chunk."""

    def __init__(self, *, run: bytes, rank: int, layout: Layout, traffic: Traffic) -> None:
        self._run, self._rank, self._layout, self._traffic = run, rank, layout.pack(), traffic
        self._world_size = layout.world
        self._greeted = False

    def average(self, coded: Coded, chunks: list[Chunk], *, step: int, into: Float32) -> None:
        """Writes the mean over the ranks of these chunks to their places in `into`, float32, shape (elements,).

        Raises: RuntimeError of torch; PeerError where a rank sent something else.
        """
        mine = b"".join([self._hello(step), *(self._pack(coded, chunk, step) for chunk in chunks)])
        for rank, theirs in enumerate(self._gather(mine)):
            try:
                messages = list(_unpack(theirs))
            except WireError as error:
                raise PeerError(f"rank {self._rank}, step {step}: of rank {rank}: {error}") from error
            if not self._greeted and messages and bytes(messages.pop(0).payload) != self._layout:
                raise PeerError(f"ranks {self._rank} and {rank} train different models")
            got = [(message.header.step, message.header.at, message.header.count) for message in messages]
            if got != [(step, chunk.at, chunk.size) for chunk in chunks]:
                raise PeerError(f"rank {self._rank}, step {step}: rank {rank} sent other chunks, e.g. {got[:1]}")
            for chunk, message in zip(chunks, messages, strict=True):
                where = slice(chunk.at, chunk.at + chunk.size)
                into[where] = message.values() if rank == 0 else into[where] + message.values()
        for chunk in chunks:
            into[chunk.at : chunk.at + chunk.size] /= np.float32(self._world_size)
        self._greeted = True

    def _hello(self, step: int) -> bytes:
        if self._greeted:
            return b""
        header = Header(kind=Kind.HELLO, run=self._run, rank=self._rank, step=step, size=len(self._layout))
        return _framed(header, self._layout)

    def _pack(self, coded: Coded, chunk: Chunk, step: int) -> bytes:
        codec, params, payload = coded.part(chunk.at, chunk.size)
        body = bytes(payload)
        header = Header(
            kind=Kind.GRADIENT,
            run=self._run,
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
