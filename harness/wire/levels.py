"""Whole levels of a few bits, times a unit for each segment of the vector: int8, ternary, QSGD and signs.

    params   {"bits": 1 | 2 | 4 | 8, "rounding": "nearest" | "stochastic" | "clipped" | "sign"}
    payload  u32 segments; for each: u32 elements, float32 unit; then the levels, the lowest bits of a byte first
    level    8, 4, 2 bits: two's complement; 1 bit: 1 is +1, 0 is -1
    value    level * unit

What a level says of the number behind it: `nearest`, that it lies within half a unit; `stochastic`, within one;
`clipped`, as much, but that it may have been cut off before; `sign`, its sign alone. A segment is what shares a unit, a
tensor or a bucket of it, as far as it lies in the chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.wire.coded import Decoded, Float32, Part, expect_size
from harness.wire.message import WireError

BITS = (1, 2, 4, 8)
REACH = {"nearest": 0.5, "stochastic": 1.0, "clipped": np.inf, "sign": np.inf}
"""Units that a number may lie from its level."""
_SEGMENT = np.dtype([("elements", "<u4"), ("unit", "<f4")])


@dataclasses.dataclass(frozen=True, slots=True)
class Levels:
    """A vector of levels."""

    levels: npt.NDArray[np.int8]
    bits: int
    rounding: str
    borders: npt.NDArray[np.int64]
    """Where segments begin, and where the last ends: ascending, from 0, shape (segments + 1,)."""
    units: Float32
    """Shape (segments,)."""

    @property
    def codec(self) -> str:
        return "levels"

    @property
    def size(self) -> int:
        return self.levels.size

    def values(self) -> Float32:
        return _scaled(self.levels, self.units, np.diff(self.borders))

    def part(self, at: int, count: int) -> Part:
        first = int(self.borders.searchsorted(at, side="right")) - 1
        last = int(self.borders.searchsorted(at + count))
        inner = np.minimum(np.maximum(self.borders[first : last + 1], at), at + count)
        table = np.empty(last - first, _SEGMENT)
        table["elements"] = inner[1:] - inner[:-1]
        table["unit"] = self.units[first:last]
        table = table[table["elements"] > 0]
        packed = _pack(self.levels[at : at + count], self.bits)
        payload = b"".join((np.uint32(len(table)).astype("<u4").tobytes(), table.tobytes(), packed.data))
        return Part("levels", {"bits": self.bits, "rounding": self.rounding}, payload)


def read(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """Raises: WireError, for segments that do not make up the chunk, or units that are not numbers."""
    bits, rounding = params.get("bits"), params.get("rounding")
    if type(bits) is not int or bits not in BITS or rounding not in REACH:
        raise WireError(f"levels: wanted {BITS} bits and a rounding of {', '.join(REACH)}, got {bits!r}, {rounding!r}")
    segments = int.from_bytes(payload[:4], "little")
    begin = 4 + segments * _SEGMENT.itemsize
    expect_size("levels", len(payload), begin + -(-count * bits // 8))
    table = np.frombuffer(payload, _SEGMENT, segments, 4)
    units, lengths = table["unit"].astype(np.float32), table["elements"].astype(np.int64)
    if sum(lengths.tolist()) != count or not all(0 <= unit < np.inf for unit in units.tolist()):
        raise WireError(f"levels: wanted segments of {count} elements with units of 0 or more, got others")
    levels = _unpack(np.frombuffer(payload, np.uint8, offset=begin), bits, count)
    with np.errstate(all="ignore"):  # a unit that a sender made up
        values = _scaled(levels, units, lengths)

    def error() -> Float32:
        if not np.isfinite(REACH[rounding]):
            return np.full(count, np.inf, np.float32)
        # A level is the nearest as float32 tells: the quotient and the product are each rounded once.
        unit = np.repeat(units, lengths)
        return np.float32(REACH[rounding]) * unit + (np.abs(values) + unit) * np.float32(2.0**-22)

    return Decoded(values, error=error)


def _scaled(levels: npt.NDArray[np.int8], units: Float32, lengths: npt.NDArray[np.int64]) -> Float32:
    """Each level in its segment's unit."""
    return np.multiply(levels, units if len(units) == 1 else np.repeat(units, lengths), dtype=np.float32)


def _pack(levels: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return levels.view(np.uint8)
    if bits == 1:
        return np.packbits(levels > 0, bitorder="little")
    per_byte = 8 // bits
    codes = np.zeros(-(-levels.size // per_byte) * per_byte, np.uint8)
    np.bitwise_and(levels.view(np.uint8), np.uint8((1 << bits) - 1), out=codes[: levels.size])
    # The codes of one byte as one number, a byte each: shifted into the lowest.
    together = codes.view(f"<u{per_byte}")
    packed = together.copy()
    for place in range(1, per_byte):
        packed |= together >> together.dtype.type((8 - bits) * place)
    return packed.astype(np.uint8)


def _unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.int8]:
    if bits == 8:
        return packed.view(np.int8)
    return _table(bits).take(packed).view(np.int8)[:count]


@functools.cache
def _table(bits: int) -> npt.NDArray[np.unsignedinteger]:
    """The levels of each byte that there is, as one number: to look up a byte is quicker than to shift it."""
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    levels = 2 * codes - 1 if bits == 1 else codes - (codes >> bits - 1 << bits)
    return levels.astype(np.int8).view(f"<u{8 // bits}")[:, 0]
