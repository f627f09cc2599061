"""Which of the examples read is which of those expected."""

from __future__ import annotations

import pytest
import torch

from attack.engine.features import Features
from attack.engine.rejoin import OtherBatch, in_order_of


def features(values: torch.Tensor, labels: list[int]) -> Features:
    return Features(values=values, labels=torch.tensor(labels), error=values[:, :2])


def test_order_is_that_of_labels_and_then_of_features() -> None:
    expected = features(torch.rand(5, 8, dtype=torch.float64), [3, 1, 3, 0, 3])
    order = torch.tensor([4, 2, 0, 1, 3])
    read = features(expected.values[order] + 0.01, expected.labels[order].tolist())
    back = in_order_of(expected, read)
    assert back.labels.equal(expected.labels)
    assert torch.allclose(back.values, expected.values + 0.01) and torch.equal(back.error, back.values[:, :2])


def test_other_labels_are_another_batch() -> None:
    values = torch.rand(2, 8)
    with pytest.raises(OtherBatch, match=r"labels \[1, 2\] and \[1, 1\]"):
        in_order_of(features(values, [2, 1]), features(values, [1, 1]))
