"""Where a long vector is not below a magnitude, found while the vector is brought up to date.

One pass over memory, compiled by numba when it is first asked for (about a second, once a process), where numpy takes
eight over each block. Its arithmetic is numpy's to the bit: single precision, one operation after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from harness.wire.coded import Float32

Places = npt.NDArray[np.int64]

_CHUNK = 1 << 11
"""Elements: what was brought up to date is looked at while it is in the first-level cache."""
_WORD = 8
"""Elements that are looked at together, a byte of a 64-bit word each: of most words none is large."""
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def not_below(
    least: np.uint32,
    values: Float32,
    given: Float32 | None = None,
    velocity: Float32 | None = None,
    factor: float = 0.0,
) -> Places:
    """Which elements, ascending, are not below `least` in magnitude.

    With `given` they are brought up to date before: v = v + g, or with `velocity` u = factor u + g, v = v + u.

    Args:
        least: the bits of a float without its sign; by them what is not a number is above all.
        values, given, velocity: of one length, each contiguous.
    """
    places = np.empty(values.size + _WORD, np.int64)  # a word is written before it is known how much of it counts
    return places[: _compiled()(least, values, given, velocity, np.float32(factor), places)].copy()


@functools.cache
def _compiled() -> Callable[..., int]:
    from numba import njit  # not above: who has no long vector need not wait for it

    compiled: Callable[..., int] = njit(nogil=True)(_not_below)
    return compiled


def _not_below(
    least: np.uint32,
    values: Float32,
    given: Float32 | None,
    velocity: Float32 | None,
    factor: np.float32,
    places: Places,
) -> int:
    """As above; how many they are. Loops, for numba."""
    count = 0
    large = np.zeros(_CHUNK, np.uint8)
    words = large.view(np.uint64)
    for at in range(0, values.size, _CHUNK):
        here = values[at : at + _CHUNK]
        if given is not None:
            fresh = given[at : at + _CHUNK]
            if velocity is None:
                for i in range(here.size):
                    here[i] += fresh[i]
            else:
                moving = velocity[at : at + _CHUNK]
                for i in range(here.size):
                    moving[i] = factor * moving[i] + fresh[i]
                    here[i] += moving[i]
        bits = here.view(np.uint32)
        for i in range(bits.size):
            large[i] = bits[i] & _MAGNITUDE >= least
        large[bits.size :] = 0
        for word in range(words.size):
            if words[word]:
                # Without a branch for each: which of them are large cannot be foreseen.
                for i in range(word * _WORD, (word + 1) * _WORD):
                    places[count] = at + i
                    count += large[i]
    return count
