"""What clipping left of one example's gradient: its direction, times an unknown factor of at most 1.

What is seen of the last layer is dW = c e f', db = c e. The features f are the same whatever the factor c is, and with
them the public layer says e = softmax(W f + b) - onehot(y), so that c is what is seen, divided by that:

    f minimizes the sum over ij of w_ij (c e_i f_j - dW_ij)^2 for c e as seen, or as it follows from the f before,
    c minimizes it together with the sum over i of w_i (c e_i - db_i)^2 for that f

where each w is 1 / variance of an element as it was seen, 0 where it was not. So what came after the clipping, noise,
rounding or pruning, is reckoned with. Own; of a batch the features are not to be had so simply.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

ROUNDS = 20
FITS = 3.0
"""Standard deviations, root mean square, that one example may leave of what was seen: two leave far more."""
NEAR = 1e-4
"""Share by which a gradient is shorter than the norm from which on it was not clipped; rounding is far below."""


@torch.no_grad()
def clipping_factor(model: nn.Module, gradient: Tensor, noise: Tensor, *, norm: float, label: int | None) -> float:
    """What the gradient of one example was multiplied by; 1 where it was not clipped, or no one example explains it.

    Args:
        model: at the weights that the gradient was taken at; its last parameters are those of a linear layer.
        gradient, noise: float64, shape (parameters,): as seen, and its standard deviation, infinite where unknown.
        norm: the longest that was left.
        label: None: it is read.
    """
    parameters = list(model.parameters())[-2:]
    if [parameter.ndim for parameter in parameters] != [2, 1] or len(parameters[0]) != len(parameters[1]):
        return 1.0
    if float(torch.linalg.vector_norm(torch.hypot(gradient, noise))) < (1 - NEAR) * norm:
        return 1.0
    weight, bias = (parameter.detach() for parameter in parameters)
    both, weights = (flat[-weight.numel() - bias.numel() :] for flat in (gradient, noise.square().reciprocal()))
    seen, w = (flat[: weight.numel()].view_as(weight) for flat in (both, weights))
    error = both[weight.numel() :]
    label = int(error.argmin()) if label is None else label
    if label >= len(bias):  # it is not the layer that tells the classes apart
        return 1.0
    best, factor = math.inf, 1.0
    for _ in range(ROUNDS):
        least = torch.finfo(w.dtype).tiny
        features = (w * error[:, None] * seen).sum(0) / (w * error.square()[:, None]).sum(0).clamp(min=least)
        plain = (weight @ features + bias).softmax(0)
        plain[label] -= 1
        whole = torch.cat([(plain[:, None] * features).flatten(), plain])
        found = float((weights * whole) @ both / ((weights * whole) @ whole))
        misfit = float(weights @ (found * whole - both).square()) / max(1, int(weights.count_nonzero()))
        if misfit < best:
            best, factor = misfit, found
        error = found * plain
    return factor if best <= FITS**2 and 0 < factor < 1 else 1.0
