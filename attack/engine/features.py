"""From the last linear layer's gradient alone: how many examples, their labels, and each one's features, exactly.

With p_i the softmax of example i's logits, e_i = (p_i - onehot(y_i)) / B and f_i its features, the layer's gradient is

    A = [db, dW] = sum over i of e_i [1, f_i]'    (classes, 1 + features)

A sum of B outer products has B singular values above the noise. Its left singular vectors U span the errors, its right
ones V the features: [1, f_i] = V g_i. So each example solves, on its own, a small nonlinear system in g:

    (I - U U') (softmax([b, W] V g) - onehot(y)) = 0,    (V g)[0] = 1

by Levenberg-Marquardt from many starts at once. Solutions count only if together they add up to A with equal shares.
Knows no layer but the last, and nothing of what made the features.

Reference: that the errors of a batch lie in the column space of a gradient of low rank is used by SPEAR, Dimitrov et
al., NeurIPS 2024, arXiv 2403.03945, there to search for ReLU patterns; here softmax takes the place of the pattern.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.chain import NoChain, trace
from attack.engine.context import Context
from attack.engine.labels import NoLabel, last_layer_signal
from attack.engine.target import Target

ABOVE_NOISE = 4.0
"""Singular values count from so many times the size of the noise's largest. On MLPs and LeNets those of a batch of 16
start at a hundred times, and the first of the noise lies at a tenth."""
STARTS = 60
SCALES = (0.3, 1.0, 3.0, 6.0)
"""Scatter of the starts, in units of the first start's size: labels that repeat need the wide ones."""
ROUNDS = 6
ITERATIONS = 60
MAX_DAMPING = 1e6
SOLVED, SOLVED_AT_MOST = 1e-11, 1e-8
"""Squared residual of a solution: as the noise turns U, no less than the first and no more than the second."""
DISTINCT = 1e-3
"""Relative distance from which on two solutions are two examples."""
SHARE = 0.05
"""How far an example's share in the gradient may be off 1/B, relative."""
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
class _Split:
    """A = [db, dW] in its singular vectors, and the public layer in the same coordinates."""

    left: Tensor
    """U, shape (classes, batch)."""
    right: Tensor
    """V, shape (1 + features, batch)."""
    core: Tensor
    """Singular values, shape (batch,)."""
    logits: Tensor
    """[b, W] V, shape (classes, batch)."""
    solved: float
    """Squared residual from which on a system is solved."""

    @property
    def batch(self) -> int:
        return len(self.core)


def count_examples(target: Target) -> int:
    """The rank of the last layer's gradient above its noise: the batch size, where that is below the layer's own size.

    Raises: NoFeatures.
    """
    return _split(target).batch


def read_features(target: Target, context: Context) -> Features:
    """Labels and features of every example.

    Raises: NoFeatures: the layer is not fully known, the rank says nothing, or fewer solutions than examples came out.
    """
    split = _split(target)
    nonnegative = _nonnegative(target)
    found = _Solutions(split, nonnegative)
    likely = _likely_labels(target, nonnegative)
    for attempt in range(ROUNDS):
        # A label whose gradient is not negative is possible where its probability was high: tried when others fail.
        labels = likely if attempt < ROUNDS - 1 else torch.arange(target.classes, device=target.device)
        unexplained = _joined(target, target.gradient) - found.explained()
        for label in labels.tolist():
            if not context.seconds_left:
                raise NoFeatures("the deadline passed")
            found.add(label, _solve(split, label, _starts(split, unexplained[label], context)))
        chosen = found.choose()
        if chosen is not None:
            return _features(split, *chosen)
    raise NoFeatures(
        f"the last layer's gradient has the rank of {split.batch} examples, but of {found.count} solutions found no "
        f"{split.batch} make it up with equal shares"
    )


def reread_features(target: Target, before: Features) -> Features:
    """The features that a slightly moved gradient gives, found from those before. Raises: NoFeatures."""
    split = _split(target, batch=len(before.labels))
    ones = torch.ones_like(before.values[:, :1])
    starts = torch.cat([ones, before.values], 1) @ split.right
    solved = [_solve(split, int(label), start[None]) for label, start in zip(before.labels, starts, strict=True)]
    if any(len(g) == 0 for g in solved):
        raise NoFeatures("a solution was lost")
    return _features(split, torch.cat(solved), before.labels)


