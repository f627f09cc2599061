"""What is black and what is white, where inputs are normalized, and where nobody says whether they are."""

from __future__ import annotations

import pytest
import torch

from attack.answer import to_picture
from attack.metrics import score
from attack.observation import Knowledge
from attack.shades import ANY_RANGE, Shades, input_range_of
from harness.models import load_normalize

BY = "mean=0.485/0.456/0.406,std=0.229/0.224/0.225"


def shades(normalize: str | None) -> Shades | None:
    return Shades.of(Knowledge(model="lenet", input_shape=(3, 8, 8), normalize=normalize).summary())


def picture() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_known_normalization_is_undone_in_the_picture() -> None:
    plain = to_picture(picture(), shades(None))
    normalized = to_picture(load_normalize(BY)(picture()[None])[0], shades(BY))
    assert plain is not None and normalized is not None and plain.tobytes() == normalized.tobytes()


def test_picture_of_unknown_shades_goes_from_its_least_to_its_greatest_value() -> None:
    assert shades("unknown") is None
    shown = to_picture(picture() * 7 - 2, None)
    assert shown is not None and (shown.getextrema()[0][0], max(high for _, high in shown.getextrema())) >= (0, 255)
    assert min(low for low, _ in shown.getextrema()) == 0
    assert to_picture(torch.full((3, 8, 8), torch.nan), None) is not None


def test_score_is_that_of_the_pictures() -> None:
    by, truth, found = load_normalize(BY), picture()[None], (picture() + 0.01)[None]
    known, label = shades(BY), torch.tensor([0])
    assert known is not None
    plain = score(found, label, truth, label, input_range=(0.0, 1.0))
    normalized = score(by(found), label, by(truth), label, input_range=(known.black, known.white))
    assert normalized.psnr_db == pytest.approx(plain.psnr_db, abs=1e-3) == pytest.approx(40, abs=1e-2)
    assert normalized.ssim == pytest.approx(plain.ssim, abs=1e-4)


def test_range_holds_all_channels() -> None:
    low, high = input_range_of(BY)
    assert low == pytest.approx(-0.485 / 0.229) and high == pytest.approx((1 - 0.406) / 0.225)
    assert ANY_RANGE[0] < low and high < ANY_RANGE[1] and input_range_of("unknown") == ANY_RANGE
