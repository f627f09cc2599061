"""GradInversion: the gradient is matched among pictures that give batch norm its usual statistics, by several searches
that hold each other together.

    x_s = argmin ||gradient(x_s) - observed||^2 / ||observed||^2 + a TV(x_s) + b ||x_s||^2
                 + c sum over batch norms (||mean(x_s) - running mean|| + ||variance(x_s) - running variance||)
                 + d ||x_s - mean over s||^2

by Adam. Labels that were not told are restored: the classes whose rows of the last weight's gradient go lowest.

Differs from the paper: the mean over the searches is not registered (its figure 4: shifts between them); Adam's rate
falls in steps, without warm-up and without added noise; the match is relative to the observed gradient's size, and the
statistics' term to the running ones', so that weights mean the same for every net; the inputs are polished without
priors (`attack.algorithms.descending`). As in the paper, labels within a batch are taken to differ.

Reference: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, See through Gradients, CVPR 2021, arXiv 2104.07586.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.algorithms.descending import descend_and_polish
from attack.engine.context import Context
from attack.engine.labels import NoLabel, read_label
from attack.engine.match import Match
from attack.engine.priors import BatchStatistics, total_variation
from attack.engine.target import Target

STARTS = 4
ITERATIONS = 2000
RATE = 0.1
VARIATION, SIZE, STATISTICS, GROUP = 1e-4, 1e-6, 0.1, 0.01
"""The paper's section 4: a, b, c, d."""


def gradinversion(target: Target, context: Context, *, iterations: int = ITERATIONS) -> Answer:
    """Inputs of the batch, at labels that were told or restored."""
    try:
        labels = target.labels if target.labels is not None else restore_labels(target)
    except NoLabel as error:
        return Answer(inputs=None, labels=None, reason=str(error))
    match = Match(target, torch.float32)
    statistics = BatchStatistics(match.model)
    low, high = target.input_range

    def cost(inputs: Tensor) -> Tensor:
        apart = match.mismatch(inputs, labels.expand(len(inputs), -1)).square().sum(1) / target.norm**2
        unit = (inputs - low) / (high - low)
        group = (unit - unit.mean(0)).flatten(1).square().mean(1)
        prior = VARIATION * total_variation(unit) + SIZE * unit.flatten(1).square().sum(1) + GROUP * group
        return apart + prior + STATISTICS * statistics.distance(inputs)

    return descend_and_polish(
        target,
        context,
        cost,
        method="gradinversion",
        labels=labels,
        starts=STARTS,
        iterations=iterations,
        rate=RATE,
        signed=False,
    )


def restore_labels(target: Target) -> Tensor:
    """int64, shape (batch,), ascending: the paper's equation 8. Raises: NoLabel."""
    if target.batch_size == 1:
        return read_label(target)
    matrices = [index for index, shape in enumerate(target.shapes) if len(shape) == 2 and shape[0] == target.classes]
    if not matrices or not target.tensors(target.known)[matrices[-1]].all():
        raise NoLabel("the last layer's gradient is not known in full, or the last layer is not linear")
    if target.batch_size > target.classes:
        raise NoLabel(f"{target.batch_size} labels cannot differ among {target.classes} classes")
    lowest = target.tensors(target.gradient)[matrices[-1]].min(1).values
    return lowest.argsort()[: target.batch_size].sort().values
