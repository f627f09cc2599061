"""From the last linear layer's gradient alone: how many examples, their labels, and each one's features, exactly.

With p_i the softmax of example i's logits, e_i = (p_i - onehot(y_i)) / B and f_i its features, the layer's gradient is

    A = [db, dW] = sum over i of e_i [1, f_i]'    (classes, 1 + features)

A sum of B outer products has B singular values above the noise. Its left singular vectors U span the errors, its right
ones V the features: [1, f_i] = V g_i. So each example solves, on its own, a small nonlinear system in g:

    (I - U U') (softmax([b, W] V g) - onehot(y)) = 0,    (V g)[0] = 1

by Levenberg-Marquardt from many starts at once. Where softmax is saturated, features of a wide range nearly solve it
for one example; the shares of a label's solutions in A add up to how often it occurs. So one solution an example is
chosen by that, and all are refined together, on

    A V - (1 / B) sum over i of (softmax([b, W] V g_i) - onehot(y_i)) g_i' = 0

where sharp errors fix the features. Only what makes up A counts. Knows no layer but the last, and nothing of what made
the features.

Reference: that the errors of a batch lie in the column space of a gradient of low rank is used by SPEAR, Dimitrov et
al., NeurIPS 2024, arXiv 2403.03945, there to search for ReLU patterns; here softmax takes the place of the pattern.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import NoChain, trace
from attack.engine.context import Context
from attack.engine.labels import NoLabel, estimate_counts, last_layer_signal, likely_counts
from attack.engine.rank import ABOVE_NOISE, Decomposed, count, decompose
from attack.engine.target import Target

STARTS = 60
SCALES = (0.3, 1.0, 3.0, 6.0)
"""Scatter of the starts, in units of the first start's size: labels that repeat need the wide ones."""
ROUNDS = 6
ITERATIONS = 60
MAX_DAMPING = 1e6
SOLVED, SOLVED_AT_MOST = 1e-11, 1e-8
"""Squared residual of a solution: as the noise turns U, no less than the first and no more than the second."""
DISTINCT = 1e-3
"""Relative distance from which on two solutions are two."""
SAME_ERROR = 0.02
"""Singular value of unit errors below which they span no further direction."""
SHARE = 0.3
"""How far a label's share in the gradient may be off a multiple of 1/B, in units of that, before the refinement."""
LIKELY = 20
"""Counts of labels that are tried as a whole, ..."""
SCATTER = (0.1, 0.1, 0.3, 0.3, 1.0, 1.0)
"""... each from so many starts, scattered by so much around the mean features, in units of their size."""
CHOICES = 6
"""Drawn by chance where a label has more solutions than examples, and each refined."""
REFINEMENTS = 40
FIT = 1e-5
"""Largest misfit of refined solutions, relative to the gradient, where the noise is below that: float32 logits of some
50 make their softmax so inexact."""
LOST = 3.0
"""Misfit, in units of the largest of fresh solutions, up to which a moved gradient's are the ones from before."""
SATURATED = 1e-7
"""Where softmax is the label itself the system is solved by no example."""
BELOW_ZERO = 2e-2
"""How far below zero a feature may come out that cannot be negative, in units of the largest: 2e-3 at batch 32."""


