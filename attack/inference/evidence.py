"""The first steps of a recording -> what they say of the last linear layer, before anybody supposes an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from attack.engine.context import Context
from attack.inference.fit import LIMIT, Evidence
from attack.inference.layer import Layer, linear_layers
from attack.inference.witness import Mute, Witness, size
from attack.observation import Observation

MAX_STEPS = 8
"""That are looked at. Momentum shows in the third, RAdam's second phase in the seventh."""
MAX_WITNESSES = 4
"""Ranks of a step that are asked."""
MAX_LAYERS = 4
"""Matrices with a bias that may be the last layer, from the last on: not every model registers it last. All but the
very last are tried with batches of one alone, as it takes long to find that several examples are not there."""


class NoEvidence(ValueError):
    """The recording says nothing of the update rule; one line that says why."""


def collect(observations: Iterable[Observation], context: Context) -> Evidence:
    """Reads the first steps of the first process group, and no further. Raises: NoEvidence."""
    steps = by_step(observations)
    first = next((step for step in steps if step[0].weights is not None), None)
    if first is None:
        raise NoEvidence("no step's weights were seen")
    evidence = _begin(first, context)
    expected = first[0].step
    for step in itertools.chain([first], steps):
        if step[0].group != first[0].group:
            continue
        cut = [evidence.layer.cut(seen) for seen in step]
        if step[0].step != expected:
            break
        if expected != first[0].step:
            evidence.witnesses.append(list(itertools.islice(_witnesses(step, evidence.layer), MAX_WITNESSES)))
        average = cut[0].average
        if average is None or not average.isfinite().all() or len(evidence.witnesses) == MAX_STEPS:
            break
        evidence.averages.append(average.clone())
        expected += 1
    if not any(evidence.witnesses[1:]):
        raise NoEvidence(
            "no rank's gradient is known wholly enough after the first step, or the average before it is not"
        )
    return evidence


def by_step(observations: Iterable[Observation]) -> Iterator[list[Observation]]:
    """Those of one step of one process group together, as a recording yields them."""
    for _, step in itertools.groupby(observations, key=lambda seen: (seen.group, seen.step)):
        yield list(step)


def _begin(step: list[Observation], context: Context) -> Evidence:
    """The layer that explains the first step's gradients at the weights that were seen."""
    weights, reasons = step[0].weights, []
    assert weights is not None
    for index, layer in enumerate(itertools.islice(linear_layers(step[0].shapes), MAX_LAYERS)):
        initial = weights[layer.start : layer.stop].clone()
        public = layer.matrix(initial.double())
        heard = []
        for seen in step[:MAX_WITNESSES]:
            try:
                one = Witness(seen, layer)
            except Mute as mute:
                reasons.append(str(mute))
                continue
            if index and one.batch > 1:
                continue
            if not one.hear(public, context):
                reasons.append(f"the {one.batch} examples of rank {seen.rank} cannot be told apart")
            elif size(one.residual(public)) > LIMIT:
                reasons.append("the model does not end in a linear layer under cross-entropy, as far as it can be seen")
            else:
                heard.append(one)
        if heard:
            return Evidence(layer=layer, initial=initial, averages=[], witnesses=[heard])
    raise NoEvidence(reasons[0] if reasons else "the model has no linear layer with a bias")


def _witnesses(step: list[Observation], layer: Layer) -> Iterator[Witness]:
    for seen in step:
        try:
            yield Witness(seen, layer)
        except Mute:
            continue
