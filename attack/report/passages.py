"""Sentences side by side with the truth, token for token, the differing ones marked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from harness.models import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A token as a person reads it."""

    text: str
    joined: bool
    """Whether it goes on the word before it."""
    same: bool
    """Whether the other side has it in the same place."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One sentence of a batch."""

    caption: str
    original: tuple[Piece, ...]
    found: tuple[Piece, ...]
    right: int
    """Tokens that are right, of ..."""
    tokens: int
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    label_ok: bool


def passage(
    caption: str, score: dict[str, Any], original: Sequence[int], found: Sequence[int], reader: Tokenizer | None
) -> Passage:
    """
    Args:
        score: the sentence's entry in an evaluation.
    """
    return Passage(
        caption=caption,
        original=_pieces(original, found, reader),
        found=_pieces(found, original, reader),
        **{name: score[name] for name in ("right", "tokens", "rouge1", "rouge2", "rougeL", "label_ok")},
    )


def _pieces(row: Sequence[int], other: Sequence[int], reader: Tokenizer | None) -> tuple[Piece, ...]:
    texts = [str(token) for token in row] if reader is None else reader.pieces(row)
    return tuple(
        Piece(
            # WordPiece marks what goes on a word, byte pairs what begins one.
            text=text.removeprefix("##").replace("Ġ", ""),
            joined=text.startswith("##"),
            same=place < len(other) and other[place] == row[place],
        )
        for place, text in enumerate(texts)
    )
