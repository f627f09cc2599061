"""The label of a single example, read from the gradient of the last linear layer.

Under cross-entropy the gradient of the last layer's bias is softmax(logits) - one_hot(label): negative at the label
and nowhere else. Without a bias the row sums of the weight's gradient serve, where the features are not negative.

Reference: iDLG, Zhao, Mopuri, Bilen 2020, arXiv 2001.02610, equation 4.
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
