"""A ring's partial sums -> what one rank added, with how far off that can be.

A rank computes after = round(own + before). Both sums are on the wire, so own is within half a unit in the last place
of `after` around after - before; what no rank added to before is on the wire as it is. DDP divides by the number of
ranks first: that is undone here, and its rounding is in the bound. Knows numbers alone.
"""

from __future__ import annotations

import enum
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from attack.decode.gloo.formats import FLOAT32, FLOAT64, Float, Format
from attack.observation import Known

Mask: TypeAlias = npt.NDArray[np.uint8]

_BLOCK: Final = 1 << 15
"""Elements worked on at a time: what lies between stays in the cache."""


class Sending(enum.Enum):
    """What a rank does to its gradient before it adds it."""

    PLAIN = enum.auto()
    DIVIDED = enum.auto()
    """By the number of ranks: multiplied by the rounded 1/world (DDP), or divided (DDP, gradients as bucket views)."""
    CAST = enum.auto()
    """Rounded to the format of the wire, then divided there by the number of ranks (DDP's fp16 and bf16 hooks)."""


class Rule(NamedTuple):
    """How a job sends its gradients."""

    format: Format
    sending: Sending
    world: int


class _Arithmetic(NamedTuple):
    """Of a container."""

    like: Format
    bits: Any
    exponent: Any
    """Mask of the exponent's bits."""


_ARITHMETIC: Final = {
    FLOAT32.container: _Arithmetic(FLOAT32, np.uint32, np.uint32(0x7F80_0000)),
    FLOAT64.container: _Arithmetic(FLOAT64, np.uint64, np.uint64(0x7FF0_0000_0000_0000)),
}


def own_part(after: Float, before: Float | None, rule: Rule, value: Float, known: Mask, bound: Float) -> None:
    """What a rank added to `before` (None: it was the first) to get `after`, into `value`, `known` and `bound`.

    Those may be wider than the format's container. An element whose sums are not finite stays unknown: there is nothing
    to be computed from them.
    """
    with np.errstate(all="ignore"):
        if before is None and rule.sending is Sending.PLAIN:
            value[:], known[:], bound[:] = after, Known.RAW, 0
            return
        for at in range(0, len(after), _BLOCK):
            where = slice(at, at + _BLOCK)
            cut = after[where], None if before is None else before[where]
            if value.dtype == rule.format.container:
                _own_part(*cut, rule, value[where], known[where], bound[where])
            else:
                narrow = np.empty_like(after[where]), np.empty_like(after[where])
                _own_part(*cut, rule, narrow[0], known[where], narrow[1])
                value[where], bound[where] = narrow


def _own_part(after: Float, before: Float | None, rule: Rule, value: Float, known: Mask, bound: Float) -> None:
    fmt, container = rule.format, _ARITHMETIC[rule.format.container].like
    number = fmt.container
    scale = number(1) if rule.sending is Sending.PLAIN else number(rule.world)
    exactly_scaled = rule.sending is Sending.PLAIN or (
        rule.sending is Sending.DIVIDED and rule.world & (rule.world - 1) == 0
    )
    limit = number(np.finfo(number).max / 4)  # of sizes that no factor here brings to overflow
    limit *= number(2.0**-container.digits) / scale
    if before is None:
        value[:] = after
        bound.fill(0)
        known.fill(Known.RAW if exactly_scaled else Known.DIFFERENCED)
        size = np.abs(after)
        if exactly_scaled and not size.min() > fmt.smallest_normal:
            # A quotient that is not a normal number has lost its last digits; a zero may have been more than that.
            small = size <= number(fmt.smallest_normal)
            known[small] = Known.DIFFERENCED
            bound[small] = scale * number(fmt.smallest)
        ordinary = size.max() < limit
    else:
        np.subtract(after, before, out=value)
        _add_half_ulps(after, value, fmt, bound)
        ordinary = bound.max() * number(2.0 ** (container.digits + 1)) < limit  # at least the size of both sums
        if exactly_scaled:
            # Twice the smallest number covers what a quotient that is not normal lost; the last factor, these sums.
            bound += number(2 * fmt.smallest)
            bound *= scale * number(1 + 2.0 ** (3 - container.digits))
        known.fill(Known.DIFFERENCED)
    if not exactly_scaled:
        _add_rounding(np.abs(value), rule, bound)
    if scale != 1:
        value *= scale
    if not ordinary:
        valid = np.isfinite(value) & np.isfinite(bound)
        known[~valid], value[~valid], bound[~valid] = Known.UNKNOWN, 0, 0


def _add_rounding(size: Float, rule: Rule, bound: Float) -> None:
    """The bound of world * x, from the bound of x: what the division, and the product just computed, rounded away.

    With u = 2**-digits, the division moves x by at most u|x|; where 1/world was rounded itself, by as much again. A
    cast before it moves the gradient by u of its own. The product in the container adds half a unit of its own. `size`
    + `bound` is at least |x|, and the factors of 1.01 cover the terms of second order for u <= 2**-8.
    """
    fmt, container = rule.format, _ARITHMETIC[rule.format.container].like
    unit = 2.0**-fmt.digits
    relative = (2 * unit + 2.0**-container.digits) * 1.01
    bound += size.dtype.type(relative) * (size + bound) + size.dtype.type(2 * fmt.smallest + 2 * container.smallest)
    bound *= size.dtype.type(rule.world * (1.01 if fmt is not container else 1 + 2.0**-20))


def _add_half_ulps(after: Float, value: Float, fmt: Format, bound: Float) -> None:
    """Into `bound`: half a unit in the last place of `after` in its format, and of `value` in its container, or more.

    Not finite where one of them is not.
    """
    like, bits, exponent = _ARITHMETIC[fmt.container]
    np.bitwise_and(after.view(bits), exponent, out=bound.view(bits))  # the powers of two below them
    if fmt is not like:
        bound *= fmt.container(2.0 ** (like.digits - fmt.digits))
    bound += (value.view(bits) & exponent).view(fmt.container)
    bound *= fmt.container(2.0**-like.digits)
    # A format's smallest numbers are evenly spaced; a container has no number for half of its own, so take it whole.
    bound += fmt.container(max(fmt.smallest / 2, like.smallest) + 2 * like.smallest)
