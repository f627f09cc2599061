"""The hyper-parameters with which an update rule explains what the ranks' gradients say of their weights.

In: the last layer's initial weights and averages, and the witnesses of each step. Out: how well a variant explains them
at its best. Levenberg-Marquardt on the witnesses' residuals, from one step to the next; the rules are torch's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attack.engine.context import Context
from attack.inference.layer import Layer
from attack.inference.variants import Values, Variant, from_line, to_line
from attack.inference.witness import Witness, size
from harness.models import load_optimizer

LIMIT = 4.0
"""Largest residual of weights that explain a gradient, root mean square in units of its noise. Right ones have 0.1 to
1.2 on convolutional and fully connected nets, batches of 1 to 16; what an optimizer does in a step makes 1e3 to 1e6."""
ITERATIONS = 25
MOST_LENGTHS = 2
"""First steps that are tried where a batch's examples suggest several."""
NEARLY = 1e-2
"""How far the length of an update may be off before its witnesses are asked."""
SAME = 1e-6
"""Relative distance up to which two directions are one."""
DIFFERENCE = 1e-4
"""For derivatives, on the scale of `variants.to_line`."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Evidence:
    """What the wire says of one linear layer over the first steps."""

    layer: Layer
    initial: Tensor
    """float32, flat: weight and bias that the first step begins with."""
    averages: list[Tensor]
    """float32, flat: what each step was taken with, from the first."""
    witnesses: list[list[Witness]]
    """By step; those of the first step are heard."""

    _lengths: list[tuple[Tensor, list[float]]] = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> int:
        """Steps whose weights a rule says."""
        return min(len(self.averages) + 1, len(self.witnesses))

    def heard(self, steps: int) -> list[tuple[int, Witness]]:
        """The checks beyond the first step, with how many steps lie before each; of fewer steps than these."""
        return [(step, one) for step in range(1, min(steps, self.depth)) for one in self.witnesses[step] if one.heard]

    def roll(self, spec: str, steps: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """[b, W] before each of so many steps, in float64, computed in `dtype`. Raises: ValueError by the optimizer."""
        weight, bias = self.initial.to(dtype).split([self.layer.classes * self.layer.features, self.layer.classes])
        parameters = [nn.Parameter(weight.view(self.layer.classes, -1).clone()), nn.Parameter(bias.clone())]
        rule = load_optimizer(spec, parameters)
        seen = [self.layer.matrix(self.initial.double())]
        for average in self.averages[: steps - 1]:
            parts = average.to(dtype).split([weight.numel(), bias.numel()])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter).clone()
            rule.step()
            seen.append(self.layer.matrix(torch.cat([one.detach().flatten() for one in parameters]).double()))
        return seen

    def lengths(self, direction: Tensor, context: Context) -> list[float]:
        """How far the first step likely went, if it went in this direction, [b, W]: in units of it, likeliest first."""
        norm = float(torch.linalg.vector_norm(direction))
        for known, lengths in self._lengths:
            ratio = norm / float(torch.linalg.vector_norm(known))
            if torch.dist(direction, ratio * known) < SAME * norm:
                return [length / ratio for length in lengths]
        initial = self.layer.matrix(self.initial.double())
        for one in self.witnesses[1]:
            if found := one.scales(initial, direction, context)[:MOST_LENGTHS]:
                break
        else:
            found = []
        self._lengths.append((direction, found))
        return found

    def residuals(self, spec: str, steps: int, *, dtype: torch.dtype = torch.float64) -> list[float]:
        """Of each check of fewer steps, root mean square in units of noise."""
        rolled = self.roll(spec, steps, dtype=dtype)
        return [size(one.residual(rolled[step])) for step, one in self.heard(steps)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A variant at its best."""

    variant: Variant
    values: Values
    residuals: tuple[float, ...]
    """Of the checks, in the order of `Evidence.heard`, as far as they were explained and of one step more."""
    steps: int
    """It explains the checks of fewer steps than this."""
    errors: Values | None = None
    """Standard deviation of each value, where all is explained."""

    @property
    def worst(self) -> float:
        """The largest residual."""
        return max(self.residuals, default=float("inf"))

    @property
    def total(self) -> float:
        """Root mean square of all residuals."""
        return math.sqrt(sum(one**2 for one in self.residuals) / max(1, len(self.residuals)))

    @property
    def spec(self) -> str:
        """With all digits."""
        return self.variant.spec(self.values)


