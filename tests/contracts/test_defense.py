"""What every defense promises on every exchange, with real processes: the mean of what each rank's code says, the same
bits on every rank, and as many bytes as the formula predicts. A new one gets its tests by a row."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.defenses import load_defense
from harness.exchange.base import as_tensor
from harness.exchange.chunks import SMALL_CHUNK
from harness.exchange.local import mean_of
from tests.contracts.exchange_ranks import KINDS, Place, run_ranks

WORLD, STEPS = 3, 3
SHAPES = ((2, 3), (SMALL_CHUNK - 3000,), (60, 70), (), (4, 0), (50,))
"""More than one chunk; the matrix lies in two of them."""
SIZES = tuple(math.prod(shape) for shape in SHAPES)
ELEMENTS = sum(SIZES)
SPECS = (
    "clip:1.0+noise-gaussian:0.1",
    "prune:0.9",
    "topk-dgc:0.99",
    "fp16",
    "bf16",
    "int8",
    "qsgd:7",
    "ternary",
    "sign",
    "powersgd:2",
)


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ParameterList([torch.randn(shape, generator=generator) for shape in SHAPES])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank saw under one defense."""

    averages: list[np.ndarray]
    bytes_out: list[int]
    """Of each step."""


def gradient_of(rank: int, step: int) -> Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(10 * step + rank))


def sent_by(spec: str, rank: int) -> list[Tensor]:
    """What a rank sends at each step."""
    return [as_tensor(sent) for sent in protect(spec, rank)]


def protect(spec: str, rank: int):
    chain = load_defense(spec).fit(Model(0))
    state = chain.begin(SIZES)
    for step in range(STEPS):
        sent, state = chain(gradient_of(rank, step), SIZES, state, seed=0, rank=rank, step=step)
        yield sent


def train_all(place: Place) -> list[Seen]:
    """The job of a rank: every defense, one after the other."""
    return [train(place, round, spec) for round, spec in enumerate(SPECS)]


def train(place: Place, round: int, spec: str) -> Seen:
    averages, bytes_out = [], []
    with place.open(round) as exchange:
        exchange.start(Model(exchange.rank), step=0)
        for step, sent in enumerate(protect(spec, exchange.rank)):
            before = exchange.traffic.bytes_out
            averages.append(exchange.average(sent, step=step).numpy().copy())
            bytes_out.append(exchange.traffic.bytes_out - before)
    return Seen(averages=averages, bytes_out=bytes_out)


@pytest.fixture(scope="module", params=KINDS)
def seen(request) -> tuple[str, dict[str, list[Seen]]]:
    """The exchange, and for each defense what each rank saw."""
    ranks, servers = run_ranks(request.param, WORLD, train_all, rounds=len(SPECS))
    for rank in ranks:
        if isinstance(rank, Exception):
            raise rank
    assert servers == [""] * len(servers)
    return request.param, {spec: [rank[round] for rank in ranks] for round, spec in enumerate(SPECS)}


def test_every_rank_has_the_same_bits(seen):
    for ranks in seen[1].values():
        for rank in ranks[1:]:
            for mine, first in zip(rank.averages, ranks[0].averages, strict=True):
                assert np.array_equal(mine.view(np.int32), first.view(np.int32))


def test_the_average_is_that_of_what_the_codes_say(seen):
    kind, found = seen
    for spec, ranks in found.items():
        sent = [sent_by(spec, rank) for rank in range(WORLD)]
        # As in the exchange's own contract; sums of short floats are rounded to these at each addition, and before.
        short = spec in ("fp16", "bf16") and kind in ("allreduce", "ddp")
        eps = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[spec] if short else torch.float32).eps
        for step, average in enumerate(ranks[0].averages):
            parts = [rank[step] for rank in sent]
            magnitude = torch.stack(parts).abs().double().mean(dim=0).numpy()
            error = abs(average - mean_of(parts).double().numpy())
            assert (error <= (WORLD + 2) * eps * magnitude + (2.0**-24 if short else 0)).all(), spec


