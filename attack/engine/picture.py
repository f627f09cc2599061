"""The picture behind the exact features of one block of convolution, ReLU and max pooling.

Each feature that is above zero is the value of one of its cell's positions, and no position's value is above its cell's
feature: with the positions known it is linear, and there are more features than pixels. Which positions passed is
annealed, by a softmax over how much each lacks. Beside the features there is the convolution's gradient, E patches(x)',
each row with the weight that it deserves under the pattern believed so far; and total variation, which fades as the
annealing cools. Where that ends in a wrong pattern, it is wrong in a part of the picture only, and shows: some cells
are not explained there. That part is annealed again, from a scale that fits what is still missing and with the cells'
weights shaken, while the rest is held; what leaves fewer cells unexplained is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, one_hot

from attack.engine.context import Context
from attack.engine.linearized import Operator, conjugate_gradients
from attack.engine.pooling import Block
from attack.engine.priors import Variation

ON = 1e-5
"""Features below this count as zero. This and what follows in units of the features' root mean square."""
SLACK, SLACK_END = 0.03, 3e-6
"""Where an annealing begins and ends."""
HELD = 1e-4
"""Where it begins for cells that are held, and by how much a cell may be off and count as explained."""
STEPS, MEND_STEPS = 40, 30
ITERATIONS, POLISH_ITERATIONS = 30, 300
"""Of conjugate gradients a step."""
VARIATION = 1.0
"""Weight of a picture's differences at `SLACK`, in units of the convolution's gain; it goes with the slack's root."""
SMOOTH = 1e-4
"""Least difference that counts by its size, in units of the input range."""
ROW = 0.1
"""Errors of the gradient's rows, in units of what independent errors of the picture would make."""
TRIES, PATIENCE = 60, 10
"""Annealings of a part; and how many in a row may leave no fewer cells unexplained."""
SPREAD = 1.5
"""Their slack is drawn between exp(-SPREAD) and exp(SPREAD) times what is missing."""
SHAKE = 0.5
"""Standard deviation of the logarithm of the factors with which the weights are shaken."""


class Picture:
    """The search for it.

    Args:
        features: the block's output, exact, shape (channels, rows, columns).
        error: derivative of the loss by it, exact where it is above zero.
        gradient, noise: of the convolution's weight, shape (channels, input channels x kernel), and the standard
            deviation of each row's errors, shape (channels, 1); infinite where a row is not known.
        input_range: of the picture.
    """

    def __init__(
        self,
        block: Block,
        features: Tensor,
        error: Tensor,
        gradient: Tensor,
        noise: Tensor,
        input_range: tuple[float, float],
        context: Context,
    ) -> None:
        self._block, self._features, self._range, self._context = block, features, input_range, context
        self._size = float(features.square().mean().sqrt())
        self._on = features > ON * self._size
        self._error, self._gradient, self._noise = error * self._on, gradient, noise
        norm = self._error.flatten(1).norm(dim=1, keepdim=True)
        self._norm = norm + 1e-3 * norm.max()

    def search(self, start: Tensor, enough: Callable[[Tensor], bool] = lambda _: False) -> Tensor:
        """The picture, shape (channels, height, width), or the nearest that was come to.

        Args:
            enough: whether a picture need not be mended; it is asked of each that leaves fewer cells unexplained.
        """
        x = self._anneal(start, torch.full_like(self._features, SLACK), STEPS)
        wrong, missing = self._unexplained(x)
        idle = 0
        for _ in range(TRIES):
            done = not wrong.any() or (not idle and enough(x))
            if done or idle == PATIENCE or not self._context.seconds_left:
                break
            draw = torch.rand(1, generator=self._context.generator, dtype=torch.float64)
            slack = missing * float(torch.exp(SPREAD * (2 * draw - 1)))
            near = max_pool2d(wrong.any(0)[None, None].to(x), 3, 1, 1)[0, 0] > 0
            shake = torch.exp(SHAKE * self._context.normal(tuple(wrong.shape)).to(x))
            other = self._anneal(x, torch.where(near, slack, HELD).expand_as(self._features), MEND_STEPS, shake)
            left, lacks = self._unexplained(other)
            idle = 0 if left.sum() < wrong.sum() else idle + 1
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
        end = SLACK_END * self._size
        for step in range(steps):
            lacks = self._lacks(x)
            least = lacks.abs().amin(-1, keepdim=True)
            scale = (self._size * slack * (SLACK_END / slack) ** (step / (steps - 1)))[..., None].clamp(min=end)
            likely = torch.softmax((least - lacks.abs()) / scale, -1)
            weights = likely / (least + scale) * self._on[..., None]
            if shake is not None and step < steps // 2:
                weights = weights * shake[..., None]
            weights = torch.maximum(weights, torch.where(lacks < 0, 1 / scale, 0.0))
            x = (x + self._step(x, lacks, likely, weights, float(scale.max()))).clamp(*self._range)
        return x

    def _step(self, x: Tensor, lacks: Tensor, likely: Tensor, weights: Tensor, scale: float) -> Tensor:
        """The move that makes up for what positions lack and rows are off, by weighted least squares.

        Args:
            likely: that each position passed; a row's weight is what the rows are off under it.
            weights: of each position.
            scale: of the errors; the largest of all cells'.
        """
        block = self._block
        spread = block.uncells(weights)
        error = block.uncells(likely * self._error[..., None]).flatten(1)
        rest = self._gradient - error @ block.patches(x).T
        off = rest.square().mean(1, keepdim=True) + (ROW * scale / block.gain * self._norm).square()
        certainty = scale / (off + self._noise.square())
        fading = (scale / (SLACK * self._size)) ** 0.5
        smooth = max(SMOOTH * (self._range[1] - self._range[0]), scale / block.gain / 4)
        variation = Variation(x, VARIATION * block.gain * fading, smooth)

        def multiply(p: Tensor) -> Tensor:
            rows = (certainty * (error @ block.patches(p).T)).T @ error
            return block.back(spread * block.apply(p)) + block.unpatch(rows) + variation.normal(p) + 1e-6 * p

        right = block.back(spread * block.uncells(lacks)) + block.unpatch((certainty * rest).T @ error)
        size = (certainty * error.square()).sum(0).expand(rest.shape[1], -1)
        diagonal = block.back(spread, squared=True) + block.unpatch(size) + variation.diagonal + 1e-6
        return self._solve(multiply, right - variation.normal(x), diagonal, ITERATIONS, 1e-4)

    def _solve(self, multiply: Operator, right: Tensor, diagonal: Tensor, iterations: int, goal: float) -> Tensor:
        inverse = diagonal.reciprocal()
        return conjugate_gradients(
            multiply, right, self._context, goal=goal, iterations=iterations, precondition=lambda r: inverse * r
        )[0]
