"""Number formats that Gloo sums, and which of them two partial sums can be.

Nothing on the wire says what the bytes are. How many there are for each element gives the width, and what is left to
choose between, rounding decides: a sum that came out much smaller than one of its parts was not rounded at all, so its
last digits are those of that part. In another format's reading they are not. Knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float: TypeAlias = npt.NDArray[Any]
"""float32, or float64."""

_ENOUGH: Final = 20
"""Zeros that must not be chance: they would be, once in 2**20."""


class Format(NamedTuple):
    """A number format of the wire. Gloo adds two numbers exactly, then rounds to nearest even (gloo/math.h, and
    c10::Half and c10::BFloat16 by way of float32, which is the same: float32 has more than twice their digits)."""

    name: str
    bytes: int
    digits: int
    """Binary digits, the leading one included."""
    lowest: int
    """Exponent of the smallest positive number."""
    container: type[np.float32] | type[np.float64]
    """What its numbers are computed with: float32, or float64; all of them are numbers there too."""

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return 2.0**self.lowest

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all digits."""
        return 2.0 ** (self.lowest + self.digits - 1)


FLOAT64: Final = Format("float64", 8, 53, -1074, np.float64)
FLOAT32: Final = Format("float32", 4, 24, -149, np.float32)
FLOAT16: Final = Format("float16", 2, 11, -24, np.float32)
BFLOAT16: Final = Format("bfloat16", 2, 8, -133, np.float32)
FORMATS: Final = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
WIDTHS: Final = (4, 8, 2)
"""Bytes of an element, the usual ones first."""


def numbers(payload: memoryview, fmt: Format) -> Float:
    """A payload as its format's container, exactly; a view of it where it is that already."""
    match fmt.name:
        case "float64":
            return np.frombuffer(payload, "<f8")
        case "float32":
            return np.frombuffer(payload, "<f4")
        case "float16":
            return np.frombuffer(payload, "<f2").astype(np.float32)
    return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)


def tell_format(width: int, sums: Iterable[tuple[memoryview, memoryview]]) -> Format | None:
    """The format of so many bytes that partial sums are in; None where none fits, or more than one may.

    Args:
        width: bytes of an element.
        sums: payloads of the same elements, before a rank added its own to them, and after. Read until it is enough.
    """
    candidates = {fmt: 0 for fmt in FORMATS if fmt.bytes == width}
    for before, after in sums:
        for fmt in list(candidates):
            zeros = _zeros(numbers(before, fmt), numbers(after, fmt), fmt)
            if zeros is None:
                del candidates[fmt]
            else:
                candidates[fmt] += zeros
        if len(candidates) < 2 and all(zeros >= _ENOUGH for zeros in candidates.values()):
            break
    if len(candidates) == 1:
        return next(iter(candidates))
    sure = [fmt for fmt, zeros in candidates.items() if zeros >= _ENOUGH]
    return sure[0] if len(sure) == 1 else None


def _zeros(before: Float, after: Float, fmt: Format) -> int | None:
    """How many of the last digits of `after` had to be zero, and were; None where one was not.

    Where |after| is at most a quarter of |before|, the number that was added is at least half of |before|. So both are
    multiples of half a unit in the last place of `before`, and so is their sum, which therefore was not rounded.
    """
    with np.errstate(all="ignore"):
        large, small = np.abs(before), np.abs(after)
        tested = (small <= large / 4) & (small > 0) & np.isfinite(large)
        large, small = large[tested].astype(np.float64), small[tested].astype(np.float64)
    grain = np.maximum(_exponent(large) - fmt.digits, fmt.lowest)
    spacing = np.maximum(_exponent(small) - fmt.digits + 1, fmt.lowest)
    # In two steps: 2**-grain alone may be more than a float64 holds.
    scaled = np.ldexp(np.ldexp(small, -(grain // 2)), -(grain - grain // 2))
    if (scaled != np.floor(scaled)).any():
        return None
    return int((grain - spacing).clip(0).sum())


def _exponent(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Of the leading digit."""
    return np.asarray(np.frexp(values)[1] - 1, np.int32)
