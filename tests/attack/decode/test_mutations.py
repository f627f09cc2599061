"""Damaged traffic: events or a DecodeError, never another exception, and never a gradient that is wrong.

A byte of a payload that is changed on the wire is, by definition, what was sent: nothing can tell. So what is changed
here is everything else: greetings, handshakes, heads of frames, headers, lengths, and holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from attack.decode.recording import Desk
from harness.wire import Header, WireError
from tests.attack.decode.checking import check
from tests.attack.decode.feeding import decoder, outcome
from tests.attack.decode.job import Job, Write, events

JOBS = [Job(steps=2, seed=1), Job(steps=2, world=3, ranks_serve=True, seed=2), Job(steps=3, world=1, seed=3)]


def changeable(write: Write) -> list[int]:
    """Indices of a write's bytes that are not a chunk's payload."""
    if write.data[0] == 0xFF or b"gradtap" not in write.data[:20]:
        return list(range(len(write.data)))
    payload = 2 + write.data[1]
    head = 9 if write.data[payload] & 2 else 2
    chunk = Header.unpack(write.data[2:payload]).count
    return list(range(payload + head)) if chunk else list(range(len(write.data)))


def mutate(data: bytes, at: int, generator: np.random.Generator) -> bytes:
    """Flips a bit, sets a byte, drops a few bytes, or doubles them."""
    match int(generator.integers(4)):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1 :]
        case 1:
            return data[:at] + generator.bytes(1) + data[at + 1 :]
        case 2:
            return data[:at] + data[at + int(generator.integers(1, 12)) :]
        case _:
            return data[: at + int(generator.integers(1, 12))] + data[at:]


def mutations(job: Job, count: int, seed: int) -> Iterator[list[Write]]:
    """The traffic with one change."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        writes = list(job.writes)
        index = int(generator.integers(len(writes)))
        at = int(generator.choice(changeable(writes[index])))
        writes[index] = Write(flow=writes[index].flow, data=mutate(writes[index].data, at, generator))
        yield writes


@pytest.mark.parametrize("job", JOBS, ids=["one server", "ranks serve", "one rank"])
def test_a_changed_frame_or_header_never_makes_a_wrong_gradient(job: Job) -> None:
    for writes in mutations(job, 350, seed=job.seed):
        check(job, Desk(events(writes), optimizer=job.optimizer).observations())


FIELDS = {
    "at": [-256, -1, 1, 255, 256],
    "step": [-1, 1, 2, 1000, 1 << 40],
    "rank": [-1, 1, 2, 60000],
    "total": [-1, 1, 1 << 35],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_that_is_legal_and_wrong_is_not_believed(field: str) -> None:
    job = JOBS[0]
    for change in FIELDS[field]:
        for target in range(24):
            altered = _Altered(field, change, target)
            damaged = Job(steps=2, seed=1, alter=altered)
            found = check(job, Desk(events(damaged.writes), optimizer=job.optimizer).observations())
            if altered.done:
                assert not all(seen.complete for seen in found) or len(found) < 4


class _Altered:
    """Changes one field of the GRADIENT with this number."""

    def __init__(self, field: str, change: int, target: int) -> None:
        self.field, self.change, self.target, self.done = field, change, target, False

    def __call__(self, header: Header) -> Header:
        self.target -= 1
        value = getattr(header, self.field) + self.change
        if self.target != -1 or value < 0:
            return header
        try:
            altered = dataclasses.replace(header, **{self.field: value})
        except WireError:  # not legal for this chunk
            return header
        self.done = True
        return altered


def test_ten_thousand_mutations_of_a_stream_are_events_or_a_decode_error() -> None:
    generator = np.random.default_rng(0)
    job = Job(steps=1, shapes=((40,), (3, 9)), chunk=30)
    stream = b"".join(write.data for write in job.writes if write.flow == job.up(0, 0))
    for _ in range(10_000):
        data = stream
        for _ in range(int(generator.integers(1, 4))):
            data = mutate(data, int(generator.integers(len(data))), generator)
        cut = int(generator.integers(len(data)))
        parts = [data[:cut], int(generator.integers(0, 60)), data[cut:]] if generator.random() < 0.3 else [data]
        outcome(decoder(from_start=generator.random() < 0.7), parts)


def test_mutations_in_a_capture_with_holes_let_nothing_out_but_observations() -> None:
    generator = np.random.default_rng(5)
    for writes in mutations(JOBS[1], 150, seed=5):
        lost = generator.random(2000) < 0.1
        found = list(Desk(events(writes, segment=500, lost=lost.item), optimizer="sgd:lr=0.1").observations())
        assert all(0 <= seen.step < 1 << 48 for seen in found)
