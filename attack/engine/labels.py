"""Labels, read from the gradient of the last linear layer: of a single example, and how often each is in a batch.

Under cross-entropy the gradient of the last layer's bias is softmax(logits) - one_hot(label): negative at the label
and nowhere else. Without a bias the row sums of the weight's gradient serve, where the features are not negative.

Over a batch of B, the bias's gradient is mean(p) - counts / B. All classes that are nobody's label pull with the same
features, each by its probability: their rows say what the mean features are, and with these the public layer says what
mean(p) is. Exact where all examples have the same probabilities, as good as that on untrained nets.

References: iDLG, Zhao, Mopuri, Bilen 2020, arXiv 2001.02610, equation 4; for batches, iLRG (Ma et al. 2022, arXiv
2206.00172) restores counts from probabilities too, there with features from the labels' own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attack.engine.target import Target

SURE = 4.0
"""Standard errors below zero from which on a number is negative and not merely in error: 3 in 100,000 are by chance."""


class NoLabel(ValueError):
    """The label cannot be read; one line that says why."""


def read_label(target: Target) -> Tensor:
    """int64, shape (1,): the label of the one example behind the gradient, as told or as read.

    Raises: NoLabel.
    """
    if target.batch_size != 1:
        raise NoLabel(f"iDLG's rule reads the label of one example, the batch has {target.batch_size}")
    if target.labels is not None:
        return target.labels
    signal, noise = last_layer_signal(target)
    surely = (signal < -SURE * noise).nonzero()[:, 0]
    negative = surely if len(surely) else (signal < 0).nonzero()[:, 0]
    if len(negative) != 1:
        raise NoLabel(f"wanted one class with a negative gradient in the last layer, got {len(negative)}")
    return negative


def estimate_counts(target: Target, batch: int) -> tuple[Tensor, Tensor]:
    """How often each label is in a batch of that size, shape (classes,), not rounded; and the mean features.

    Raises: NoLabel.
    """
    last_layer_signal(target)
    if target.shapes[-1] != (target.classes,):
        raise NoLabel("the last layer has no bias")
    slopes, bias_slopes = target.tensors(target.gradient)[-2:]
    nobodys = bias_slopes > 0
    if not nobodys.any():
        raise NoLabel("no class pulls away from the features: the last layer's gradient is not that of cross-entropy")
    features = slopes[nobodys].sum(0) / bias_slopes[nobodys].sum()
    weight, bias = (parameter.detach() for parameter in list(target.model.parameters())[-2:])
    return batch * ((weight @ features + bias).softmax(0) - bias_slopes), features


def likely_counts(estimate: Tensor, batch: int, *, most: int) -> list[Tensor]:
    """Whole numbers that add up to `batch`, int64, shape (classes,): the nearest first, then those that move one."""
    counts = estimate.clamp(min=0).floor().long()
    over = estimate - counts
    while int(counts.sum()) > batch:
        counts[torch.where(counts > 0, over, torch.inf).argmin()] -= 1
        over = estimate - counts
    counts[over.argsort(descending=True)[: batch - int(counts.sum())]] += 1
    over = estimate - counts
    # Moving one from class i to class j adds 2 (1 + over_i - over_j) to the squared distance.
    costs = over[:, None] - over[None, :]
    costs[counts == 0] = torch.inf
    costs.fill_diagonal_(torch.inf)
    order = costs.flatten().argsort()[: most - 1]
    moved = [counts]
    for source, goal in zip((order // len(counts)).tolist(), (order % len(counts)).tolist(), strict=True):
        if costs[source, goal] < torch.inf:
            moved.append(counts.clone())
            moved[-1][source] -= 1
            moved[-1][goal] += 1
    return moved


def read_labels(target: Target) -> Tensor:
    """int64, shape (batch,), ascending where not told: the likeliest labels of the batch. Raises: NoLabel."""
    if target.labels is not None or target.batch_size == 1:
        return read_label(target) if target.labels is None else target.labels
    estimate, _ = estimate_counts(target, target.batch_size)
    counts = likely_counts(estimate, target.batch_size, most=1)[0]
    return torch.arange(target.classes, device=target.device).repeat_interleave(counts)


def last_layer_signal(target: Target) -> tuple[Tensor, Tensor]:
    """One number a class, negative at a label, and its error. Raises: NoLabel where the last layer does not give it."""
    gradients, noises = target.tensors(target.gradient), target.tensors(target.noise)
    last, weight = gradients[-1], gradients[-2] if len(gradients) > 1 else gradients[-1]
    if last.ndim == 1 and weight.ndim == 2 and len(weight) == len(last) == target.classes:
        signal, noise = last, noises[-1]
    elif last.ndim == 2 and len(last) == target.classes:
        signal, noise = last.sum(1), torch.linalg.vector_norm(noises[-1], dim=1)
    else:
        raise NoLabel("the model does not end in a linear layer with an output a class")
    seen = noise.isfinite()
    if not seen.all():
        raise NoLabel(f"the last layer's gradient is known for {int(seen.sum())} of {target.classes} classes")
    return signal, noise
