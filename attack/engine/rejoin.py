"""The examples of a batch found again among those that a gradient shows.

In: the features that they should have there, and those that were read (`attack.engine.features`), in any order. Out:
what was read, in the batch's order. Labels say most of it; where one occurs several times, nearest features belong
together.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment

from attack.engine.features import Features


class OtherBatch(ValueError):
    """These are other examples; one line that says why."""


def in_order_of(expected: Features, read: Features) -> Features:
    """`read`, in the order of `expected`. Raises: OtherBatch."""
    if not expected.labels.sort().values.equal(read.labels.sort().values):
        raise OtherBatch(f"labels {sorted(expected.labels.tolist())} and {sorted(read.labels.tolist())}")
    distance = torch.cdist(expected.values, read.values).square()
    apart = expected.labels[:, None] != read.labels
    cost = torch.where(apart, distance.sum() + 1, distance)
    order = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(read.labels.device)
    return Features(values=read.values[order], labels=read.labels[order], error=read.error[order])
