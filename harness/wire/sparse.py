"""The elements that were sent, and where they belong; nothing of the others.

    params   {"index": "mask" | "u16" | "u32", "kept": elements}
    payload  places, then `kept` little-endian float32 in ascending order of their places
    places   mask: a bit for each element of the chunk, the lowest bit of a byte first;
             u16, u32: little-endian, ascending, counted from the chunk's first element

Whichever is shortest: a mask above one element in 16, or in 32 where the chunk has more than 65,536.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.wire.coded import Decoded, Float32, Mask, Part, expect_size
from harness.wire.message import WireError

_PLACES = {"u16": "<u2", "u32": "<u4"}


@dataclasses.dataclass(frozen=True, slots=True)
class Sparse:
    """A vector of `size` elements, all but those at `places` not sent."""

    size: int
    places: npt.NDArray[np.int64]
    """Ascending."""
    numbers: Float32
    """At these places."""

    @classmethod
    def of(cls, size: int, sent: Iterable[tuple[npt.NDArray[np.int64], Float32]]) -> Sparse:
        """From the places and numbers of one part of the vector after the other."""
        places, numbers = zip((np.empty(0, np.int64), np.empty(0, np.float32)), *sent, strict=True)
        return cls(size, np.concatenate(places), np.concatenate(numbers))

    @property
    def codec(self) -> str:
        return "sparse"

    def values(self) -> Float32:
        values = np.zeros(self.size, np.float32)
        values[self.places] = self.numbers
        return values

    def part(self, at: int, count: int) -> Part:
        begin, end = np.searchsorted(self.places, (at, at + count))
        places, numbers = self.places[begin:end] - at, self.numbers[begin:end]
        short = "u16" if count <= 1 << 16 else "u32"
        if places.size * np.dtype(_PLACES[short]).itemsize < -(-count // 8):
            index, coded = short, places.astype(_PLACES[short]).tobytes()
        else:
            mask = np.zeros(count, np.bool_)
            mask[places] = True
            index, coded = "mask", np.packbits(mask, bitorder="little").tobytes()
        return Part("sparse", {"index": index, "kept": int(places.size)}, coded + numbers.astype("<f4").tobytes())


def read(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """Raises: WireError, for places that are not ascending, or beyond the chunk."""
    index, kept = params.get("index"), params.get("kept")
    if type(kept) is not int or not 0 <= kept <= count:
        raise WireError(f"sparse: wanted 0 to {count} elements kept, got {kept!r:.40}")
    if index == "mask":
        length = -(-count // 8)
        expect_size("sparse", len(payload), length + 4 * kept)
        bits = np.unpackbits(np.frombuffer(payload, np.uint8, length), bitorder="little")
        if (found := np.count_nonzero(bits)) != kept or bits[count:].any():
            raise WireError(f"sparse: wanted {kept} bits of {count} set, got {found}")
        sent: Mask = bits[:count].view(np.bool_)
        # By their places: several times as fast as by the mask, where that is full of holes.
        places = np.flatnonzero(sent)
    elif index in _PLACES:
        length = kept * np.dtype(_PLACES[index]).itemsize
        expect_size("sparse", len(payload), length + 4 * kept)
        places = np.frombuffer(payload, _PLACES[index], kept).astype(np.int64)
        if kept and (places[-1] >= count or (places[1:] <= places[:-1]).any()):
            raise WireError(f"sparse: wanted ascending places below {count}, got others")
        sent = np.zeros(count, np.bool_)
        sent[places] = True
    else:
        raise WireError(f"sparse: wanted places as mask, {' or '.join(_PLACES)}, got {index!r:.40}")
    values = np.zeros(count, np.float32)
    values[places] = np.frombuffer(payload, "<f4", offset=length)
    return Decoded(values, sent=sent, error=lambda: np.where(sent, np.float32(0), np.float32(np.inf)))
