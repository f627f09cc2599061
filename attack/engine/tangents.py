"""One example's equations differentiated by every pixel at once: their Jacobian as a matrix.

The gradient of a chain's weights at a layer is the error there, times the layer's input; both are followed forward
along all directions of the picture together (forward differentiation over the backward pass), layer by layer:

    u_l = a(z_l),  z_l = F_l u_(l-1) + b_l;    e_l = a'(z_l) g_l,  g_(l-1) = F_l' e_l,  dW_l = e_l (x) u_(l-1)

For a LeNet that is two hundred times as fast as asking automatic differentiation for a row after the other. Knows
neither what was observed nor how exact it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.layers import RESHAPES, bias_of, check, patches_of, pull_back, push

CHUNK = 64
"""Directions followed at once: what a layer's outputs see of each, unfolded, is to stay near the cache."""
BLOCK = 384
"""Rows of J'J at a time, of which only those up to the diagonal are computed."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Affine:
    """A layer with weights, at one place."""

    link: Link
    input: Tensor
    """Flat."""
    inputs: Tensor
    """Its derivatives, shape (directions, inputs)."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Bend:
    """An activation, at one place."""

    slope: Tensor
    curvature: Tensor
    inputs: Tensor
    """Derivatives of what it was given, shape (directions, elements)."""


class Tangents:
    """Derivatives of a layer's outputs and of the weights' gradients, but for the last layer's.

    Args:
        links: a chain, whose layers with weights are in the order of the model's parameters.
        outputs_of: so many of the first links make the outputs that are differentiated, too.
        loss: of logits, shape (1, classes), and a label.

    Raises: NoChain: a link is of a kind that is not followed here.
    """

    def __init__(
        self, links: list[Link], outputs_of: int, loss: Callable[[Tensor, Tensor], Tensor], label: Tensor
    ) -> None:
        check(links)
        self._links, self._outputs_of = links, outputs_of
        self._loss, self._label = loss, label

    @torch.no_grad()
    def transposed(self, x: Tensor) -> Tensor:
        """J', shape (elements of the input, equations): outputs first, then the gradients in their order.

        Args:
            x: float64, shape (1, *input_shape).
        """
        logits = x
        for link in self._links:
            logits = link(logits)
        error = _error(self._loss, logits[0], self._label)
        directions = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        return torch.cat([self._follow(x.flatten(), part, *error) for part in directions.split(CHUNK)])

    def gram(
        self, x: Tensor, scales: Tensor, *, turned: Callable[[Tensor], Tensor] = lambda jacobian: jacobian
    ) -> Tensor:
        """J'J of the equations, each times its scale; shape (elements, elements).

        Args:
            x: as `transposed`.
            scales: shape (equations,); 0 leaves one out.
            turned: J' of those equations, from `transposed`.
        """
        jacobian = turned(self.transposed(x))
        jacobian *= scales
        jacobian = jacobian[:, scales > 0]
        found = torch.empty(len(jacobian), len(jacobian), dtype=x.dtype, device=x.device)
        for first in range(0, len(found), BLOCK):
            last = first + BLOCK
            found[first:last, :last] = jacobian[first:last] @ jacobian[:last].T
            found[:first, first:last] = found[first:last, :first].T
        return found

    def _follow(self, value: Tensor, tangents: Tensor, error: Tensor, bend: Tensor) -> Tensor:
        passed: list[_Affine | _Bend] = []
        outputs = tangents
        for place, link in enumerate(self._links):
            if isinstance(link.module, (nn.Linear, nn.Conv2d)):
                passed.append(_Affine(link, value, tangents))
                value = push(link, value[None])[0] + bias_of(link).to(value)
                tangents = push(link, tangents)
            elif not isinstance(link.module, RESHAPES):
                shape = (1, *link.input_shape)
                slope, curvature = bends(link.module, value.view(shape))
                passed.append(_Bend(slope, curvature, tangents))
                value, tangents = link.module(value.view(shape)).detach().flatten(), tangents * slope
            if place + 1 == self._outputs_of:
                outputs = tangents
        last = passed.pop()
        assert isinstance(last, _Affine)
        value, tangents = pull_back(last.link, error[None])[0], pull_back(last.link, tangents @ bend)
        found: list[Tensor] = []
        for at in reversed(passed):
            if isinstance(at, _Bend):
                tangents = at.slope * tangents + (at.curvature * value) * at.inputs
                value = at.slope * value
                continue
            found = [*_weight_gradients(at, value, tangents), *found]
            if at is not passed[0]:
                value, tangents = pull_back(at.link, value[None])[0], pull_back(at.link, tangents)
        return torch.cat([outputs, *found], dim=1)


def _weight_gradients(at: _Affine, error: Tensor, errors: Tensor) -> list[Tensor]:
    """Derivatives of the weight's gradient, and of the bias's where there is one, each (directions, elements)."""
    outputs = at.link.output_shape[0] if len(at.link.output_shape) == 3 else at.link.outputs
    errors, error = errors.view(len(errors), outputs, -1), error.view(outputs, -1)
    patches, tangents = patches_of(at.link, at.input[None])[0], patches_of(at.link, at.inputs)
    weight = errors @ patches.T + error @ tangents.transpose(1, 2)
    return [weight.flatten(1)] + ([errors.sum(2)] if at.link.module.bias is not None else [])


@torch.enable_grad()
def bends(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of an elementwise function, flat."""
    z = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    curvature = torch.autograd.grad(slope.sum(), z)[0] if slope.requires_grad else torch.zeros_like(z)
    return slope.detach().flatten(), curvature.flatten()


@torch.enable_grad()
def _error(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of the loss by the logits, and the derivative of that, symmetric."""

    def slope(z: Tensor) -> Tensor:
        return torch.autograd.grad(loss(z[None], label), z, create_graph=True)[0]

    z = logits.detach().requires_grad_()
    return slope(z).detach(), torch.autograd.functional.jacobian(slope, z)


def check_order(links: list[Link], model: nn.Module) -> None:
    """Raises: NoChain where the model's parameters are not in the order in which its layers run."""
    ran = [parameter for link in links for parameter in link.module.parameters()]
    if any(one is not other for one, other in zip(ran, model.parameters(), strict=True)):
        raise NoChain("the model's parameters are not in the order in which its layers run")
