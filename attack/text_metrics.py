"""How near text is to the truth: tokens in their places, whole sentences, ROUGE, and which sentence is which.

In: an answer and the truth, as tokens. Only an evaluation, after an attack has written its answer, may call this.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from harness.models import Tokenizer, Tokens

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SentenceScore:
    """One sentence of an answer, beside the true one that it was matched to."""

    true_index: int
    """Which sentence of the true batch: a gradient does not keep the order."""
    tokens: int
    """Of the true sentence."""
    right: int
    """Of these, tokens that the answer has in the same place."""
    exact: bool
    """Whether the answer is the true sentence, token for token."""
    rouge1: float | None
    """F1 of words; None where the library rouge-score is not installed."""
    rouge2: float | None
    """F1 of pairs of words."""
    rougeL: float | None
    """F1 of the longest common subsequence."""
    label_ok: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """A batch."""

    token_accuracy: float
    """Share of the true batch's tokens that the answer has in their places, 0 to 1."""
    exact: int
    """Sentences that are right, token for token."""
    sentences: int
    """Of the true batch."""
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    label_ok: bool
    """Whether every sentence has its labels, and none is missing."""
    examples: tuple[SentenceScore, ...]


def score_text(
    inputs: Tensor,
    labels: Tensor,
    true_inputs: Tensor,
    true_labels: Tensor,
    *,
    tokens: Tokens,
    reader: Tokenizer | None = None,
) -> TextScore:
    """Compares sentences with the truth, each with the one that the best matching gives it.

    Args:
        inputs, true_inputs: int64, shape (batch, length), padded; they may differ in both.
        reader: makes words of tokens, for ROUGE; without one each token counts as a word.
    """
    own, true = tokens.rows(inputs), tokens.rows(true_inputs)
    equal = np.array([[_equal(one, other) for other in true] for one in own])
    # What is as near in tokens is matched by labels.
    same = np.array([[a == b for b in _cut(true_labels, true)] for a in _cut(labels, own)])
    pairs = zip(*linear_sum_assignment(2 * equal + same, maximize=True), strict=True)
    examples = []
    for row, column in pairs:
        rouge = _rouge(_words(true[column], reader), _words(own[row], reader))
        examples.append(
            SentenceScore(
                true_index=int(column),
                tokens=len(true[column]),
                right=int(equal[row, column]),
                exact=own[row] == true[column],
                label_ok=bool(same[row, column]),
                **dict(zip(ROUGE, rouge, strict=True)),
            )
        )
    return TextScore(
        token_accuracy=sum(example.right for example in examples) / sum(map(len, true)),
        exact=sum(example.exact for example in examples),
        sentences=len(true),
        label_ok=len(own) == len(true) and all(example.label_ok for example in examples),
        examples=tuple(examples),
        **{name: _mean([getattr(example, name) for example in examples], len(true)) for name in ROUGE},
    )


def _cut(labels: Tensor, rows: list[list[int]]) -> list[object]:
    return [label[: len(row)].tolist() if label.ndim else int(label) for label, row in zip(labels, rows, strict=True)]


def _equal(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def _words(row: list[int], reader: Tokenizer | None) -> str:
    return " ".join(map(str, row)) if reader is None else reader.decode([t for t in row if t not in reader.special])


def _rouge(true: str, own: str) -> tuple[float | None, ...]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return (None,) * len(ROUGE)
    found = RougeScorer(list(ROUGE)).score(true, own)
    return tuple(float(found[name].fmeasure) for name in ROUGE)


def _mean(values: list[float | None], count: int) -> float | None:
    """Over the true sentences: one that is missing counts as 0."""
    there = [value for value in values if value is not None]
    return statistics.fmean([*there, *[0.0] * (count - len(there))]) if there else None
