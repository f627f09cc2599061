"""A flat vector with its mask, as it is put together from pieces of several kinds.

Knows how an element came to be known; nothing of messages, ranks or steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from attack.decode.averages import Difference, Float32
from attack.decode.vector import Mask, Piece, Place
from attack.observation import Known


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankGradient:
    """What is known of one rank's gradient at one step."""

    values: Float32
    known: npt.NDArray[np.uint8]
    """A `Known` for each element."""
    bound: Float32 | None
    """Largest error of each DIFFERENCED or CODED element; None where there is none."""
    defense: str | None
    """The chain of defenses that made it, where the wire says so."""
    sent: Mask | None = None
    """Of a code: which elements the sender did not leave out."""


class Assembly:
    """A flat vector with its mask, as it is put together."""

    def __init__(self, total: int) -> None:
        self.values: Float32 = np.zeros(total, np.float32)
        self.known = np.zeros(total, np.uint8)
        self.bound: Float32 | None = None
        self.defense: str | None = None
        self.sent: Mask | None = None

    def gradient(self) -> RankGradient:
        """What it is by now; the arrays are shared, not copied."""
        return RankGradient(
            values=self.values, known=self.known, bound=self.bound, defense=self.defense, sent=self.sent
        )

    def place(self, piece: Piece) -> None:
        """Elements that were on the wire."""
        self.defense = piece.tag if isinstance(piece.tag, str) else None
        self.fill(piece.place, piece.values, piece.known)
        if piece.codec != "dense":
            self._place_code(piece)

    def _place_code(self, piece: Piece) -> None:
        where, error = piece.place.where, piece.said.error
        if self.sent is None:
            self.sent = np.zeros(self.values.size, np.bool_)
        known = np.ones(piece.place.size, np.bool_) if piece.known is None else piece.known
        self.sent[where] = known if piece.said.sent is None else known & piece.said.sent
        if error is not None:
            bound = self._bounds()
            bound[where] = np.where(known, error, np.float32(0))
            self.known[where][known & (error > 0)] = Known.CODED

    def unlimited(self, place: Place) -> None:
        """Elements of what was sent in a code that is not known: the gradient's own may be anything."""
        known = self.known[place.where] != Known.UNKNOWN
        self._bounds()[place.where][known] = np.inf
        self.known[place.where][known] = Known.CODED

    def _bounds(self) -> Float32:
        if self.bound is None:
            self.bound = np.zeros(self.values.size, np.float32)  # zeros_like would write every page
        return self.bound

    def fill(self, place: Place, values: Float32, known: Mask | None) -> None:
        """Elements that are equal to the bit to what was sent, where `known`; None: all."""
        where = place.where
        if known is None or known.all():
            self.values[where] = values
            self.known[where] = Known.RAW
        else:
            self.values[where][known] = values[known]
            self.known[where][known] = Known.RAW

    def place_difference(self, place: Place, found: Difference, known: Mask) -> None:
        """Elements that were computed, where `known`."""
        bound, where = self._bounds(), place.where
        known = known & found.valid
        np.copyto(self.values[where], found.value, where=known)
        np.copyto(bound[where], found.bound, where=known)
        self.known[where][known] = Known.DIFFERENCED

    def forget(self, place: Place) -> None:
        """Elements that turned out not to be known."""
        self.values[place.where] = 0
        self.known[place.where] = Known.UNKNOWN
