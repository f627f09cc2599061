"""How far weights have moved in a known direction, when a batch's examples are not known either.

With the weights [b, W] + s D, every example of the batch solves, on its own, with s the same for all,

    (I - U U') (softmax(([b, W] + s D) V g) - onehot(y)) = 0,    (V g)[0] = 1

(`attack.engine.features` has the names, and solves it for s = 0). Here s is one more unknown of each; the values on
which several examples agree come out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STARTS = 10
SCALES = (0.3, 1.0, 3.0)
"""Scatter of the starts' features, in units of the first start's size."""
MOVES = (0.3, 2.0, 12.0)
"""Starts for s, in units of what moves a logit by one."""
ITERATIONS = 60
SOLVED = 1e-8
"""Squared residual of a solution."""
SATURATED = 1e-7
"""Where softmax is the label itself the system is solved by no example."""
AGREE = 1e-3
"""Relative distance up to which two values of s are one."""


def solve_scales(
    left: Tensor, right: Tensor, rows: Tensor, logits: Tensor, turn: Tensor, *, generator: torch.Generator
) -> list[float]:
    """Positive values of s, those on which most examples agree first.

    Args:
        left, right: U, shape (classes, batch), and V, shape (1 + features, batch).
        rows: A V, shape (classes, batch).
        logits, turn: [b, W] V and D V, shape (classes, batch).
        generator: for the starts.
    """
    found: list[float] = []
    for label in (rows @ right[0] < 0).nonzero()[:, 0].tolist():
        found += _solve(left, right[0], label, *_starts(rows[label], right[0], turn, generator), logits, turn)
    groups: list[list[float]] = []
    for s in sorted(found):
        if groups and s - groups[-1][0] <= AGREE * abs(s):
            groups[-1].append(s)
        else:
            groups.append([s])
    groups.sort(key=len, reverse=True)
    return [group[len(group) // 2] for group in groups]


def _starts(row: Tensor, first: Tensor, turn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shapes (starts, batch) and (starts,): around what a label's own row of the gradient suggests."""
    center = row / (row @ first)
    scatter = torch.randn(STARTS, len(row), generator=generator, dtype=torch.float64).to(row)
    scales = torch.tensor(SCALES).to(row).repeat(-(-STARTS // len(SCALES)))[:STARTS, None]
    around = center + scatter * scales * torch.linalg.vector_norm(center) / len(row) ** 0.5
    around[0] = center
    unit = 1 / float((turn @ center).abs().max())
    moves = torch.tensor([0.0, *(sign * move * unit for move in MOVES for sign in (1, -1))]).to(row)
    return around.repeat(len(moves), 1), moves.repeat_interleave(STARTS)


def _solve(
    left: Tensor, first: Tensor, label: int, starts: Tensor, moves: Tensor, logits: Tensor, turn: Tensor
) -> list[float]:
    """Levenberg-Marquardt in (g, s) from every start at once; s of the distinct solutions among its ends."""
    particular = first / first.square().sum()
    free = torch.linalg.qr(first[:, None], mode="complete").Q[:, 1:]  # directions that leave (V g)[0] alone
    onehot = functional.one_hot(torch.tensor(label), len(left)).to(first)

    def off(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = particular + x[:, :-1] @ free.T
        p = (g @ logits.T + x[:, -1:] * (g @ turn.T)).softmax(-1)
        error = p - onehot
        return g, p, error - (error @ left) @ left.T

    x = torch.cat([(starts - particular) @ free, moves[:, None]], 1)
    g, p, r = off(x)
    loss = r.square().sum(-1)
    damping = torch.full_like(loss, 1e-3)
    for _ in range(ITERATIONS):
        inner = torch.cat([logits @ free + x[:, -1, None, None] * (turn @ free), (g @ turn.T)[:, :, None]], 2)
        slopes = p[:, :, None] * (inner - (p[:, None, :] @ inner))
        slopes = slopes - left @ (left.T @ slopes)
        normal = slopes.mT @ slopes
        damped = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-30)
        step, failed = torch.linalg.solve_ex(damped, (slopes.mT @ r[:, :, None])[:, :, 0])
        tried = x - step
        g_tried, p_tried, r_tried = off(tried)
        loss_tried = r_tried.square().sum(-1)
        better = (loss_tried < loss) & (failed == 0)
        x, g, p = (torch.where(better[:, None], new, old) for new, old in ((tried, x), (g_tried, g), (p_tried, p)))
        r, loss = torch.where(better[:, None], r_tried, r), torch.where(better, loss_tried, loss)
        damping = torch.where(better, damping / 5, damping * 4).clamp(min=1e-15)
        if damping.min() > 1e6:
            break
    done = (loss < SOLVED) & (p[:, label] < 1 - SATURATED)
    kept: list[Tensor] = []
    for solution in torch.cat([g, x[:, -1:]], 1)[done]:
        if all(torch.dist(solution, other) > AGREE * torch.linalg.vector_norm(other) for other in kept):
            kept.append(solution)
    return [float(solution[-1]) for solution in kept if solution[-1] > 0]
