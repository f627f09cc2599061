"""Tokens at positions -> whole sentences, each proven by what the first attention made of it.

The gradient of the attention's output layer is a combination of contexts c_n, one for each token, and a token's context
depends on all that it looks at. So a sentence is right where every one of its tokens has a context in that span, and
wrong ones hardly ever have: each sentence is proven by itself. In an encoder what the network behind the attention is
given, y_n, has to be in the span of its gradient too: where attention is almost even, as in a fresh model, contexts
alone say little.

A causal model is read position by position: a token is right where the context that it gives its prefix is in the span.
In an encoder every token looks at all others. There a sentence is annealed: one position after the other takes a
candidate by how much of the contexts then lies outside the span, more and more strictly. Queries, keys and values
depend on a token and its position alone, and are computed once.

Reference: DAGER, Petrov et al. 2024, arXiv 2405.15586, sections 4.2 and 4.3.
Differs from the paper: it checks inputs of the second layer, here contexts of the first: they need no feed-forward
layer and no norm; and for encoders it enumerates, where a sum over random directions of the complement is annealed
here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attack.engine.anatomy import Anatomy
from attack.engine.context import Context
from attack.engine.span import Span

DIRECTIONS = 48
"""Random directions of the complement that an annealing looks at; a proof looks at all."""
SWEEPS, LAST_SWEEPS = 30, 3
"""Visits to each position in an annealing, and those at its end that take the best candidate."""
COOL = 0.01
"""The last temperature, in units of the first."""
RESTARTS = 8
"""Annealings of one length, before the next length has its turn."""
DEEPEST = 80.0
"""Scores that far below a token's largest count as that: their weight is nothing."""

Sentence = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Tokens that may stand at positions, and what the first attention sees of each."""

    tokens: Tensor
    """int64, shape (n,)."""
    at: tuple[Tensor, ...]
    """Indices of those at each position."""
    scores: Tensor
    """float64, shape (n, n, heads): what attention's softmax is taken of."""
    values: Tensor
    """float64, shape (n, heads, width of a head)."""

    @classmethod
    def of(cls, anatomy: Anatomy, tokens: Tensor, places: Tensor, inputs: Tensor) -> Candidates:
        """
        Args:
            tokens, places: int64, shape (n,).
            inputs: of the first attention, shape (n, width).
        """
        query, key, value = anatomy.project(inputs)
        length = int(places.max()) + 1 if len(places) else 0
        return cls(
            tokens=tokens,
            at=tuple((places == place).nonzero()[:, 0] for place in range(length)),
            scores=anatomy.scores(query, key),
            values=value,
        )

    def contexts(self, sentence: Tensor, first: int = 0, *, causal: bool) -> Tensor:
        """Of the tokens from `first` on, shape (length - first, width); a sentence is indices, shape (..., length)."""
        scores = self.scores[sentence[..., first:, None], sentence[..., None, :]]
        if causal:
            length = sentence.shape[-1]
            hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)[first:]
            scores = scores.masked_fill(hidden[..., None], -torch.inf)
        return torch.einsum("...nmh,...mhd->...nhd", scores.softmax(-2), self.values[sentence]).flatten(-2)


