"""A rough picture behind the exact features of two blocks with pooling: a search from noise on, 20 to 30 dB.

What Inverting Gradients matches through the whole net and its second derivatives is had for an eighth of the work where
features v and error e are exact: v(x) is matched, and of the upper gradient, E patches(u(x))', its direction, with e
placed at the positions that pass now. Knows neither label nor truth.

Differs from Geiping et al., NeurIPS 2020, arXiv 2003.14053, whose signed Adam and total variation these are, in that.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attack.engine.context import Context
from attack.engine.descent import descend
from attack.engine.pooling import Pooled
from attack.engine.priors import total_variation

ITERATIONS = 500
RATE = 0.1
"""In units of the input range."""
VARIATION = 1e-2
"""Weight of the total variation, for inputs of range 1."""


def rough_picture(net: Pooled, input_range: tuple[float, float], context: Context) -> Tensor:
    """A picture, float64, shape (channels, height, width); searched for in float32."""
    low, high = input_range
    lower, upper = (dataclasses.replace(b, conv=copy.deepcopy(b.conv).float()) for b in (net.lower, net.upper))
    features, error, gradient = net.features.float(), net.error.float(), net.gradient.float().flatten()
    size = features.square().sum()

    def cost(pictures: Tensor) -> Tensor:
        between = lower.output(pictures[0])
        cells = upper.cells(upper.forward(between))
        values, passed = cells.max(-1)
        off = (values.clamp(min=0) - features).square().sum() / size
        placed = torch.zeros_like(cells).scatter(-1, passed[..., None], error[..., None])
        own = upper.uncells(placed).flatten(1) @ upper.patches(between).T
        turned = 1 - cosine_similarity(own.flatten(), gradient, dim=0)
        return (off + turned)[None] + VARIATION / (high - low) * total_variation(pictures[None])

    noise = context.normal(net.lower.input_shape).to(features)[None]
    found = low + (high - low) * noise
    rate = RATE * (high - low)
    for _, pictures, _ in descend(found, cost, context, iterations=ITERATIONS, rate=rate, box=input_range):
        found = pictures.detach()
    return found[0].double()
