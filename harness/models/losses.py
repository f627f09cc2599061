"""Public losses: cross-entropy of a model's outputs, the mean over all that have a label."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""In place of a label: this token has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """Cross-entropy of outputs and labels, once `aligned` has put one label beside each row of logits."""

    aligned: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Outputs and labels of a batch -> logits, shape (n, classes), and int64 labels, shape (n,), `IGNORED` where there
    is none; or probabilities, shape (n, classes)."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over all that have a label."""
        logits, labels = self.aligned(outputs, labels)
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED)

    def correct(self, outputs: Tensor, labels: Tensor) -> float:
        """Share of the labels that the largest output names, 0 to 1."""
        logits, labels = self.aligned(outputs.detach(), labels)
        return (logits.argmax(1) == labels)[labels != IGNORED].float().mean().item()


def _one_an_example(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, shape (batch, classes), and labels, shape (batch,)."""
    if outputs.ndim != 2:
        raise ValueError(f"cross_entropy: wanted logits of shape (batch, classes), got {tuple(outputs.shape)}")
    return outputs, labels


def _one_a_token(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, shape (batch, length, vocabulary), and labels, shape (batch, length)."""
    if outputs.ndim != 3:
        raise ValueError(f"masked_lm: wanted logits of shape (batch, length, tokens), got {tuple(outputs.shape)}")
    return outputs.flatten(0, 1), labels.flatten()


def _next_token(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, each token's logits beside the next one's label."""
    if outputs.ndim != 3:
        raise ValueError(f"causal_lm: wanted logits of shape (batch, length, tokens), got {tuple(outputs.shape)}")
    return outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_one_an_example),
    "masked_lm": Loss(_one_a_token),
    "causal_lm": Loss(_next_token),
}
"""Of examples that have one class each; of masked tokens; of every token, from those before it. For the latter two the
labels are tokens, in their places."""
