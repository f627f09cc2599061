"""What one rank's gradient says of the weights it was taken at, from the last linear layer alone.

Under cross-entropy that layer's gradient is a sum over the batch's examples, with f_i the features and y_i the label,

    A = [db, dW] = 1/B sum over i of e_i [1, f_i]',    e_i = softmax([b, W] [1, f_i]) - onehot(y_i)

Of the singular vectors V of A the features are combinations, [1, f_i] = V g_i with (V g_i)[0] = 1. So the weights
[b, W] that the gradient was taken at leave no more than its noise of

    R = 1/B sum over i of e_i g_i' - A V       classes x B equations for B x (B - 1) unknowns

and other weights leave more. With one example there is no unknown at all. Knows no optimizer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.engine.context import Context
from attack.engine.features import NoFeatures, read_features
from attack.engine.rank import ABOVE_NOISE, decompose
from attack.engine.target import Target, element_noise
from attack.inference.layer import Layer
from attack.inference.scale import solve_scales
from attack.observation import Observation
from harness.models import LOSSES

ROUNDING = 2.0**-24
"""Of a float32 operation, relative."""
NARROW = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Rounding of what is sent in these formats, relative."""
ITERATIONS = 40
SETTLED = 1e-3
"""Relative gain in the squared residual below which features are refined no further."""


class Mute(ValueError):
    """This gradient says nothing of its weights; one line that says why."""


