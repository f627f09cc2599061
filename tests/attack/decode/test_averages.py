"""The server's arithmetic backwards: the bound holds for every element, whatever the magnitudes."""

from __future__ import annotations

import numpy as np
import pytest

from attack.decode.averages import average, difference, same

ELEMENTS = 4096


def parts_of(kind: str, world: int, generator: np.random.Generator) -> list[np.ndarray]:
    """One part of each rank, of a kind that is hard in its own way."""
    shape = (world, ELEMENTS)
    values = generator.standard_normal(shape)
    match kind:
        case "huge ranges":
            values *= 10.0 ** generator.integers(-45, 38, shape)
        case "subnormal":
            values = generator.integers(-50, 51, shape) * 2.0**-149
        case "around the smallest normal":
            values *= 10.0 ** generator.integers(-40, -36, shape)
        case "cancellation":
            values[-1] = -values[:-1].sum(0) * (1 + generator.integers(-2, 3, ELEMENTS) * 2.0**-23)
        case "mostly zero":
            values[generator.random(shape) < 0.8] = 0.0
            values[generator.random(shape) < 0.1] = -0.0
        case "close to overflow":
            values = generator.uniform(-1, 1, shape) * 3.4e38
    with np.errstate(over="ignore"):
        return list(values.astype(np.float32))


KINDS = (
    "ordinary",
    "huge ranges",
    "subnormal",
    "around the smallest normal",
    "cancellation",
    "mostly zero",
    "close to overflow",
)


@pytest.mark.parametrize("world", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_the_missing_part_is_within_its_bound(kind: str, world: int) -> None:
    generator = np.random.default_rng([world, KINDS.index(kind)])
    for missing in range(world):
        parts = parts_of(kind, world, generator)
        found = difference(average(parts), [None if rank == missing else part for rank, part in enumerate(parts)])
        truth = parts[missing].astype(np.float64)
        error = np.abs(found.value.astype(np.float64) - truth)
        assert (error <= found.bound)[found.valid].all()
        if kind in ("ordinary", "subnormal", "mostly zero"):
            assert found.valid.all()


def test_the_bound_is_of_the_size_of_the_rounding() -> None:
    # A bound that is true and useless would be infinity: for equal magnitudes it is a few units in the last place.
    generator = np.random.default_rng(0)
    for world in range(2, 9):
        parts = parts_of("ordinary", world, generator)
        found = difference(average(parts), [None, *parts[1:]])
        assert np.median(found.bound) < world * 4 * 2.0**-24 * np.sqrt(world)


def test_an_average_that_is_not_finite_says_nothing() -> None:
    mean = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    found = difference(mean, [np.zeros(4, np.float32), None])
    assert found.valid.tolist() == [False, False, False, True]


def test_the_average_is_the_plain_sum_in_rank_order_over_the_number_of_ranks() -> None:
    parts = parts_of("ordinary", 5, np.random.default_rng(3))
    total = np.zeros(ELEMENTS, np.float32)
    for index in range(ELEMENTS):
        value = parts[0][index]
        for part in parts[1:]:
            value = np.float32(value + part[index])
        total[index] = np.float32(value / np.float32(5))
    before = [part.copy() for part in parts]
    assert same(average(parts), total).all()
    assert all((one == other).all() for one, other in zip(parts, before, strict=True))  # the parts are left alone


def test_same_tells_zeros_apart_and_takes_any_nan_for_another() -> None:
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert same(nans, nans[::-1].copy()).all()
    assert not same(np.float32([0.0]), np.float32([-0.0])).any()
