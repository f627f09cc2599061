"""Every element by itself: float32, or rounded to a float of two bytes.

    dense        little-endian float32
    fp16, bf16   little-endian, IEEE 754 binary16; or the upper half of a float32

A number that is coded as v lies within half of v's spacing: half a unit in the last place, of the power of two above
it where v is one. Beyond fp16's largest number, 65504, v is infinite and limits nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harness.wire.coded import Decoded, Float32, Part, expect_size

_SIGNIFICANT_BITS = {"fp16": 11, "bf16": 8}
_SMALLEST_STEP = {"fp16": 2.0**-24, "bf16": 2.0**-133}
"""Between subnormal numbers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """float32, as it is."""

    numbers: Float32

    @property
    def codec(self) -> str:
        return "dense"

    @property
    def size(self) -> int:
        return self.numbers.size

    def values(self) -> Float32:
        return self.numbers

    def part(self, at: int, count: int) -> Part:
        payload = self.numbers[at : at + count]
        payload.flags.writeable = False  # the sender's
        return Part("dense", {}, payload)


@dataclasses.dataclass(frozen=True, slots=True)
class Half:
    """Floats of two bytes."""

    codec: str
    """`fp16` or `bf16`."""
    bits: npt.NDArray[np.uint16]

    @property
    def size(self) -> int:
        return self.bits.size

    def values(self) -> Float32:
        return _widen(self.codec, self.bits)

    def part(self, at: int, count: int) -> Part:
        payload = self.bits[at : at + count]
        payload.flags.writeable = False
        return Part(self.codec, {}, payload)


def read_float32(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """A view of the payload where it is aligned, as small frames lie anywhere in libzmq's own buffer."""
    expect_size("dense", len(payload), 4 * count)
    values = np.frombuffer(payload, "<f4")
    return Decoded(values if values.flags.aligned else values.copy())


def read_fp16(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """See the file's docstring."""
    return _read("fp16", count, payload)


def read_bf16(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """See the file's docstring."""
    return _read("bf16", count, payload)


def _read(codec: str, count: int, payload: memoryview) -> Decoded:
    expect_size(codec, len(payload), 2 * count)
    values = _widen(codec, np.frombuffer(payload, "<u2"))
    return Decoded(values, error=lambda: _half_of_spacing(codec, values))


def _half_of_spacing(codec: str, values: Float32) -> Float32:
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(values)
        step = np.where(values == 0, np.float32(0), np.ldexp(np.float32(1), exponent - _SIGNIFICANT_BITS[codec]))
        error = np.maximum(step, np.float32(_SMALLEST_STEP[codec])) / np.float32(2)
    return np.where(np.isfinite(values), error, np.float32(np.inf))


def _widen(codec: str, bits: npt.NDArray[np.uint16]) -> Float32:
    if codec == "fp16":
        half = bits.view(np.float16)
        # torch widens in vectors, numpy one by one: a fifth of the time.
        return torch.from_numpy(half if half.flags.writeable else half.copy()).float().numpy()
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
