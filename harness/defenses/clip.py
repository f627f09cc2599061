"""Clipping to a largest Euclidean norm, of a rank's whole gradient or of each example's.

    g -> g * min(1, norm / ||g||)

Public side: the norm. Of a clipped batch the eavesdropper sees the direction exactly, and not how long it was; a
gradient shorter than the norm was not clipped. Each example's is hidden in their mean, as without.

References: Pascanu, Mikolov, Bengio 2013, On the difficulty of training recurrent neural networks, arXiv 1211.5063; for
examples: Abadi et al. 2016, Deep Learning with Differential Privacy, arXiv 1607.00133, algorithm 1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from harness.defenses.base import ExampleStep, Moment, State, Step


@dataclasses.dataclass(frozen=True, slots=True)
class Clip(Step):
    """The rank's gradient, as a whole."""

    norm: float

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        return gradient * shrink(torch.linalg.vector_norm(gradient), self.norm), state


@dataclasses.dataclass(frozen=True, slots=True)
class ClipExamples(ExampleStep):
    """The gradient of each example; then their mean."""

    norm: float

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def __call__(self, examples: Tensor, moment: Moment) -> Tensor:
        norms = torch.linalg.vector_norm(examples, dim=1)
        return (shrink(norms, self.norm) @ examples) / len(examples)


def shrink(norms: Tensor, largest: float) -> Tensor:
    """min(1, largest / norm), 1 where the norm is 0."""
    return (largest / norms).clamp(max=1.0)


def check_norm(norm: float) -> None:
    """Raises: ValueError."""
    if not 0 < norm < float("inf"):
        raise ValueError(f"wanted a norm of more than 0, e.g. 1.0, got {norm}")
