"""What DistributedDataParallel says about a model when it is built: shapes, and the state of rank 0.

Takes payloads of collectives, gives shapes and vectors; None where bytes fit no model, or more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attack.decode.gloo.framing import Message
from attack.observation import Shapes

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


def parse_shapes(payload: bytes | bytearray, count: int | None, most: int | None) -> Shapes | None:
    """int64: of each parameter its sizes, then its strides; nothing says where one ends.

    A contiguous tensor's strides follow from its sizes, which leaves few ways to read them. Shapes that lie otherwise
    in memory (channels last) are refused: their gradients would be in another order.

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
        found = [way for number in counts for way in _ways(numbers, number, 1) if sum(map(math.prod, way)) == most]
        return found[0] if len(found) == 1 else None
    for least in (1, 0):  # dimensions
        ways = _ways(numbers, count, least)
        totals = [sum(map(math.prod, way)) for way in ways]
        exact = [way for way, total in zip(ways, totals, strict=True) if total == most]
        fitting = exact or [way for way, total in zip(ways, totals, strict=True) if most is None or total <= most]
        if fitting:
            return fitting[0] if len(fitting) == 1 and len(ways) < _MAX_WAYS else None
    return None


def _ways(numbers: list[int], count: int, least: int) -> list[Shapes]:
    """Every way to read sizes and strides of so many tensors of `least` or more dimensions, up to a limit."""
    ends: dict[int, list[Shapes]] = {0: [()]}  # of the tensors so far: where they end, and how they can be read
    for _ in range(count):
        following: dict[int, list[Shapes]] = {}
        for at, found in ends.items():
            for dimensions in range(least, _MAX_DIMENSIONS + 1):
                shape = tuple(numbers[at : at + dimensions])
                strides = numbers[at + dimensions : at + 2 * dimensions]
                if len(strides) == dimensions and min(shape, default=1) > 0 and strides == _strides(shape):
                    into = following.setdefault(at + 2 * dimensions, [])
                    into += [(*shapes, shape) for shapes in found]
                    del into[_MAX_WAYS:]
        ends = following
    return ends.get(len(numbers), [])


def parse_layout(
    indices: bytes | bytearray, sizes: bytes | bytearray, count: int
) -> tuple[tuple[int, ...], ...] | None:
    """int32: the parameters in the order of the buckets, then how many buckets; and the parameters of each bucket."""
    if len(indices) != 4 * (count + 1) or len(sizes) % 4:
        return None
    order, lengths = np.frombuffer(indices, "<i4").tolist(), np.frombuffer(sizes, "<i4").tolist()
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


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