class Assembler:
    """Finds sentences among candidates."""

    def __init__(
        self, candidates: Candidates, contexts: Span, context: Context, proof: Callable[[Tensor, Tensor], bool]
    ) -> None:
        """
        Args:
            proof: whether an encoder's sentence, tokens and contexts, is right as far as more can be seen of it.
        """
        self._candidates, self._span, self._context, self._proof = candidates, contexts, context, proof

    def causal(self) -> list[Sentence]:
        """Every sentence of which each token's context is in the span, as long as it goes on."""
        whole: list[Sentence] = []
        prefixes = torch.empty(1, 0, dtype=torch.int64, device=self._candidates.tokens.device)
        for at in self._candidates.at:
            if not self._context.seconds_left or not len(at):
                break
            goes_on = torch.zeros(len(prefixes), dtype=torch.bool, device=at.device)
            longer = []
            for row, prefix in enumerate(prefixes):
                tried = torch.cat([prefix.expand(len(at), -1), at[:, None]], 1)
                right = self._span.has(self._candidates.contexts(tried, len(prefix), causal=True)[:, 0])
                goes_on[row] = right.any()
                longer.append(tried[right])
            whole += [tuple(prefix.tolist()) for prefix in prefixes[~goes_on] if len(prefix)]
            prefixes = torch.cat(longer)
        return whole + [tuple(prefix.tolist()) for prefix in prefixes if len(prefix)]

    def encoded(self, total: int) -> Iterator[Sentence]:
        """Sentences as they are found, each once, until their tokens are `total` or time is up."""
        found: set[Sentence] = set()
        while self._context.seconds_left:
            for length in self._lengths():
                for _ in range(RESTARTS):
                    sentence = self._annealed(length)
                    if sentence in found or not self._proven(sentence):
                        continue
                    found.add(sentence)
                    yield sentence
                    if sum(map(len, found)) >= total:
                        return
                    break
                if not self._context.seconds_left:
                    return
            if all(len(at) == 1 for at in self._candidates.at):
                return

    def _proven(self, sentence: Sentence) -> bool:
        indices = torch.tensor(sentence, device=self._candidates.tokens.device)
        contexts = self._candidates.contexts(indices, causal=False)
        return bool(self._span.has(contexts).all()) and self._proof(self._candidates.tokens[indices], contexts)

    def _lengths(self) -> list[int]:
        """The longest first; those before them that end as the longest may."""
        at, tokens = self._candidates.at, self._candidates.tokens
        lengths = [length for length in range(len(at), 0, -1) if all(len(each) for each in at[:length])]
        if not lengths:
            return []
        ends = tokens[at[lengths[0] - 1]]
        return sorted(lengths, key=lambda length: not bool(torch.isin(tokens[at[length - 1]], ends).any()))

    def _annealed(self, length: int) -> Sentence:
        """One sentence of that length, right or not."""
        draws = self._context.generator
        at = self._candidates.at[:length]
        sentence = torch.stack([each[torch.randint(len(each), (1,), generator=draws)[0]] for each in at])
        if all(len(each) == 1 for each in at):
            return tuple(sentence.tolist())
        directions = torch.randn(
            DIRECTIONS, self._span.width - self._span.rank, generator=draws, dtype=torch.float64
        ) / math.sqrt(DIRECTIONS)
        heads = self._candidates.values.shape[1]
        basis = self._span.outside(directions.to(sentence.device)).unflatten(-1, (heads, -1))
        used = torch.unique(torch.cat(list(at)))
        seen = torch.zeros(len(self._candidates.tokens), DIRECTIONS * heads, dtype=torch.float64)
        values = seen.to(sentence.device).view(-1, heads, DIRECTIONS)
        values[used] = torch.einsum("rhd,nhd->nhr", basis, self._candidates.values[used])
        first = 0.0
        for sweep in range(SWEEPS):
            cold = sweep >= SWEEPS - LAST_SWEEPS
            for place in torch.randperm(length, generator=draws).tolist():
                if len(at[place]) == 1:
                    continue
                lack = self._lacks(sentence, place, at[place], values)
                lack = lack - lack.min()
                first = first or float(lack.median()) / 2
                if cold or not first:
                    choice = lack.argmin()
                else:
                    chance = torch.softmax(-lack / (first * COOL ** (sweep / (SWEEPS - 1))), 0)
                    choice = torch.multinomial(chance.cpu(), 1, generator=draws)[0]
                sentence[place] = at[place][choice]
        return tuple(sentence.tolist())

    def _lacks(self, sentence: Tensor, place: int, choices: Tensor, values: Tensor) -> Tensor:
        """How much of all contexts lies outside, squared, with each choice in that place, shape (choices,)."""
        others = torch.cat([sentence[:place], sentence[place + 1 :]])
        scores = self._candidates.scores
        among, chosen = scores[others[:, None], others], scores[others[:, None], choices]
        top = torch.maximum(among.amax(1), chosen.amax(1))[:, None]
        among, chosen = (among - top).clamp(min=-DEEPEST).exp(), (chosen - top).clamp(min=-DEEPEST).exp()
        sums = torch.einsum("nmh,mhr->nhr", among, values[others])
        whole = among.sum(1)[:, None] + chosen
        outside = torch.einsum("nch,nhr->ncr", 1 / whole, sums)
        outside += torch.einsum("nch,chr->ncr", chosen / whole, values[choices])
        own = torch.cat([scores[choices[:, None], others], scores[choices, choices][:, None]], 1).softmax(1)
        itself = torch.einsum("cmh,mhr->cr", own[:, :-1], values[others])
        itself += torch.einsum("ch,chr->cr", own[:, -1], values[choices])
        return outside.square().sum((0, 2)) + itself.square().sum(1)
