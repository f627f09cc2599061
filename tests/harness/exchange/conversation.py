"""Messages as ranks write them, to hand to a `Shard` or to send to a server by hand."""

from __future__ import annotations

import numpy as np

from harness.exchange.message import Message
from harness.exchange.secure import Member
from harness.wire import Header, Kind, Layout

RUN = b"test-run"


def layout(elements: int, *, world: int, buffers: int = 0) -> Layout:
    return Layout(world=world, parameters=((elements,),), buffers=((buffers,),) if buffers else ())


def hello(rank: int, agreed: Layout, *, run: bytes = RUN, step: int = 0) -> Message:
    payload = agreed.pack()
    return Message(Header(kind=Kind.HELLO, run=run, rank=rank, step=step, size=len(payload)), payload)


def chunk(kind: Kind, rank: int, values: np.ndarray, *, total: int, at: int = 0, step: int = 0) -> Message:
    payload = values.astype("<f4")
    header = Header(
        kind=kind, run=RUN, rank=rank, step=step, at=at, count=len(payload), total=total, size=payload.nbytes
    )
    return Message(header, payload)


def bye(rank: int, *, step: int = 0) -> Message:
    return Message(Header(kind=Kind.BYE, run=RUN, rank=rank, step=step), b"")


def key(rank: int) -> Message:
    payload = Member(run=RUN, rank=rank, world_size=3).public_key
    return Message(Header(kind=Kind.KEY, run=RUN, rank=rank, step=0, size=len(payload)), payload)
