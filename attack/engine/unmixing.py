"""From every example's features to every example's inputs, through fully connected layers, by least squares alone.

With the errors e_i at a linear layer's output known, its input u_i is the solution of

    dW = sum over i of e_i u_i'          one small system (outputs x batch) for all inputs at once

and an activation carries the error to the layer below: e_i at its input is (W' e_i) times the slope there. The slope of
a ReLU is read from its output, which leaves units near zero open. Their rows take no part, nor do rows that do not fit
the others; then u_i says on which side each unit was, and the layer is solved again with every row.

Knows no labels and no truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.engine.chain import Link, NoChain
from attack.engine.features import Features
from attack.engine.layers import RESHAPES, Activation, activation
from attack.engine.target import Target

KINKED = (nn.ReLU, nn.LeakyReLU)
"""Activations whose slope jumps at zero."""
OPEN = 1e-5, 1e-3
"""Outputs of a kinked unit between these, in units of the layer's largest, leave its side open: features come to 1e-6
for batches of 4, and to 4e-4 for batches of 16."""
NEAR_ZERO = 1e-6
"""The same for its input, once that is known."""
MISFIT = 20.0
"""A row fits when it is off by less than so many times its noise. One wrong side makes it 1e4 times and more."""
LOST = 1e-9
"""Errors of a batch are dependent where their smallest singular value is so small a part of the largest: below what
float32 gradients can show."""
MAX_TURNS = 6
"""Solutions of one layer until the sides of its units stay; two are usual."""


def check_connected(links: list[Link]) -> None:
    """Raises NoChain where a link is neither linear with an invertible activation nor a reshape."""
    for link in links:
        if not (isinstance(link.module, (nn.Linear, *RESHAPES)) or activation(link.module)):
            kind = type(link.module).__name__
            raise NoChain(f"layer {link.name} ({kind}): a batch is taken apart through fully connected layers alone")
        if isinstance(link.module, nn.Linear) and len(link.input_shape) != 1:
            raise NoChain(f"layer {link.name}: one linear layer at several positions mixes them")


@torch.no_grad()
def unmix_layers(target: Target, links: list[Link], features: Features, *, near: Tensor | None = None) -> Tensor:
    """Inputs of the chain, shape (batch, *input_shape), from those of its last layer.

    Args:
        near: inputs whose forward pass says on which side of zero each kinked unit is. Same shape.

    Raises: NoChain.
    """
    settled = {} if near is None else _outputs(links, near)
    gradients, noises, places = target.tensors(target.gradient), target.tensors(target.noise), target.places
    value, error = features.values, features.error @ _weight(links[-1])
    pending: nn.Module | None = None
    for link in reversed(links[:-1]):
        if activation(link.module):
            if pending is not None:
                raise NoChain(f"layer {link.name}: two activations in a row")
            pending = link.module
        elif isinstance(link.module, nn.Linear):
            place = places[id(link.module.weight)]
            inputs = settled.get(link.name)
            value, error = _solve_layer(link, pending, value, error, gradients[place], noises[place], inputs)
            if len(value) == 1 and link.module.bias is not None:
                place = places[id(link.module.bias)]
                scale = _scale(error[0], gradients[place], noises[place])
                value, error = value / scale, error * scale
            error, pending = error @ _weight(link), None
    if pending is not None:
        raise NoChain("an activation stands before the first linear layer")
    return value.view(-1, *target.input_shape)


def _scale(error: Tensor, gradient: Tensor, noise: Tensor) -> Tensor:
    """By how much one example's errors at a layer are too small: the bias's gradient is these errors themselves.

    What the layers above leave in doubt is common to all of them, and would be common to all inputs.
    """
    weights = noise.square().reciprocal()
    size = (weights * error.square()).sum()
    return (weights * error * gradient).sum() / size if size > 0 else torch.ones_like(size)


def _outputs(links: list[Link], value: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for link in links:
        outputs[link.name] = value = link(value)
    return outputs


def _weight(link: Link) -> Tensor:
    weight = link.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _solve_layer(
    link: Link,
    above: nn.Module | None,
    output: Tensor,
    error: Tensor,
    gradient: Tensor,
    noise: Tensor,
    settled: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A linear layer's inputs and the errors at its outputs.

    Args:
        above: the activation on it, if there is one.
        output: that activation's outputs, or the layer's own, shape (batch, outputs).
        error: derivative of the loss by `output`.
        gradient, noise: of the layer's weight.
        settled: the layer's own outputs, where they are known beforehand.
    """
    module, function = link.module, None if above is None else activation(above)
    assert isinstance(module, nn.Linear)
    if function is None or above is None:
        return _least_squares(link, error, gradient, noise, torch.ones_like(error[0])), error
    kinked = isinstance(above, KINKED)
    if kinked and settled is not None:
        error = error * _slope_at(above, function, settled)
        return _least_squares(link, error, gradient, noise, torch.ones_like(error[0])), error
    slope, open_rows = function.slope(output), _between(output, OPEN) & kinked
    for _ in range(MAX_TURNS):
        solution = _fitting(link, error * slope, gradient, noise, (~open_rows).to(slope), drop=kinked)
        inputs = module(solution)
        before, slope = slope, _slope_at(above, function, inputs)
        open_rows = _between(inputs, (0, NEAR_ZERO)) & kinked
        if not kinked or slope.equal(before):
            break
    return solution, error * before


