"""The direct solver against systems that are written out."""

from __future__ import annotations

import torch
from torch import Tensor

from attack.engine import direct
from attack.engine.direct import Direct, gram
from attack.engine.linearized import Jacobian
from attack.engine.prior import Pictures, Quadratic
from tests.attack.toys import unhurried

SHAPE = (2, 1, 3, 4)


def equations(scale: float) -> direct.Parts:
    """Some of each example and some of all; not linear."""
    draws = torch.Generator().manual_seed(0)
    own, shared = (torch.randn(*size, generator=draws, dtype=torch.float64) for size in ((9, 12), (7, 24)))

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return scale * (x.flatten(1) @ own.T).sin(), scale * (shared @ x.flatten()).tanh()

    return parts


def flat(parts: direct.Parts, x: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in parts(x)])


def place() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gram_is_that_of_the_jacobian() -> None:
    parts = [equations(1.0), equations(3.0)]
    x = place()
    jacobian = torch.cat([torch.autograd.functional.jacobian(lambda x, p=p: flat(p, x), x).flatten(1) for p in parts])
    assert torch.allclose(gram(parts, x), jacobian.T @ jacobian, rtol=1e-12, atol=1e-12)


def test_step_solves_the_system_here_and_near_by() -> None:
    parts = [equations(1e4), equations(1e4 + 1)]  # the second says nearly the same, with what is new 1e8 times weaker
    grams = []
    solver = Direct(lambda place: grams.append(gram(parts, place)) or grams[-1])
    for x in (place(), place() + 1e-4):
        prior = Pictures(input_range=(0.0, 1.0)).at(x)
        at = Jacobian(lambda x: torch.cat([flat(part, x) for part in parts]), x)

        def multiply(v: Tensor, at: Jacobian = at, prior: Quadratic = prior) -> Tensor:
            return at.back(at.forward(v)) / 2.0 + prior.multiply(v)

        right = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        step, solved = solver.solve(multiply, right, x, prior, 2.0, unhurried(), goal=1e-9)
        basis = torch.eye(24, dtype=torch.float64).view(24, *SHAPE)
        system = torch.stack([multiply(v).flatten() for v in basis])
        wanted = torch.linalg.solve(system, right.flatten())
        assert solved
        assert torch.dist(step.flatten(), wanted) < 1e-6 * torch.linalg.vector_norm(wanted)
    assert len(grams) == 1
