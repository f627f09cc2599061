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

SWEEPS = 2
"""Over the candidates that are in no sentence yet, or over all if there is none such: each is asked for its sentence
that often."""

Sentence = tuple[int, ...]
"""Tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Tokens at positions, one below the other."""

    tokens: Tensor
    """int64, shape (n,)."""
    places: Tensor
    """int64, shape (n,), ascending."""
    sure: Tensor
    """bool, shape (n,): whether they are known to be there."""

    @classmethod
    def of(cls, words: Tensor, there: Tensor, sure: Tensor) -> Pairs:
        """Words, shape (words,), where they are `there`, shape (words, positions)."""
        places, rows = there.T.nonzero(as_tuple=True)
        return cls(tokens=words[rows], places=places, sure=sure[rows, places])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Tokens that may stand at positions, and what the first attention sees of each."""

    pairs: Pairs
    at: tuple[Tensor, ...]
    """Indices of those at each position."""
    scores: Tensor
    """float64, shape (n, n, heads): what attention's softmax is taken of."""
    values: Tensor
    """float64, shape (n, heads, width of a head)."""

    @classmethod
    def of(cls, anatomy: Anatomy, pairs: Pairs) -> Candidates:
        """What the first attention sees of them."""
        query, key, value = anatomy.project(anatomy.embed(pairs.tokens, pairs.places))
        length = int(pairs.places.max()) + 1 if len(pairs.places) else 0
        return cls(
            pairs=pairs,
            at=tuple((pairs.places == place).nonzero()[:, 0] for place in range(length)),
            scores=anatomy.scores(query, key),
            values=value,
        )

    def sentence(self, indices: Tensor) -> Sentence:
        """Its tokens."""
        return tuple(self.pairs.tokens[indices].tolist())

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

    def __init__(self, contexts: Span, context: Context, doubt: Callable[[Tensor, Tensor], float]) -> None:
        """
        Args:
            doubt: what `Span.doubt` says of the states behind an encoder's sentence, tokens and contexts.
        """
        self._span, self._context, self._doubt = contexts, context, doubt
        self._doubts: dict[Sentence, float] = {}
        """Of an encoder's sentences that are proven."""

    def causal(self, candidates: Candidates) -> list[Sentence]:
        """Every sentence of which each token's context is in the span, as long as it goes on."""
        whole: list[Tensor] = []
        prefixes = torch.empty(1, 0, dtype=torch.int64, device=candidates.values.device)
        for at in candidates.at:
            if not self._context.seconds_left or not len(at):
                break
            goes_on = torch.zeros(len(prefixes), dtype=torch.bool, device=at.device)
            longer = []
            for row, prefix in enumerate(prefixes):
                tried = torch.cat([prefix.expand(len(at), -1), at[:, None]], 1)
                right = self._span.has(candidates.contexts(tried, len(prefix), causal=True)[:, 0])
                goes_on[row] = right.any()
                longer.append(tried[right])
            whole += prefixes[~goes_on]
            prefixes = torch.cat(longer)
        return [candidates.sentence(indices) for indices in [*whole, *prefixes] if len(indices)]

    def encoded(self, candidates: Candidates, total: int) -> Iterator[list[Sentence]]:
        """Each time that one more is proven, until time is up: all proven ones, those of earlier candidates too, the
        least doubtful first, as many as hold `total` tokens; with them one that was proven wrongly, where directions
        of the span are faint, comes last.
        """
        draws, pairs = self._context.generator, candidates.pairs
        companions = Companions(candidates.at, candidates.scores, candidates.values, self._span)
        likely, others = _lengths(candidates)
        sure = pairs.sure.nonzero()[:, 0]
        for sweep in range(SWEEPS):
            order = sure[torch.randperm(len(sure), generator=draws).to(sure.device)].tolist()
            open_ = [index for index in order if not self._placed(pairs, index)]
            for index in open_ or order:
                if open_ and self._placed(pairs, index):
                    continue
                left = total - sum(map(len, self._doubts))
                least = None
                # One sentence that is left is as long as what is left. At last from other shares than equal ones.
                for lengths in ([left] if left in likely else [], likely, others if sweep else []):
                    asked = [each for each in lengths if pairs.places[index] < each <= (total if sweep else left)]
                    start = draws if sweep else None
                    least = least or self._proven(candidates, companions, index, asked, start)
                if not self._context.seconds_left:
                    return
                if least is None or least[1] in self._doubts:
                    continue
                self._doubts[least[1]] = least[0]
                ordered = sorted(self._doubts, key=lambda sentence: self._doubts[sentence])
                reached = accumulate(map(len, ordered), initial=0)
                yield [sentence for sentence, before in zip(ordered, reached, strict=False) if before < total]

    def _placed(self, pairs: Pairs, index: int) -> bool:
        """Whether a token is in a sentence that was proven."""
        token, place = int(pairs.tokens[index]), int(pairs.places[index])
        return any(sentence[place : place + 1] == (token,) for sentence in self._doubts)

    def _proven(
        self,
        candidates: Candidates,
        companions: Companions,
        index: int,
        lengths: list[int],
        start: torch.Generator | None,
    ) -> tuple[float, Sentence] | None:
        """The least doubtful sentence of a candidate, and how doubtful it is; None where none is proven."""
        right = []
        for length in lengths:
            if self._context.seconds_left:
                found = companions.of(index, length, start)
                right.append((self._doubted(candidates, found), candidates.sentence(found)))
        return min((each for each in right if each[0] < 1), default=None)

    def _doubted(self, candidates: Candidates, sentence: Tensor) -> float:
        contexts = candidates.contexts(sentence, causal=False)
        return max(self._span.doubt(contexts), self._doubt(candidates.pairs.tokens[sentence], contexts))


def _lengths(candidates: Candidates) -> tuple[list[int], list[int]]:
    """Those that end as the longest may, and others, the longest first."""
    at, pairs = candidates.at, candidates.pairs
    lengths = [length for length in range(len(at), 0, -1) if all(len(each) for each in at[:length])]
    last = [at[length - 1][pairs.sure[at[length - 1]]] for length in lengths]
    ends = pairs.tokens[last[0]] if lengths else pairs.tokens[:0]
    likely = [
        length for length, there in zip(lengths, last, strict=True) if torch.isin(pairs.tokens[there], ends).any()
    ]
    return likely, [length for length in lengths if length not in likely]
