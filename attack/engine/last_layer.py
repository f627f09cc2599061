"""One example's features from a last-layer gradient that is known coarsely, or in part.

Of one example the gradient is dW = e f', db = e with e = softmax(W f + b) - onehot(y): the features f alone, and the
public layer, say all of it. So f is what fits best, each element weighed by its own error, by Gauss-Newton:

    minimize  sum over ij of w_ij (e_i f_j - dW_ij)^2 + sum over i of w_i (e_i - db_i)^2 + |f - mean|^2 / variance

Rows that are known in part are enough, as every row says the same f; and the errors of a hundred rounded rows average
out. What is left of the curvature says how well each feature is known.

Differs from `attack.engine.features`, which takes batches apart, but asks for all of the layer, and nearly exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attack.engine.context import Context
from attack.engine.features import NoFeatures
from attack.engine.target import Target
from attack.engine.walk import SAMPLES, FullBelief

ROUNDS, STEPS = 20, 50
"""Of the start, which takes e as given to find f and the other way round; and of Gauss-Newton."""
MOVED = 1e-10
"""Squared move of the features, relative to their size, at which they are done."""
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-3, 1e-12, 1e6
FITS = 3.0
"""Standard deviations, root mean square, that the fit may leave of what was seen: two examples leave far more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CoarseFeatures:
    """What a coarse gradient of the last layer says of one example."""

    label: Tensor
    """int64, shape (1,)."""
    values: Tensor
    """float64, shape (1, features): inputs of the last linear layer."""
    deviation: Tensor
    """Standard deviation of each; same shape."""


