"""What every exchange promises, checked on every exchange with real processes. A new one gets its tests by a row."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.errors import DeadlineError, ExchangeError
from harness.exchange.base import Exchange, flat_state
from harness.exchange.local import mean_of
from tests.contracts.exchange_ranks import KINDS, Place, run_ranks

WORLDS = (1, 2, 3, 4)
SIZES = (1, 7, 3 * 65536 + 5)
"""Elements: fewer than servers, odd, and more than one chunk for each of four shards."""
FIRST_STEP, STEPS = 5, 4
DEADLINE_S = 2.0


class Model(nn.Module):
    """`elements` parameters, one of them a scalar, and one tensor without any; a float buffer and one of integers."""

    def __init__(self, elements: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scalar = nn.Parameter(torch.randn((), generator=generator))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        if elements > 1:
            self.rest = nn.Parameter(torch.randn(elements - 1, generator=generator))
        self.register_buffer("mean", torch.randn(3, generator=generator))
        self.register_buffer("count", torch.tensor(seed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw of one exchange. Arrays, as torch would share tensors through a process that has ended."""

    state: np.ndarray
    averages: list[np.ndarray]
    bytes_out: int
    bytes_in: int


def gradient_of(rank: int, step: int, elements: int) -> Tensor:
    """First rank + 1, so that the mean is arithmetic; then random numbers."""
    if step == FIRST_STEP:
        return torch.full((elements,), float(rank + 1))
    return torch.randn(elements, generator=torch.Generator().manual_seed(1000 * step + rank))


def train_all(place: Place) -> list[Seen]:
    """The job of a rank: every size, one after the other."""
    return [train(place.open(round), elements) for round, elements in enumerate(SIZES)]


def train(exchange: Exchange, elements: int) -> Seen:
    """Start, several steps, close twice. The gradient is overwritten after each step."""
    model = Model(elements, seed=exchange.rank)
    exchange.start(model, step=FIRST_STEP)
    averages = []
    gradient = torch.empty(elements)
    for step in range(FIRST_STEP, FIRST_STEP + STEPS):
        gradient.copy_(gradient_of(exchange.rank, step, elements))
        averages.append(exchange.average(gradient, step=step).numpy().copy())
        gradient.fill_(torch.nan)
    exchange.close()
    exchange.close()
    return Seen(
        state=flat_state(model).numpy(),
        averages=averages,
        bytes_out=exchange.traffic.bytes_out,
        bytes_in=exchange.traffic.bytes_in,
    )


@pytest.fixture(
    scope="module", params=[(kind, world) for kind in KINDS for world in WORLDS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def seen(request) -> dict[int, list[Seen]]:
    """Elements -> what each rank saw."""
    kind, world_size = request.param
    ranks, servers = run_ranks(kind, world_size, train_all, rounds=len(SIZES))
    for rank in ranks:
        if isinstance(rank, Exception):
            raise rank
    assert servers == [""] * len(servers)
    return {elements: [rank[round] for rank in ranks] for round, elements in enumerate(SIZES)}


def test_start_gives_every_rank_the_weights_and_float_buffers_of_rank_0(seen):
    for elements, ranks in seen.items():
        for rank in ranks:
            assert np.array_equal(rank.state, flat_state(Model(elements, seed=0)).numpy())


def test_the_mean_of_whole_numbers_is_arithmetic(seen):
    for ranks in seen.values():
        for rank in ranks:
            assert np.array_equal(rank.averages[0], np.full_like(rank.averages[0], (len(ranks) + 1) / 2))


def test_every_rank_has_the_same_bits(seen):
    for ranks in seen.values():
        for rank in ranks[1:]:
            for mine, first in zip(rank.averages, ranks[0].averages, strict=True):
                assert np.array_equal(mine.view(np.int32), first.view(np.int32))


def test_averages_are_the_oracles_to_rounding(seen):
    for elements, ranks in seen.items():
        for step, average in enumerate(ranks[0].averages, start=FIRST_STEP):
            gradients = [gradient_of(rank, step, elements) for rank in range(len(ranks))]
            # W - 1 additions and up to W divisions (DDP divides first), each off by at most half a unit in the last
            # place of a partial sum, which is at most the sum of magnitudes; and the oracle's own rounding.
            magnitude = torch.stack(gradients).abs().double().mean(dim=0).numpy()
            tolerance = (len(ranks) + 1) * np.finfo(np.float32).eps * magnitude
            assert (abs(average - mean_of(gradients).double().numpy()) <= tolerance).all()


def stop_answering(place: Place, how: str) -> tuple[str, str, float]:
    """The last rank falls silent after the first step; what the others are told, and how long that takes."""
    exchange = place.open()
    exchange.start(Model(1000, seed=0), step=0)
    exchange.average(torch.ones(1000), step=0)
    if how == "dies":
        place.meet()  # where ranks serve, it would take with it what others are still to be sent
    if place.rank == place.world_size - 1:
        if how == "dies":
            os._exit(1)
        time.sleep(DEADLINE_S + 1.0)  # longer than all others wait
    begin = time.monotonic()
    try:
        exchange.average(torch.ones(1000), step=1)
    except ExchangeError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    finally:
        exchange.close()
    return "", "", time.monotonic() - begin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_a_rank_that_stops_ends_the_others_within_the_deadline(kind, how):
    if kind == "local" and how == "dies":
        pytest.skip("its ranks are threads of one process, which dies as a whole")
    ranks, servers = run_ranks(kind, 3, stop_answering, how, deadline_s=DEADLINE_S)
    for rank, (error, text, seconds) in enumerate(ranks[:-1]):
        assert error in ("DeadlineError", "PeerError"), text
        assert text.startswith(f"rank {rank}, step 1: ") and "\n" not in text
        assert seconds < DEADLINE_S + 2.0  # of it, up to one on a busy machine
    if how == "is silent":
        # Who notices first, a rank or the server, is a race; the others may be told by the one that did.
        late = [text for error, text, _ in ranks[:-1] if error == DeadlineError.__name__]
        late += [text for text in servers if text.startswith(DeadlineError.__name__)]
        assert late and all("no " in text and f"within {DEADLINE_S:g} s" in text for text in late)
    for text in servers:
        assert text.startswith(("DeadlineError: server", "PeerError: server"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_never_comes_is_missed(kind):
    ranks, _ = run_ranks(kind, 2, come_alone, deadline_s=DEADLINE_S)
    error, text = ranks[0]
    assert error in ("DeadlineError", "PeerError"), text
    assert text.startswith("rank 0, step 0: ") and "\n" not in text


def come_alone(place: Place) -> tuple[str, str]:
    """Rank 1 opens its end and does not start."""
    with place.open() as exchange:
        if place.rank == 1:
            time.sleep(DEADLINE_S + 1.0)
            return "", ""
        try:
            exchange.start(Model(10, seed=0), step=0)
        except ExchangeError as error:
            return type(error).__name__, str(error)
    return "", "started alone"
