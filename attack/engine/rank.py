"""A layer's gradient over a batch in its singular vectors: those above the noise, one an example.

    A = [db, dW] = sum over examples of e_i [1, u_i]'    (outputs, 1 + inputs)

is a sum of as many outer products as there are examples: e_i an example's error at the layer's output, u_i its input.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor, nn

ABOVE_NOISE = 4.0
"""Singular values count from so many times the size of the noise's largest. On MLPs and LeNets those of a batch of 16
start at a hundred times, and the first of the noise lies at a tenth."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decomposed:
    """Of A, the singular vectors that count."""

    left: Tensor
    """float64, shape (outputs, rank): spans the errors."""
    core: Tensor
    """Singular values, shape (rank,), descending."""
    right: Tensor
    """Shape (1 + inputs, rank): spans the inputs, each behind a one."""
    floor: float
    """About the largest singular value of the noise."""

    @property
    def rank(self) -> int:
        """How many singular values count."""
        return len(self.core)


def decompose(gradient: Tensor, noise: Tensor, *, rank: int | None = None) -> Decomposed:
    """The singular vectors of a gradient, by the standard deviation of each of its elements, which must be finite.

    Args:
        rank: how many to keep, whatever the noise.
    """
    left, core, right = torch.linalg.svd(gradient, full_matrices=False)
    floor = _floor(noise)
    if rank is None:
        rank = int((core > ABOVE_NOISE * floor).sum())
    return Decomposed(left=left[:, :rank], core=core[:rank], right=right[:rank].T, floor=floor)


def count(gradient: Tensor, noise: Tensor) -> int:
    """How many singular values count, without their vectors, for a quarter of the time."""
    tall = gradient if len(gradient) > gradient.shape[1] else gradient.T
    core = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return int((core > ABOVE_NOISE * _floor(noise)).sum())


@torch.no_grad()
def highest_ranks(model: nn.Module, inputs: Tensor) -> dict[int, int]:
    """The highest rank that each linear layer's gradient over such a batch can have: as many rows as it is applied to.

    Returns: by the weight's place in `model.parameters()`; without those that other modules hold, too, or that are
        used in some other way than by calling their layer.
    """
    rows, holders = Counter[int](), Counter(id(own) for part in model.modules() for own in part._parameters.values())

    def note(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        rows[id(layer.weight)] += output.numel() // layer.out_features

    hooks = [part.register_forward_hook(note) for part in model.modules() if type(part) is nn.Linear]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    places = enumerate(map(id, model.parameters()))
    return {place: rows[weight] for place, weight in places if rows[weight] and holders[weight] == 1}


def _floor(noise: Tensor) -> float:
    """Size of a random matrix: about its largest row and its largest column together."""
    return float(torch.linalg.vector_norm(noise, dim=1).max() + torch.linalg.vector_norm(noise, dim=0).max())
