"""What DistributedDataParallel says about a model when it is built: shapes, and the state of rank 0.

Takes payloads of collectives, gives layouts; None where bytes fit no model, or more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from attack.decode.gloo.framing import Message


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements to the next index, of each dimension."""

    @classmethod
    def contiguously(cls, shape: tuple[int, ...]) -> Layout:
        """A tensor whose elements lie in the order of their indices."""
        return cls(shape, tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape))))

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in the order of their indices. A size of 0 counts as 1 (c10/core/TensorImpl.h)."""
        sizes = self.shape
        return min(sizes, default=0) >= 0 and all(
            stride == math.prod(max(size, 1) for size in sizes[axis + 1 :]) for axis, stride in enumerate(self.strides)
        )

    @property
    def dense(self) -> bool:
        """Whether its elements lie side by side, in the order of other indices. A stride of a size of 1 says nothing,
        but torch keeps to the others' order there too: it is none that is larger than the whole tensor."""
        if min(self.shape, default=1) < 1 or min(self.strides, default=1) < 1:
            return False
        expected = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return max(self.strides, default=1) <= expected


Tensors: TypeAlias = tuple[Layout, ...]
"""Of each parameter, in order."""

_MAX_DIMENSIONS = 8
_MAX_UNSEEN_COUNT = 512
"""Parameters of a model whose number of them was not seen: all numbers are tried."""
_MAX_WAYS = 64
"""To read shapes; as many as this are too many to choose from."""


def joined(copies: Sequence[Sequence[Message]]) -> bytearray | None:
    """What links say alike that carried the same; None where they contradict, or something is missing in all."""
    whole = [copy for copy in copies if not any(message.holes for message in copy)]
    if whole and len(whole) == len(copies):
        contents = [copy[0].payload if len(copy) == 1 else bytearray().join(m.payload for m in copy) for copy in copies]
        return contents[0] if all(content == contents[0] for content in contents[1:]) else None
    content: npt.NDArray[np.uint8] | None = None
    known = np.zeros(0, np.bool_)
    for copy in copies:
        theirs = np.frombuffer(bytearray().join(message.payload for message in copy), np.uint8)
        seen = np.ones(len(theirs), np.bool_)
        at = 0
        for message in copy:
            for start, stop in message.holes:
                seen[at + start : at + stop] = False
            at += len(message.payload)
        if content is None:
            content, known = theirs, seen
        elif len(theirs) != len(content) or (known & seen & (content != theirs)).any():
            return None
        else:
            content, known = np.where(known, content, theirs), known | seen
    return bytearray(content) if content is not None and known.all() else None


def gathered(copies: Sequence[Sequence[Message]]) -> bytearray | None:
    """The one i64 that all ranks gathered: Gloo sends it in two halves. None where they are not two numbers, or more.

    The upper half of a number below 2**32 is zero, so it does not matter which messages were missed.
    """
    parts = {bytes(message.payload) for copy in copies for message in copy if not message.holes}
    lower = parts - {bytes(4)}
    return bytearray(lower.pop() + bytes(4)) if len(lower) == 1 and all(len(part) == 4 for part in parts) else None


def parse_shapes(payload: bytes | bytearray, count: int | None, most: int | None) -> Tensors | None:
    """int64: of each parameter its sizes, then its strides; nothing says where one ends.

    A contiguous tensor's strides follow from its sizes, which leaves few ways to read them. Only where that leaves
    none, tensors may also lie in memory with their dimensions in another order, without holes.

    Args:
        count: of parameters; None where it was not seen: then the state must have been.
        most: elements that the state has: all parameters, and the buffers. None where it was not seen.

    Returns: the one way that has all of the state's elements; else the one that has no more, and no tensor without
        dimensions; None where that leaves none, or a choice. The first step's sums must confirm the number of elements.
    """
    if len(payload) % 8 or (count is None and most is None):
        return None
    numbers = np.frombuffer(payload, "<i8").tolist()
    if count is None:
        counts = range(1, min(len(numbers) // 2, _MAX_UNSEEN_COUNT) + 1)
        found = [way for number in counts for way in _ways(numbers, number, 1, False) if _elements(way) == most]
        return found[0] if len(found) == 1 else None
    for any_order in (False, True):
        for least in (1, 0):  # dimensions
            ways = _ways(numbers, count, least, any_order)
            exact = [way for way in ways if _elements(way) == most]
            fitting = exact or [way for way in ways if most is None or _elements(way) <= most]
            if fitting:
                return fitting[0] if len(fitting) == 1 and len(ways) < _MAX_WAYS else None
    return None


def in_logical_order(flat: np.ndarray[Any, Any], tensor: Layout) -> np.ndarray[Any, Any]:
    """The elements of a tensor as they lie in memory, in the order of their indices. A copy."""
    strides = tuple(stride * flat.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).flatten()


def _ways(numbers: list[int], count: int, least: int, any_order: bool) -> list[Tensors]:
    """Every way to read sizes and strides of so many tensors of `least` or more dimensions, up to a limit."""
    ends: dict[int, list[Tensors]] = {0: [()]}  # of the tensors so far: where they end, and how they can be read
    for _ in range(count):
        following: dict[int, list[Tensors]] = {}
        for at, found in ends.items():
            for dimensions in range(least, _MAX_DIMENSIONS + 1):
                middle, end = at + dimensions, at + 2 * dimensions
                tensor = Layout(tuple(numbers[at:middle]), tuple(numbers[middle:end]))
                if end <= len(numbers) and (tensor.contiguous or (any_order and tensor.dense)):
                    into = following.setdefault(end, [])
                    into += [(*tensors, tensor) for tensors in found]
                    del into[_MAX_WAYS:]
        ends = following
    return ends.get(len(numbers), [])


def _elements(tensors: Tensors) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def parse_layout(
    indices: bytes | bytearray, sizes: bytes | bytearray | None, count: int
) -> tuple[tuple[int, ...], ...] | None:
    """int32: the parameters in the order of the buckets, then how many buckets; and the parameters of each bucket,
    which need not have been seen (None) where there is one bucket."""
    if len(indices) != 4 * (count + 1) or len(sizes or b"") % 4:
        return None
    order = np.frombuffer(indices, "<i4").tolist()
    lengths = [count] if sizes is None else np.frombuffer(sizes, "<i4").tolist()
    if sorted(order[:-1]) != list(range(count)) or order[-1] != len(lengths) or sum(lengths) != count:
        return None
    buckets, at = [], 0
    for length in lengths:
        buckets.append(tuple(order[at : at + length]))
        at += length
    return tuple(buckets)


def begins_layout(indices: bytes | bytearray, count: int) -> bool:
    """Whether these bytes can be the first part of a layout: each parameter once."""
    return len(indices) == 4 * (count + 1) and sorted(np.frombuffer(indices, "<i4")[:-1].tolist()) == list(range(count))
