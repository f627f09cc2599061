"""Deep Leakage from Gradients: dummy inputs and dummy labels are changed until their gradient is the observed one.

    (x, y) = argmin || grad(loss(model(x), softmax(y))) - observed ||^2

Differs from the paper and its released code: the L-BFGS has a line search and ends in float64, a search that
diverges or sticks is started again, and elements of the gradient that are not known take no part. A batch is
updated as one, not an example at a time.

Reference: Zhu, Liu, Han, NeurIPS 2019, arXiv 1906.08935, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context
from attack.engine.match import Matches
from attack.engine.search import search
from attack.engine.target import Target


def dlg(target: Target, context: Context) -> Answer:
    """Inputs and soft labels of the batch, together."""

    matches = Matches(target)

    def start() -> list[Tensor]:
        shapes = ((target.batch_size, *target.input_shape), (target.batch_size, target.classes))
        return [
            torch.randn(shape, generator=context.generator, dtype=torch.float64).to(target.device) for shape in shapes
        ]

    def mismatch(variables: list[Tensor]) -> Tensor:
        inputs, label_logits = variables
        return matches[inputs.dtype].mismatch(inputs, label_logits.softmax(-1))

    found = search(target, context, method="dlg", start=start, mismatch=mismatch)
    inputs, label_logits = found.variables
    soft_labels = label_logits.softmax(-1)
    return Answer(
        inputs=inputs,
        labels=soft_labels.argmax(-1),
        soft_labels=soft_labels,
        film=found.film,
        evaluations=found.evaluations,
        restarts=found.restarts,
        reason=found.reason,
    )
