"""Chunks become a vector; of two that contradict each other neither is believed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attack.capture.streams import Flow
from attack.decode.vector import Origin, Piece, Place, Vector
from harness.wire.coded import Decoded

FLOW = Flow(source="a", destination="b")


def piece(
    at: int, values: list[float], *, holes: tuple[tuple[int, int], ...] = (), tag: int = 0, begin: int = 0
) -> Piece:
    payload = bytearray(np.float32(values).tobytes())
    origin = Origin(FLOW, begin, begin + 100, begin + 100 + len(payload))
    said = Decoded(np.frombuffer(payload, "<f4"))
    return Piece(Place(at, at + len(values)), said, holes, tag, origin)


def known(vector: Vector) -> dict[int, float]:
    """Every element that is believed."""
    return {
        one.place.at + index: float(value)
        for one in vector
        for index, value in enumerate(one.values)
        if one.known is None or one.known[index]
    }


def test_pieces_in_any_order() -> None:
    for order in itertools.permutations([piece(0, [1, 2]), piece(2, [3]), piece(5, [6])]):
        vector = Vector()
        assert [vector.add(one) for one in order] == [None] * 3
        assert known(vector) == {0: 1, 1: 2, 2: 3, 5: 6}
        assert [one.place.at for one in vector] == [0, 2, 5]


@pytest.mark.parametrize(("hole", "gone"), [((0, 1), {0}), ((3, 5), {0, 1}), ((4, 8), {1}), ((11, 12), {2})])
def test_an_element_that_a_hole_touches_is_not_known(hole: tuple[int, int], gone: set[int]) -> None:
    vector = Vector()
    vector.add(piece(0, [1, 2, 3], holes=(hole,)))
    assert set(known(vector)) == {0, 1, 2} - gone


def test_copies_that_agree_fill_each_others_holes() -> None:
    vector = Vector()
    for holes in (((0, 8),), ((4, 12),), ((0, 4),)):
        assert vector.add(piece(0, [1, 2, 3], holes=holes)) is None
    assert known(vector) == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize(
    "other", [piece(0, [1, 9]), piece(0, [1, 2], tag=1), piece(1, [2]), piece(1, [2, 3]), piece(0, [1, 2, 3])]
)
def test_pieces_that_contradict_are_both_struck_out_for_good(other: Piece) -> None:
    vector = Vector()
    vector.add(piece(7, [8]))
    vector.add(piece(0, [1, 2]))
    assert vector.add(other) is not None
    assert vector.add(piece(0, [1, 2])) is not None
    assert known(vector) == {7: 8}
    assert vector.overlaps(Place(0, 1)) and not vector.overlaps(Place(3, 7))


def test_zero_and_minus_zero_contradict_and_not_a_number_agrees_with_itself() -> None:
    for one, other, agree in ((0.0, -0.0, False), (np.nan, np.nan, True)):
        vector = Vector()
        vector.add(piece(0, [one]))
        assert (vector.add(piece(0, [other])) is None) == agree


def test_doubt_reaches_only_what_was_built_from_the_bytes() -> None:
    vector = Vector()
    vector.add(piece(0, [1, 2, 3], begin=1000))
    vector.add(piece(3, [4, 5], begin=2000))
    assert not vector.doubt(FLOW, 1112, 2000) and not vector.doubt(FLOW.reverse, 0, 9999)
    assert vector.doubt(FLOW, 1104, 1105)
    assert known(vector) == {0: 1, 2: 3, 3: 4, 4: 5}
    assert vector.doubt(FLOW, 2050, 2051)  # in the header: the whole piece
    assert known(vector) == {0: 1, 2: 3}