class NoFeatures(ValueError):
    """The last layer's gradient does not give the features; one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What the last layer says of every example, in the order of the labels."""

    values: Tensor
    """float64, shape (batch, features): inputs of the last linear layer."""
    labels: Tensor
    """int64, shape (batch,)."""
    error: Tensor
    """float64, shape (batch, classes): derivative of the mean loss by the logits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Split(Decomposed):
    """A = [db, dW] in its singular vectors, and the public layer in the same coordinates."""

    misfit: float
    """Largest Frobenius norm of what solutions may leave of A V."""
    logits: Tensor
    """[b, W] V, shape (classes, batch)."""
    solved: float
    """Squared residual from which on a system is solved."""


def count_examples(target: Target) -> int:
    """The rank of the last layer's gradient above its noise: the batch size, where that is below the layer's own size.

    Raises: NoFeatures.
    """
    return _examples(count(*_last_layer(target)), target)


def read_features(target: Target, context: Context) -> Features:
    """Labels and features of every example.

    Raises: NoFeatures: the layer is not fully known, the rank says nothing, or fewer solutions than examples came out.
    """
    split = _split(target)
    if split.rank == 1:
        return _only_one(split)
    nonnegative = _nonnegative(target)
    at_once = _at_once(split, target, nonnegative, context)
    if at_once is not None:
        return at_once
    if 2 * split.rank - 1 > target.classes:
        raise NoFeatures(
            f"the last layer's gradient has rank {split.rank}, and no labels were found that explain it: one by one, "
            f"{target.classes} classes tell {(target.classes + 1) // 2} examples apart at most"
        )
    found = _Solutions(split, nonnegative)
    likely = _likely_labels(target, nonnegative)
    for attempt in range(ROUNDS):
        # A label whose gradient is not negative is possible where its probability was high: tried when others fail.
        labels = likely if attempt % 3 < 2 else torch.arange(target.classes, device=target.device)
        unexplained = found.unexplained()
        for label in labels.tolist():
            if not context.seconds_left:
                raise NoFeatures("the deadline passed")
            found.add(label, _solve(split, label, _starts(split, label, unexplained, context)))
        for g, chosen in found.choices(context):
            refined, misfit = _refine(split, g, chosen)
            if misfit <= min(split.misfit, float(split.core[-1]) / 2):
                return _features(split, refined, chosen)
    raise NoFeatures(
        f"the last layer's gradient has the rank of {split.rank} examples, but of {found.count} solutions found no "
        f"{split.rank} make it up with equal shares"
    )


def _at_once(split: _Split, target: Target, nonnegative: bool, context: Context) -> Features | None:
    """All examples together, from the mean features, at labels that are likely as a whole; None where none fit.

    On untrained nets the first try mostly does. It needs no more classes than examples, where each example alone needs
    twice as many.
    """
    try:
        estimate, mean = estimate_counts(target, split.rank)
    except NoLabel as error:
        raise NoFeatures(str(error)) from error
    center = torch.cat([torch.ones_like(mean[:1]), mean]) @ split.right
    size = torch.linalg.vector_norm(center) / split.rank**0.5
    for counts in likely_counts(estimate, split.rank, most=LIKELY):
        labels = torch.arange(target.classes, device=target.device).repeat_interleave(counts)
        for scale in SCATTER:
            if not context.seconds_left:
                raise NoFeatures("the deadline passed")
            scatter = torch.randn(split.rank, split.rank, generator=context.generator, dtype=torch.float64)
            start = center + scale * size * scatter.to(center)
            g, misfit = _refine(split, start / (start @ split.right[0])[:, None], labels)
            if misfit <= min(split.misfit, float(split.core[-1]) / 2):
                features = _features(split, g, labels)
                if not nonnegative or bool((features.values > -BELOW_ZERO * features.values.abs().max()).all()):
                    return features
    return None


def read_batch(target: Target, context: Context) -> Features:
    """As `read_features`; but batch size and labels must be those that were told, and their order is kept.

    Raises: NoFeatures.
    """
    examples = count_examples(target)
    if not target.batch_size_assumed and examples != target.batch_size:
        raise NoFeatures(
            f"the last layer's gradient has the rank of {examples} examples, and {target.batch_size} were told"
        )
    features = read_features(target, context)
    if target.labels is None:
        return features
    places = target.labels.argsort(stable=True).argsort()
    if not features.labels.sort().values[places].equal(target.labels):
        raise NoFeatures(f"the last layer's gradient is that of labels {features.labels.tolist()}, others were told")
    places = features.labels.argsort(stable=True)[places]
    return Features(values=features.values[places], labels=features.labels[places], error=features.error[places])


def reread_features(target: Target, before: Features) -> Features:
    """The features that a slightly moved gradient gives, found from those before. Raises: NoFeatures."""
    split = _split(target, batch=len(before.labels))
    if split.rank == 1:
        return _only_one(split)
    ones = torch.ones_like(before.values[:, :1])
    starts = torch.cat([ones, before.values], 1) @ split.right
    g, misfit = _refine(split, starts, before.labels)
    if not misfit <= LOST * split.misfit:
        raise NoFeatures("a solution was lost")
    return _features(split, g, before.labels)


def _only_one(split: _Split) -> Features:
    """Of one example nothing is to be solved: A = e [1, f]'. e is negative at the label alone, and sums to zero."""
    scale = split.right[0]
    error = (split.left * split.core * scale).T
    error = error - error.mean()
    return Features(values=(split.right[1:] / scale).T, labels=error.argmin(1), error=error)


