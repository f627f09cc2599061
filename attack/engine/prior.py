"""What is assumed of inputs where the equations leave them open: pictures are smooth but for edges, and in a range.

A prior is an energy, minus the logarithm of a density. At each place there is a quadratic above it that touches it
there: least squares can use that, and a step down the quadratic is one down the energy (iteratively reweighted least
squares). Knows no model and no gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

OPPONENT = ((1.0, 1.0, 1.0), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))
"""Brightness, red against green, yellow against blue: in photographs nearly independent of each other."""
CHROMA = 3.0
"""Differences of neighboring pixels in the two colors are so many times smaller than in brightness."""
DIFFERENCE = 0.05
"""Usual difference of neighboring pixels, in units of the range."""
EDGE = 0.02
"""Difference, in units of the range, below which it counts by its square and above which by its size."""
LEVEL = 3.0
"""Standard deviation of a pixel from the middle of the range, in its units: next to nothing is assumed."""
BOX = 0.03
"""Standard deviation of how far outside its range a pixel may lie, in units of that."""


class Quadratic(Protocol):
    """A quadratic in x that touches an energy at one place."""

    def energy(self, x: Tensor) -> float:
        """Its value, but for a constant."""

    @property
    def gradient(self) -> Tensor:
        """Its derivative at the place where it touches."""

    def multiply(self, v: Tensor) -> Tensor:
        """Its second derivative times v: the precision of the prior. Of a batch of one, v may be a stack of several."""

    def add_to(self, system: Tensor) -> None:
        """Adds the second derivative, written out, to a matrix of shape (elements of the batch, the same)."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """A draw from a normal distribution whose covariance is the second derivative."""


class Prior(Protocol):
    """What is assumed of a batch of inputs."""

    def at(self, x: Tensor) -> Quadratic:
        """The quadratic that touches at x."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """Every element by itself, all with one mean and one variance."""

    mean: float
    variance: float

    def at(self, x: Tensor) -> Quadratic:
        return _Gaussian(self, x)


@dataclasses.dataclass(frozen=True, slots=True)
class _Gaussian:
    prior: Gaussian
    place: Tensor

    def energy(self, x: Tensor) -> float:
        return float((x - self.prior.mean).square().sum()) / (2 * self.prior.variance)

    @property
    def gradient(self) -> Tensor:
        return (self.place - self.prior.mean) / self.prior.variance

    def multiply(self, v: Tensor) -> Tensor:
        return v / self.prior.variance

    def add_to(self, system: Tensor) -> None:
        system.diagonal().add_(1 / self.prior.variance)

    def draw(self, generator: torch.Generator) -> Tensor:
        return _normal(self.place, generator) / self.prior.variance**0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Inputs of shape (channels, height, width): total variation of opponent colors, rounded off at zero, and a box.

    The differences of all colors at one place in one direction are a vector, and its length counts: edges are common
    to the colors.
    """

    input_range: tuple[float, float]

    def at(self, x: Tensor) -> Quadratic:
        low, high = self.input_range
        unit = (x - low) / (high - low)
        across, down = _differences(unit)
        weights = [1 / (DIFFERENCE * (d.square().sum(1, keepdim=True) + EDGE**2).sqrt()) for d in (across, down)]
        return _Pictures(low, high - low, unit, weights[0], weights[1])


@dataclasses.dataclass(frozen=True, slots=True)
class _Pictures:
    low: float
    span: float
    place: Tensor
    """In units of the range, from 0."""
    across: Tensor
    down: Tensor
    """Weights of the differences, shape (batch, 1, height, width) less one row or column."""

    def energy(self, x: Tensor) -> float:
        unit = (x - self.low) / self.span
        across, down = _differences(unit)
        rough = (self.across * across.square()).sum() + (self.down * down.square()).sum()
        outside = (unit - unit.clamp(0, 1)).square().sum() / BOX**2
        return float(rough + outside + (unit - 0.5).square().sum() / LEVEL**2) / 2

    @property
    def gradient(self) -> Tensor:
        rough = self._rough(self.place)
        outside = (self.place - self.place.clamp(0, 1)) / BOX**2
        return (rough + outside + (self.place - 0.5) / LEVEL**2) / self.span

    def multiply(self, v: Tensor) -> Tensor:
        return (self._rough(v) + self._own * v) / self.span**2

    def add_to(self, system: Tensor) -> None:
        batch, channels, height, width = self.place.shape
        colors, pixels = _colors(self.place), height * width
        mixed = colors.T @ colors / self.span**2
        blocks = system.view(batch, channels, pixels, batch, channels, pixels)
        for example in range(batch):
            rough = _neighbors(self.across[example, 0], self.down[example, 0])
            for one in range(channels):
                for other in range(channels):
                    if mixed[one, other]:
                        blocks[example, one, :, example, other] += mixed[one, other] * rough
        system.diagonal().add_(self._own.flatten() / self.span**2)

    def draw(self, generator: torch.Generator) -> Tensor:
        across, down = (_normal(d, generator) for d in _differences(self.place))
        rough = _scatter(across * self.across.sqrt(), down * self.down.sqrt())
        return (rough + _normal(self.place, generator) * self._own.sqrt()) / self.span

    @property
    def _own(self) -> Tensor:
        outside = (self.place < 0) | (self.place > 1)
        return outside.to(self.place) / BOX**2 + 1 / LEVEL**2

    def _rough(self, v: Tensor) -> Tensor:
        across, down = _differences(v)
        return _scatter(across * self.across, down * self.down)


def _colors(v: Tensor) -> Tensor:
    """The change to opponent colors, shape (channels, channels)."""
    if v.shape[1] != 3:
        return torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    rows = torch.tensor(OPPONENT, dtype=v.dtype, device=v.device)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows[1:] *= CHROMA
    return rows


def _differences(v: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbors in a row and in a column, by opponent color."""
    colors = torch.einsum("kc,bchw->bkhw", _colors(v), v)
    return colors.diff(dim=3), colors.diff(dim=2)


def _scatter(across: Tensor, down: Tensor) -> Tensor:
    """The adjoint of `_differences`."""
    pad = torch.nn.functional.pad
    rows = pad(across, (1, 0)) - pad(across, (0, 1))
    columns = pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))
    return torch.einsum("kc,bkhw->bchw", _colors(across), rows + columns)


def _neighbors(across: Tensor, down: Tensor) -> Tensor:
    """The sum over neighbors of weight times squared difference, as a matrix, shape (pixels, pixels): what `_scatter`
    makes of weighted `_differences`, in one color."""
    height, width = across.shape[0], down.shape[1]
    place = torch.arange(height * width, device=across.device).view(height, width)
    found = across.new_zeros(height * width, height * width)
    for weights, one, other in ((across, place[:, 1:], place[:, :-1]), (down, place[1:], place[:-1])):
        pairs = one.flatten(), other.flatten()
        for row, column, sign in ((0, 0, 1), (1, 1, 1), (0, 1, -1), (1, 0, -1)):
            found.index_put_((pairs[row], pairs[column]), sign * weights.flatten(), accumulate=True)
    return found


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
