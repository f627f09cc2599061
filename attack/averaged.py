"""One gradient from several draws of it: noise, and rounding by chance, differ from step to step, and average out.

    known noise        mean of T steps, standard deviation S / sqrt(T); of Laplace's law the median, which is likelier
    rounding by chance mean of T steps, each at one of two neighboring levels; how often at which says how far off it is

In: an observation, and those of other steps beside it. Out: an observation of one gradient, with the bound that an
error uniform within it would have at that variance, and by how far the gradient may have come while the weights moved.
Only while these stay; what is drawn nowhere, as rounding to the nearest, is the same at each step, and no better for
it. Knows no model.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from attack.defense import PublicDefense
from attack.feedback import STILL, drift, movement
from attack.observation import Known, Observation

MEDIAN = 5
"""Draws from which on the median of Laplace's law is nearer than the mean."""

SPREAD = 1.7
"""The median's variance is 1 + so many times 1 / sqrt(draws) of the least that any estimate has: measured, 5 to 64."""


def average(observation: Observation, *, examples: int = 1) -> Observation:
    """One gradient by all of its draws; the observation itself where there are none to put together.

    Args:
        observation: in the parameters' shapes.
        examples: of the batch, over which noise on a sum of examples is spread.
    """
    defense = PublicDefense.read(observation.defense or "")
    noise = defense.noise_of(examples)
    if defense.keeps or defense.prunes or defense.rank or not (noise or defense.draws):
        return observation
    steps = [step for step in (observation, *observation.again) if _alike(step, observation, defense)]
    if len(steps) < 2:
        return observation
    count = len(steps)
    values = torch.stack([step.gradient for step in steps]).double()
    cell = torch.zeros_like(values[0]) if observation.bound is None else observation.bound.double()
    if defense.draws:
        mean = values.mean(0)
        variance = ((values - mean).square().sum(0) + cell.square() / 2) / count**2
    elif defense.laplace and count >= MEDIAN:
        mean, variance = (
            _median(values),
            torch.full_like(cell, noise**2 / (2 * count) * (1 + SPREAD / math.sqrt(count))),
        )
    else:
        mean, variance = values.mean(0), torch.full_like(cell, noise**2 / count)
    if not defense.draws:
        variance = variance + cell.square() / 3
    used = {step.step for step in steps}
    known = torch.stack([step.limited for step in steps]).all(0)
    return dataclasses.replace(
        observation,
        gradient=torch.where(known, mean, 0.0),
        known=torch.where(known, int(Known.CODED), int(Known.UNKNOWN)).to(torch.uint8),
        bound=torch.hypot((3 * variance).sqrt(), drift(mean, steps)),
        defense=None,
        joined=tuple(sorted(used - {observation.step})),
        again=tuple(step for step in observation.again if step.step not in used),
    )


def _alike(step: Observation, first: Observation, defense: PublicDefense) -> bool:
    """Whether a step is another draw of the first one's gradient, all of which is known within bounds, but for columns
    that were left out."""
    still = step.weights is not None and first.weights is not None and movement([first, step]) <= STILL
    return still and step.defense == first.defense and (defense.columns or bool(step.limited.all()))


def _median(values: Tensor) -> Tensor:
    """Between the two in the middle, where there are two."""
    return values.quantile(0.5, dim=0)
