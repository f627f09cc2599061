"""Secure aggregation without sockets: masks cancel to the bit, and a rank that is lost takes nobody with it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.defenses import load_defense
from harness.defenses.secure import Private
from harness.errors import DefenseError, ExchangeError, PeerError
from harness.exchange.chunks import Chunk
from harness.exchange.masks import add_masks, mask, quantize
from harness.exchange.message import Message
from harness.exchange.secure import Member
from harness.exchange.secure_server import SecureShard
from harness.wire import Header, Kind
from harness.wire.masked import average_of

RUN = bytes(8)
SIZE = 70_000
"""More than two blocks."""


def members(world: int) -> list[Member]:
    ours = [Member(run=RUN, rank=rank, world_size=world) for rank in range(world)]
    for one in ours:
        one.meet([other.public_key for other in ours])
    return ours


def private(rank: int, step: int = 0) -> Private:
    numbers = np.random.default_rng([rank, step]).standard_normal(SIZE).astype(np.float32)
    return Private(numbers, 64.0)


def server(world: int) -> SecureShard:
    chunks = [Chunk(0, 40_000), Chunk(40_000, SIZE - 40_000)]
    shard = SecureShard(world_size=world, chunks=chunks)
    for rank in range(world):
        shard.add_key(rank, bytes([rank]) * 32)
    return shard


def push(shard: SecureShard, rank: int, masked, *, chunks: int = 2) -> None:
    for at, count in ((0, 40_000), (40_000, SIZE - 40_000))[:chunks]:
        codec, params, payload = masked.part(at, count)
        header = Header(
            kind=Kind.GRADIENT, run=RUN, rank=rank, step=0, at=at, count=count, total=SIZE, codec=codec, params=params,
            size=payload.nbytes,
        )  # fmt: skip
        shard.add(rank, Message(header, payload))


def within_the_step(average: np.ndarray, ranks: list[int], unit: float, step: int = 0) -> bool:
    plain = np.mean([private(rank, step).numbers.astype(np.float64) for rank in ranks], axis=0)
    return bool((abs(average - plain) <= unit / 2 + 2.0**-24 * abs(average)).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 100), st.integers(0, 1 << 30))
def test_masks_cancel_to_the_bit(world: int, size: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).uniform(-64, 64, (world, size)).astype(np.float32)
    ours = [Private(vector, 64.0) for vector in vectors]
    unit = ours[0].unit(world)
    masked = [one.mask(own, step=3, own=False) for one, own in zip(members(world), ours, strict=True)]
    total = sum((one.words for one in masked), np.zeros(size, np.uint32))
    plain = sum((quantize(vector, unit) for vector in vectors), np.zeros(size, np.uint32))
    assert np.array_equal(total, plain)
    average = average_of(total, unit, world)
    assert (abs(average - vectors.astype(np.float64).mean(axis=0)) <= unit / 2 + 2.0**-24 * abs(average)).all()


def test_the_server_bares_the_sum_alone() -> None:
    ours, shard = members(3), server(3)
    unit = private(0).unit(3)
    for step in range(2):
        for rank in (2, 0, 1):
            assert not shard.call()
            push(shard, rank, ours[rank].mask(private(rank, step), step=step))
        present = shard.call()
        assert present == (0, 1, 2) and shard.late() == [0, 1, 2] and not shard.call()
        for rank in present:
            assert shard.finish() is None
            shard.release(rank, ours[rank].release(present, step=step))
        answer = shard.finish()
        assert answer is not None and answer.ranks == (0, 1, 2)
        assert within_the_step(answer.average, [0, 1, 2], unit, step)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_rank_that_is_lost_before_the_call_is_left_out(chunks: int) -> None:
    ours, shard = members(4), server(4)
    unit = private(0).unit(4)
    for rank in range(4):
        push(shard, rank, ours[rank].mask(private(rank), step=0), chunks=chunks if rank == 1 else 2)
        if rank < 3:
            assert not shard.call()
    shard.drop([1])
    present = shard.call()
    assert present == (0, 2, 3)
    for rank in present:
        shard.release(rank, ours[rank].release(present, step=0))
    answer = shard.finish()
    assert answer is not None and answer.ranks == present and within_the_step(answer.average, [0, 2, 3], unit)
    for rank in present:  # and the next step is theirs alone
        push(shard, rank, ours[rank].mask(private(rank, 1), step=1))
    for rank in shard.call():
        shard.release(rank, ours[rank].release(present, step=1))
    answer = shard.finish()
    assert answer is not None and within_the_step(answer.average, [0, 2, 3], unit, 1)


def test_a_rank_that_is_lost_with_its_seed_costs_the_step() -> None:
    ours, shard = members(3), server(3)
    for rank in range(3):
        push(shard, rank, ours[rank].mask(private(rank), step=0))
    present = shard.call()
    for rank in (0, 1):
        shard.release(rank, ours[rank].release(present, step=0))
    shard.drop([2])
    answer = shard.finish()
    assert answer is not None and answer.ranks == () and not answer.average.any()
    for rank in (0, 1):
        push(shard, rank, ours[rank].mask(private(rank, 1), step=1))
    assert shard.call() == (0, 1)
    for rank in (0, 1):
        shard.release(rank, ours[rank].release((0, 1), step=1))
    answer = shard.finish()
    assert answer is not None and within_the_step(answer.average, [0, 1], private(0).unit(3), 1)


def test_one_rank_alone_is_never_averaged() -> None:
    ours, shard = members(2), server(2)
    push(shard, 0, ours[0].mask(private(0), step=0))
    shard.drop([1])
    with pytest.raises(PeerError, match="2 ranks or more"):
        shard.call()
    with pytest.raises(PeerError, match="nobody may have"):
        ours[0].release([0], step=0)


def test_a_rank_answers_once_and_masks_a_step_once() -> None:
    """Two answers for one step could name a rank present and missing: its vector would be bare."""
    [one, *_] = members(3)
    one.mask(private(0), step=0)
    one.release([0, 1], step=0)
    with pytest.raises(PeerError, match="nobody may have"):
        one.release([0, 2], step=0)
    with pytest.raises(ExchangeError, match="used once"):
        one.mask(private(0), step=0)


def test_what_everybody_else_gave_away_bares_nobody() -> None:
    """A rank that was dropped, though all of its vector crossed the wire: its own seed keeps it hidden."""
    ours = members(3)
    masked = [one.mask(private(rank), step=0) for rank, one in enumerate(ours)]
    shared = [one.release([0, 1], step=0)[32:] for one in ours[:2]]
    words = masked[2].words.copy()
    add_masks(words, [(shared[0], 1), (shared[1], 1)])  # rank 2 subtracted both
    unit = private(2).unit(3)
    levels = words.view(np.int32) * unit
    spread = np.std(levels) / np.std(np.random.default_rng(0).integers(-(1 << 31), 1 << 31, SIZE) * unit)
    correlation = np.corrcoef(levels, private(2).numbers)[0, 1]
    assert 0.99 < spread < 1.01 and abs(correlation) < 5 / SIZE**0.5


def test_no_seed_is_used_at_two_steps_or_in_two_runs() -> None:
    again = np.zeros(SIZE, np.float32)
    one, two = members(2)
    streams = [one.mask(Private(again, 64.0), step=step, own=False).words.copy() for step in range(3)]
    other_run = Member(run=os.urandom(8), rank=0, world_size=2)
    other_run._key = one._key
    other_run.meet([one.public_key, two.public_key])
    streams.append(other_run.mask(Private(again, 64.0), step=0, own=False).words)
    for at, stream in enumerate(streams):
        assert abs(float((stream >> 31).mean()) - 0.5) < 0.02
        assert all((stream == other).mean() < 0.01 for other in streams[:at])


def test_streams_do_not_depend_on_where_blocks_end() -> None:
    seed = os.urandom(32)
    whole = mask(np.zeros(SIZE, np.float32), 1.0, [(seed, 1)])
    assert np.array_equal(whole[:1000], mask(np.zeros(1000, np.float32), 1.0, [(seed, 1)]))
    add_masks(whole, [(seed, -1)])
    assert not whole.any()


def test_what_is_beyond_the_range_is_refused() -> None:
    import torch

    chain = load_defense("secure-aggregation:range=2")
    with pytest.raises(DefenseError, match="an element of 3 is beyond its range of 2"):
        chain(torch.tensor([0.0, -3.0]), (2,), {}, seed=0, rank=0, step=0)
    with pytest.raises(DefenseError, match="nan"):
        chain(torch.tensor([0.0, float("nan")]), (2,), {}, seed=0, rank=0, step=0)
    sent, _ = chain(torch.tensor([0.0, 2.0]), (2,), {}, seed=0, rank=0, step=0)
    with pytest.raises(DefenseError, match="needs an exchange that masks"):
        sent.part(0, 2)
