"""A prior's quadratic touches its energy and lies above it; its pieces are each other's derivatives."""

from __future__ import annotations

import pytest
import torch

from attack.engine.prior import Gaussian, Pictures, Prior

PRIORS = [Gaussian(mean=0.5, variance=2.0), Pictures(input_range=(0.0, 1.0)), Pictures(input_range=(-2.0, 2.0))]


def picture(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_is_the_derivative_of_the_energy(prior: Prior, channels: int) -> None:
    place, way = picture(0, channels), 1e-6 * picture(1, channels)
    quadratic = prior.at(place)
    change = quadratic.energy(place + way) - quadratic.energy(place - way)
    assert change == pytest.approx(2 * float((quadratic.gradient * way).sum()), rel=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_multiply_is_symmetric_positive_and_the_derivative_of_the_gradient(prior: Prior) -> None:
    quadratic, one, two = prior.at(picture(0)), picture(1), picture(2)
    assert float((one * quadratic.multiply(two)).sum()) == pytest.approx(float((two * quadratic.multiply(one)).sum()))
    assert float((one * quadratic.multiply(one)).sum()) > 0


@pytest.mark.parametrize("prior", PRIORS)
def test_draws_have_the_precision_as_their_covariance(prior: Prior) -> None:
    quadratic, way = prior.at(picture(0)), picture(1)
    generator = torch.Generator().manual_seed(0)
    seen = sum(float((quadratic.draw(generator) * way).sum()) ** 2 for _ in range(400)) / 400
    # The mean of 400 squares of normal numbers has a standard deviation of 7 %.
    assert seen == pytest.approx(float((way * quadratic.multiply(way)).sum()), rel=0.3)


def test_a_flat_gray_picture_is_the_likeliest() -> None:
    gray = torch.full((1, 3, 5, 4), 0.5, dtype=torch.float64)
    quadratic = Pictures(input_range=(0.0, 1.0)).at(gray)
    assert quadratic.energy(gray) == 0 and not quadratic.gradient.any()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_written_out_it_is_what_it_multiplies_by(prior: Prior, channels: int) -> None:
    quadratic, v = prior.at(picture(0, channels)), picture(1, channels)
    system = torch.eye(v.numel(), dtype=v.dtype)
    quadratic.add_to(system)
    assert torch.allclose((system @ v.flatten()).view_as(v), v + quadratic.multiply(v))
