"""One sentence from a gradient that is rounded, pruned or noisy: each token by the two rows that its slope stands in.

A token's slope, what the loss says of its embedding, is a part of two rows: of its word's and of its position's. Of a
single sentence, a position's row is that slope, and so each position is laid beside every word. What the last layer
adds where it is the word embeddings as well is searched beside it: the states of a masked language model's labels, as
soon as there is a sentence to compute them from; a causal one's token by token.

All is weighed by how exactly each element is known, so that what was not sent, within its bound, is no less of an
equation. The first sentence is then read again and again, with all that the one before explains taken off
(`attack.engine.explained`).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from attack.algorithms.base import Answer
from attack.engine.context import Context, Progress
from attack.engine.explained import COARSELY, Explained, Seen, gains, swaps
from attack.engine.film import Film
from attack.engine.labels import NoLabel
from attack.engine.layout import Layout, watched
from attack.engine.rivals import closest
from attack.engine.target import Target
from harness.models import IGNORED, LOSSES

ROUNDS = 8
"""Readings, at most."""
SWEEPS = 5
"""Visits to each place in a reading, at most."""
REPAIRS = 48
"""Texts tried behind the last reading, at most."""
FAR = 5.0
"""Standard deviations from which on nothing is an error."""
BEYOND = 1.75
"""The same of errors that have a bound: it is sqrt(3) = 1.73 deviations, those of errors uniform within it."""
STRAY = 1e-2
"""Share of elements that may be within their bound, and not zero, for errors to count as having one. What rounding and
pruning send is 0 or beyond; of what noise makes, most is within."""


def coarse_text(target: Target, context: Context) -> Answer:
    """The tokens and labels of a batch of one."""
    if target.batch_size != 1:
        return Answer(inputs=None, labels=None, reason="a gradient known coarsely is read for one sentence alone")
    film, seen = Film(), []
    best: Explained | None = None
    try:
        reader = Reader(target)
        tokens = reader.first()
        for evaluation in range(1, ROUNDS + 1):
            found = Explained(target, reader.layout, tokens, reader.labels(tokens))
            film.take(evaluation, found.residual, tokens)
            left = context.seconds_left
            context.progress(
                Progress(method="coarse-text", evaluations=evaluation, residual=found.residual, seconds_left=left)
            )
            if best is None or found.misfit < best.misfit:
                best = found
            seen.append(tokens)
            tokens = reader.again(found)
            if not left or any(tokens.equal(one) for one in seen):
                break
    except NoLabel as error:
        if best is None:
            return Answer(inputs=None, labels=None, reason=str(error))
    assert best is not None
    best, tried = repaired(target, best, context)
    film.take(len(film.history) + 1, best.residual, best.tokens)
    return Answer(inputs=best.tokens, labels=best.labels, film=film, evaluations=len(film.history) + tried)


def repaired(target: Target, found: Explained, context: Context) -> tuple[Explained, int]:
    """The text with one token or label changed at a time, as long as the whole gradient then matches better, and how
    many were tried."""
    better, tried = True, 0
    while better:
        better = False
        for text in closest(found)[0]:
            if not context.seconds_left or tried == REPAIRS:
                return found, tried
            tried += 1
            other = Explained(target, found.layout, *text)
            if other.misfit < found.misfit:
                found, better = other, True
                break
    return found, tried


class Reader:
    """Reads sentences off the embeddings' gradients. Raises: NoLabel."""

    def __init__(self, target: Target) -> None:
        assert target.tokens is not None
        self._target, self.layout, self._pad = target, Layout.of(target), target.tokens.pad
        self._words, self._places = (Seen.of(target, name) for name in (self.layout.words, self.layout.positions))
        self._head = Seen.of(target, self.layout.head)
        self._causal = target.loss is LOSSES["causal_lm"]
        used = length(self._places)
        if not used:
            raise NoLabel("the gradient of the position embeddings does not say how long the sentence is")
        if self._causal and used == len(self._places.values):
            raise NoLabel("the last position has a slope, and a causal model asks for no token behind it")
        self._slopes = self._places.values[:used]
        self._error = float(self._places.variance[:used].mean())

    def first(self) -> Tensor:
        """A sentence, int64, shape (1, length)."""
        variance = self._words.variance + self._error
        if self._causal:
            return self._prefixes(variance)
        if self._target.loss is LOSSES["masked_lm"] and self.layout.tied:
            # A label's row holds a state that is not known yet: as good as an error of that size.
            rows = (self._bias() < 0).nonzero()[:, 0]
            variance[rows] += self._words.values[rows].square().mean(1, keepdim=True)
        return Sorter([(self._words.values, variance, self._slopes)], self._pad).rows()[None]

    def again(self, found: Explained) -> Tensor:
        """The sentence, once more, with what another one explains taken off."""
        slopes, states = found.vectors(found.slopes)
        own = slopes.clone()
        given = torch.zeros_like(own)
        given[: len(self._slopes)] = self._slopes
        # The model's slopes are those of that sentence, and off as far as it is; the observed ones are by their errors.
        off = ((given - own).square().mean(1, keepdim=True) - self._error).clamp(min=0)
        slopes = (own * self._error + given * off) / (self._error + off)
        if len(self._slopes) < len(own):
            slopes[len(self._slopes) :] = 0
        error = (self._error * off / (self._error + off)).mean()
        words = found.matrix(self.layout.words)
        tied = states if self.layout.tied else torch.zeros_like(states)
        rows = words.values.index_add(0, found.tokens[0], own + tied)
        sets = [(rows, words.variance + error, slopes + tied)]
        if self._causal and not self.layout.tied:
            head = found.matrix(self.layout.head)
            sets.append((head.values.index_add(0, found.tokens[0], states), head.variance, states))
        return Sorter(sets, self._pad).rows()[None]

    def labels(self, tokens: Tensor) -> Tensor:
        """The likeliest labels of a sentence, as the loss takes them."""
        if self._causal:
            return tokens
        states, logits = self._run(tokens)
        if self._target.loss is LOSSES["cross_entropy"]:
            vectors = logits.softmax(1)[0, :, None] * states - self._head.values
            # Of each class, its label takes one state off its row.
            return gains(vectors, self._head.variance, states)[:, 0].argmax()[None]
        return self._masked(tokens, states[0], logits[0].softmax(1))

    def _prefixes(self, variance: Tensor) -> Tensor:
        """A causal model's sentence, token by token: each is in its place, and the label of the state before."""
        count = len(self._slopes)
        rows, head = self._words.values.clone(), self._head.values.clone()
        tokens: list[int] = []
        for at in range(count + 1):
            slope = self._slopes[at] if at < count else torch.zeros_like(self._slopes[0])
            state = torch.zeros_like(slope)
            if tokens:
                state = -self._run(torch.tensor([tokens], device=rows.device))[0][0, -1] / count
            if self.layout.tied:
                slope = slope + state
            scores = gains(rows, variance, slope[None])
            if not self.layout.tied:
                scores += gains(head, self._head.variance + self._error, state[None])
            scores[self._pad] = -torch.inf
            chosen = int(scores.argmax())
            rows[chosen] -= slope
            head[chosen] -= state
            tokens.append(chosen)
        return torch.tensor([tokens], device=rows.device)

    def _bias(self) -> Tensor:
        """The last bias's gradient, 0 where that may be an error."""
        if self.layout.bias is None:
            raise NoLabel("the last layer has no bias, whose gradient would name the labels")
        seen = Seen.of(self._target, self.layout.bias)
        return torch.where(seen.values.square() > FAR**2 * seen.variance, seen.values, 0.0)

    def _masked(self, tokens: Tensor, states: Tensor, chances: Tensor) -> Tensor:
        bias = self._bias()
        rows = (bias < 0).nonzero()[:, 0]
        parts = (chances.mean(0) - bias)[rows]
        fits = []
        for count in range(1, len(states) + 1):
            counts = (parts * count).round()
            if int(counts.sum()) == count:
                fits.append((float((parts - counts / count).square().sum()), count))
        if not fits:
            raise NoLabel("the last bias's gradient does not say how many tokens were asked for")
        count = min(fits)[1]
        wanted = rows.repeat_interleave((parts * count).round().long())
        left = self._head.values
        if self.layout.tied:
            left = left.index_add(0, tokens[0, : len(self._slopes)], -self._slopes)
        scores = gains(left[wanted], self._head.variance[wanted] + self._error, -states / count)
        order = linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1]
        labels = torch.full_like(tokens, IGNORED)
        labels[0, torch.as_tensor(order, device=tokens.device)] = wanted
        return labels

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer is given, and the logits."""
        with torch.no_grad(), watched(self._target.model.get_submodule(self.layout.states)) as seen:
            logits = self._target.model(tokens)
        given, output = seen[-1]
        return (given if self._target.loss is LOSSES["cross_entropy"] else output), logits


class Sorter:
    """Finds the row that each vector is a part of, so that as little as can be is left of the rows.

    Args:
        sets: matrices, each with rows and the variance of their errors, shape (rows, width), and vectors, shape (n,
            width); the n-th vectors of all sets are in one row.
        barred: a row that none is in.
    """

    def __init__(self, sets: list[tuple[Tensor, Tensor, Tensor]], barred: int) -> None:
        self._sets = [(rows.clone(), variance, vectors) for rows, variance, vectors in sets]
        self._barred = barred
        self._scores = torch.stack([gains(*each) for each in sets]).sum(0)
        self._scores[barred] = -torch.inf
        self._count = self._scores.shape[1]

    def rows(self) -> Tensor:
        """int64, shape (n,)."""
        where, which = linear_sum_assignment(self._scores.clamp(min=-1e300).cpu().numpy(), maximize=True)
        chosen = [0] * self._count
        for row, vector in zip(where.tolist(), which.tolist(), strict=True):
            chosen[vector] = row
            self._put(vector, row, 1)
        for _ in range(SWEEPS):
            before = list(chosen)
            for vector in range(self._count):
                self._put(vector, chosen[vector], -1)
                chosen[vector] = int(self._scores[:, vector].argmax())
                self._put(vector, chosen[vector], 1)
                other, better = self._swap(vector, chosen)
                if better > 0:
                    rows = chosen[vector], chosen[other]
                    for one, row, sign in zip((vector, other) * 2, (*rows, *rows[::-1]), (-1, -1, 1, 1), strict=True):
                        self._put(one, row, sign)
                    chosen[vector], chosen[other] = rows[1], rows[0]
            if chosen == before:
                break
        return torch.tensor(chosen, device=self._scores.device)

    def _put(self, vector: int, row: int, sign: int) -> None:
        """Takes a vector out of what is left of a row, or puts it back."""
        score = torch.zeros_like(self._scores[row])
        for left, variance, vectors in self._sets:
            left[row] -= sign * vectors[vector]
            score += gains(left[row, None], variance[row, None], vectors)[0]
        if row != self._barred:
            self._scores[row] = score

    def _swap(self, vector: int, chosen: list[int]) -> tuple[int, float]:
        """The vector that this one would best change rows with, and by how much that improves the match."""
        rows = torch.tensor(chosen, device=self._scores.device)
        better = torch.stack(
            [swaps(left[rows], variance[rows], vectors, vector) for left, variance, vectors in self._sets]
        ).sum(0)
        better[rows == rows[vector]] = -torch.inf
        other = int(better.argmax())
        return other, float(better[other])


def length(places: Seen) -> int:
    """Tokens of a sentence, by the rows of its positions that are no errors; 0 where every row may be one."""
    errors = places.variance.sqrt()
    within = (places.values != 0) & (places.values.abs() <= COARSELY * errors)
    if within.float().mean() < STRAY:
        used = (places.values.abs() > BEYOND * errors).any(1)
    else:
        width = places.values.shape[1]
        used = (places.values / errors).square().sum(1) > width + FAR * (2 * width) ** 0.5
    rows = used.nonzero()[:, 0]
    return int(rows.max()) + 1 if len(rows) else 0
