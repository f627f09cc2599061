"""What a search on dummy text has read so far: tokens over iterations, and the best of them by the gradient match.

Shared by the attacks that search text. The match is of tokens, in float64; an embedding's counts for nothing.
"""

from __future__ import annotations

from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context, Progress
from attack.engine.dummy_text import DummyText
from attack.engine.film import Film
from attack.engine.target import Target

STRIDE = 25
"""Iterations between two looks."""


class Reading:
    """Looks at a search, and remembers."""

    def __init__(self, target: Target, context: Context, dummy: DummyText, *, method: str) -> None:
        self._target, self._context, self._dummy, self._method = target, context, dummy, method
        self._film = Film()
        self._best: tuple[Tensor, Tensor] | None = None
        self.residual = float("inf")
        """Relative gradient residual of the best tokens."""

    def look(self, iteration: int, z: Tensor, evaluations: int) -> bool:
        """Takes note of the tokens; says whether they are a match, so that the search may end."""
        tokens, labels = self._dummy.read(z.detach())
        residual = self._target.residual(tokens, labels)
        self._film.take(iteration, residual, tokens)
        if residual < self.residual or self._best is None:
            self._best, self.residual = (tokens, labels), residual
        left = self._context.seconds_left
        self._evaluations = evaluations
        self._context.progress(
            Progress(method=self._method, evaluations=evaluations, residual=self.residual, seconds_left=left)
        )
        return residual <= self._target.tolerance

    def answer(self) -> Answer:
        """The best tokens. There must have been a look."""
        assert self._best is not None
        tokens, labels = self._best
        found = self.residual <= self._target.tolerance
        reason = "the search got stuck" if self._context.seconds_left else "the deadline passed"
        return Answer(
            inputs=tokens,
            labels=labels,
            film=self._film,
            evaluations=self._evaluations,
            reason=None if found else reason,
        )
