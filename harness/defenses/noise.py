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
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from harness.defenses.base import Moment, State, Step
from harness.defenses.blocks import BLOCK, with_sign
from harness.seeding import Draws
from harness.wire.coded import Float32


@dataclasses.dataclass(frozen=True, slots=True)
class Gaussian(Step):
    """Normal noise."""

    std: float

    def __post_init__(self) -> None:
        check_std(self.std)

    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        return add_noise(gradient, gaussian, self.std, moment), state


@dataclasses.dataclass(frozen=True, slots=True)
class Laplace(Step):
    """Laplace noise."""

    std: float

    def __post_init__(self) -> None:
        check_std(self.std)

    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        return add_noise(gradient, laplace, self.std, moment), state


def add_noise(gradient: Tensor, law: Callable[[Draws, Float32], None], std: float, moment: Moment) -> Tensor:
    """The gradient, which is not changed, with noise of this law and standard deviation; on its device."""
    draws, given = moment.draws(), gradient.detach().cpu().numpy()
    sent, scratch = np.empty(given.size, np.float32), np.empty(BLOCK, np.float32)
    for at in range(0, given.size, BLOCK):
        part = given[at : at + BLOCK]
        noise = scratch[: part.size]
        law(draws, noise)
        noise *= np.float32(std)
        np.add(part, noise, out=sent[at : at + BLOCK])
    return torch.from_numpy(sent).to(gradient.device)


def gaussian(draws: Draws, into: Float32) -> None:
    """Fills with normal draws of mean 0 and deviation 1, two at a time (Box and Muller 1958); none is beyond 6.66."""
    half = -(-into.size // 2)
    radius, angle = _exponential(uniform(draws, half)), uniform(draws, half)
    radius *= np.float32(2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(math.pi)
    np.multiply(radius, np.cos(angle), out=into[:half])
    rest = into.size - half
    np.multiply(radius[:rest], np.sin(angle[:rest]), out=into[half:])


def laplace(draws: Draws, into: Float32) -> None:
    """Fills with Laplace draws of mean 0 and deviation 1; none is beyond 15.7."""
    drawn = uniform(draws, into.size)
    with_sign(_exponential(drawn), drawn, out=into)
    into *= np.float32(math.sqrt(0.5))


def uniform(draws: Draws, count: int) -> Float32:
    """From -1 to 1, in steps of 2**-31 where float32 has these: near 0, where the tails of both laws come from."""
    words = draws.words(np.int32, count)
    return np.multiply(words, np.float32(2.0**-31), dtype=np.float32, casting="unsafe")


def _exponential(drawn: Float32) -> Float32:
    """Exponential draws of mean 1, from the magnitudes of uniform ones."""
    left = np.abs(drawn)
    left += np.float32(2.0**-32)
    np.log(left, out=left)
    return np.negative(left, out=left)


def check_std(std: float) -> None:
    """Raises: ValueError."""
    if not 0 <= std < float("inf"):
        raise ValueError(f"wanted a standard deviation of 0 or more, e.g. 1e-3, got {std}")
