"""Many searches at once: each comes to its own end as if it were alone, and those that fail make room."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from attack.engine.context import Context
from attack.engine.descent import descend
from attack.engine.lbfgs import Searches
from attack.engine.match import Match
from attack.engine.search import search
from attack.engine.target import Target, prepare
from tests.attack.toys import example, observe, told


def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def begin(starts: Tensor, history: int = 10) -> Searches:
    searches = Searches(starts.shape[1], history=history, dtype=starts.dtype, device=starts.device)
    searches.add(starts, rosenbrock)
    return searches


@pytest.mark.parametrize("history", [4, 50])
def test_lbfgs_comes_to_the_minimum_from_everywhere(history: int) -> None:
    starts = 2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    searches, least = begin(starts, history), []
    for _ in range(400):
        least.append(searches.value.clone())
        searches.round(rosenbrock)
    assert all((after <= before).all() for before, after in itertools.pairwise(least))
    # 3.7 is the other minimum of four dimensions, near (-0.78, 0.61, 0.38, 0.15)
    assert all(value < 1e-10 or abs(value - 3.7014) < 1e-3 for value in searches.value.tolist())


def test_a_search_does_not_notice_the_others() -> None:
    starts = 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    joined, alone = begin(starts[:4]), begin(starts[2:3])
    for count in range(60):
        if count == 10:
            joined.keep(torch.tensor([True, False, True, True]))
        if count == 20:
            joined.add(starts[4:], rosenbrock)
        joined.round(rosenbrock)
        alone.round(rosenbrock)
    assert len(joined) == 4
    assert torch.allclose(joined.x[1], alone.x[0], rtol=1e-6)  # batched products add up in another order


def test_a_step_into_nan_is_taken_back() -> None:
    def logarithm(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - x.log()).sum(1), 1 - 1 / x  # least at 1, NaN below 0

    searches = Searches(1, history=5, dtype=torch.float64, device=torch.device("cpu"))
    searches.add(torch.tensor([[1e-3], [50.0]], dtype=torch.float64), logarithm)
    for _ in range(60):
        searches.round(logarithm)
    assert torch.allclose(searches.x, torch.ones(2, 1, dtype=torch.float64), atol=1e-6)


def prepared(name: str = "sigmoid") -> tuple[Target, Tensor, Tensor]:
    model, inputs, labels = example(name)
    return prepare(observe(model, inputs, labels), told(name, inputs), device=torch.device("cpu")), inputs, labels


def context(seconds: float = 60.0) -> Context:
    return Context(generator=torch.Generator().manual_seed(0), deadline=time.monotonic() + seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_many_are_those_of_each(dtype: torch.dtype) -> None:
    target, _, labels = prepared("convolution")
    many = torch.rand(3, 1, *target.input_shape, dtype=dtype)
    together = Match(target, dtype).mismatch(many, labels.expand(3, -1))
    each = torch.stack([target.mismatch(inputs.double(), labels) for inputs in many])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(together.double(), each, atol=tolerance * float(each.abs().max()), rtol=0)


@pytest.mark.parametrize(("together", "dtype"), [(1, torch.float64), (3, torch.float64), (3, torch.float32)])
def test_starts_that_fail_make_room_and_the_best_match_wins(together: int, dtype: torch.dtype) -> None:
    target, inputs, labels = prepared()
    matches = {kind: Match(target, kind) for kind in (torch.float32, torch.float64)}
    starts = [torch.full((1, 12), float("nan")), torch.full((1, 12), 1e9), torch.full((1, 12), 0.5)]

    def mismatch(variables: list[Tensor]) -> Tensor:
        (x,) = variables
        return matches[x.dtype].mismatch(x, labels.expand(len(x), -1))

    found = search(
        target,
        context(),
        method="test",
        start=lambda: [starts.pop(0).double()],
        mismatch=mismatch,
        restarts=2,
        together=together,
        dtype=dtype,
    )
    assert found.residual <= target.tolerance and found.reason is None and found.restarts == 2
    assert found.variables[0].dtype == torch.float64
    assert torch.allclose(found.variables[0].float(), inputs, atol=1e-3)
    assert found.film.history[-1][1] <= target.tolerance


def test_descent_falls_in_steps_and_stays_in_its_box() -> None:
    start = torch.tensor([[0.9, 0.1], [0.2, 0.7]])
    goals = torch.tensor([[0.25, 2.0], [-1.0, 0.5]])
    *_, (last, x, costs) = descend(
        start, lambda x: (x - goals).square().sum(1), context(), iterations=80, rate=0.1, box=(0.0, 1.0)
    )
    assert last == 80 and costs.shape == (2,)
    assert torch.allclose(x, goals.clamp(0, 1), atol=1e-2)  # the rate ends at 1e-4, the last quarter went at 1e-3
