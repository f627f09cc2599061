"""Normalization: as torchvision's, and undone by its black and white."""

from __future__ import annotations

import pytest
import torch

from harness.models import load_normalize

IMAGENET = "mean=0.485/0.456/0.406,std=0.229/0.224/0.225"


def test_pictures_are_normalized_by_channel() -> None:
    by, pictures = load_normalize(IMAGENET), torch.rand(2, 3, 4, 4)
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(by(pictures)[:, channel], (pictures[:, channel] - mean) / std)


def test_black_and_white_are_what_they_become() -> None:
    by = load_normalize(IMAGENET)
    assert by(torch.zeros(1, 3, 1, 1)).flatten().tolist() == pytest.approx(by.black)
    assert by(torch.ones(1, 3, 1, 1)).flatten().tolist() == pytest.approx(by.white)


def test_one_number_serves_all_channels() -> None:
    pictures = torch.rand(1, 3, 2, 2)
    assert torch.allclose(load_normalize("mean=0.5,std=0.25")(pictures), 4 * pictures - 2)


@pytest.mark.parametrize(
    "text", ["", "mean=0.5", "mean=0.5,std=0", "mean=0.1/0.2,std=0.1", "mean=a,std=b", "imagenet", "mean=1,std=1,x=2"]
)
def test_what_it_is_not_is_said_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"normalize|key=value") as error:
        load_normalize(text)
    assert "\n" not in str(error.value)


def test_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="3 channels do not fit"):
        load_normalize(IMAGENET)(torch.rand(1, 1, 2, 2))
