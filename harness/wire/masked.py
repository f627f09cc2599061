"""Fixed-point numbers under masks: of each rank's alone they say nothing, of all ranks' sum they say all.

params   {"unit": the value of 1, a power of two}
payload  little-endian u32, to be added modulo 2**32; the sum, read as i32, counts units
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.wire.coded import Decoded, Float32, Part, expect_size
from harness.wire.message import WireError

Words: TypeAlias = npt.NDArray[np.uint32]


@dataclasses.dataclass(frozen=True, slots=True)
class Masked:
    """A vector of masked words."""

    words: Words
    unit: float

    @property
    def codec(self) -> str:
        return "masked"

    @property
    def size(self) -> int:
        return self.words.size

    def values(self) -> Float32:
        """What a reader makes of it by itself: nothing."""
        return np.zeros(self.size, np.float32)

    def part(self, at: int, count: int) -> Part:
        payload = self.words[at : at + count].view()
        payload.flags.writeable = False  # the sender's
        return Part("masked", {"unit": self.unit}, payload)


def read(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """Nothing is known of any element. Raises: WireError."""
    read_words(count, params, payload)
    return Decoded(
        np.zeros(count, np.float32), sent=np.zeros(count, np.bool_), error=lambda: np.full(count, np.inf, np.float32)
    )


def read_words(count: int, params: Mapping[str, Any], payload: Any) -> tuple[Words, float]:
    """The words, a view of the payload where it is aligned, and their unit. Raises: WireError."""
    unit = params.get("unit")
    if type(unit) is not float or not 0 < unit < float("inf"):
        raise WireError(f"masked: wanted a unit of more than 0, got {unit!r:.40}")
    expect_size("masked", memoryview(payload).nbytes, 4 * count)
    words = np.frombuffer(payload, "<u4")
    return words if words.flags.aligned else words.copy(), unit


def average_of(total: Words, unit: float, ranks: int) -> Float32:
    """The mean that a sum over so many ranks says, rounded once."""
    return (total.view(np.int32) * np.float64(unit / ranks)).astype(np.float32)
