"""Improved Deep Leakage from Gradients: the label is read from the last layer's gradient, the input alone is searched.

    x = argmin || grad(loss(model(x), label)) - observed ||^2

Labels that were told are taken as they are; those of a batch are the likeliest as a whole (`attack.engine.labels`).
The search differs from the paper's as that of `dlg` does.

Reference: Zhao, Mopuri, Bilen 2020, arXiv 2001.02610.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context
from attack.engine.labels import NoLabel, read_labels
from attack.engine.match import Matches
from attack.engine.search import search
from attack.engine.target import Target


def idlg(target: Target, context: Context) -> Answer:
    """Inputs of the batch, at labels that were read or told."""
    try:
        labels = read_labels(target)
    except NoLabel as error:
        return Answer(inputs=None, labels=None, reason=str(error))

    matches = Matches(target)

    def start() -> list[Tensor]:
        shape = (target.batch_size, *target.input_shape)
        return [torch.randn(shape, generator=context.generator, dtype=torch.float64).to(target.device)]

    def mismatch(variables: list[Tensor]) -> Tensor:
        (inputs,) = variables
        return matches[inputs.dtype].mismatch(inputs, labels.expand(len(inputs), -1))

    found = search(target, context, method="idlg", start=start, mismatch=mismatch)
    return Answer(
        inputs=found.variables[0],
        labels=labels,
        film=found.film,
        evaluations=found.evaluations,
        restarts=found.restarts,
        reason=found.reason,
    )
