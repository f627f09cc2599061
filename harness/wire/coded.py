"""What a coded vector is, and what a payload says once it is read: the words that all codecs share.

A coded vector can be cut anywhere, and each chunk is coded by itself, so that no message needs another to be read. What
a code leaves open of the number behind it is public too: `Decoded.error`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from harness.wire.message import WireError

Float32: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]


class Part(NamedTuple):
    """A chunk of a coded vector, as a message carries it."""

    codec: str
    params: dict[str, Any]
    payload: Any
    """Any buffer; one that the sender still needs is read-only."""


class Coded(Protocol):
    """A flat vector in the code in which it is sent."""

    @property
    def codec(self) -> str:
        """Its name: a key of `harness.wire.codec.READERS`."""

    @property
    def size(self) -> int:
        """Elements."""

    def values(self) -> Float32:
        """What a reader makes of it: float32, shape (elements,)."""

    def part(self, at: int, count: int) -> Part:
        """Elements `at` to `at + count`."""


class Decoded:
    """What a payload says of its elements."""

    def __init__(self, values: Float32, sent: Mask | None = None, error: Callable[[], Float32] | None = None) -> None:
        """`error` makes what the property gives; as often as not nobody asks, and it takes longer than the values."""
        self.values = values
        """Writable, and shared with nobody, but for a `dense` payload's; 0 where nothing was sent."""
        self.sent = sent
        """Which elements were sent; None: all."""
        self._error = error

    @functools.cached_property
    def error(self) -> Float32 | None:
        """Largest distance of the number that was coded from its value, infinite where the code does not limit it.

        None: 0 everywhere. Of elements that were not sent the code says nothing, and this is infinite. To be asked for
        before the values are written to.
        """
        return None if self._error is None else self._error()


def expect_size(codec: str, got: int, wanted: int) -> None:
    """Raises: WireError."""
    if got != wanted:
        raise WireError(f"{codec}: wanted {wanted} bytes of payload, got {got}")


@dataclasses.dataclass(frozen=True, slots=True)
class Defended:
    """A coded vector that says which chain of defenses made it: configuration is public."""

    coded: Coded
    defense: str

    @property
    def codec(self) -> str:
        return self.coded.codec

    @property
    def size(self) -> int:
        return self.coded.size

    def values(self) -> Float32:
        return self.coded.values()

    def part(self, at: int, count: int) -> Part:
        codec, params, payload = self.coded.part(at, count)
        return Part(codec, params | {"defense": self.defense}, payload)
