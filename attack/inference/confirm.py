"""Weights that an inferred rule says are passed on where a gradient of the same step confirms them, and nowhere else.

An inference looks at the first steps; a schedule, or a rule that only looked like another, shows later.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import torch

from attack.engine.context import Context
from attack.inference.evidence import MAX_LAYERS, MAX_WITNESSES, by_step
from attack.inference.fit import LIMIT
from attack.inference.layer import Layer, linear_layers
from attack.inference.witness import Mute, Witness, size
from attack.observation import Observation


class Confirmation:
    """Iterates over observations whose weights after the first step are inferred. Ask once."""

    def __init__(self, observations: Iterable[Observation]) -> None:
        self._observations = observations
        self.confirmed = 0
        """Steps so far, after the first, at which a rank's gradient fits the weights."""
        self.refused: list[int] = []
        """Steps so far at which none does: their observations come without weights."""

    def __iter__(self) -> Iterator[Observation]:
        layers: dict[str | None, Layer | None] = {}
        for step in by_step(self._observations):
            group = step[0].group
            if step[0].weights is None:
                yield from step
            elif group not in layers:
                layers[group] = _last_layer(step)
                yield from step
            elif (layer := layers[group]) is not None and any(_fits(seen, layer) for seen in step[:MAX_WITNESSES]):
                self.confirmed += 1
                yield from step
            else:
                self.refused.append(step[0].step)
                yield from (dataclasses.replace(seen, weights=None) for seen in step)


def _last_layer(step: list[Observation]) -> Layer | None:
    """The one that the first step's gradients fit."""
    layers = itertools.islice(linear_layers(step[0].shapes), MAX_LAYERS)
    return next((layer for layer in layers if any(_fits(seen, layer) for seen in step[:MAX_WITNESSES])), None)


def _fits(seen: Observation, layer: Layer) -> bool:
    if seen.weights is None or not seen.weights.isfinite().all():
        return False
    weights = layer.matrix(seen.weights.double())
    context = Context(generator=torch.Generator().manual_seed(0), deadline=math.inf)
    try:
        witness = Witness(seen, layer)
    except Mute:
        return False
    return witness.hear(weights, context) and size(witness.residual(weights)) <= LIMIT
