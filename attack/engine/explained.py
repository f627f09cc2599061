"""A text with its labels -> what it explains of an observed gradient, and by how much another token or label in any
place would explain more.

The gradient of the word embeddings is a sum of slopes: what the loss says of a token's embedding stands in its word's
row. That of the last layer is one of states: of each label, its state stands in the label's row, by its share and with
a minus. Where the embeddings are the last layer, both stand in one matrix. So another token or label in a place moves
one vector from a row to another, and what that does to

    sum over elements of (observed - explained)^2 / variance

is had for all of them at once. What else it changes, in the slopes themselves and in all other parameters, only makes
a wrong one worse; that is left out.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from attack.engine.layout import Layout, watched
from attack.engine.target import Target
from harness.models import IGNORED, LOSSES

COARSELY = 1.7
"""Bound, in units of the whole error's deviation, from which on observing makes nearly all of it: at most sqrt(3)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A parameter's gradient as it was observed, or what is left of it."""

    values: Tensor
    """float64, the parameter's shape."""
    variance: Tensor
    """The same: of each element's error; infinite where it is not known."""

    @classmethod
    def of(cls, target: Target, name: str, *, left: Tensor | None = None) -> Seen:
        """Of the parameter of that name.

        Args:
            left: what is left of the whole gradient, shape (parameters,).
        """
        at = [each for each, _ in target.model.named_parameters()].index(name)
        values = target.gradient if left is None else left
        return cls(values=target.tensors(values)[at], variance=target.tensors(target.noise)[at].square())


def gains(rows: Tensor, variance: Tensor, vectors: Tensor) -> Tensor:
    """By how much the match improves where a vector is taken out of what a row leaves unexplained.

    Args:
        rows, variance: shape (rows, width).
        vectors: shape (n, width).

    Returns: shape (rows, n).
    """
    weights = 1 / variance
    return 2 * (rows * weights) @ vectors.T - weights @ vectors.square().T


