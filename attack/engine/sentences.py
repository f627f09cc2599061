"""Tokens at positions -> whole sentences, each proven by what the first attention made of it.

The gradient of the attention's output layer is a combination of contexts c_n, one for each token, and a token's context
depends on all that it looks at. So a sentence is right where every one of its tokens has a context in that span, and
wrong ones hardly ever have: each sentence is proven by itself. In an encoder what the network behind the attention is
given, y_n, has to be in the span of its gradient too: where attention is almost even, as in a fresh model, contexts
alone say little.

A causal model is read position by position: a token is right where the context that it gives its prefix is in the span.
In an encoder every token looks at all others of its sentence, and one token's context says which these are
(`attack.engine.companions`). Queries, keys and values depend on a token and its position alone, and are computed once.

Reference: DAGER, Petrov et al. 2024, arXiv 2405.15586, sections 4.2 and 4.3.
Differs from the paper: it checks inputs of the second layer, here contexts of the first: they need no feed-forward
layer and no norm; and for encoders it enumerates, where equations for one token's context are solved here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from attack.engine.anatomy import Anatomy
from attack.engine.companions import Companions
from attack.engine.context import Context
from attack.engine.span import Span

SWEEPS = 4
"""Over all candidates: each is asked for its sentence that often."""

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
        self, candidates: Candidates, contexts: Span, context: Context, doubt: Callable[[Tensor, Tensor], float]
    ) -> None:
        """
        Args:
            doubt: what `Span.doubt` says of the states behind an encoder's sentence, tokens and contexts.
        """
        self._candidates, self._span, self._context, self._doubt = candidates, contexts, context, doubt

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

    def encoded(self, total: int) -> Iterator[list[Sentence]]:
        """Each time that one more is proven, until time is up: all proven ones, the least doubtful first, as many as
        hold `total` tokens; with them one that was proven wrongly, where directions of the span are faint, comes
        last.
        """
        at, draws = self._candidates.at, self._context.generator
        companions = Companions(at, self._candidates.scores, self._candidates.values, self._span)
        likely, others = self._lengths()
        doubts: dict[Sentence, float] = {}
        for sweep in range(SWEEPS):
            for token in torch.randperm(len(self._candidates.tokens), generator=draws).tolist():
                # First those that are in no sentence yet, from equal shares on; then any, from others.
                if sweep == 0 and any(token in sentence for sentence in doubts):
                    continue
                start = draws if sweep else None
                best = self._least(companions, token, likely, start) or self._least(companions, token, others, start)
                if not self._context.seconds_left:
                    return
                if best is None or best[1] in doubts:
                    continue
                doubts[best[1]] = best[0]
                ordered = sorted(doubts, key=lambda sentence: doubts[sentence])
                reached = accumulate(map(len, ordered), initial=0)
                yield [sentence for sentence, before in zip(ordered, reached, strict=False) if before < total]

    def _least(
        self, companions: Companions, token: int, lengths: list[int], start: torch.Generator | None
    ) -> tuple[float, Sentence] | None:
        """The least doubtful sentence of a token, and how doubtful it is; None where none is proven."""
        found = []
        for length in lengths:
            if self._context.seconds_left and any(token in there for there in self._candidates.at[:length]):
                sentence = tuple(companions.of(token, length, start).tolist())
                found.append((self._doubted(sentence), sentence))
        return min((pair for pair in found if pair[0] < 1), default=None)

    def _doubted(self, sentence: Sentence) -> float:
        indices = torch.tensor(sentence, device=self._candidates.tokens.device)
        contexts = self._candidates.contexts(indices, causal=False)
        return max(self._span.doubt(contexts), self._doubt(self._candidates.tokens[indices], contexts))

    def _lengths(self) -> tuple[list[int], list[int]]:
        """Those that end as the longest may, and others, the longest first."""
        at, tokens = self._candidates.at, self._candidates.tokens
        lengths = [length for length in range(len(at), 0, -1) if all(len(each) for each in at[:length])]
        ends = tokens[at[lengths[0] - 1]] if lengths else tokens[:0]
        likely = [length for length in lengths if torch.isin(tokens[at[length - 1]], ends).any()]
        return likely, [length for length in lengths if length not in likely]
