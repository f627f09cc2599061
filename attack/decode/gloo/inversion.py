"""A ring's partial sums -> what one rank added, with how far off that can be; float32 and float16.

A rank computes after = round(own + before). Both sums are on the wire, so own is within half a unit in the last place
of `after` around after - before; what no rank added to before is on the wire as it is. DDP divides by the number of
ranks first: that is undone here, and its rounding is in the bound. Knows numbers alone.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from attack.observation import Known

Float32: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.uint8]

_BLOCK: Final = 1 << 14
"""Elements worked on at a time: what lies between stays in the cache."""
_EXPONENT: Final = np.uint32(0x7F80_0000)
_TINY: Final = np.float32(np.finfo(np.float32).tiny)


class Format(NamedTuple):
    """A number format of the wire."""

    name: str
    bytes: int
    digits: int
    """Binary digits, the leading one included."""
    half_smallest: float
    """Half of the smallest positive number."""


FLOAT32: Final = Format("float32", 4, 24, 2.0**-150)
FLOAT16: Final = Format("float16", 2, 11, 2.0**-25)


class Sending(enum.Enum):
    """What a rank does to its gradient before it adds it."""

    PLAIN = enum.auto()
    DIVIDED = enum.auto()
    """By the number of ranks: multiplied by the float32 1/world (DDP), or divided (DDP, gradients as bucket views)."""
    CAST = enum.auto()
    """Rounded to the format of the wire, then divided there by the number of ranks (DDP's fp16 hook)."""


class Rule(NamedTuple):
    """How a job sends its gradients."""

    format: Format
    sending: Sending
    world: int


def numbers(payload: memoryview, fmt: Format) -> Float32:
    """A payload as float32, exactly; a view of it where it is that already."""
    if fmt is FLOAT32:
        return np.frombuffer(payload, "<f4")
    return np.frombuffer(payload, "<f2").astype(np.float32)


def looks_like_float16(payload: memoryview) -> bool:
    """Whether two-byte numbers are spread as gradients are, if they are float16.

    bfloat16 has the upper bits of float32: read as float16, all that is smaller than 2 and larger than 2**-31 has an
    exponent of 12 to 15. A guess, therefore, that errs towards no.
    """
    bits = np.frombuffer(payload, "<u2")
    exponents = (bits[bits & 0x7FFF != 0] >> 10) & 0x1F
    return bool(len(exponents)) and float(np.mean((exponents >= 12) & (exponents <= 15))) < 0.9


def own_part(after: Float32, before: Float32 | None, rule: Rule, value: Float32, known: Mask, bound: Float32) -> None:
    """What a rank added to `before` (None: it was the first) to get `after`, into `value`, `known` and `bound`.

    An element whose sums are not finite stays unknown: there is nothing to be computed from them.
    """
    with np.errstate(all="ignore"):
        if before is None and rule.sending is Sending.PLAIN:
            value[:], known[:], bound[:] = after, Known.RAW, 0
            return
        for at in range(0, len(after), _BLOCK):
            where = slice(at, at + _BLOCK)
            args = value[where], known[where], bound[where]
            _own_part(after[where], None if before is None else before[where], rule, *args)


def _own_part(after: Float32, before: Float32 | None, rule: Rule, value: Float32, known: Mask, bound: Float32) -> None:
    world = np.float32(rule.world)
    scale = np.float32(1) if rule.sending is Sending.PLAIN else world
    exactly_scaled = rule.sending is Sending.PLAIN or (
        rule.sending is Sending.DIVIDED and rule.world & (rule.world - 1) == 0
    )
    if before is None:
        value[:] = after
        bound.fill(0)
        known.fill(Known.RAW if exactly_scaled else Known.DIFFERENCED)
        if exactly_scaled and (small := np.abs(after) <= _TINY).any():
            # A quotient that is not a normal number has lost its last digits; a zero may have been more than that.
            known[small] = Known.DIFFERENCED
            bound[small] = scale * np.float32(2.0**-149)
    else:
        np.subtract(after, before, out=value)
        np.add(_half_ulp(after, rule.format), _half_ulp(value, FLOAT32), out=bound)
        known.fill(Known.DIFFERENCED)
        if exactly_scaled:
            # Twice the smallest number covers what a quotient that is not normal lost; the last factor, this sum.
            bound += np.float32(2.0**-148)
            bound *= scale * np.float32(1 + 2.0**-22)
    if not exactly_scaled:
        _add_rounding(np.abs(value), rule, bound)
    if scale != 1:
        value *= scale
    # A bound is finite only where both sums are; a product may overflow besides.
    if not (np.isfinite(value).all() and bound.max() < np.inf):
        valid = np.isfinite(value) & np.isfinite(bound)
        known[~valid], value[~valid], bound[~valid] = Known.UNKNOWN, 0, 0


def _add_rounding(size: Float32, rule: Rule, bound: Float32) -> None:
    """The bound of world * x, from the bound of x: what the division, and the product just computed, rounded away.

    With u = 2**-digits, the division moves x by at most u|x|; where 1/world was rounded itself, by as much again. A
    cast before it moves the gradient by u of its own. The product in float32 adds 2**-24. `size` + `bound` is at least
    |x|, and the factors of 1.01 cover the terms of second order for u <= 2**-11.
    """
    world, fmt = np.float32(rule.world), rule.format
    unit = 2.0**-fmt.digits
    relative = np.float32((2 * unit + 2.0**-24) * 1.01)
    bound += relative * (size + bound) + np.float32(4 * fmt.half_smallest + 2.0**-148)
    bound *= world * np.float32(1.01 if fmt is not FLOAT32 else 1 + 2.0**-20)


def _half_ulp(values: Float32, fmt: Format) -> Float32:
    """Half a unit in the last place of a format, or more."""
    power = (values.view(np.uint32) & _EXPONENT).view(np.float32)
    power *= np.float32(2.0**-fmt.digits)
    # A format's smallest numbers are evenly spaced; float32 has no number for half of its own, so take it whole.
    return np.maximum(power, np.float32(max(fmt.half_smallest, 2.0**-149)), out=power)
