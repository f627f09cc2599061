"""Metrics against formulas written out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attack.metrics import MAX_PSNR_DB, match, mse, psnr_db, score, ssim


def pictures(count: int, *, seed: int = 0, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_mse_and_psnr_are_their_formulas() -> None:
    one, two = pictures(2)
    written_out = sum((float(a) - float(b)) ** 2 for a, b in zip(one.flatten(), two.flatten(), strict=True)) / 768
    assert mse(one, two) == pytest.approx(written_out, rel=1e-12)
    assert psnr_db(one, two, input_range=(0, 1)) == pytest.approx(-10 * math.log10(written_out))
    assert psnr_db(one, two, input_range=(-1, 1)) == pytest.approx(10 * math.log10(4 / written_out))


def test_equal_pictures_have_a_psnr_that_json_can_hold() -> None:
    (one,) = pictures(1)
    assert psnr_db(one, one, input_range=(0, 1)) == MAX_PSNR_DB
    json.dumps(psnr_db(one, one, input_range=(0, 1)), allow_nan=False)
    assert ssim(one, one, input_range=(0, 1)) == pytest.approx(1)


def slow_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004, equation 13, at every position where the 11 x 11 window fits; one channel."""
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for row in range(5, x.shape[0] - 5):
        for column in range(5, x.shape[1] - 5):
            a = x[row - 5 : row + 6, column - 5 : column + 6]
            b = y[row - 5 : row + 6, column - 5 : column + 6]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
            cov = (window * a * b).sum() - mean_a * mean_b
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


def test_ssim_is_its_formula() -> None:
    one, two = pictures(2)
    two = 0.7 * one + 0.3 * two
    slow = np.mean([slow_ssim(a.double().numpy(), b.double().numpy(), 1.0) for a, b in zip(one, two, strict=True)])
    # skimage blurs with a window cut at 3.5 sigma and a mirrored edge, then leaves the edge out: equal inside.
    assert ssim(one, two, input_range=(0, 1)) == pytest.approx(slow, rel=1e-9)


@pytest.mark.parametrize("side", [3, 4, 5, 7, 10, 11, 12])
def test_ssim_of_small_pictures(side: int) -> None:
    one, two = pictures(2, side=side)
    value = ssim(one, two, input_range=(0, 1))
    assert value is not None and -1 <= value < 1


def test_what_is_no_picture_has_no_ssim() -> None:
    assert ssim(torch.rand(12), torch.rand(12), input_range=(0, 1)) is None
    assert ssim(torch.rand(3, 2, 9), torch.rand(3, 2, 9), input_range=(0, 1)) is None


def test_batch_is_matched_whatever_its_order() -> None:
    truth = pictures(6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    found = truth[order] + 0.05 * pictures(6, seed=1)
    assert match(found, truth) == order.tolist()
    result = score(found, order, truth, torch.arange(6), input_range=(0, 1))
    assert result.label_ok and [example.true_index for example in result.examples] == order.tolist()
    wrong = score(found, torch.zeros(6, dtype=torch.int64), truth, torch.arange(6), input_range=(0, 1))
    assert wrong.label_accuracy == pytest.approx(1 / 6) and not wrong.label_ok


def test_batches_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted the truth's shape"):
        score(pictures(1), torch.zeros(1), pictures(2), torch.zeros(2), input_range=(0, 1))
