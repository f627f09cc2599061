"""The picture behind the exact features of one block of convolution, ReLU and max pooling.

Each feature that is above zero is the value of one of its cell's positions, and no position's value is above its cell's
feature: with the positions known it is linear, and there are more features than pixels. Which positions passed is
annealed, by a softmax over how much each lacks. Where that ends in a wrong pattern, it is wrong in a part of the
picture only, and shows: some cells are not explained there. That part is annealed again, from a scale that fits what is
still missing and with the cells' weights shaken, while the rest is held; what leaves fewer cells unexplained is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, one_hot

from attack.engine.context import Context
from attack.engine.linearized import Operator, conjugate_gradients
from attack.engine.pooling import Block

ON = 1e-5
"""Features below this count as zero. This and what follows in units of the features' root mean square."""
SLACK, SLACK_END = 0.03, 3e-6
"""Where an annealing begins and ends."""
HELD = 1e-4
"""Where it begins for cells that are held, and by how much a cell may be off and count as explained."""
STEPS, MEND_STEPS = 80, 30
ITERATIONS, POLISH_ITERATIONS = 60, 300
"""Of conjugate gradients a step."""
TRIES = 60
"""Annealings of a part; some 20 are enough where it can be done at all."""
SPREAD = 1.5
"""Their slack is drawn between exp(-SPREAD) and exp(SPREAD) times what is missing."""
SHAKE = 0.5
"""Standard deviation of the logarithm of the factors with which the weights are shaken."""


class Picture:
    """The search for it.

    Args:
        features: the block's output, exact, shape (channels, rows, columns).
        input_range: of the picture.
    """

    def __init__(self, block: Block, features: Tensor, input_range: tuple[float, float], context: Context) -> None:
        self._block, self._features, self._range, self._context = block, features, input_range, context
        self._size = float(features.square().mean().sqrt())
        self._on = features > ON * self._size

    def search(self, start: Tensor) -> Tensor:
        """The picture, shape (channels, height, width), or the nearest that was come to."""
        x = self._anneal(start, torch.full_like(self._features, SLACK), STEPS)
        wrong, missing = self._unexplained(x)
        for _ in range(TRIES):
            if not wrong.any() or not self._context.seconds_left:
                break
            draw = torch.rand(1, generator=self._context.generator, dtype=torch.float64)
            slack = missing * float(torch.exp(SPREAD * (2 * draw - 1)))
            near = max_pool2d(wrong.any(0)[None, None].to(x), 3, 1, 1)[0, 0] > 0
            shake = torch.exp(SHAKE * self._context.normal(tuple(wrong.shape)).to(x))
            other = self._anneal(x, torch.where(near, slack, HELD).expand_as(self._features), MEND_STEPS, shake)
            left, lacks = self._unexplained(other)
            if left.sum() <= wrong.sum():
                x, wrong, missing = other, left, lacks
        return x

    def polish(self, pattern: Tensor, start: Tensor) -> Tensor:
        """The picture by the equalities alone, as exact as the features are.

        Args:
            pattern: a picture whose pattern is right.
            start: where to solve from; what the equalities leave open stays as it is there.
        """
        block = self._block
        cells = block.cells(block.forward(pattern))
        passed = one_hot(cells.argmax(-1), cells.shape[-1]) * (cells.amax(-1, keepdim=True) > 0)
        spread = block.uncells(passed.to(start))
        lacks = spread * (block.uncells(self._features[..., None].expand_as(cells)) - block.forward(start))
        diagonal = block.back(spread, squared=True) + 1e-9
        return start + self._solve(
            lambda p: block.back(spread * block.apply(p)), block.back(lacks), diagonal, POLISH_ITERATIONS, 1e-12
        )

    def _lacks(self, x: Tensor) -> Tensor:
        """What each position is below its cell's feature, shape (channels, rows, columns, positions)."""
        return self._features[..., None] - self._block.cells(self._block.forward(x))

    def _unexplained(self, x: Tensor) -> tuple[Tensor, float]:
        """Cells of which no position has the value, or one lies above it; and by how much the former are off, root mean
        square."""
        lacks = self._lacks(x) / self._size
        least = lacks.abs().amin(-1)
        off = (least > HELD) & self._on
        missing = float(least[off].square().mean().sqrt()) if off.any() else HELD
        return off | (lacks < -HELD).any(-1), missing

    def _anneal(self, x: Tensor, slack: Tensor, steps: int, shake: Tensor | None = None) -> Tensor:
        """From the slack of each cell down; the weights are shaken, where they are, in the first half."""
        block, end = self._block, SLACK_END * self._size
        for step in range(steps):
            lacks = self._lacks(x)
            least = lacks.abs().amin(-1, keepdim=True)
            scale = (self._size * slack * (SLACK_END / slack) ** (step / (steps - 1)))[..., None].clamp(min=end)
            weights = torch.softmax((least - lacks.abs()) / scale, -1) / (least + scale) * self._on[..., None]
            if shake is not None and step < steps // 2:
                weights = weights * shake[..., None]
            spread = block.uncells(torch.maximum(weights, torch.where(lacks < 0, 1 / scale, 0.0)))
            x = (x + self._step(spread, block.uncells(lacks))).clamp(*self._range)
        return x

    def _step(self, weights: Tensor, lacks: Tensor) -> Tensor:
        """The move that makes up for what positions lack, by weighted least squares."""
        block = self._block
        return self._solve(
            lambda p: block.back(weights * block.apply(p)) + 1e-6 * p,
            block.back(weights * lacks),
            block.back(weights, squared=True) + 1e-6,
            ITERATIONS,
            1e-4,
        )

    def _solve(self, multiply: Operator, right: Tensor, diagonal: Tensor, iterations: int, goal: float) -> Tensor:
        inverse = diagonal.reciprocal()
        return conjugate_gradients(
            multiply, right, self._context, goal=goal, iterations=iterations, precondition=lambda r: inverse * r
        )[0]