def _last_layer(target: Target) -> tuple[Tensor, Tensor]:
    """[db, dW] and its noise. Raises: NoFeatures: it is not known in full, or not of that form."""
    try:
        last_layer_signal(target)
    except NoLabel as error:
        raise NoFeatures(str(error)) from error
    if len(target.shapes) < 2 or len(target.shapes[-1]) != 1 or len(target.shapes[-2]) != 2:
        raise NoFeatures("the last layer has no bias")
    gradient, noise = _joined(target, target.gradient), _joined(target, target.noise)
    if not noise.isfinite().all():
        raise NoFeatures("the last layer's gradient is not known in full")
    return gradient, noise


def _examples(rank: int, target: Target) -> int:
    """A rank as a number of examples. Raises: NoFeatures: it cannot be one."""
    if rank == 0:
        raise NoFeatures("the last layer's gradient is within its noise")
    if rank > 1 and rank >= target.classes:
        raise NoFeatures(
            f"the last layer's gradient has rank {rank}, and with {target.classes} classes it is at most "
            f"{target.classes - 1}: it was changed"
        )
    return rank


def _split(target: Target, batch: int | None = None) -> _Split:
    gradient, noise = _last_layer(target)
    parts = decompose(gradient, noise, rank=batch)
    if batch is None:
        batch = _examples(parts.rank, target)
    weight, bias = list(target.model.parameters())[-2:]
    public = torch.cat([bias[:, None], weight], 1).detach()
    solved = min(max(SOLVED, (parts.floor / float(parts.core[-1])) ** 2), SOLVED_AT_MOST)
    expected = float(noise.square().mean() * len(noise) * batch) ** 0.5
    misfit = max(ABOVE_NOISE * expected, FIT * float(torch.linalg.vector_norm(parts.core)))
    return _Split(
        left=parts.left,
        core=parts.core,
        right=parts.right,
        floor=parts.floor,
        misfit=misfit,
        logits=public @ parts.right,
        solved=solved,
    )


def _joined(target: Target, flat: Tensor) -> Tensor:
    weight, bias = target.tensors(flat)[-2:]
    return torch.cat([bias[:, None], weight], 1)


def _nonnegative(target: Target) -> bool:
    """Whether the features come from an activation that is never negative."""
    try:
        links = trace(target.model, target.input_shape)
    except NoChain:
        return False
    kept = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d)
    below = [link.module for link in links[:-1] if not isinstance(link.module, kept)]
    return bool(below) and isinstance(below[-1], (nn.ReLU, nn.Sigmoid))


def _likely_labels(target: Target, nonnegative: bool) -> Tensor:
    """Classes with a negative gradient: only a label pulls below zero."""
    bias, *entries = _joined(target, target.gradient).split([1, target.shapes[-2][1]], dim=1)
    negative = bias[:, 0] < 0
    if nonnegative:
        noise = _joined(target, target.noise)[:, 1:]
        negative |= (entries[0] < -ABOVE_NOISE * noise).any(1)
    return negative.nonzero()[:, 0]