def fit(variant: Variant, evidence: Evidence, context: Context, *, hear: bool) -> Fit | None:
    """The variant's best fit from any of its starts; None where not even a learning rate can be found.

    Args:
        hear: whether witnesses of batches that nobody has understood yet are to be asked at the weights that it says.
    """
    best: Fit | None = None
    for start in variant.starts:
        before, after = evidence.roll(variant.direction(start), 2)
        for lr in evidence.lengths(after - before, context):
            values = {"lr": lr, **dict(zip(variant.free, start, strict=True))}
            found = _fit_from(variant, values, evidence, context, hear)
            if best is None or (found.steps, -found.worst) > (best.steps, -best.worst):
                best = found
            if (best.steps == evidence.depth and best.worst <= LIMIT) or not context.seconds_left:
                return best
    return best


def _fit_from(variant: Variant, values: dict[str, float], evidence: Evidence, context: Context, hear: bool) -> Fit:
    steps = 1
    residuals: list[float] = []
    errors: Values | None = None
    for last in range(1, evidence.depth):
        asked = evidence.witnesses[last]
        if hear and not all(one.heard for one in asked):
            values = _hear(variant, values, evidence, context, last)
        if asked and not any(one.heard for one in asked):
            break
        if asked:
            values, residuals, errors = _descend(variant, values, evidence, last + 1)
        if max(residuals, default=0.0) > LIMIT:
            break
        steps = last + 1
    return Fit(variant=variant, values=values, residuals=tuple(residuals), steps=steps, errors=errors)


def _hear(
    variant: Variant, values: dict[str, float], evidence: Evidence, context: Context, step: int
) -> dict[str, float]:
    """Asks the witnesses of a step, if the last update, as the rule has it, is one that their examples agree on: to
    look for examples that are not there takes long. Returns the values, the momentum read from what they agree on."""
    waiting = [one for one in evidence.witnesses[step] if not one.heard]
    if step == 2 and "momentum" in variant.free and variant.optimizer == "sgd" and not variant.fixed:
        none, full = ({**values, "momentum": momentum} for momentum in (1e-6, 1 - 1e-6))
        base, end = (evidence.roll(variant.spec(one), step + 1)[step] for one in (none, full))
        found = [s for s in waiting[0].scales(base, end - base, context) if s < 1]
        values = {**values, "momentum": found[0]} if found else values
    before, after = evidence.roll(variant.spec(values), step + 1)[-2:]
    if any(abs(s - 1) < NEARLY for s in waiting[0].scales(before, after - before, context)):
        for one in waiting:
            one.hear(after, context)
    return values


def _descend(
    variant: Variant, values: Values, evidence: Evidence, steps: int
) -> tuple[dict[str, float], list[float], Values]:
    """The values that explain the checks of fewer steps best, their residuals, and the values' errors."""
    names = variant.names
    x = torch.tensor([to_line(name, values[name]) for name in names], dtype=torch.float64)

    def at(x: Tensor) -> Tensor:
        return _residual(variant, _values(names, x), evidence, steps)

    r, damping = at(x), 1e-3
    loss = float(r.square().sum())
    for _ in range(ITERATIONS):
        slopes = _slopes(at, x, r)
        normal = slopes.T @ slopes
        damped = normal + damping * normal.diagonal().diag() + 1e-12 * torch.eye(len(x), dtype=torch.float64)
        tried = x - torch.linalg.solve(damped, slopes.T @ r)
        r_tried = at(tried)
        loss_tried = float(r_tried.square().sum())
        if loss_tried < loss:
            gain, x, r, loss, damping = (loss - loss_tried) / loss, tried, r_tried, loss_tried, damping / 10
            if gain < 1e-4:
                break
        else:
            damping *= 10
            if damping > 1e8:
                break
    found, slopes = _values(names, x), _slopes(at, x, r)
    spread = torch.linalg.pinv(slopes.T @ slopes, rtol=1e-14).diagonal().sqrt()
    idle = slopes.square().sum(0) < 1e-6  # a value that changes nothing may be any
    errors = {
        name: math.inf if idle[i] else abs(from_line(name, float(x[i] + spread[i])) - found[name])
        for i, name in enumerate(names)
    }
    return found, evidence.residuals(variant.spec(found), steps), errors


def _residual(variant: Variant, values: Values, evidence: Evidence, steps: int) -> Tensor:
    rolled = evidence.roll(variant.spec(values), steps)
    return torch.cat([one.residual(rolled[step]).flatten() for step, one in evidence.heard(steps)])


def _values(names: Sequence[str], x: Tensor) -> dict[str, float]:
    return {name: from_line(name, float(value)) for name, value in zip(names, x, strict=True)}


def _slopes(at: Callable[[Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
    """Shape (equations, values), by differences."""
    columns = []
    for i in range(len(x)):
        moved = x.clone()
        moved[i] -= DIFFERENCE  # towards what may be: a smaller rate
        columns.append((r - at(moved)) / DIFFERENCE)
    return torch.stack(columns, 1)
