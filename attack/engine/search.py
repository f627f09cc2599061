"""Gradient matching as a search: L-BFGS from several starts at once, a divergence check, and fresh starts for those
that fail.

Takes where to start and what to minimize; returns the best variables by the gradient match. It knows no picture, no
label and no truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from attack.engine.context import Context, Progress
from attack.engine.film import Film
from attack.engine.lbfgs import Searches
from attack.engine.target import Target

ROUNDS = 6000
"""Evaluations of one search: the released code of Deep Leakage from Gradients takes up to 300 times 20."""
STRIDE = 20
"""Rounds between two looks at the searches."""
PATIENCE = 600
"""Evaluations within which the residual must fall by a tenth, or the search counts as stuck."""
DIVERGED = 1e3
"""Relative residual above which a search is given up; a random start has about 1."""
RESTARTS = 4
HISTORY = 100
"""Pairs, as in the released code."""
FLOAT32_GOAL = 1e-4
"""Relative residual to which float32 searches, where it does: its own error stalls it at 1e-5 to 5e-5."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The best of all starts."""

    variables: list[Tensor]
    residual: float
    film: Film
    evaluations: int
    restarts: int
    reason: str | None
    """Why the search ended, where what it found is not within the tolerance."""


def search(
    target: Target,
    context: Context,
    *,
    method: str,
    start: Callable[[], list[Tensor]],
    mismatch: Callable[[list[Tensor]], Tensor],
    restarts: int = RESTARTS,
    patience: int = PATIENCE,
    together: int | None = None,
    dtype: torch.dtype | None = None,
) -> Found:
    """Minimizes ||mismatch(variables)||^2 from `start()`, and from new starts where searches got stuck or diverged.

    Args:
        start: draws fresh variables of one search, float64; the first of them is the batch of inputs, of which frames
            are kept.
        mismatch: the differentiable difference from the observed gradient; variables with an axis of searches in front
            -> shape (searches, parameters). In the variables' precision.
        restarts: at most so many starts beside the first.
        patience: evaluations within which the residual must fall by a tenth, or a search counts as stuck.
        together: searches at once; None: one on a CPU, where more cost as much more, all elsewhere.
        dtype: None: float64 on a CPU, where it costs the same, and elsewhere float32 first, polished in float64.
    """
    here = target.device
    dtype = dtype or (torch.float64 if here.type == "cpu" else torch.float32)
    together = together or (1 if here.type == "cpu" else restarts + 1)
    run = _Run(target, context, method, start, mismatch, patience)
    run.go([run.draw for _ in range(restarts + 1)], together, dtype)
    if dtype == torch.float32:
        run.polish()
    return run.found()


class _Run:
    """Searches of one target, and the best that any of them has seen."""

    def __init__(
        self,
        target: Target,
        context: Context,
        method: str,
        start: Callable[[], list[Tensor]],
        mismatch: Callable[[list[Tensor]], Tensor],
        patience: int,
    ) -> None:
        self._target, self._context, self._method = target, context, method
        self._start, self._mismatch, self._patience = start, mismatch, patience
        self._shapes: list[torch.Size] = []
        self._films: list[Film] = []  # of each search under way
        self._ages: list[int] = []  # evaluations of each
        self.best: Tensor | None = None
        self.least = math.inf
        self._film = Film()
        self._evaluations = self._starts = 0
        self._reason: str | None = None

    def draw(self) -> Tensor:
        """A fresh start, flat."""
        self._starts += 1
        variables = self._start()
        self._shapes = [variable.shape for variable in variables]
        return torch.cat([variable.flatten() for variable in variables])

    def polish(self) -> None:
        """On from the best, in float64; what float32 took for its residual no longer counts."""
        assert self.best is not None
        rough, self.least = self.best.double(), math.inf
        self.best = rough
        self.go([lambda: rough], 1, torch.float64)

    def found(self) -> Found:
        """The best."""
        assert self.best is not None
        done = self.least <= self._target.tolerance
        return Found(
            variables=[part[0] for part in self._split(self.best[None])],
            residual=self.least,
            film=self._film,
            evaluations=self._evaluations,
            restarts=self._starts - 1,
            reason=None if done else f"{self._reason}, after {self._starts - 1} restarts",
        )

    def go(self, starts: list[Callable[[], Tensor]], together: int, dtype: torch.dtype) -> None:
        """Until a search arrives, no start is left, or the deadline passes."""
        goal = max(self._target.tolerance / 3, FLOAT32_GOAL if dtype == torch.float32 else 0.0)
        searches: Searches | None = None
        while starts or searches is None or len(searches):
            room = min(together - (0 if searches is None else len(searches)), len(starts))
            if room:
                fresh = torch.stack([starts.pop(0)() for _ in range(room)]).to(dtype)
                if searches is None:
                    searches = Searches(fresh.shape[1], history=HISTORY, dtype=dtype, device=fresh.device)
                searches.add(fresh, self._evaluate)
                self._films += [Film() for _ in range(room)]
                self._ages += [0] * room
            assert searches is not None
            keep = self._look(searches)
            arrived = self.least <= goal
            if arrived or not self._context.seconds_left:
                self._reason = None if arrived else "the deadline passed"
                self._films, self._ages = [], []
                return
            if not all(keep):
                searches.keep(torch.tensor(keep, device=searches.x.device))
                self._films = [film for film, kept in zip(self._films, keep, strict=True) if kept]
                self._ages = [age for age, kept in zip(self._ages, keep, strict=True) if kept]
                continue
            for _ in range(STRIDE):
                searches.round(self._evaluate)
                if not self._context.seconds_left:
                    break

    def _look(self, searches: Searches) -> list[bool]:
        """Takes note of every search; says which go on."""
        residuals = searches.value.clamp(min=0).sqrt().tolist()
        keep = []
        for row, residual in enumerate(residuals):
            film = self._films[row]
            film.take(self._ages[row], residual, self._split(searches.x[row : row + 1])[0][0])
            if self.best is None or residual < self.least:
                self.best, self._film = searches.x[row].clone(), film
                self.least = residual if math.isfinite(residual) else math.inf
            back = self._patience // STRIDE
            past = film.history[-1 - back][1] if len(film.history) > back else math.inf
            reason = _verdict(residual, past, self._ages[row], exhausted=bool(searches.exhausted[row]))
            self._reason = reason or self._reason
            keep.append(reason is None)
            self._ages[row] += STRIDE
        left = self._context.seconds_left
        self._context.progress(
            Progress(method=self._method, evaluations=self._evaluations, residual=self.least, seconds_left=left)
        )
        return keep

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            values = self._mismatch(self._split(x)).square().sum(1) / self._target.norm**2
            (gradients,) = torch.autograd.grad(values.sum(), x)
        self._evaluations += len(x)
        return values.detach(), gradients

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([math.prod(shape) for shape in self._shapes], dim=1)
        return [part.view(len(flat), *shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _verdict(residual: float, past: float, age: int, *, exhausted: bool) -> str | None:
    if not residual < DIVERGED:
        return "the search diverged"
    if exhausted or residual > 0.9 * past:
        return "the search got stuck"
    return f"no end after {ROUNDS} evaluations" if age >= ROUNDS else None
