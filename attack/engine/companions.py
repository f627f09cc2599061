"""Which tokens share a sentence with a token, by Newton's method on what it looks at.

A token's context is, in each head, the mean of the values of its sentence's tokens, by weights exp(score). Give each
candidate a share, 1 if it is in the sentence and 0 if not: the context is then a smooth function of the shares,

    c = sum_j share_j exp(score_j) v_j / sum_j share_j exp(score_j)        in each head,

and for the true shares it is in the span of the output layer's gradient. That is one equation for each direction
outside of the span, hundreds as long as the batch is not as long as the model is wide. They are solved for shares that
are not negative and add up to one at each position, from equal shares on; four to seven steps are enough.
"""

from __future__ import annotations

import torch
from scipy.optimize import nnls
from torch import Tensor

from attack.engine.span import Span

STEPS = 8
"""Newton's, at most."""
SETTLED = 1e-3
"""Largest change of a share that ends them."""
FIRM = 10.0
"""Weight of an equation that shares add up to one, in units of a candidate's root mean square effect on the others."""


class Companions:
    """Solves for a token's sentence."""

    def __init__(self, at: tuple[Tensor, ...], scores: Tensor, values: Tensor, span: Span) -> None:
        """
        Args:
            at, scores, values: as `Candidates` has them.
            span: of contexts.
        """
        self._at, self._scores, count = at, scores, len(values)
        self._adds_up = torch.zeros(len(at), count, dtype=torch.float64, device=values.device)
        for place, there in enumerate(at):
            self._adds_up[place, there] = 1
        eye = torch.eye(span.width - span.rank, dtype=torch.float64, device=values.device)
        directions = span.outside(eye).unflatten(-1, values.shape[1:])
        self._outside = torch.einsum("rhd,nhd->nhr", directions, values)
        """What of each candidate's value lies outside the span, by heads, shape (n, heads, directions)."""

    def of(self, token: int, length: int, draws: torch.Generator | None) -> Tensor:
        """The sentence of that length, indices of candidates, int64, right or not.

        Args:
            draws: for shares to start from; from equal ones if None.
        """
        used = torch.cat(self._at[:length])
        if len(used) == length:
            return used
        adds_up = self._adds_up[:length, used]
        weights = (self._scores[token, used] - self._scores[token, used].amax(0)).exp()
        start = torch.ones(len(used), dtype=torch.float64)
        if draws is not None:
            start.exponential_(generator=draws)
        shares = start.to(used.device)
        shares = shares / (adds_up.T @ (adds_up @ shares))
        for _ in range(STEPS):
            effects = weights[..., None] * self._outside[used] / (shares @ weights)[:, None]
            lack = torch.einsum("n,nhr->hr", shares, effects)
            effects = effects.sum(1) - (weights / (shares @ weights)) @ lack
            size = (effects.norm() / len(used) ** 0.5).clamp(min=torch.finfo(effects.dtype).eps)
            left = torch.cat([effects.T / size, FIRM * adds_up])
            right = torch.cat([(shares @ effects - lack.sum(0)) / size, torch.full_like(adds_up[:, 0], FIRM)])
            try:
                solved = torch.as_tensor(nnls(left.cpu().numpy(), right.cpu().numpy())[0], device=used.device)
            except (RuntimeError, ValueError):  # too many iterations, or no share is left of all that a head looks at
                break
            moved, shares = (solved - shares).abs().max(), solved
            if moved < SETTLED:
                break
        of_all = torch.zeros(len(self._outside), dtype=torch.float64, device=used.device)
        of_all[used] = shares
        return torch.stack([there[of_all[there].argmax()] for there in self._at[:length]])
