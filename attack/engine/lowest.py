"""The two lowest layers of a chain, of one example, where what is known begins above them: equations in the pixels.

With a belief on their output z and on the error e there, what is left of the whole gradient's equations is

    R (z(x) - mean) = 0,  R'R its precision;      d <e, z(x)> / d weights = the observed gradient

in which e is a plain number: all that bends is one activation, and Gauss-Newton needs few steps from anywhere. J'J is
put together by layers: in the input u of the upper layer it is a constant matrix; the slopes and the lower layer carry
that to x; the lower layer's own gradient rows, of which there are few, are written out. That takes a fifth of the time
of the whole Jacobian (`attack.engine.tangents`). Knows no label and no truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.layers import activation, bias_of, by_channel, gradient_rows, patches_of, pull_back, push, weight_of
from attack.engine.tangents import bends
from attack.engine.target import Target
from attack.engine.walk import FullBelief, information, prior_below, row_noise

LEAST_DAMPING = 1e-14
"""Of a precision that has no factor in float64, relative to its diagonal."""
MAX_ROWS = 4096
"""Gradient rows of the lower layer that are written out."""
BLOCK = 384
"""Rows of J'J at a time, of which only those up to the diagonal are computed."""


class Lowest:
    """What a gradient says of the input of a chain's two lowest layers with weights.

    Args:
        links: from the chain's input up to the second of them.
        belief: on its output.
        floor: least deviation of an equation, relative to what it is about. What is known more exactly makes it the
            harder to solve them, and where a prior decides a part, the answer no better.

    Raises: NoChain: there are not two such layers, or the lower one has too many weights.
    """

    @torch.no_grad()
    def __init__(self, target: Target, links: list[Link], belief: FullBelief, *, floor: float) -> None:
        layers = [link for link in links if isinstance(link.module, (nn.Linear, nn.Conv2d))]
        if len(layers) != 2 or layers[1] is not links[-1]:
            raise NoChain("there are not two layers with weights")
        lower, upper = layers
        weights = [weight_of(link) for link in layers]
        if weights[0].numel() > MAX_ROWS:
            raise NoChain(f"layer {lower.name} has more than {MAX_ROWS} weights")
        self._links, self._lower = links, lower
        self._between = links[links.index(lower) + 1 : -1]
        self._mean, self._error = belief.mean, belief.error
        covariance = torch.linalg.inv(belief.precision)
        covariance.diagonal().add_(floor**2 * belief.mean.square().mean())
        precision = torch.linalg.inv(covariance)
        self._root = _root(precision)

        places = target.places
        # The gradient of the upper layer's bias says nothing of x: it is the sum of e.
        self._parameters: list[Tensor] = [*lower.module.parameters(), weights[1]]
        self._observed = [target.tensors(target.gradient)[places[id(one)]] for one in self._parameters]
        noises = [target.tensors(target.noise)[places[id(one)]] for one in self._parameters]
        off, prior = belief.error_samples - belief.error, prior_below(links[: links.index(upper)], target)
        below = pull_back(upper, torch.cat([belief.error[None], off]))
        self._error_below, off_below = below[0], below[1:]
        for link in self._between:
            function = activation(link.module)
            if function:
                off_below = off_below * function.slope(torch.full_like(self._error_below, prior[0]))
        ones, inputs = (1.0, 0.0), prior_below([], target)  # what a bias's rows meet, and a weight's
        noises = [
            *(row_noise(off_below, noise, inputs if noise.ndim > 1 else ones) for noise in noises[:-1]),
            row_noise(off, noises[-1], prior),
        ]
        self._weights = [
            torch.hypot(noise, floor * _scale(seen, noise)).reciprocal()  # 0 where the gradient is not known
            for seen, noise in zip(self._observed, noises, strict=True)
        ]
        rows = gradient_rows(upper, belief.error)
        self._inner = information(upper, precision, rows, by_channel(upper, self._weights[-1].square()))

    def rows(self, x: Tensor) -> Tensor:
        """The equations, each in units of its own error; differentiable.

        Args:
            x: float64, shape (1, *input_shape).
        """
        value = x
        for link in self._links:
            value = link(value)
        gradients = torch.autograd.grad(value, self._parameters, self._error.view_as(value), create_graph=True)
        found = [
            ((gradient - seen) * weight).flatten()
            for gradient, seen, weight in zip(gradients, self._observed, self._weights, strict=True)
        ]
        return torch.cat([self._root @ (value.flatten() - self._mean), *found])

    @torch.no_grad()
    def gram(self, x: Tensor) -> Tensor:
        """J'J of the equations, shape (elements, elements)."""
        lower, flat = self._lower, x.flatten()
        slope, curvature = bends(self._bend, push(lower, flat[None])[0] + bias_of(lower).to(flat))
        half = pull_back(lower, slope[:, None] * self._inner * slope)
        found = pull_back(lower, half.T.contiguous()).contiguous()
        own = self._own(flat, slope * self._error_below, curvature * self._error_below)
        for first in range(0, len(found), BLOCK):
            last = first + BLOCK
            part = own[:, first:last].T @ own[:, :last]
            found[first:last, :last] += part
            found[:first, first:last] += part[:, :first].T
        return found

    def _own(self, x: Tensor, error: Tensor, bent: Tensor) -> Tensor:
        """J of the lower layer's gradient rows, shape (rows, elements).

        Args:
            error: at its output.
            bent: derivative of that by the output.
        """
        lower, outputs = self._lower, len(weight_of(self._lower))
        patches, bent = patches_of(lower, x[None])[0], bent.view(outputs, -1)
        parts = []
        for output in range(outputs):  # what x changes of the error
            rows = x.new_zeros(1 + len(patches), *bent.shape)
            rows[:-1, output], rows[-1, output] = bent[output] * patches, bent[output]
            parts.append(pull_back(lower, rows.flatten(1)))
        by_error = torch.stack(parts)  # (outputs, weights of one and its bias, elements)
        direct = gradient_rows(lower, error)  # (outputs x kernel, elements of one channel)
        kernel, size = len(direct) // outputs, direct.shape[1]
        channels = len(x) // size
        weight = by_error[:, :-1].view(outputs, channels, kernel, channels, size)
        weight.diagonal(dim1=1, dim2=3).add_(direct.view(outputs, kernel, size, 1))
        found = [weight.reshape(-1, len(x)) * self._weights[0].view(-1, 1)]
        if lower.module.bias is not None:
            found.append(by_error[:, -1] * self._weights[1].view(-1, 1))
        return torch.cat(found)

    def _bend(self, outputs: Tensor) -> Tensor:
        """From the lower layer's outputs to the upper one's inputs, flat."""
        value = outputs.reshape(1, -1)
        for link in self._between:
            value = link(value)
        return value.flatten()


def _scale(gradient: Tensor, noise: Tensor) -> Tensor:
    """Root mean square of what is known."""
    return (gradient.square().sum() / noise.isfinite().sum().clamp(min=1)).sqrt()


def _root(precision: Tensor) -> Tensor:
    """R with R'R = precision, but for directions that float64 cannot tell from none."""
    damping = LEAST_DAMPING
    while True:
        damped = precision.clone()
        damped.diagonal().mul_(1 + damping).add_(torch.finfo(precision.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor.T
        damping *= 100
