"""The factor in blocks is LAPACK's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attack.engine.chain import NoChain, trace
from attack.engine.factor import BLOCK, Cholesky, lower_product

(LINK,) = trace(nn.Sequential(nn.Linear(2, 3)), (2,))


@pytest.mark.parametrize("size", [0, 1, BLOCK, 2 * BLOCK + 7])
def test_factor_solves_as_lapack_does(size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, size + 3, dtype=torch.float64, generator=generator)
    gram = rows @ rows.T + torch.eye(size, dtype=torch.float64)
    lower = lower_product(rows, rows)
    lower.diagonal().add_(1)
    assert torch.allclose(lower.tril(), gram.tril())
    factor, right = Cholesky(lower, LINK), torch.randn(2, size, dtype=torch.float64, generator=generator)
    exact = torch.linalg.cholesky(gram)
    assert torch.allclose(factor.forward(right) @ exact.T, right)
    assert torch.allclose(factor.backward(right) @ exact, right)
    assert torch.allclose(factor.solve(right) @ gram, right)


def test_matrix_that_is_not_positive_has_no_factor():
    with pytest.raises(NoChain, match=f"layer {LINK.name}: its equations are too ill-conditioned"):
        Cholesky(-torch.eye(3), LINK)
