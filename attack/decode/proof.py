"""The chunks of one step -> what they prove of each rank's gradient, and of the average.

An element is RAW only if it was on the wire, at a place that is believed. It is DIFFERENCED where a rank serves a
shard, so that its own part of it was never sent. Where the average and the parts disagree, the average is not known.
Knows places and values; which messages may be believed is decided before.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attack.capture.streams import Flow
from attack.decode.assembly import Assembly, RankGradient
from attack.decode.averages import Float32, average, difference, same
from attack.decode.notes import Notes
from attack.decode.vector import Mask, Piece, Place, Vector
from attack.observation import Known


class StepChunks:
    """What was seen of one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.gradients: dict[int, Vector] = {}
        """By rank."""
        self.unit: float | None = None
        """Of masked gradients: nothing is known of a rank's, and the average is within half of it."""
        self.defense: str | None = None
        """The chain that ends in masks."""
        self.taken: set[tuple[int, ...]] = set()
        """The ranks over which averages say that they were taken."""
        self.averages = Vector()
        """Each piece's tag is the rank that answered."""
        self.named: dict[Place, set[Flow]] = {}
        """The flows that named each place: what one rank sends, the answer to it and all other ranks' parts repeat."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Over which the average of masked gradients was taken; none where that is not certain."""
        return next(iter(self.taken)) if len(self.taken) == 1 else ()

    @property
    def bytes(self) -> int:
        """Size of what it holds."""
        return self.averages.bytes + sum(vector.bytes for vector in self.gradients.values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodedStep:
    """One step, when nothing more will be said of it."""

    step: int
    gradients: dict[int, RankGradient]
    """By rank: every rank of the run where its size is known, else those that were seen."""
    average: Float32 | None
    """The averaged gradient, where all of it is known."""
    mean: RankGradient | None = None
    """Where ranks sent masked gradients: all that was seen is their mean, as far as that was."""
    ranks: tuple[int, ...] = ()
    """Over which it was taken."""


def prove(chunks: StepChunks, believed: set[Place], *, world_size: int | None, total: int, notes: Notes) -> DecodedStep:
    """What the chunks at the places that are believed prove together.

    Args:
        world_size: ranks of the run; where None, nothing is concluded from several ranks' parts.
        total: elements of a gradient.
    """
    ranks = range(world_size) if world_size is not None else sorted(chunks.gradients)
    gradients = {rank: Assembly(total) for rank in ranks}
    for rank, assembly in gradients.items():
        for piece in chunks.gradients.get(rank, Vector()):
            if piece.place in believed:
                assembly.place(piece)
    vectors = [chunks.gradients.get(rank, Vector()) for rank in range(world_size or 0)]
    mean = _average(chunks, believed, vectors, Assembly(total), notes)
    for answer in chunks.averages:
        if answer.place in believed:
            _fill_in_owner(answer, vectors, gradients)
    average = mean.values if mean.known.all() else None
    if chunks.unit is not None:
        return DecodedStep(
            step=chunks.step, gradients={}, average=average, mean=_mean(chunks, mean), ranks=chunks.ranks
        )
    return DecodedStep(
        step=chunks.step,
        gradients={rank: assembly.gradient() for rank, assembly in gradients.items()},
        average=average,
    )


def _mean(chunks: StepChunks, mean: Assembly) -> RankGradient:
    """Of masked gradients. It was rounded twice: each part to the fixed point, and the sum of these to float32."""
    assert chunks.unit is not None
    bound = np.abs(mean.values) * np.float32(2.0**-23) + np.float32(0.5 * chunks.unit * (1 + 2.0**-20))
    known = np.where(mean.known == Known.UNKNOWN, Known.UNKNOWN, Known.DIFFERENCED).astype(np.uint8)
    return RankGradient(values=mean.values.copy(), known=known, bound=bound, defense=chunks.defense)


def _average(chunks: StepChunks, believed: set[Place], vectors: list[Vector], mean: Assembly, notes: Notes) -> Assembly:
    """The averaged gradient: as answered, or computed where all parts are known; unknown where the two differ."""
    for place in sorted(believed):
        answer = chunks.averages.get(place)
        parts = [part for vector in vectors if (part := vector.get(place)) is not None]
        if answer is not None:
            mean.place(answer)
        if not parts or len(parts) < len(vectors):
            continue
        computed, known = average([part.values for part in parts]), _common(parts)
        if answer is not None and (~same(computed, answer.values) & known & _common([answer])).any():
            mean.forget(place)
            notes.add(f"step {chunks.step}, {place}: the average is not that of the ranks' parts: not believed")
        else:
            mean.fill(place, computed, known)
    return mean


def _fill_in_owner(answer: Piece, vectors: list[Vector], gradients: dict[int, Assembly]) -> None:
    """A rank that serves a shard does not send its own part of it: that is the average less all other parts."""
    owner, place = answer.tag, answer.place
    if not isinstance(owner, int) or not 0 <= owner < len(vectors) or vectors[owner].overlaps(place):
        return
    pieces = [None if rank == owner else vector.get(place) for rank, vector in enumerate(vectors)]
    others = [piece for piece in pieces if piece is not None]
    if len(others) == len(vectors) - 1:
        parts = [piece if piece is None else piece.values for piece in pieces]
        gradients[owner].place_difference(place, difference(answer.values, parts), _common([answer, *others]))
        if any(piece.codec != "dense" for piece in others):
            gradients[owner].unlimited(place)


def _common(pieces: list[Piece]) -> Mask:
    """The elements that all of them know."""
    known = np.ones(pieces[0].place.size, np.bool_)
    for piece in pieces:
        if piece.known is not None:
            known &= piece.known
    return known
