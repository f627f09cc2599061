"""A convolution's gradient alone gives its input and the error at its output, but for one factor: no weights, no label.

Of one example, the gradient of the weights from input channel i to output channel o at kernel element k is

    dW[o, i, k] = sum over positions p, q of e[o, p] S_k[p, q] u[i, q]

with S_k the shift that the kernel element makes: known, and different for each k. Where there are no more positions
than channels, dW has the rank of e: dW = Q R_k with Q from its singular vectors and e = Q T for some T. Together, all
R_k = T S_k u' are R = L(T) u', with L(T) linear in T. What the columns of R do not span, L(T) does not either:

    N R = 0   =>   N L(T) = 0

That is an ordinary linear system, and its null space has one dimension: shifts commute with nothing but multiples of
the identity (with a stride they do: then nothing is said). Then u follows by least squares. Knows no model.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional

ABOVE_NOISE = 4.0
"""Singular values count from so many times the size of the noise's largest."""
ALONE = 1e-4
"""Largest ratio of the least to the next eigenvalue of a null space of one dimension: seen are 1e-14."""
ROUNDS = 300
"""Of the eigenvalue iteration."""
MOST_POSITIONS = 196
"""14 x 14. The linear system has as many unknowns as the square of this."""


def factor(
    convolution: nn.Conv2d, gradient: Tensor, noise: float, input_shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Error at the output, shape (outputs, height, width), and input, of `input_shape`, up to a factor and its inverse.

    None where the gradient does not determine them: more positions than channels, or more than one example.

    Args:
        gradient: float64, of the weight, shape (outputs, inputs, *kernel).
        noise: standard deviation of its elements.
        generator: draws combinations of equations where there are more than needed.
    """
    if convolution.groups != 1 or isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        return None
    shifts = shifts_of(convolution, input_shape)  # (kernel, out, in)
    kernel, outside, inside = shifts.shape
    outputs, inputs = gradient.shape[:2]
    if outside > min(outputs, MOST_POSITIONS) or inside > min(inputs, MOST_POSITIONS) or kernel == 1:
        return None
    left, sizes, right = torch.linalg.svd(gradient.reshape(outputs, -1), full_matrices=False)
    rank = int((sizes > ABOVE_NOISE * noise * (outputs**0.5 + (inputs * kernel) ** 0.5)).sum())
    if not 0 < rank <= outside or rank * kernel <= inside:
        return None
    rows = (sizes[:rank, None] * right[:rank]).view(rank, inputs, kernel).transpose(1, 2).reshape(-1, inputs)
    basis, _, _ = torch.linalg.svd(rows, full_matrices=True)
    beyond = basis[:, inside:].T  # N: what the rows do not span
    turn = _null_space(beyond.view(-1, rank, kernel), shifts, generator)  # T
    if turn is None:
        return None
    spanned = torch.einsum("rp,kpq->rkq", turn, shifts).reshape(-1, inside)
    u = torch.linalg.lstsq(spanned, rows).solution.T
    sign = torch.sign(u.sum())
    height, width = _output_size(convolution, input_shape)
    error = sign * (left[:, :rank] @ turn).view(outputs, height, width)
    return error, sign * u.reshape(input_shape)


def _null_space(beyond: Tensor, shifts: Tensor, generator: torch.Generator) -> Tensor | None:
    """T, shape (rank, positions out), with N L(T) = 0; None where there are several.

    The eigenvalues of the system are 0 and some between 1 and 9, so that Lanczos's iteration takes few products.
    """
    rank, outside = beyond.shape[1], shifts.shape[1]

    def multiply(flat: np.ndarray) -> np.ndarray:
        turn = torch.from_numpy(flat).to(beyond).view(rank, outside)
        moved = torch.einsum("rp,kpq->rkq", turn, shifts)
        across = torch.einsum("nrk,rkq->nq", beyond, moved)
        back = torch.einsum("nrk,nq->rkq", beyond, across)
        result: np.ndarray = torch.einsum("rkq,kpq->rp", back, shifts).flatten().cpu().numpy()
        return result

    size = rank * outside
    start = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=2, which="SA", v0=start, maxiter=ROUNDS)
    except scipy.sparse.linalg.ArpackNoConvergence:
        return None
    if not max(values[0], 0.0) <= ALONE * values[1]:
        return None
    return torch.from_numpy(vectors[:, 0]).to(beyond).view(rank, outside)


def shifts_of(convolution: nn.Conv2d, input_shape: tuple[int, ...]) -> Tensor:
    """S: shape (kernel elements, positions out, positions in), float64: 1 where a kernel element meets a position."""
    _, height, width = input_shape
    single = torch.eye(height * width, dtype=torch.float64, device=convolution.weight.device)
    assert not isinstance(convolution.padding, str)
    met = functional.unfold(
        single.view(-1, 1, height, width),
        convolution.kernel_size,
        dilation=convolution.dilation,
        padding=convolution.padding,
        stride=convolution.stride,
    )
    return met.permute(1, 2, 0)


def _output_size(convolution: nn.Conv2d, input_shape: tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(convolution.padding, str)
    sizes = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            input_shape[1:],
            convolution.padding,
            convolution.dilation,
            convolution.kernel_size,
            convolution.stride,
            strict=True,
        )
    ]
    return sizes[0], sizes[1]
