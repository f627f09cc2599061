"""The largest elements of each tensor, exactly, in one pass.

Of a long tensor every so-many-th cache line is looked at first, which tells about how large the smallest of the largest
is; a pass then collects what is not clearly smaller, and of that little the largest are found. Where the sample was
misleading, and too little was collected, everything is looked at: a sample decides how long it takes, never what is
found. Lin et al. 2018 (arXiv 1712.01887, section 5) sample so, and are content with the sample's threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from harness.defenses.base import Sizes
from harness.defenses.scan import Places, not_below
from harness.wire.coded import Float32

Bits: TypeAlias = npt.NDArray[np.uint32]
Found: TypeAlias = tuple[Places, Float32]
"""Where elements are, and what they are."""

_LONG = 1 << 16
"""Elements from which on a tensor is sampled."""
_LINE = 16
"""Elements in 64 bytes, a cache line: to look at one takes as long as to look at all of them."""
_STRIDE = 89
"""Lines; a prime, so that it meets all parts of a matrix."""
_DEVIATIONS = 3.0
"""How many more of a sample are taken for the largest, of those by which their number deviates."""


@dataclasses.dataclass(frozen=True, slots=True)
class Numbers:
    """A flat vector as it will be when it has grown: v = v + g, or with a velocity u = factor u + g, v = v + u."""

    values: Float32
    """v, changed in place where it grows."""
    given: Float32 | None = None
    """g; None: it is there already."""
    velocity: Float32 | None = None
    """u, changed in place."""
    factor: float = 0.0

    def __getitem__(self, part: slice) -> Numbers:
        """A part, which is changed with the whole."""
        given, velocity = (each if each is None else each[part] for each in (self.given, self.velocity))
        return dataclasses.replace(self, values=self.values[part], given=given, velocity=velocity)

    def sample(self) -> Float32:
        """Some of what it will be; nothing is changed."""
        values = sample(self.values)
        if self.given is not None:
            values += sample(self.given)
        if self.velocity is not None:
            values += np.float32(self.factor) * sample(self.velocity)
        return values

    def grow(self) -> None:
        """To be called once, or `not_below`."""
        if self.given is None:
            return
        added = self.given
        if self.velocity is not None:
            added = np.multiply(self.velocity, np.float32(self.factor), out=self.velocity)
            added += self.given
        np.add(self.values, added, out=self.values)

    def not_below(self, least: np.uint32) -> Places:
        """Grows, and says which of the values are not smaller in magnitude."""
        return not_below(least, self.values, self.given, self.velocity, self.factor)


def largest(numbers: Numbers, sizes: Sizes, counts: list[int]) -> Iterator[Found]:
    """For each tensor the `counts` elements that are largest in magnitude, ascending by their places in the vector.

    What is not a number is larger than any; of two of one magnitude, which is not said. All of the vector has grown in
    the end, each tensor before what is found of it.
    """
    at = 0
    for size, count in zip(sizes, counts, strict=True):
        tensor = numbers[at : at + size]
        least = _threshold(tensor.sample(), size, count) if size > _LONG else np.uint32(0)
        if least:
            places = tensor.not_below(least)
        else:
            tensor.grow()
        if not least or places.size < count:
            places = np.arange(size)
        found = tensor.values[places]
        if places.size > count:
            chosen = _largest(_magnitudes(found), count)
            places, found = places[chosen], found[chosen]
        yield places + at, found
        at += size


def _largest(magnitudes: Bits, count: int) -> Places:
    """Where the `count` largest are, ascending."""
    smaller = magnitudes.size - count
    least = np.partition(magnitudes, smaller - 1)[smaller - 1]
    chosen = np.flatnonzero(magnitudes > least)
    if (equal := count - chosen.size) > 0:
        chosen = np.sort(np.concatenate([chosen, np.flatnonzero(magnitudes == least)[:equal]]))
    return chosen


def _magnitudes(values: Float32) -> Bits:
    """As whole numbers, of which the larger is that of the larger float; what is not a number is above all."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def sample(tensor: Float32) -> Float32:
    """What is looked at first of a tensor: a copy of every so-many-th line."""
    lines = tensor[: len(tensor) // _LINE * _LINE].reshape(-1, _LINE)
    return lines.take(np.arange(0, len(lines), _STRIDE), axis=0).ravel()


def _threshold(sample: Float32, size: int, count: int) -> np.uint32:
    """A magnitude that is hardly above the least of the `count` largest of `size` elements; 0: it cannot be told."""
    expected = len(sample) * count / size
    rank = int(expected + _DEVIATIONS * max(1.0, expected) ** 0.5) + 1
    return np.uint32(0 if rank >= len(sample) else np.partition(_magnitudes(sample), -rank)[-rank])
