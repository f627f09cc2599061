"""A capture with holes yields what it proves: seeded losses, and not one element that is said to be known is wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attack.decode.recording import Desk
from attack.observation import Known
from harness.wire import Header
from tests.attack.decode.checking import check
from tests.attack.decode.job import Job, Write, events

JOBS = {
    "one server": Job(world=2, steps=4, seed=1),
    "two servers": Job(world=3, steps=3, servers=2, seed=2, optimizer="sgd:lr=0.1,momentum=0.9"),
    "ranks serve": Job(world=3, steps=4, ranks_serve=True, seed=3),
    "four ranks serve": Job(world=4, steps=3, ranks_serve=True, seed=4, buffers=((3,),)),
    "resumed": Job(world=2, steps=3, first_step=300, ranks_serve=True, seed=5),
}


def random_loss(rate: float, seed: int) -> Callable[[int], bool]:
    """Each segment is missing with this chance."""
    lost = np.random.default_rng(seed).random(100_000) < rate
    return lambda index: bool(lost[index])


def burst_loss(seed: int) -> Callable[[int], bool]:
    """A few long runs of segments are missing."""
    generator = np.random.default_rng(seed)
    lost = np.zeros(100_000, np.bool_)
    for start in generator.integers(0, 400, 4):
        lost[start : start + generator.integers(2, 40)] = True
    return lambda index: bool(lost[index])


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5])
def test_random_loss(name: str, rate: float) -> None:
    job = JOBS[name]
    fractions = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        segment = int(generator.integers(60, 1500))
        lost = random_loss(rate, seed)
        found = check(job, Desk(events(job.writes, segment=segment, lost=lost), optimizer=job.optimizer).observations())
        fractions += [seen.known_fraction for seen in found]
    assert np.mean(fractions) > (1 - rate) ** 4 / 2  # and something is: what was seen with its place is reported


@pytest.mark.parametrize("name", JOBS)
def test_bursts_and_a_late_start_and_an_early_end(name: str) -> None:
    job = JOBS[name]
    for seed in range(20):
        generator = np.random.default_rng(seed)
        skip = int(generator.integers(0, 200)) if seed % 2 else 0
        writes = job.writes[: len(job.writes) - int(generator.integers(0, 60))]
        stream = events(writes, segment=int(generator.integers(100, 1500)), lost=burst_loss(seed), skip=skip)
        check(job, Desk(stream, optimizer=job.optimizer).observations())


def test_a_late_start_still_reads_what_follows() -> None:
    job = JOBS["one server"]
    desk = Desk(events(job.writes, skip=50), optimizer=job.optimizer)
    found = check(job, desk.observations())
    last = [seen for seen in found if seen.step == 3]
    assert [seen.exact_fraction for seen in last] == [1.0, 1.0]
    assert all(seen.weights is None for seen in found)
    assert any("no HELLO was seen" in line for line in desk.notes.lines())


@pytest.mark.parametrize("name", ["one server", "two servers"])
def test_only_one_direction_of_one_rank_is_enough_for_that_rank(name: str) -> None:
    job = JOBS[name]
    writes = [write for write in job.writes if write.flow.source.startswith("10.0.0.2:")]
    found = check(job, Desk(events(writes), optimizer=job.optimizer).observations())
    assert all(seen.exact_fraction == (seen.rank == 1) for seen in found)


def place_of(write: Write) -> tuple[int, int]:
    """Step and first element of a message with a short header."""
    header = Header.unpack(write.data[2 : 2 + write.data[1]])
    return header.step, header.at


def without(job: Job, kind: bytes) -> list[Write]:
    """The traffic less all messages of a kind, as if it had never been sent."""
    return [write for write in job.writes if kind not in write.data[:200]]


def test_lost_averages_are_computed_where_all_parts_were_seen() -> None:
    job = JOBS["two servers"]
    found = check(job, Desk(events(without(job, b"average")), optimizer=job.optimizer).observations())
    assert all(seen.complete and seen.weights is not None for seen in found)


def test_what_should_have_been_answered_and_was_not_is_not_believed() -> None:
    job = Job(world=1)
    desk = Desk(events(without(job, b"average")))
    assert list(desk.observations()) == []  # no other rank names the places, and no hole explains the silence
    assert any("no other confirms it: not believed" in line for line in desk.notes.lines())


def test_an_average_that_is_not_that_of_the_parts_is_named_and_not_used() -> None:
    job = Job(steps=2)
    for index, write in enumerate(job.writes):
        if b"average" in write.data and place_of(write) == (0, 256):
            job.writes[index] = Write(flow=write.flow, data=write.data[:-4] + np.float32(1e9).tobytes())
    desk = Desk(events(job.writes), optimizer=job.optimizer)
    found = check(job, desk.observations())
    assert [(seen.complete, seen.weights is not None) for seen in found] == [(True, True)] * 2 + [(True, False)] * 2
    assert any("the average is not that of the ranks' parts" in line for line in desk.notes.lines())


def test_an_own_part_is_differenced_only_where_all_others_are_known() -> None:
    job = JOBS["ranks serve"]
    whole = check(job, Desk(events(job.writes), optimizer=job.optimizer).observations())
    assert all(seen.complete and (seen.known == Known.DIFFERENCED).any() for seen in whole)
    unseen = {job.up(2, 0), job.up(2, 0).reverse}
    found = check(job, Desk(events([write for write in job.writes if write.flow not in unseen])).observations())
    total = job.layout.parameter_count
    for seen in found:
        differenced = (seen.known == Known.DIFFERENCED).nonzero()[:, 0]
        assert (len(differenced) == 0) == (seen.rank == 0)  # shard 0 misses rank 2's part
        if seen.rank == 2:
            assert not seen.known[: total // 3].any()


def test_weights_are_known_up_to_the_first_average_that_is_not() -> None:
    job = JOBS["one server"]
    lost: set[int] = set()
    index = 0
    for write in job.writes:
        segments = -(-len(write.data) // 1448)
        kind = write.data[:200]
        if (b"average" in kind or b"gradient" in kind) and place_of(write) == (1, 256) and write.flow != job.up(1, 0):
            lost.update(range(index, index + segments))
        index += segments
    found = check(job, Desk(events(job.writes, lost=lambda i: i in lost), optimizer=job.optimizer).observations())
    known = [(seen.step, seen.weights is not None) for seen in found if seen.rank == 0]
    assert known == [(0, True), (1, True), (2, False), (3, False)]