@torch.no_grad()
def read_coarsely(
    target: Target, last: nn.Linear, *, mean: float, variance: float, label: Tensor | None = None
) -> CoarseFeatures:
    """The one example behind the gradient.

    Args:
        last: the last layer, whose parameters are the last.
        mean, variance: of a feature before anything is seen.
        label: int64, shape (1,); None: it is read.

    Raises: NoFeatures: no one example explains the layer's gradient.
    """
    fit = _Fit(target, last, mean, variance)
    label = read_label([target]) if label is None else label
    features = fit.start(label)
    damping, value = FIRST_DAMPING, fit.value(features, label)
    for _ in range(STEPS):
        curvature, slope = fit.derivatives(features, label)
        while damping < MOST_DAMPING:
            damped = curvature.clone()
            damped.diagonal().mul_(1 + damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
            tried = fit.value(features - step, label)
            if not failed and tried <= value:
                break
            damping *= 10
        else:
            break
        features, value, damping = features - step, tried, max(damping / 10, LEAST_DAMPING)
        if step.square().sum() <= MOVED * features.square().sum():
            break
    off = (fit.misfit(features, label) / fit.count) ** 0.5
    if not off <= FITS:
        raise NoFeatures(
            f"no one example explains the last layer's gradient: {off:.1f} standard deviations of it are left"
        )
    curvature, _ = fit.derivatives(features, label)
    factor, failed = torch.linalg.cholesky_ex(curvature)
    if failed:
        raise NoFeatures("the last layer's gradient is too ill-conditioned for float64")
    deviation = torch.cholesky_inverse(factor).diagonal().sqrt()
    return CoarseFeatures(label=label, values=features[None], deviation=max(1.0, off) * deviation[None])


@torch.no_grad()
def at_features(features: CoarseFeatures, last: nn.Linear, context: Context) -> FullBelief:
    """The belief on the features, and on the derivative of the loss by them: where the walk back may begin.

    How their errors hang together is left out: sums of features may be known far better than any of them, and what
    bends below would be taken for news on such a sum.
    """
    mean, deviation = features.values[0], features.deviation[0]
    precision = deviation.square().reciprocal().diag()
    samples = mean + deviation * context.normal((SAMPLES, len(mean))).to(mean)
    weight, bias = last.weight.detach(), last.bias.detach()
    errors = (torch.cat([mean[None], samples]) @ weight.T + bias).softmax(1)
    errors[:, features.label] -= 1
    errors = errors @ weight
    return FullBelief(
        mean=mean,
        precision=precision,
        weighted=precision @ mean,
        samples=samples,
        error=errors[0],
        error_samples=errors[1:],
    )


class _Fit:
    """The sum of squares, and its derivatives by the features."""

    def __init__(self, target: Target, last: nn.Linear, mean: float, variance: float) -> None:
        self._weight, self._bias = last.weight.detach(), last.bias.detach()
        (self._d_weight, self.d_bias), (noise, bias_noise) = (
            target.tensors(flat)[-2:] for flat in (target.gradient, target.noise)
        )
        if self._d_weight.shape != self._weight.shape or self.d_bias.shape != self._bias.shape:
            raise NoFeatures("the model's last parameters are not those of its last layer")
        self._w, self.w_bias = noise.square().reciprocal(), bias_noise.square().reciprocal()  # 0 where unknown
        self._mean, self._variance = mean, variance
        self.count = max(1, int(self._w.count_nonzero() + self.w_bias.count_nonzero()))

    def start(self, label: Tensor) -> Tensor:
        """Features that fit the errors as seen, or those that such features make, where these fit better: the more
        exact an error was seen, the less is it worth to compute it."""
        error = torch.where(self.w_bias > 0, self.d_bias, 0.0)
        found = []
        for _ in range(ROUNDS):
            seen = (self._w * error.square()[:, None]).sum(0) + 1 / self._variance
            features = ((self._w * error[:, None] * self._d_weight).sum(0) + self._mean / self._variance) / seen
            error = self._error(features, label)[0]
            found.append((self.value(features, label), features))
        return min(found, key=lambda pair: pair[0])[1]

    def misfit(self, features: Tensor, label: Tensor) -> float:
        """Sum of squared standard deviations from what was seen."""
        error, _ = self._error(features, label)
        off = self._w * (error[:, None] * features - self._d_weight).square()
        return float(off.sum() + (self.w_bias * (error - self.d_bias).square()).sum())

    def value(self, features: Tensor, label: Tensor) -> float:
        """The misfit, and how far the features are from what is expected of them."""
        return self.misfit(features, label) + float((features - self._mean).square().sum()) / self._variance

    def derivatives(self, features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton's half second derivative of `value`, shape (features, features), and half its first."""
        error, probabilities = self._error(features, label)
        by_logits = probabilities.diag() - probabilities.outer(probabilities)
        by_features = by_logits @ self._weight  # of the error, shape (classes, features)
        off = error[:, None] * features - self._d_weight
        own = (self._w * error.square()[:, None]).sum(0) + 1 / self._variance
        across = (self._w * error[:, None] * features).T @ by_features
        shared = (self._w * features.square()).sum(1) + self.w_bias
        curvature = own.diag() + across + across.T + by_features.T @ (shared[:, None] * by_features)
        slope = (self._w * error[:, None] * off).sum(0) + (features - self._mean) / self._variance
        pulled = (self._w * features * off).sum(1) + self.w_bias * (error - self.d_bias)
        return curvature, slope + by_features.T @ pulled

    def _error(self, features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = (self._weight @ features + self._bias).softmax(0)
        error = probabilities.clone()
        error[label] -= 1
        return error, probabilities


def read_label(targets: Sequence[Target]) -> Tensor:
    """The class whose bias has the most negative gradient: of one example, the only one below zero. Of several steps of
    one example their mean, each weighed by how well it is known. Raises: NoFeatures."""
    if targets[0].labels is not None:
        return targets[0].labels
    weights = torch.stack([target.tensors(target.noise)[-1].square().reciprocal() for target in targets])
    seen = torch.stack([target.tensors(target.gradient)[-1] for target in targets])
    mean = (weights * seen).sum(0) / weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
    if not mean.min() < 0:
        raise NoFeatures("no class has a negative gradient in the last layer's bias, as far as it was seen")
    return mean.argmin()[None]
