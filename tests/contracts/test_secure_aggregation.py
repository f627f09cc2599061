"""Secure aggregation with real processes: the right mean, and lost ranks that cost a deadline and not the run."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
from torch import nn

from harness.defenses import load_defense
from harness.errors import PeerError
from harness.exchange.chunks import SMALL_CHUNK
from tests.contracts.exchange_ranks import Place, run_ranks

ELEMENTS = 3 * SMALL_CHUNK + 5
STEPS, DEADLINE_S = 4, 4.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ELEMENTS))


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(10 * step + rank))


def train(place: Place, dies: dict[int, int], hangs: dict[int, int]) -> tuple[list[np.ndarray], list[float]]:
    """Averages, and the seconds that each took. Some ranks die in the middle of a vector, or sleep over a step."""
    chain, averages, seconds = load_defense("clip:1e9+secure-aggregation"), [], []
    with place.open() as exchange:
        exchange.start(Model(), step=0)
        for step in range(STEPS):
            if dies.get(exchange.rank) == step:
                chunk, sent = exchange._chunk, []

                def die(vector, at, chunk=chunk, sent=sent):
                    sent.append(at)
                    if len(sent) == 3:
                        time.sleep(0.2)  # for what was sent to leave
                        os._exit(1)
                    return chunk(vector, at)

                exchange._chunk = die
            if hangs.get(exchange.rank) == step:
                time.sleep(2.5 * DEADLINE_S)
            coded, _ = chain(gradient(exchange.rank, step), (ELEMENTS,), {}, seed=0, rank=exchange.rank, step=step)
            began = time.monotonic()
            averages.append(exchange.average(coded, step=step).numpy().copy())
            seconds.append(time.monotonic() - began)
    return averages, seconds


@pytest.mark.parametrize(
    ("world", "dies", "hangs", "present"),
    [
        (2, {}, {}, [[0, 1]] * 4),
        (4, {2: 1}, {3: 2}, [[0, 1, 2, 3], [0, 1, 3], [0, 1], [0, 1]]),
    ],
)
def test_the_mean_is_that_of_the_ranks_that_are_there(world, dies, hangs, present) -> None:
    ranks, servers = run_ranks("zeromq 1 server", world, train, dies, hangs, deadline_s=DEADLINE_S)
    assert servers == [""], servers
    averages, seconds = ranks[0]
    unit = 2.0 ** np.ceil(np.log2(64 * world / (2**31 - 1 - world)))
    for step, there in enumerate(present):
        plain = torch.stack([gradient(rank, step) for rank in there]).double().mean(dim=0).numpy()
        assert (abs(averages[step] - plain) <= unit / 2 + 2.0**-24 * abs(plain) * 2).all(), step
        assert np.array_equal(averages[step], ranks[1][0][step])
        assert seconds[step] < 2 * DEADLINE_S
    assert all(ranks[rank] is None for rank in dies)
    for rank in hangs:
        assert isinstance(ranks[rank], PeerError) and "out of the run" in str(ranks[rank]), ranks[rank]


def test_with_too_few_ranks_left_the_run_ends() -> None:
    ranks, _ = run_ranks("zeromq 1 server", 2, train, {1: 1}, {}, deadline_s=DEADLINE_S)
    assert isinstance(ranks[0], PeerError) and "wanted 2 ranks or more, got [0]" in str(ranks[0])


@pytest.mark.parametrize("kind", ["allreduce", "ddp"])
def test_where_ranks_gather_the_mean_is_theirs(kind: str) -> None:
    ranks, _ = run_ranks(kind, 3, train, {}, {})
    unit = 2.0 ** np.ceil(np.log2(64 * 3 / (2**31 - 1 - 3)))
    for averages, _ in ranks:
        for step, average in enumerate(averages):
            plain = torch.stack([gradient(rank, step) for rank in range(3)]).double().mean(dim=0).numpy()
            assert (abs(average - plain) <= unit / 2 + 2.0**-24 * abs(plain) * 2).all()
            assert np.array_equal(average, ranks[0][0][step])


@pytest.mark.parametrize("kind", ["zeromq 2 servers", "zeromq ranks serve"])
def test_where_the_sum_is_cut_up_it_is_refused(kind: str) -> None:
    ranks, _ = run_ranks(kind, 2, train, {}, {}, deadline_s=DEADLINE_S)
    assert all("needs one server of its own" in str(rank) for rank in ranks)