def _split(target: Target, batch: int | None = None) -> _Split:
    try:
        last_layer_signal(target)
    except NoLabel as error:
        raise NoFeatures(str(error)) from error
    weight, bias = list(target.model.parameters())[-2:] if len(target.shapes) > 1 else [None, None]
    if weight is None or bias is None or bias.ndim != 1 or weight.ndim != 2:
        raise NoFeatures("the last layer has no bias")
    gradient, noise = _joined(target, target.gradient), _joined(target, target.noise)
    if not noise.isfinite().all():
        raise NoFeatures("the last layer's gradient is not known in full")
    left, core, right = torch.linalg.svd(gradient, full_matrices=False)
    # Size of a random matrix: about its largest row and its largest column together.
    floor = float(torch.linalg.vector_norm(noise, dim=1).max() + torch.linalg.vector_norm(noise, dim=0).max())
    if batch is None:
        batch = int((core > ABOVE_NOISE * floor).sum())
        if batch > 1 and 2 * batch - 1 > target.classes:
            raise NoFeatures(
                f"the last layer's gradient has rank {batch}: {target.classes} classes tell "
                f"{(target.classes + 1) // 2} examples apart at most"
            )
        if batch == 0:
            raise NoFeatures("the last layer's gradient is within its noise")
    left, core, right = left[:, :batch], core[:batch], right[:batch].T
    public = torch.cat([bias[:, None], weight], 1).detach()
    solved = min(max(SOLVED, (floor / float(core[-1])) ** 2), SOLVED_AT_MOST)
    return _Split(left=left, right=right, core=core, logits=public @ right, solved=solved)


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


def _starts(split: _Split, row: Tensor, context: Context) -> Tensor:
    """Shape (starts, batch): around the features that a label's own row of the gradient suggests: there, its examples
    outweigh all others."""
    center = row / row[0] @ split.right
    scatter = torch.randn(STARTS, split.batch, generator=context.generator, dtype=torch.float64).to(center)
    scales = torch.tensor(SCALES).to(center).repeat(-(-STARTS // len(SCALES)))[:STARTS, None]
    scatter = scatter * scales * torch.linalg.vector_norm(center) / split.batch**0.5
    scatter[0] = 0
    return center + scatter


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
        better = (loss_tried < loss) & (failed == 0)
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

    def explained(self) -> Tensor:
        """The part of the gradient that the solutions make up, with equal shares."""
        if not self._found:
            return torch.zeros_like(self._split.left[:, :1])
        g, labels = self._stacked()
        return _error(self._split, g, labels).T @ (g @ self._split.right.T) / self._split.batch

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

    def choose(self) -> tuple[Tensor, Tensor] | None:
        """The solutions with a share of 1/B each in the gradient; None unless there are B of them."""
        batch = self._split.batch
        if len(self._found) < batch:
            return None
        g, labels = self._stacked()
        error = _error(self._split, g, labels)
        # S = sum of shares x U'e g', in the singular vectors' coordinates
        products = ((error @ self._split.left)[:, :, None] * g[:, None, :]).flatten(1)
        shares = torch.linalg.lstsq(products.T, self._split.core.diag().flatten()[:, None]).solution[:, 0]
        chosen = (shares * batch - 1).abs() < SHARE
        if int(chosen.sum()) != batch:
            return None
        order = labels[chosen].argsort(stable=True)
        return g[chosen][order], labels[chosen][order]


def _error(split: _Split, g: Tensor, labels: Tensor) -> Tensor:
    """softmax - onehot, shape (solutions, classes)."""
    return (g @ split.logits.T).softmax(-1) - functional.one_hot(labels, len(split.left)).to(g)


def _features(split: _Split, g: Tensor, labels: Tensor) -> Features:
    return Features(values=g @ split.right[1:].T, labels=labels, error=_error(split, g, labels) / len(labels))
