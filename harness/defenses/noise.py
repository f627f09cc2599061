"""Noise added to every element, drawn anew for every rank and step.

    noise-gaussian:S    normal, standard deviation S
    noise-laplace:S     Laplace with scale S / sqrt(2): its standard deviation is S too

Each rank adds its own: what only one rank adds, before the sum, leaves the others' gradients bare on the wire.

Public side: the law, with its S. Draws of different steps are independent.

Reference: Zhu, Liu, Han 2019, Deep Leakage from Gradients, arXiv 1906.08935, section 5.1: scales 1e-4 to 1e-1 of
variance or of scale, it does not say which; here all are standard deviations.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from harness.defenses.base import Moment, State, Step


@dataclasses.dataclass(frozen=True, slots=True)
class Gaussian(Step):
    """Normal noise."""

    std: float

    def __post_init__(self) -> None:
        check_std(self.std)

    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        noise = torch.empty(gradient.shape).normal_(std=self.std, generator=moment.generator())
        return noise.to(gradient.device).add_(gradient), state


@dataclasses.dataclass(frozen=True, slots=True)
class Laplace(Step):
    """Laplace noise."""

    std: float

    def __post_init__(self) -> None:
        check_std(self.std)

    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        generator = moment.generator()
        # The difference of two exponential draws; one draw and the logarithm of what is left of 1 would lose the tail.
        noise = torch.empty(gradient.shape).exponential_(generator=generator)
        noise -= torch.empty(gradient.shape).exponential_(generator=generator)
        return torch.add(gradient, noise.to(gradient.device), alpha=self.std / math.sqrt(2)), state


def check_std(std: float) -> None:
    """Raises: ValueError."""
    if not 0 <= std < float("inf"):
        raise ValueError(f"wanted a standard deviation of 0 or more, e.g. 1e-3, got {std}")
