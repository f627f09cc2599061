"""What the defenses that send whole levels share: units for segments, rounding, and what a code lost.

Knows numbers and segments; nothing of why a unit was chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from harness.errors import DefenseError
from harness.wire.coded import Float32

_LONG = 1 << 12
"""Elements of a segment, in the mean, from which on they are long."""
_BLOCK = 1 << 16
"""Elements worked on at a time, so that what lies between stays in the cache."""


def borders(sizes: Sequence[int], bucket: int | None = None) -> np.ndarray:
    """Where segments begin and the last ends: one for each tensor, or for each `bucket` elements of one."""
    cut, at = [0], 0
    for size in sizes:
        cut += range(at + bucket, at + size, bucket) if bucket else []
        at += size
        if size:
            cut.append(at)
    return np.array(cut, np.int64)


def by_segment(reduce: np.ufunc, values: Float32, cut: np.ndarray) -> np.ndarray:
    """A number for each segment, e.g. its sum for `np.add`."""
    if len(cut) == 1:
        return np.zeros(0, np.float32)
    if cut[-1] > _LONG * len(cut):  # one by one, as `reduceat` takes no part of what makes `reduce` quick
        return np.array([reduce.reduce(values[begin:end]) for begin, end in itertools.pairwise(cut)], np.float32)
    exact = np.float64 if reduce is np.add else None  # it adds one after the other
    return np.asarray(reduce.reduceat(values, cut[:-1], dtype=exact))


def round_levels(
    values: Float32, cut: np.ndarray, units: Float32, most: int, generator: torch.Generator | None
) -> np.ndarray:
    """int8 levels of `values` in their segments' units, at most `most` in magnitude.

    Args:
        generator: rounds down or up by chance, so that the expectation is the value; None: to the nearest.
    """
    levels = np.empty(values.size, np.int8)
    with np.errstate(divide="ignore"):
        inverse = np.where(units > 0, 1 / units, np.float32(0)).astype(np.float32)
    for begin, end, factor in zip(cut[:-1], cut[1:], inverse, strict=True):
        for at in range(begin, end, _BLOCK):
            block = slice(at, min(at + _BLOCK, end))
            scaled = values[block] * factor
            if generator is None:
                np.rint(scaled, out=scaled)
            else:
                scaled += torch.empty(scaled.size).uniform_(generator=generator).numpy()
                np.floor(scaled, out=scaled)
            levels[block] = np.clip(scaled, -most, most, out=scaled)
    return levels


def as_finite(gradient: Tensor, defense: str) -> Float32:
    """The gradient as an array. Raises: DefenseError, as levels cannot say what is not a number."""
    # Not a number goes into either end; a mask of all elements would cost as much as the rounding.
    if gradient.numel() and not torch.stack(torch.aminmax(gradient)).isfinite().all():
        raise DefenseError(f"{defense}: the gradient is not finite; the training diverged: lower the learning rate")
    return gradient.numpy()
