"""The ring's geometry and its inversion, against a simulation that is slow and obvious."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from attack.capture.streams import Flow
from attack.decode.gloo.head import Kind
from attack.decode.gloo.ring import Ring, align, totals
from attack.observation import Known
from tests.attack.decode.gloo.jobs import SHAPES, PaperJob, events
from tests.attack.decode.gloo.recordings import check, observe
from tests.attack.decode.gloo.rings import ring

CASES = int(os.environ.get("GRADTAP_LOSS_CASES", "40"))
"""More of them on request."""


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 16, 63, 1000, 262_145 * 3])
def test_lengths_are_those_of_the_simulation_and_prove_the_total(world: int, count: int) -> None:
    sent, _ = ring([np.zeros(count, np.float32)] * world)
    geometry = Ring(4 * count, world, 4)
    answer = None
    for rank, payloads in enumerate(sent):
        lengths = tuple(map(len, payloads))
        assert geometry.sent_by(rank)[1] == lengths
        if lengths:
            found = totals(lengths, world=world, rank=rank, element=4)
            assert 4 * count in found
            answer = found if answer is None else answer & found
    assert answer == {4 * count}


def test_places_are_left_open_where_there_is_a_choice() -> None:
    same, endless = [100] * 6, float("inf")
    assert align([[100, 100], [100]], [(0, 0), (0, endless)], same, ended=True) == [0, 5]
    assert align([[100, 100], [100]], [(0, 0), (0, endless)], same, ended=False) == [0, None]
    assert align([[100], [100], []], [(0, 0), (0, 148 * 3), (0, 148 * 3)], same, ended=True) == [0, None, 6]
    assert align([[100], [100], []], [(0, 0), (0, 148 * 4), (0, 147)], same, ended=True) == [0, 5, 6]
    assert align([[100, 100], [100]], [(0, 0), (0, 147)], same, ended=False) == [0, 2]
    assert align([[], [40]], [(0, 0), (0, endless)], [100, 100, 40, 100], ended=False) == [0, 2]
    assert align([[70]], [(0, 0)], same, ended=True) == [None]


def test_bytes_that_were_missed_say_how_many_messages_they_were() -> None:
    same, endless = [100] * 6, float("inf")
    assert align([[100], [100]], [(0, 0), (2 * 148 - 90, 2 * 148)], same, ended=False) == [0, 3]
    assert align([[], [100]], [(0, 0), (149, 3 * 148)], same, ended=False) == [0, None]
    assert align([[100], [], [100]], [(0, 0), (200, 300), (0, endless)], same, ended=True) == [0, 3, 5]
    assert align([[100]], [(148 * 6, endless)], same, ended=False) == [None]


@pytest.mark.parametrize("world", range(2, 9))
def test_every_rank_is_whole_where_nothing_was_missed(world: int) -> None:
    job = PaperJob(world=world, seed=world)
    found, desk = observe(list(events(job.writes)))
    check(job.truth, found)
    assert len(found) == 3 * world and all(seen.complete for seen in found), desk.notes.lines()
    if world & (world - 1) == 0:
        raw = [np.mean(seen.known.numpy() == Known.RAW) for seen in found]
        assert np.mean(raw) == pytest.approx(0.9 / world, rel=0.2)  # a tenth are zeros, which division may have made


@pytest.mark.parametrize("seed", range(CASES))
def test_nothing_known_is_wrong_whatever_was_missed(seed: int) -> None:
    draw = random.Random(seed)
    shapes = draw.choice([SHAPES, ((1, 3), (1,), (2, 1), (2,)), ((50, 70), (9,), (60, 9), (60,))])
    job = PaperJob(world=draw.randint(2, 8), steps=draw.randint(2, 5), shapes=shapes, seed=seed)
    flows = list(dict.fromkeys(flow for flow, _ in job.writes))
    share, burst, gone = draw.choice([0.01, 0.05, 0.2, 0.5]), draw.choice([1, 1, 12]), draw.choice([None, *flows])
    # The first collectives, without which nothing can be said at all, are spared half of the time.
    spared = draw.choice([0, 12 * job.world * job.world])
    until = draw.choice([1 << 60, 1 << 60, draw.randint(100, 2000)])
    left = 0

    def lost(index: int, flow: Flow) -> bool:
        nonlocal left
        if index < spared:
            return False
        if not left and draw.random() < share / burst:
            left = burst
        left = max(0, left - 1)
        return left > 0 or (burst == 1 and draw.random() < share) or flow == gone or index > until

    check(job.truth, observe(list(events(job.writes, segment=draw.choice([200, 1448]), lost=lost)))[0])


def test_two_links_of_a_rank_give_all_of_it_and_one_link_no_more_than_its_share() -> None:
    """World 4, as the table of what each place reveals says it; the state was seen, the ring's other links were not."""
    job = PaperJob(world=4, shapes=((64, 5), (64,)), buckets=((0, 1),), seed=3)
    out, into = job._flow(1, 0), job._flow(2, 1)
    start = next(i for i, (_, data) in enumerate(job.writes) if len(data) > 48 and data[23] == Kind.ALLREDUCE) - 2

    def share(seen: set[Flow]) -> list[float]:
        count = -1

        def lost(index: int, flow: Flow) -> bool:
            nonlocal count
            count = index
            return index > start and flow not in seen

        found, _ = observe(list(events(job.writes, segment=1 << 20, lost=lost)))
        check(job.truth, found)
        return [observation.known_fraction for observation in found if observation.step == 0]

    assert share({out, into}) == pytest.approx([0.25, 1.0, 0.25, 0.0], abs=0.01)
    assert share({out}) == pytest.approx([0.0, 0.25, 0.0, 0.0], abs=0.01)
