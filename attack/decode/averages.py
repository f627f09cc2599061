"""The server's arithmetic, forwards to the bit and backwards with a bound.

Forwards: parts are added in rank order in float32, and the sum is divided by the number of ranks in float32. Backwards:
the part that was never sent, from the average and all others, and how far from it the answer can be at most. Knows
numbers alone; nothing of chunks, steps or how the numbers were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

_BLOCK = 1 << 14
"""Elements worked on at a time: the intermediate float64 vectors stay in the cache, which doubles the speed."""
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def average(parts: Sequence[Float32]) -> Float32:
    """What the server answers to these parts, one of each rank in rank order; the same bits."""
    with np.errstate(all="ignore"):  # a training run that diverges is not an error of ours
        return np.divide(added(parts), np.float32(len(parts)))


def added(parts: Sequence[Float32]) -> Float32:
    """The server's sum so far: in this order, in float32."""
    total = parts[0]
    for part in parts[1:]:
        total = np.add(total, part, out=None if total is parts[0] else total)
    return total


def same(left: Float32, right: Float32) -> npt.NDArray[np.bool_]:
    """Where two vectors have the same bits, or are both not a number (which one, the processor chooses)."""
    equal: npt.NDArray[np.bool_] = left.view(np.uint32) == right.view(np.uint32)
    return equal if equal.all() else equal | (np.isnan(left) & np.isnan(right))


class Difference(NamedTuple):
    """One rank's part, computed from the others'. Where `valid` is False the other two mean nothing."""

    value: Float32
    bound: Float32
    """The part is within `value` - `bound` to `value` + `bound`, both included."""
    valid: npt.NDArray[np.bool_]


def difference(mean: Float32, parts: Sequence[Float32 | None]) -> Difference:
    """The part of the one rank whose entry in `parts` is None.

    With P_j the server's sum after rank j, S = P_(W-1) and k the missing rank: P_(k-1) is known to the bit. S is within
    half a unit in the last place of W * mean, and each step back, P_(j-1) = P_j - g_j, and the last, g_k = P_k -
    P_(k-1), adds half a unit in the last place of the sum that was rounded. All of this is done in float64 (W * mean is
    exact there), whose own roundings are in the bound too. An average that is not finite says nothing.
    """
    blocks = [
        _difference(mean[at : at + _BLOCK], [part if part is None else part[at : at + _BLOCK] for part in parts])
        for at in range(0, len(mean), _BLOCK)
    ]
    if len(blocks) == 1:
        return blocks[0]
    return Difference(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def _difference(mean: Float32, parts: Sequence[Float32 | None]) -> Difference:
    world = len(parts)
    missing = next(rank for rank, part in enumerate(parts) if part is None)
    with np.errstate(all="ignore"):
        center = mean.astype(np.float64) * world
        radius = _half_ulp(np.abs(center) / world) * world
        if world & (world - 1) == 0:  # exact above the subnormal numbers
            radius = np.where(np.abs(mean) > _SMALLEST_NORMAL, 0.0, radius)
        for part in reversed(parts[missing + 1 :]):
            center, radius = _step_back(center, radius, part)
        before = [part for part in parts[:missing] if part is not None]
        if before:
            center, radius = _step_back(center, radius, added(before))
        value = center.astype(np.float32)
        radius = radius + np.abs(value.astype(np.float64) - center)
        # The sums above round at most a few times 2^-53 of the radius away; then up to the next float32, whose bits are
        # the next integer. What is not finite anywhere above ends up in the bound.
        bound = (radius * (1 + 2.0**-40)).astype(np.float32)
        bound.view(np.uint32)[:] += 1
        return Difference(value, bound, np.isfinite(bound))


def _step_back(center: Float64, radius: Float64, part: Float32 | None) -> tuple[Float64, Float64]:
    """An enclosure of x, from one of fl(x + part)."""
    assert part is not None, "only one part may be missing"
    before = center - part
    return before, radius + _half_ulp(np.abs(center) + radius) + np.abs(before) * 2.0**-52


def _half_ulp(largest: Float64) -> Float64:
    """What rounding a result of at most this magnitude to float32 can move it: the power of two below, times 2^-24.

    Below the normal numbers float32 is spaced evenly, by 2^-149.
    """
    power: Float64 = (largest.view(np.uint64) & np.uint64(0x7FF0_0000_0000_0000)).view(np.float64)
    return np.maximum(power * 2.0**-24, 2.0**-150)