def _between(value: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Units, shape (outputs,), of which some example's value lies between the bounds, in units of the largest."""
    size = value.abs() / value.abs().max()
    return ((size >= bounds[0]) & (size <= bounds[1])).any(0)


def _slope_at(module: nn.Module, function: Activation, inputs: Tensor) -> Tensor:
    below = module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
    return torch.where(inputs > 0, 1.0, below) if isinstance(module, KINKED) else function.slope(module(inputs))


def _fitting(link: Link, error: Tensor, gradient: Tensor, noise: Tensor, rows: Tensor, *, drop: bool) -> Tensor:
    """Least squares over the rows that fit together: the worst are left out until all do, or few are left."""
    weights = noise.square().reciprocal()  # 0 where the gradient is not known
    known = (weights > 0).sum(1).clamp(min=1)
    while True:
        solution = _least_squares(link, error, gradient, noise, rows)
        off = ((error.T @ solution - gradient).square() * weights).sum(1).div(known).sqrt() * rows
        worst = float(off.max())
        if not drop or worst <= MISFIT:
            return solution
        fewer = rows * (off <= max(MISFIT, worst / 3))
        if int(fewer.sum()) < 2 * len(error):
            return solution
        rows = fewer


def _least_squares(link: Link, error: Tensor, gradient: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
    """Inputs, shape (batch, inputs), that explain dW = error' inputs over the given rows, each weighed by its noise.

    Raises: NoChain where they leave an example open.
    """
    singular = torch.linalg.svdvals(error * rows)
    if not singular[-1] > LOST * singular[0]:
        raise NoChain(f"layer {link.name}: an example's error does not reach it, or equals another's")
    weights = noise.reciprocal() * rows[:, None]  # 0 where the gradient is not known
    if bool((weights == weights[:, :1]).all()):  # one system serves every input
        return torch.linalg.lstsq(error.T * weights[:, :1], gradient * weights).solution
    squared = weights.square()
    pairs = (error[:, None] * error[None]).flatten(0, 1) @ squared
    factor, failed = torch.linalg.cholesky_ex(pairs.view(len(error), len(error), -1).permute(2, 0, 1))
    if failed.any():
        raise NoChain(f"layer {link.name}: too few rows of its gradient are known for {len(error)} examples")
    return torch.cholesky_solve((error @ (squared * gradient)).T[:, :, None], factor)[:, :, 0].T
