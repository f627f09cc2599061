"""Long vectors in blocks that stay in the cache, and what each segment of one comes to.

A vector is cut into segments, tensors or buckets of them; a block is a part of a long segment, or several short ones,
whole. Knows numbers and segments; nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import sasum

from harness.errors import DefenseError
from harness.wire.coded import Float32

BLOCK = 1 << 16
"""Elements: four vectors of them fit a second-level cache of 1 MiB."""

Borders = npt.NDArray[np.int64]
"""Where segments begin, and the last ends: ascending, from 0, shape (segments + 1,); none is empty."""
_AT_ONCE = np.zeros(1, np.int64)
"""Where the one segment of a block begins."""


class Block(NamedTuple):
    """Elements that are worked on together."""

    elements: slice
    segments: slice
    """One, or several that are all of it."""
    starts: Borders
    """Where its segments begin, counted from its first element."""

    @property
    def lengths(self) -> Borders:
        """Elements of each segment that lie in it."""
        return np.diff(self.starts, append=self.elements.stop - self.elements.start)


def borders(sizes: Sequence[int], bucket: int | None = None) -> Borders:
    """Of a segment for each tensor that is not empty, or for each `bucket` elements of one."""
    cut, at = [0], 0
    for size in sizes:
        cut += range(at + bucket, at + size, bucket) if bucket else []
        at += size
        if size:
            cut.append(at)
    return np.array(cut, np.int64)


def blocks(cut: Borders) -> Iterator[Block]:
    """All of a vector, in order."""
    first = 0
    while first < len(cut) - 1:
        begin = int(cut[first])
        last = max(first + 1, int(np.searchsorted(cut, begin + BLOCK, side="right")) - 1)
        end = int(cut[last])
        segments, starts = slice(first, last), cut[first:last] - begin
        for at in range(begin, end, BLOCK):
            yield Block(slice(at, min(at + BLOCK, end)), segments, starts)
            starts = _AT_ONCE
        first = last


def spread(numbers: Float32, block: Block) -> Float32:
    """One number a segment of a block -> one for each of its elements, or one for all."""
    return numbers if len(numbers) == 1 else np.repeat(numbers, block.lengths)


class Measure(NamedTuple):
    """What a segment comes to."""

    together: np.ufunc
    """Of two parts: of the whole."""
    of: Callable[[Float32], float]
    """Of a part."""
    each: Callable[[Float32], Float32]
    """Of each element by itself."""


LARGEST = Measure(np.maximum, lambda part: float(np.maximum(part.max(), -part.min())), np.abs)
"""Magnitude."""
TOTAL = Measure(np.add, sasum, np.abs)
"""Of magnitudes."""
SQUARES = Measure(np.add, lambda part: float(np.dot(part, part)), np.square)
"""Their sum."""


def by_segment(measure: Measure, cut: Borders, read: Callable[[slice], Float32]) -> npt.NDArray[np.float64]:
    """A number for each segment.

    Args:
        read: elements of the vector -> their values; called for each block once, in order.

    Raises: DefenseError where one is not finite, as no unit of levels can say that.
    """
    found = np.zeros(len(cut) - 1)
    for block in blocks(cut):
        values = read(block.elements)
        if len(block.starts) == 1:
            found[block.segments] = measure.together(found[block.segments], measure.of(values))
        else:
            found[block.segments] = measure.together.reduceat(measure.each(values), block.starts, dtype=np.float64)
    if not np.isfinite(found).all():
        raise DefenseError("the gradient is not finite; the training diverged: lower the learning rate")
    return found


def with_sign(magnitudes: Float32, of: Float32, out: Float32) -> Float32:
    """`np.copysign`, several times quicker; magnitudes may be one number for all."""
    bits = np.bitwise_and(of.view(np.uint32), np.uint32(1 << 31), out=out.view(np.uint32))
    np.bitwise_or(bits, magnitudes.view(np.uint32), out=bits)
    return out