def moves(left: Tensor, variance: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
    """By how much the match improves where a vector moves from its row to another.

    Args:
        left: what each row leaves unexplained, shape (rows, width).
        variance: the same shape.
        vectors: shape (n, width).
        rows: that each vector stands in, int64, shape (n,).

    Returns: shape (rows, n), minus infinity for the row that it is in.
    """
    taken = ((2 * left[rows] * vectors + vectors.square()) / variance[rows]).sum(1)
    found = gains(left, variance, vectors) - taken
    found[rows, torch.arange(len(rows), device=rows.device)] = -torch.inf
    return found


def swaps(left: Tensor, variance: Tensor, vectors: Tensor, which: int) -> Tensor:
    """By how much the match improves where a vector changes rows with another; not for two that are in one row.

    Args:
        left: what its row leaves unexplained, of each vector, shape (n, width).
        variance: the same shape.
        vectors: shape (n, width).
        which: the one vector.

    Returns: shape (n,).
    """
    change = vectors[which] - vectors
    own = (2 * left[which] * change + change.square()) / variance[which]
    return -(own + (change.square() - 2 * left * change) / variance).sum(1)


class Explained:
    """One batch of text, run through the model.

    Args:
        tokens: int64, shape (batch, length), padded.
        labels: int64, shape (batch, length) or (batch,).
    """

    def __init__(self, target: Target, layout: Layout, tokens: Tensor, labels: Tensor) -> None:
        self._target, self.layout = target, layout
        self.tokens, self.labels = tokens, labels
        self.causal, self.masked = (target.loss is LOSSES[name] for name in ("causal_lm", "masked_lm"))
        parameters = dict(target.model.named_parameters())
        words = parameters[layout.words].detach()[tokens].requires_grad_()
        with torch.enable_grad():
            with watched(target.model.get_submodule(layout.states)) as seen:
                self.logits = target.model(tokens, words)
            loss = target.loss(self.logits, labels)
            slopes, *parts = torch.autograd.grad(
                loss, [words, *parameters.values()], allow_unused=True, materialize_grads=True
            )
        self.logits = self.logits.detach()
        self.slopes = slopes
        """float64, shape (batch, length, width): of the loss by each token's embedding."""
        given, output = (each.detach() for each in seen[-1])
        self.states = output if target.loss is not LOSSES["cross_entropy"] else given
        """What the last layer was given."""
        at = list(parameters).index(layout.words)
        parts[at] = parts[at].index_add(0, tokens.flatten(), slopes.flatten(0, 1))
        self.left = (target.gradient - torch.cat([part.flatten() for part in parts])) * target.known
        """float64, shape (parameters,): what is observed and not explained."""

    @property
    def residual(self) -> float:
        """As `Target.residual`."""
        return float(torch.linalg.vector_norm(self.left)) / self._target.norm

    @functools.cached_property
    def misfit(self) -> float:
        """Sum over elements of (observed - explained)^2 / variance."""
        return float((self.left / self._target.noise).square().sum())

    @functools.cached_property
    def looseness(self) -> float:
        """Mean square of what is left of those elements that are known coarsely, in units of the largest variance that
        their errors may have; at most 1 of a true text."""
        coarse = self._target.bound > COARSELY * self._target.noise
        return float((self.left[coarse] / self._target.noise[coarse]).square().mean()) if coarse.any() else 0.0

    @functools.cached_property
    def errors(self) -> float:
        """Mean square of what is left, in units of the errors' variance: that of the word embeddings' elements or that
        of all known ones, whichever is larger; 1 where both are less."""
        words = self.matrix(self.layout.words)
        own = (words.values.square() / words.variance).sum() / words.variance.isfinite().sum().clamp(min=1)
        return max(1.0, float(own), self.misfit / float(self._target.known.sum()))

    def vectors(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """What each token of the batch puts into its row of the word embeddings and of the last layer, shapes (tokens,
        width): its slope, as given; and the state that it is the label of, if the model is a causal language model."""
        states = torch.zeros_like(slopes)
        if self.causal:
            states[:, 1:] = -self.share * self.states[:, :-1]
        return slopes[self.real], states[self.real]

    def better_tokens(self) -> Tensor:
        """By how much another token in each place would improve the match, shape (vocabulary, tokens of the batch)."""
        assert self._target.tokens is not None
        rows = self.tokens[self.real]
        found = torch.stack([moves(*each, rows) for each in self._sets()]).sum(0)
        found[self._target.tokens.pad] = -torch.inf
        return found

    def better_swaps(self) -> Tensor:
        """The same for two tokens in each other's places, shape (tokens, tokens), each pair once; minus infinity for
        equal ones."""
        rows = self.tokens[self.real]
        found = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for left, variance, vectors in self._sets():
            found += torch.stack([swaps(left[rows], variance[rows], vectors, one) for one in range(len(rows))])
        later = torch.ones_like(found, dtype=torch.bool).triu(1)
        return found.masked_fill(~later | (rows == rows[:, None]), -torch.inf)

    def _sets(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Matrices that the tokens stand in: what is left of the rows, the variance of its errors, and the vectors."""
        slopes, states = self.vectors(self.slopes)
        words = self.matrix(self.layout.words)
        if self.layout.tied or not self.causal:
            return [(words.values, words.variance, slopes + states)]
        head = self.matrix(self.layout.head)
        return [(words.values, words.variance, slopes), (head.values, head.variance, states)]

    def better_labels(self) -> Tensor:
        """The same for another label in each place that has one, shape (labels there are, labels of the batch); of a
        causal language model none, as its labels are its tokens."""
        if self.causal:
            return torch.zeros(0, len(self.labels), dtype=torch.float64, device=self.labels.device)
        head = self.matrix(self.layout.head)
        return moves(head.values, head.variance, -self.share * self.states[self.asked], self.labels[self.asked])

    def better_places(self) -> Tensor:
        """The same for each label in a place that has none, shape (places without, labels of the batch); only of a
        masked language model there are such places."""
        if not self.masked:
            return torch.zeros(0, len(self.labels), dtype=torch.float64, device=self.labels.device)
        head = self.matrix(self.layout.head)
        rows, free = self.labels[self.asked], self.states[self.real & ~self.asked]
        vectors = self.share * (self.states[self.asked] - free[:, None])
        return ((2 * head.values[rows] * vectors - vectors.square()) / head.variance[rows]).sum(2)

    @property
    def real(self) -> Tensor:
        """bool, shape (batch, length): where there are tokens."""
        assert self._target.tokens is not None
        return self.tokens != self._target.tokens.pad

    @property
    def asked(self) -> Tensor:
        """bool, shape of the labels: which there are."""
        return self.labels != IGNORED

    @property
    def share(self) -> float:
        """Of each label in the mean that the loss is."""
        return 1 / int(self.asked[:, 1:].sum() if self.causal else self.asked.sum())

    def matrix(self, name: str) -> Seen:
        """What is left of a parameter's gradient."""
        return Seen.of(self._target, name, left=self.left)