def payload_of(spec: str, chunks: int) -> tuple[float, float]:
    """Least and most bytes of what a rank says at a step, by the code's formula, in so many messages."""
    kept = {0.9: sum(n - round(0.9 * n) for n in SIZES), 0.99: sum(min(n, math.ceil(0.01 * n - 1e-9)) for n in SIZES)}
    bits = {"int8": 8, "ternary": 2, "qsgd:7": 4, "sign": 1}
    if spec in ("fp16", "bf16"):
        return 2 * ELEMENTS, 2 * ELEMENTS
    if spec == "prune:0.9":  # a bit each, up to whole bytes; in a short chunk perhaps places, if they are fewer
        return 4 * kept[0.9] + ELEMENTS / 8 - 20, 4 * kept[0.9] + ELEMENTS / 8 + chunks
    if spec == "topk-dgc:0.99":  # a place in two bytes; in a chunk of few elements a mask of one, if that is less
        return 6 * kept[0.99] - chunks, 6 * kept[0.99]
    if spec in bits:
        segments = sum(-(-n // 512) for n in SIZES) if spec == "qsgd:7" else sum(n > 0 for n in SIZES)
        low = bits[spec] * ELEMENTS / 8 + 8 * segments + 4 * chunks
        return low, low + chunks * (8 + 1)  # a segment that is cut in two, and whole bytes
    if spec == "powersgd:2":  # 60 rows and 70 columns, which are said in each chunk
        low = 4 * (ELEMENTS - 60 * 70 + 2 * (60 + 70)) + 4 * chunks + 16 * (len(SHAPES) - 1)
        return low, low + 16 * 2 + 4 * 2 * (70 + 1)
    return 4 * ELEMENTS, 4 * ELEMENTS


def test_the_wire_carries_as_many_bytes_as_predicted(seen):
    kind, found = seen
    if kind in ("local", "zeromq ranks serve"):
        pytest.skip("nothing is sent, or other ranks' averages are counted too")
    for spec, ranks in found.items():
        if kind.startswith("zeromq"):
            low, high = payload_of(spec, 2)
        elif spec in ("fp16", "bf16", "clip:1.0+noise-gaussian:0.1"):
            # A ring: all but one of the ranks' parts, twice.
            low = high = 2 * (WORLD - 1) * payload_of(spec, 1)[0] // WORLD
        else:
            # Every rank's messages, filled up to the longest's, go to every other; the first step's hold a HELLO.
            chunks = 2 if kind == "allreduce" else sum(size > 0 for size in SIZES)
            low, high = payload_of(spec, chunks)
            low, high = (WORLD - 1) * (8 + low + 100 * chunks), (WORLD - 1) * (8 + high + 300 * chunks)
        for rank in ranks:
            assert all(low <= sent <= high for sent in rank.bytes_out[1:]), (spec, rank.bytes_out, low, high)
            assert 0 <= rank.bytes_out[0] - rank.bytes_out[1] <= (WORLD - 1) * 500 or "topk" in spec, spec


def average_factors(place: Place) -> tuple[Seen, np.ndarray]:
    """The averages of a rank, and its residual after the last."""
    chain = load_defense("powersgd-averaged:2").fit(Model(0))
    state, averages, bytes_out = chain.begin(SIZES), [], []
    with place.open() as exchange:
        exchange.start(Model(exchange.rank), step=0)
        for step in range(STEPS):
            before = exchange.traffic.bytes_out
            sent, state = chain(gradient_of(exchange.rank, step), SIZES, state, seed=0, rank=exchange.rank, step=step)
            averages.append(exchange.average(sent, step=step).numpy().copy())
            bytes_out.append(exchange.traffic.bytes_out - before)
    return Seen(averages=averages, bytes_out=bytes_out), state["0.residual"].numpy().copy()


@pytest.mark.parametrize("kind", ["local", "allreduce", "ddp"])
def test_factors_are_averaged_in_rounds(kind):
    ranks, _ = run_ranks(kind, WORLD, average_factors)
    begin = SIZES[0] + SIZES[1]
    matrix = slice(begin, begin + SIZES[2])
    for seen, _ in ranks:
        for mine, first in zip(seen.averages, ranks[0][0].averages, strict=True):
            assert np.array_equal(mine.view(np.int32), first.view(np.int32))
            assert np.linalg.matrix_rank(mine[matrix].reshape(60, 70), tol=1e-3) == 2
        if kind != "local":  # a ring for each of three sums
            sums = (ELEMENTS - 60 * 70, 60 * 2, 70 * 2)
            assert seen.bytes_out == [sum(2 * (WORLD - 1) * 4 * size // WORLD for size in sums)] * STEPS
    # The first average, written out for all ranks at once.
    means = torch.stack([torch.stack([gradient_of(r, step) for r in range(WORLD)]).mean(0) for step in range(STEPS)])
    first = means[0][matrix].view(60, 70).double().numpy()
    start = load_defense("powersgd-averaged:2").fit(Model(0)).begin(SIZES)["0.q"].numpy().reshape(70, 2)
    basis = np.linalg.qr(first @ start)[0]
    assert np.allclose(ranks[0][0].averages[0][matrix].reshape(60, 70), basis @ basis.T @ first, atol=1e-4)
    # Nothing is lost: what was averaged and what all ranks keep is the mean of all that they had.
    averaged = sum(average.astype(np.float64) for average in ranks[0][0].averages)
    kept = np.mean([residual for _, residual in ranks], axis=0)
    assert np.allclose(averaged + kept, means.sum(0).numpy(), atol=1e-4)
