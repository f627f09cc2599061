"""The largest elements of each tensor, exactly, in one pass.

Of a long tensor every so-many-th cache line is looked at first, which tells about how large the smallest of the largest
is; a pass then collects what is not clearly smaller, and of that little the largest are found. Where the sample was
misleading, and too little was collected, everything is looked at: a sample decides how long it takes, never what is
found. Lin et al. 2018 (arXiv 1712.01887, section 5) sample so, and are content with the sample's threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from harness.defenses.base import Sizes
from harness.wire.coded import Float32

Places: TypeAlias = npt.NDArray[np.int64]
Found: TypeAlias = tuple[Places, Float32]
"""Where elements are, and what they are."""
Bits: TypeAlias = npt.NDArray[np.uint32]
Sampling: TypeAlias = Callable[[Float32], Float32]
"""Of a flat vector, the elements to look at first."""

_BLOCK = 1 << 17
"""Elements: twice as many as elsewhere, so that a block is begun half as often."""
_LINE = 16
"""Elements in 64 bytes, a cache line: to look at one takes as long as to look at all of them."""
_STRIDE = 61
"""Lines; a prime, so that it meets all parts of a matrix."""
_DEVIATIONS = 3.0
"""How many more of a sample are taken for the largest, of those by which their number deviates."""


def largest(
    values: Float32,
    sizes: Sizes,
    counts: list[int],
    *,
    peek: Callable[[Sampling], Float32] | None = None,
    fill: Callable[[slice], None] | None = None,
) -> Iterator[Found]:
    """For each tensor the `counts` elements that are largest in magnitude, ascending by their places in the vector.

    What is not a number is larger than any; of two of one magnitude, which is not said.

    Args:
        values: the flat vector.
        fill: writes a block of `values` before it is read, each once, in order; None: they are there.
        peek: what such elements of `values` will be.
    """
    at = 0
    for size, count in zip(sizes, counts, strict=True):
        sampling = functools.partial(sample, begin=at, size=size)
        least = _threshold(sampling(values) if peek is None else peek(sampling), size, count)
        places, numbers = _not_below(least, values, at, at + size, fill)
        if places.size < count:
            places, numbers = np.arange(at, at + size), values[at : at + size]
        if (smaller := places.size - count) > 0:
            chosen = np.ones(places.size, np.bool_)
            chosen[np.argpartition(_magnitudes(numbers), smaller - 1)[:smaller]] = False
            among = np.flatnonzero(chosen)  # by a mask that is full of holes it takes several times as long
            places, numbers = places[among], numbers[among]
        yield places, numbers
        at += size


def _magnitudes(values: Float32, out: Bits | None = None) -> Bits:
    """As whole numbers, of which the larger is that of the larger float; what is not a number is above all."""
    return np.bitwise_and(values.view(np.uint32), np.uint32(0x7FFFFFFF), out=out)


def sample(vector: Float32, *, begin: int, size: int) -> Float32:
    """What is looked at first of a tensor that begins there."""
    lines = vector[begin : begin + size // _LINE * _LINE].reshape(-1, _LINE)
    return lines.take(np.arange(0, len(lines), _STRIDE), axis=0).ravel()


def _threshold(sample: Float32, size: int, count: int) -> np.uint32:
    """A magnitude that is hardly above the least of the `count` largest of `size` elements."""
    expected = len(sample) * count / max(1, size)
    rank = int(expected + _DEVIATIONS * max(1.0, expected) ** 0.5) + 1
    if size <= _BLOCK or rank >= len(sample):
        return np.uint32(0)
    return np.uint32(np.partition(_magnitudes(sample), -rank)[-rank])


def _not_below(least: np.uint32, values: Float32, begin: int, end: int, fill: Callable[[slice], None] | None) -> Found:
    """Elements that are not smaller."""
    scratch, reaches = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.bool_)
    places, numbers = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for at in range(begin, end, _BLOCK):
        block = slice(at, min(at + _BLOCK, end))
        if fill is not None:
            fill(block)
        size = block.stop - at
        here = _magnitudes(values[block], out=scratch[:size])
        near = np.flatnonzero(np.greater_equal(here, least, out=reaches[:size]))
        places.append(near + at)
        numbers.append(values[block][near])  # at once, while they are in the cache
    return np.concatenate(places), np.concatenate(numbers)
