"""The server's logic without a socket: any order of arrival gives the same bits, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from harness.errors import PeerError
from harness.exchange.chunks import SMALL_CHUNK, WINDOW, Chunk, shard_chunks
from harness.exchange.message import Message
from harness.exchange.shard import Shard
from harness.wire import MAX_PAYLOAD_BYTES, Kind, WireError
from tests.harness.exchange.conversation import RUN, bye, chunk, hello, key, layout

TOTAL = 2 * SMALL_CHUNK + 5


def open_shard(world: int, total: int = TOTAL, *, index: int = 0, servers: int = 1) -> Shard:
    """A shard whose ranks have joined, and have their weights."""
    shard = Shard(run=RUN, world_size=world, index=index, servers=servers)
    for rank in range(world):
        shard.receive(rank, hello(rank, layout(total, world=world)))
    for at, size in shard_chunks(total, index=index, servers=servers):
        shard.receive(0, chunk(Kind.WEIGHTS, 0, np.zeros(size), total=total, at=at))
    return shard


def random_gradients(world: int, total: int = TOTAL) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(world, total)).astype(np.float32)


def test_all_are_welcomed_when_the_last_has_joined():
    shard = Shard(run=RUN, world_size=3)
    assert shard.receive(2, hello(2, layout(4, world=3))) == []
    assert shard.waits_for() == "HELLO from ranks 0, 1"
    assert shard.receive(0, hello(0, layout(4, world=3))) == []
    welcomed = shard.receive(1, hello(1, layout(4, world=3)))
    assert [(rank, message.header.kind) for rank, message in welcomed] == [(rank, Kind.WELCOME) for rank in range(3)]


def test_rank_0s_weights_are_handed_to_the_others_as_they_are():
    shard = Shard(run=RUN, world_size=3)
    for rank in range(3):
        shard.receive(rank, hello(rank, layout(4, world=3, buffers=2)))
    message = chunk(Kind.WEIGHTS, 0, np.arange(6), total=6)
    handed = shard.receive(0, message)
    assert [rank for rank, _ in handed] == [1, 2]
    assert all(answer.payload is message.payload for _, answer in handed)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_arrival_gives_the_bits_of_the_sum_in_rank_order(seed):
    world, gradients = 4, random_gradients(4)
    expected = (((gradients[0] + gradients[1]) + gradients[2]) + gradients[3]) / np.float32(world)
    shard, landed = open_shard(world), np.full(TOTAL, np.nan, np.float32)
    arrivals = list(itertools.product(range(world), shard_chunks(TOTAL, index=0, servers=1)))
    random.Random(seed).shuffle(arrivals)
    for rank, (at, size) in arrivals:
        answers = shard.receive(rank, chunk(Kind.GRADIENT, rank, gradients[rank, at : at + size], total=TOTAL, at=at))
        assert [to for to, _ in answers] in ([], list(range(world)))
        for _, answer in answers[:1]:
            landed[answer.header.at :][: answer.header.count] = answer.values()
    assert np.array_equal(landed.view(np.int32), expected.view(np.int32))
    assert shard.step == 1 and shard.waits_for() is None


@pytest.mark.parametrize("read_only", [(), (0,), (1,), (0, 1), (0, 1, 2)])
def test_read_only_parts_and_earlier_answers_are_never_written(read_only):
    world, gradients = 3, random_gradients(3, 8)
    expected = ((gradients[0] + gradients[1]) + gradients[2]) / np.float32(world)
    shard, kept, answers = open_shard(world, 8), [], []
    for step in range(3):
        for rank in range(world):
            message = chunk(Kind.GRADIENT, rank, gradients[rank], total=8, step=step)
            if rank in read_only:
                message.payload.flags.writeable = False
                kept.append((rank, message.payload))
            answers += [answer.payload for _, answer in shard.receive(rank, message)[:1]]
    assert all(np.array_equal(answer, expected) for answer in answers) and len(answers) == 3
    assert all(np.array_equal(part, gradients[rank]) for rank, part in kept)
    memories = [*answers, *(part for _, part in kept)]
    assert not any(np.shares_memory(one, other) for one, other in itertools.combinations(memories, 2))


def test_one_rank_gets_its_own_gradient_back():
    shard = open_shard(1, 8)
    ((to, answer),) = shard.receive(0, chunk(Kind.GRADIENT, 0, np.arange(8), total=8))
    assert to == 0 and answer.values().tolist() == list(range(8))


@pytest.mark.parametrize("total", [0, 1, 7, SMALL_CHUNK, TOTAL, 5_000_000])
@pytest.mark.parametrize("servers", [1, 2, 3, 8])
def test_shards_cover_the_vector_once(total, servers):
    chunks = [piece for index in range(servers) for piece in shard_chunks(total, index=index, servers=servers)]
    assert [piece.at for piece in chunks] == [0, *np.cumsum([piece.size for piece in chunks])][: len(chunks)]
    assert sum(piece.size for piece in chunks) == total
    assert all(1 <= piece.size * 4 <= MAX_PAYLOAD_BYTES for piece in chunks)


GRADIENT = chunk(Kind.GRADIENT, 1, np.zeros(SMALL_CHUNK), total=TOTAL)


def with_header(message: Message, **changes: Any) -> Message:
    return Message(dataclasses.replace(message.header, **changes), message.payload)


@pytest.mark.parametrize(
    ("sender", "message", "said"),
    [
        (1, with_header(GRADIENT, run=b"another!"), "another job uses this port"),
        (1, with_header(GRADIENT, rank=0), "under its own name, got 0 as 1"),
        (7, with_header(GRADIENT, rank=7), "a rank below 2"),
        (-1, with_header(GRADIENT, rank=-1), "a rank below 2"),
    ],
)
def test_a_strangers_message_is_refused_and_changes_nothing(sender, message, said):
    shard = open_shard(2)
    with pytest.raises(WireError, match=said):
        shard.receive(sender, message)
    assert shard.waits_for() is None
    assert shard.receive(1, GRADIENT) == []


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (with_header(GRADIENT, step=1), "wanted a chunk of step 0, got gradient of step 1"),
        (with_header(GRADIENT, total=TOTAL + 1), "wanted a chunk of step 0"),
        (with_header(GRADIENT, at=1), "a chunk of its shard, each once"),
        (with_header(GRADIENT, codec="magic"), "wanted a chunk of step 0"),
        (with_header(GRADIENT, kind=Kind.AVERAGE), "wanted a message of a rank, got average"),
        (with_header(GRADIENT, kind=Kind.WEIGHTS), "weights of rank 0"),
        (hello(1, layout(TOTAL, world=2)), "one HELLO of each rank"),
    ],
)
def test_a_rank_that_breaks_the_conversation_ends_it_by_name(message, said):
    with pytest.raises(PeerError, match=f"rank 1: .*{said}"):
        open_shard(2).receive(1, message)


def test_the_same_chunk_twice_ends_it():
    shard = open_shard(2)
    shard.receive(1, GRADIENT)
    with pytest.raises(PeerError, match=r"rank 1: .* each once"):
        shard.receive(1, GRADIENT)


def test_more_than_a_window_is_not_held():
    total = (WINDOW + 1) * SMALL_CHUNK
    shard = open_shard(2, total)
    for at in range(0, WINDOW * SMALL_CHUNK, SMALL_CHUNK):
        shard.receive(1, chunk(Kind.GRADIENT, 1, np.zeros(SMALL_CHUNK), total=total, at=at))
    with pytest.raises(PeerError, match=f"rank 1: .* at most {WINDOW} chunks unanswered"):
        shard.receive(1, chunk(Kind.GRADIENT, 1, np.zeros(SMALL_CHUNK), total=total, at=WINDOW * SMALL_CHUNK))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (hello(1, layout(5, world=2)), "ranks 0 and 1 train different models: 4 parameters in 1 tensors, 5 in 1"),
        (hello(1, layout(4, world=3)), "rank 1: wanted a run of 2 ranks, got 3"),
        (hello(1, layout(4, world=2), step=9), "rank 0 starts at step 0, rank 1 at step 9"),
        (Message(hello(1, layout(4, world=2)).header, b"\xff" * 20), "rank 1: layout"),
    ],
)
def test_ranks_that_do_not_agree_do_not_begin(second, said):
    shard = Shard(run=RUN, world_size=2)
    shard.receive(0, hello(0, layout(4, world=2)))
    with pytest.raises(PeerError, match=said):
        shard.receive(1, second)


def test_whoever_leaves_too_early_is_named():
    shard = open_shard(2, 8)
    shard.receive(0, chunk(Kind.GRADIENT, 0, np.zeros(8), total=8))
    with pytest.raises(PeerError, match="rank 1 left while others waited"):
        shard.receive(1, bye(1))

    shard = open_shard(2, 8)
    shard.receive(1, bye(1))
    with pytest.raises(PeerError, match="rank 1 left before step 0"):
        shard.receive(0, chunk(Kind.GRADIENT, 0, np.zeros(8), total=8))


def test_it_is_finished_when_all_have_left():
    shard = open_shard(2, 8)
    assert shard.receive(0, bye(0)) == [] and not shard.finished
    assert shard.receive(1, bye(1)) == [] and shard.finished


def test_who_leaves_where_gradients_are_masked_is_told_nothing():
    shard = open_shard(3, 8)
    for rank in range(3):
        shard.receive(rank, key(rank))
    assert shard.tolerant
    assert not any(shard.receive(rank, bye(rank)) for rank in range(3)) and shard.finished


def test_it_says_which_ranks_it_waits_for():
    shard = open_shard(3)
    shard.receive(1, with_header(GRADIENT))
    assert shard.waits_for() == f"gradient for {Chunk(0, SMALL_CHUNK)} from ranks 0, 2"
