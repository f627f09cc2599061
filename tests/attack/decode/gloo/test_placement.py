"""Where messages belong of which others were missed: by the bytes that were, and by what was seen of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from attack.decode.gloo.head import Kind
from attack.observation import Known, Observation
from tests.attack.decode.gloo.jobs import PaperJob, events
from tests.attack.decode.gloo.recordings import check, observe

SHAPES = ((40, 30), (40,), (3, 40), (3,))
SEGMENT = 248
"""Bytes of a packet: a head and 50 elements, or 62 elements."""


def missed(job: PaperJob, lost: set[int]) -> list[Observation]:
    found, _ = observe(list(events(job.writes, segment=SEGMENT, lost=lambda index, _: index in lost)))
    check(job.truth, found)
    return found


def unknown(found: list[Observation]) -> int:
    return sum(int((one.known.numpy() == Known.UNKNOWN).sum()) for one in found)


def packets(job: PaperJob) -> list[tuple[int, bool]]:
    """Of each packet of an all-reduce its index, and whether it begins a message."""
    answer, index = [], 0
    for _, data in job.writes:
        for at in range(0, len(data), SEGMENT):
            if len(data) > 48 and data[23] == Kind.ALLREDUCE:
                answer.append((index, not at))
            index += 1
    return answer


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_missed_packet_costs_the_elements_that_it_held(world: int) -> None:
    """Of the rank that sent them, and of the one that was to add its own."""
    job = PaperJob(world=world, steps=3, shapes=SHAPES, buckets=((0, 1, 2, 3),))
    whole = missed(job, set())
    assert len(whole) == 3 * world and not unknown(whole)
    for index, begins in random.Random(world).sample(packets(job), 40):
        found = missed(job, {index})
        assert len(found) == 3 * world
        assert unknown(found) <= 2 * (50 if begins else 62), (index, begins)


def test_a_missed_head_beside_other_buckets_costs_its_message_at_most() -> None:
    """Messages of two buckets mix: which of them ends before a head is not known, but which ones were missed is."""
    job = PaperJob(world=2, steps=3, shapes=SHAPES, buckets=((2, 3), (0, 1)))
    longest = -(-(40 * 30 + 40 + 3 * 40 + 3) // 4)
    for index, _ in random.Random(0).sample(packets(job), 40):
        assert unknown(missed(job, {index})) <= 2 * longest


@pytest.mark.parametrize(("share", "least"), [(0.05, 0.7), (0.2, 0.4), (0.5, 0.08)])
def test_what_can_be_proven_of_a_job_that_began_unharmed_is_reported(share: float, least: float) -> None:
    job = PaperJob(world=2, steps=3, shapes=SHAPES, buckets=((0, 1, 2, 3),))
    first = packets(job)[0][0] - 2
    shares = []
    for seed in range(10):
        draw = random.Random(seed)
        found = missed(job, {index for index in range(first, first + 2000) if draw.random() < share})
        shares.append(sum(one.known_fraction for one in found) / 6)
    assert np.mean(shares) >= least
