"""Text metrics on answers written by hand."""

from __future__ import annotations

import pytest
import torch

from attack.text_metrics import score_text
from harness.models import Tokens

TOKENS = Tokens(vocab=50, pad=0)
TRUE = torch.tensor([[1, 7, 8, 9, 2], [1, 5, 2, 0, 0]])
LABELS = torch.tensor([3, 4])


def test_an_answer_in_another_order_is_exact() -> None:
    found = score_text(TRUE.flip(0), LABELS.flip(0), TRUE, LABELS, tokens=TOKENS)
    assert (found.token_accuracy, found.exact, found.sentences, found.label_ok) == (1.0, 2, 2, True)
    assert [example.true_index for example in found.examples] == [1, 0]


def test_one_wrong_token_is_counted() -> None:
    pytest.importorskip("rouge_score")
    own = TRUE.clone()
    own[0, 2] = 6
    found = score_text(own, LABELS, TRUE, LABELS, tokens=TOKENS)
    assert found.token_accuracy == 7 / 8 and found.exact == 1
    # 4 of 5 words, 2 of 4 pairs, 4 in a row with one left out.
    first = found.examples[0]
    assert [first.rouge1, first.rouge2, first.rougeL] == pytest.approx([0.8, 0.5, 0.8])


def test_a_missing_sentence_is_missing() -> None:
    pytest.importorskip("rouge_score")
    found = score_text(TRUE[1:, :3], LABELS[1:], TRUE, LABELS, tokens=TOKENS)
    assert found.token_accuracy == 3 / 8 and found.exact == 1 and not found.label_ok
    assert found.rouge1 == pytest.approx(0.5)


def test_labels_of_tokens_count_where_there_are_tokens() -> None:
    labels = torch.where(TRUE == 8, 30, -100)
    found = score_text(TRUE[:1], labels[:1], TRUE[:1], labels[:1], tokens=TOKENS)
    assert found.label_ok
    assert not score_text(TRUE[:1], labels[:1] + 1, TRUE[:1], labels[:1], tokens=TOKENS).label_ok
