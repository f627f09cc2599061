"""Soteria's side of an observation: a column of a linear layer's gradient that is zero was left out, and is not known.

Of an element of the layer's input that is zero itself the column is, too; then nothing is lost by not believing it.
Knows no model.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from attack.defense import PublicDefense
from attack.observation import Known, Observation


def disbelieve(observation: Observation) -> Observation:
    """The observation without the columns that its defense left out; itself where the defense leaves none out."""
    if not PublicDefense.read(observation.defense or "").columns:
        return observation
    known, at = observation.known.clone(), 0
    for shape in observation.shapes:
        part = slice(at, at + math.prod(shape))
        at = part.stop
        if len(shape) == 2:
            empty = (observation.gradient[part].view(shape) == 0).all(0)
            known[part].view(shape)[:, empty] = int(Known.UNKNOWN)
    gradient = torch.where(known == Known.UNKNOWN, 0.0, observation.gradient)
    return dataclasses.replace(observation, gradient=gradient, known=known)