class Witness:
    """One rank at one step."""

    def __init__(self, seen: Observation, layer: Layer) -> None:
        """Raises: Mute."""
        self.rank, self.step = seen.rank, seen.step
        own = layer.cut(seen)
        known = own.limited
        if not bool(known.all() and own.gradient.isfinite().all()):
            raise Mute("the last layer's gradient is not wholly known, or not finite")
        gradient = own.gradient.double()
        self._layer = layer
        self._bound = torch.zeros_like(gradient) if own.bound is None else own.bound.double()
        noise = element_noise(own, known, gradient, self._bound)
        narrow = next((error for name, error in NARROW.items() if (own.defense or "").startswith(name)), 0.0)
        self._flat, self._flat_noise = gradient, torch.hypot(noise, narrow * gradient.abs())
        self._gradient, self._noise = layer.matrix(gradient), layer.matrix(self._flat_noise)
        parts = decompose(self._gradient, self._noise)
        self.batch = parts.rank
        if self.batch == 0 or (self.batch > 1 and 2 * self.batch > layer.classes):
            raise Mute(
                f"the last layer's gradient has rank {self.batch}: {layer.classes} classes tell 1 to "
                f"{layer.classes // 2} examples apart"
            )
        self._left, self._core, self._right = parts.left, parts.core, parts.right
        # Noise of A V, and of V itself in what is outside of its own span.
        self._noise_AV = (self._noise.square() @ self._right.square()).sqrt()
        self._noise_V = (self._noise.square().T @ self._left.square()).sqrt() / self._core
        self._g: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        if self.batch == 1:
            self._g = 1 / self._right[:1]
            self._labels = (self._gradient[:, 0]).argmin()[None]

    @property
    def heard(self) -> bool:
        """Whether the examples are known, so that weights can be judged."""
        return self._g is not None

    @property
    def equations(self) -> int:
        """Independent equations beyond the unknowns: each example's errors add up to zero."""
        return self.batch * (self._layer.classes - 1) - self.batch * (self.batch - 1)

    def hear(self, weights: Tensor, context: Context) -> bool:
        """Looks for the examples at these weights, [b, W] in float64; remembers them where they are found."""
        if self.batch == 1:
            return True
        model = nn.Linear(self._layer.features, self._layer.classes).double()
        with torch.no_grad():
            model.bias.copy_(weights[:, 0])
            model.weight.copy_(weights[:, 1:])
        target = Target(
            model=model,
            loss=LOSSES["cross_entropy"],
            gradient=self._flat,
            known=torch.ones_like(self._flat),
            noise=self._flat_noise,
            bound=self._bound,
            shapes=(model.weight.shape, model.bias.shape),
            input_shape=(self._layer.features,),
            input_range=(0.0, 1.0),
            classes=self._layer.classes,
            batch_size=self.batch,
            batch_size_assumed=False,
            labels=None,
        )
        try:
            found = read_features(target, context)
        except NoFeatures:
            return False
        if len(found.labels) != self.batch:
            return False
        self._g, self._labels = functional.pad(found.values, (1, 0), value=1.0) @ self._right, found.labels
        return True

    def scales(self, weights: Tensor, direction: Tensor, context: Context) -> list[float]:
        """Likely s > 0, the likeliest first, with the gradient taken at `weights` + s `direction`; [b, W], float64."""
        if self.batch > 1:
            return solve_scales(
                self._left,
                self._right,
                self._left * self._core,
                weights @ self._right,
                direction @ self._right,
                generator=context.generator,
            )
        off, noise = self._log_odds(weights)
        sure = noise.isfinite()
        if int(sure.sum()) < 3:
            return []
        assert self._g is not None
        turn = direction @ self._right @ self._g[0]
        weigh = 1 / noise[sure]
        matrix = torch.stack([turn[sure] * weigh, weigh], 1)
        found = float(torch.linalg.lstsq(matrix, (off[sure] * weigh)[:, None], driver="gelsd").solution[0])
        return [found] if found > 0 else []

    def residual(self, weights: Tensor) -> Tensor:
        """R in units of its noise, shape (classes, batch): about 1 for the right weights. Ask once the examples are
        known; here they are what fits these weights best.

        Args:
            weights: [b, W], float64, shape (classes, 1 + features).
        """
        assert self._g is not None
        logits = weights @ self._right
        g = self._g if self.batch == 1 else self._refine(logits, self._g)
        p = (g @ logits.T).softmax(-1)
        return self._off(p, g) / self._sigma(weights, p, g)

    def _log_odds(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of one example: how far the logits that the gradient shows are from those at these weights, up to a common
        constant, and the noise of that; shape (classes,) each. The noise is infinite where a class has no chance."""
        assert self._g is not None
        error = self._core / self._g[0] * self._left[:, 0]
        shown = error + functional.one_hot(self._labels[0], self._layer.classes)
        noise = self._noise_AV[:, 0] / self._g[0].abs()
        sure = shown > ABOVE_NOISE * noise
        off = shown.clamp(min=1e-300).log() - weights @ self._right @ self._g[0]
        return torch.where(sure, off, 0.0), torch.where(sure, noise / shown.clamp(min=1e-300), math.inf)

    def _off(self, p: Tensor, g: Tensor) -> Tensor:
        error = p - functional.one_hot(self._labels, p.shape[-1])
        return error.T @ g / self.batch - self._left * self._core

    def _sigma(self, weights: Tensor, p: Tensor, g: Tensor) -> Tensor:
        """Standard deviation of R, shape (classes, batch), to first order: the gradient's own noise, and what that and
        the job's float32 arithmetic make of the logits."""
        inputs = g @ self._right.T
        of_logits = g.square() @ self._noise_V.square().T @ weights.square().T
        of_logits = of_logits + (4 * ROUNDING * (inputs.abs() @ weights.abs().T)).square() / self._layer.features
        own = (p * (1 - p)).square() * of_logits
        others = p.square() * ((p.square() * of_logits).sum(-1, keepdim=True) - p.square() * of_logits)
        of_error = own + others + (2 * ROUNDING * p).square()
        return (self._noise_AV.square() + of_error.T @ g.square() / self.batch**2).sqrt()

    def _refine(self, logits: Tensor, g: Tensor) -> Tensor:
        """The examples that fit these weights best, by Levenberg-Marquardt from those before. `logits` is [b, W] V."""
        first = self._right[0]
        free = torch.linalg.qr(first[:, None], mode="complete").Q[:, 1:]  # directions that leave (V g)[0] alone
        unit = self._noise_AV.square().mean(1, keepdim=True).sqrt()
        turn, damping = logits @ free, 1e-6
        p = (g @ logits.T).softmax(-1)
        off = self._off(p, g) / unit
        loss = float(off.square().sum())
        for _ in range(ITERATIONS):
            # dR[c, b] / dt[i, k] = (J_i turn)[c, k] g[i, b] + e[i, c] free[b, k], over B
            error = p - functional.one_hot(self._labels, p.shape[-1])
            slopes = p[:, :, None] * (turn - (p @ turn)[:, None, :])
            by = torch.einsum("ick,ib->cbik", slopes, g) + torch.einsum("ic,bk->cbik", error, free)
            matrix = (by / self.batch / unit[:, :, None, None]).flatten(2).flatten(0, 1)
            normal, right = matrix.T @ matrix, matrix.T @ off.flatten()
            damped = normal + damping * normal.diagonal().diag() + 1e-30 * torch.eye(len(normal), dtype=normal.dtype)
            step, failed = torch.linalg.solve_ex(damped, right)
            tried = g - step.view(self.batch, -1) @ free.T
            p_tried = (tried @ logits.T).softmax(-1)
            off_tried = self._off(p_tried, tried) / unit
            loss_tried = float(off_tried.square().sum())
            if int(failed) == 0 and loss_tried < loss:
                gain = (loss - loss_tried) / loss
                g, p, off, loss, damping = tried, p_tried, off_tried, loss_tried, damping / 10
                if gain < SETTLED:
                    break
            else:
                damping = max(damping * 10, 1e-9)
                if damping > 1e6:
                    break
        return g


def size(residual: Tensor) -> float:
    """Root mean square."""
    return float(residual.square().mean().sqrt())
