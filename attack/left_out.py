"""Soteria's side of an observation: a column of a linear layer's gradient that was left out is not known.

    without noise    it is zero, within what observing is off
    noise of S       it may be noise alone: sum |x| over its n elements <= S sqrt(2 / pi) q, with q the sum of n
                     exponential variables of mean 1 that is passed once in 1 / CHANCE

S sqrt(2 / pi) is the mean magnitude of normal noise. Magnitudes of Laplace's law are exponential, of less mean; those
of the normal law, and of sums of both, have lighter tails.

What is left out may differ from rank to rank, and who sends signs sends no zeros: then no column can be told from the
others, and none is believed. One that is as small for another reason says little, so that little is lost. Knows no
model.
"""

from __future__ import annotations

import dataclasses
import math

import scipy.stats
import torch
from torch import Tensor

from attack.defense import PublicDefense
from attack.observation import Known, Observation

CHANCE = 1e-9
"""That noise alone is taken for a column's gradient."""


def disbelieve(observation: Observation) -> Observation:
    """The observation, and those of other steps beside it, without the columns that its defense left out; itself where
    the defense leaves none out."""
    defense = PublicDefense.read(observation.defense or "")
    if not defense.columns:
        return observation
    sizes = _certain(observation, defense)
    known, at = observation.known.clone(), 0
    for shape in observation.shapes:
        part = slice(at, at + math.prod(shape))
        at = part.stop
        if len(shape) == 2:
            most = defense.noise * math.sqrt(2 / math.pi) * scipy.stats.gamma.isf(CHANCE, shape[0])
            known[part].view(shape)[:, sizes[part].view(shape).sum(0) <= most] = int(Known.UNKNOWN)
    return dataclasses.replace(
        observation,
        gradient=torch.where(known == Known.UNKNOWN, 0.0, observation.gradient),
        known=known,
        again=tuple(disbelieve(dataclasses.replace(each, shapes=observation.shapes)) for each in observation.again),
    )


def _certain(observation: Observation, defense: PublicDefense) -> Tensor:
    """The least magnitude that each element had before it was coded; float64."""
    sizes = observation.gradient.double().abs()
    if len(observation.ranks) > 1:
        return torch.zeros_like(sizes)
    if observation.bound is None or (defense.draws and not defense.noise):  # by chance to 0, but never away from it
        return sizes
    return (sizes - observation.bound).clamp(min=0)
