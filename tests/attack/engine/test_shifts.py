"""A convolution's gradient gives its input and the error at its output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attack.engine.shifts import factor, shifts_of


def gradient_of(convolution: nn.Conv2d, u: Tensor, error: Tensor) -> Tensor:
    return torch.autograd.grad(convolution(u), convolution.weight, error)[0]


def draw(seed: int, *, stride: int = 1, side: int = 4, batch: int = 1) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A convolution, its input, as a ReLU leaves it, and an error that passed one."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d(80, 40, 3, stride=stride, padding=1, bias=False).double()
    u = torch.randn(batch, 80, side, side).double().relu()
    error = torch.randn_like(convolution(u)) * (torch.randn_like(convolution(u)) > 0)
    return convolution, u, error


def found(convolution: nn.Conv2d, gradient: Tensor, u: Tensor) -> tuple[Tensor, Tensor] | None:
    return factor(convolution, gradient, 1e-9, tuple(u.shape[1:]), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", [4, 6])
def test_both_come_out_but_for_a_factor(seed: int, side: int) -> None:
    convolution, u, error = draw(seed, side=side)
    answer = found(convolution, gradient_of(convolution, u, error), u)
    assert answer is not None
    for mine, true in zip(answer, (error[0], u[0]), strict=True):
        cosine = nn.functional.cosine_similarity(mine.flatten(), true.flatten(), dim=0)
        assert 1 - abs(float(cosine)) < 1e-12
    assert float((answer[1] * u[0]).sum()) > 0  # what ReLU leaves is not negative
    assert torch.allclose(
        gradient_of(convolution, answer[1][None], answer[0][None]), gradient_of(convolution, u, error), atol=1e-8
    )


def test_errors_that_sum_to_zero_as_behind_batch_norm_do_as_well() -> None:
    convolution, u, error = draw(0)
    error = error - error.mean((2, 3), keepdim=True)
    answer = found(convolution, gradient_of(convolution, u, error), u)
    assert answer is not None
    assert 1 - float(nn.functional.cosine_similarity(answer[1].flatten(), u.flatten(), dim=0)) < 1e-12


@pytest.mark.parametrize("changes", [{"side": 8}, {"batch": 2}, {"stride": 2, "side": 8}])
def test_what_is_not_determined_is_not_answered(changes: dict[str, int]) -> None:
    convolution, u, error = draw(0, **changes)
    assert found(convolution, gradient_of(convolution, u, error), u) is None


def test_noise_alone_is_no_gradient() -> None:
    convolution, u, _ = draw(0)
    assert found(convolution, torch.randn(40, 80, 3, 3, dtype=torch.float64), u) is None


def test_shifts_say_what_a_kernel_element_meets() -> None:
    convolution, u, _ = draw(0, stride=2, side=6)
    shifts = shifts_of(convolution, tuple(u.shape[1:]))
    by_hand = torch.einsum("oik,kpq,iq->op", convolution.weight.flatten(2), shifts, u[0].flatten(1))
    assert torch.allclose(by_hand, convolution(u)[0].flatten(1))