def _starts(split: _Split, label: int, unexplained: Tensor, context: Context) -> Tensor:
    """Shape (starts, batch): half in the space that the solutions so far leave, where that is not all; the others
    around the features that a label's own row of the gradient suggests: there, its examples outweigh all others."""
    row = split.left[label] * split.core
    center = row / (row @ split.right[0])
    scatter = torch.randn(STARTS, split.rank, generator=context.generator, dtype=torch.float64).to(center)
    scales = torch.tensor(SCALES).to(center).repeat(-(-STARTS // len(SCALES)))[:STARTS, None]
    around = center + scatter * scales * torch.linalg.vector_norm(center) / split.rank**0.5
    around[0] = center
    if 0 < len(unexplained) < split.rank:
        half = STARTS // 2
        within = scatter[:half, : len(unexplained)] @ unexplained
        around[:half] = within / (within @ split.right[0])[:, None]
    return around


def _solve(split: _Split, label: int, starts: Tensor) -> Tensor:
    """Levenberg-Marquardt from every start at once; the solutions among its ends, shape (solutions, batch)."""
    first = split.right[0]
    particular = first / first.square().sum()
    free = torch.linalg.qr(first[:, None], mode="complete").Q[:, 1:]  # directions that leave (V g)[0] alone
    onehot = functional.one_hot(torch.tensor(label), len(split.left)).to(first)

    def off(t: Tensor) -> tuple[Tensor, Tensor]:
        p = ((particular + t @ free.T) @ split.logits.T).softmax(-1)
        error = p - onehot
        return p, error - (error @ split.left) @ split.left.T

    t = (starts - particular) @ free
    turn = split.logits @ free
    p, r = off(t)
    loss = r.square().sum(-1)
    open_ = loss >= split.solved  # where softmax is saturated, a solution would wander off along flat directions
    damping = torch.full_like(loss, 1e-3)
    for _ in range(ITERATIONS if free.shape[1] else 0):
        if damping.min() > MAX_DAMPING:  # nothing gets better any more
            break
        # J = (I - U U') (diag(p) - p p') [b, W] V
        slopes = p[:, :, None] * (turn - (p @ turn)[:, None, :])
        slopes = slopes - split.left @ (split.left.T @ slopes)
        normal = slopes.mT @ slopes
        damped = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-30)
        step, failed = torch.linalg.solve_ex(damped, (slopes.mT @ r[:, :, None])[:, :, 0])
        tried = t - step
        p_tried, r_tried = off(tried)
        loss_tried = r_tried.square().sum(-1)
        better = (loss_tried < loss) & (failed == 0) & open_
        t, p = torch.where(better[:, None], tried, t), torch.where(better[:, None], p_tried, p)
        r, loss = torch.where(better[:, None], r_tried, r), torch.where(better, loss_tried, loss)
        damping = torch.where(better, damping / 5, damping * 4).clamp(min=1e-15)
    done = (loss < split.solved) & (p[:, label] < 1 - SATURATED)
    return (particular + t @ free.T)[done]


class _Solutions:
    """Distinct solutions, and which of them make up the gradient."""

    def __init__(self, split: _Split, nonnegative: bool) -> None:
        self._split, self._nonnegative = split, nonnegative
        self._found: list[tuple[Tensor, int]] = []

    @property
    def count(self) -> int:
        return len(self._found)

    def unexplained(self) -> Tensor:
        """Rows that span the features of the examples not found yet, in the coordinates of g: A without the found
        errors. Shape (dimensions, batch)."""
        split = self._split
        if not self._found:
            return split.core.diag()
        found = functional.normalize(_error(split, *self._stacked()) @ split.left)
        _, size, directions = torch.linalg.svd(found)
        return directions[int((size > SAME_ERROR).sum()) :] * split.core

    def _stacked(self) -> tuple[Tensor, Tensor]:
        g = torch.stack([g for g, _ in self._found])
        return g, torch.tensor([label for _, label in self._found], device=g.device)

    def add(self, label: int, solutions: Tensor) -> None:
        for g in solutions:
            features = self._split.right[1:] @ g
            if self._nonnegative and features.min() < -BELOW_ZERO * features.abs().max():
                continue
            if all(y != label or torch.dist(g, h) > DISTINCT * torch.linalg.vector_norm(h) for h, y in self._found):
                self._found.append((g, label))

    def choices(self, context: Context) -> Iterator[tuple[Tensor, Tensor]]:
        """Choices of one solution an example, and their labels: as many of a label as its share in the gradient."""
        if self.count < self._split.rank:
            return
        g, labels = self._stacked()
        error = _error(self._split, g, labels)
        # S = sum of shares x U'e g', in the singular vectors' coordinates
        products = ((error @ self._split.left)[:, :, None] * g[:, None, :]).flatten(1)
        wanted = self._split.core.diag().flatten()
        shares = torch.linalg.lstsq(products.T, wanted[:, None]).solution[:, 0] * self._split.rank
        totals = torch.zeros(len(self._split.left), dtype=shares.dtype, device=shares.device)
        totals.index_add_(0, labels, shares)
        counts = totals.round().long()
        there = torch.bincount(labels, minlength=len(counts))
        if bool(((totals - counts).abs() > SHARE).any() or (counts < 0).any() or (counts > there).any()):
            return
        if int(counts.sum()) != self._split.rank:
            return
        for _ in range(CHOICES if bool((there > counts).any()) else 1):
            order = torch.randperm(len(labels), generator=context.generator).to(labels.device)
            chosen = [order[labels[order] == label][: int(counts[label])] for label in counts.nonzero()[:, 0]]
            yield g[torch.cat(chosen)], labels[torch.cat(chosen)]


def _refine(split: _Split, g: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """All solutions together, by Levenberg-Marquardt, and the Frobenius norm of what of A V they leave."""
    first, batch = split.right[0], split.rank
    particular = first / first.square().sum()
    free = torch.linalg.qr(first[:, None], mode="complete").Q[:, 1:]
    turn, wanted = split.logits @ free, split.left * split.core
    onehot = functional.one_hot(labels, len(split.left)).to(g)

    def off(t: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        g = particular + t @ free.T
        p = (g @ split.logits.T).softmax(-1)
        r = wanted - (p - onehot).T @ g / batch
        return g, p, r, float(r.square().sum())

    t = (g - particular) @ free
    g, p, r, loss = off(t)
    damping = 1e-3
    for _ in range(REFINEMENTS if free.shape[1] else 0):
        slopes = p[:, :, None] * (turn - (p @ turn)[:, None, :])  # of e by t: (examples, classes, free)
        jacobian = torch.einsum("icf,ig->cgif", slopes, g) + torch.einsum("ic,gf->cgif", p - onehot, free)
        flat = jacobian.flatten(2).flatten(0, 1) / batch
        normal = flat.T @ flat
        normal.diagonal().mul_(1 + damping).add_(1e-30)
        step, failed = torch.linalg.solve_ex(normal, flat.T @ r.flatten())
        tried = t + step.view_as(t)
        at = off(tried)
        if failed or not at[3] < loss:
            damping *= 8
            if damping > MAX_DAMPING:
                break
            continue
        slow = at[3] > 0.99 * loss
        t, (g, p, r, loss), damping = tried, at, damping / 10
        if slow:
            break
    return g, loss**0.5


def _error(split: _Split, g: Tensor, labels: Tensor) -> Tensor:
    """softmax - onehot, shape (solutions, classes)."""
    return (g @ split.logits.T).softmax(-1) - functional.one_hot(labels, len(split.left)).to(g)


def _features(split: _Split, g: Tensor, labels: Tensor) -> Features:
    return Features(values=g @ split.right[1:].T, labels=labels, error=_error(split, g, labels) / len(labels))
