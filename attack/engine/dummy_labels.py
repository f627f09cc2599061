"""Dummy labels of text: probabilities in place of what the loss asks for, so that a search can change them.

A class for each example, where it cannot be read; the next token for each place of a causal model; and of a masked
language model a place for each token that is asked for, since the last bias says which these are.

Reference: Zhu, Liu, Han, NeurIPS 2019, arXiv 1906.08935, algorithm 1; the labels' softmax as in its released code.
"""

from __future__ import annotations

from typing import Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from attack.engine.labels import SURE, NoLabel, read_labels
from attack.engine.target import Target
from harness.models import IGNORED, LOSSES


class DummyLabels(Protocol):
    """Labels of a batch, by logits that a search changes."""

    shape: torch.Size
    """Of the logits."""

    def loss(self, outputs: Tensor, logits: Tensor) -> Tensor:
        """The job's, of the model's outputs."""

    def read(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, shape (batch, length), with what only labels say of them; and the likeliest labels, int64, as the
        job's loss takes them."""


def dummy_labels(target: Target, length: int) -> DummyLabels:
    """Of sentences of that length. Raises: NoLabel."""
    if target.loss is LOSSES["cross_entropy"]:
        # Without a bias, the rule wants features that are not negative, and a transformer's are.
        read = target.labels is not None or target.shapes[-1] == (target.classes,)
        return KnownClasses(read_labels(target)) if read else Classes(target.batch_size, target.classes)
    if target.loss is LOSSES["causal_lm"]:
        return NextTokens(target.batch_size, length, target.classes)
    if target.loss is LOSSES["masked_lm"]:
        return MaskedTokens(asked_tokens(target, target.batch_size * length), target.batch_size * length)
    raise NoLabel("the loss is none whose labels are known to be searched")


class KnownClasses:
    """One an example, told or read: nothing to search. int64, shape (batch,)."""

    def __init__(self, labels: Tensor) -> None:
        self.shape, self._known = torch.Size((0,)), labels

    def loss(self, outputs: Tensor, logits: Tensor) -> Tensor:
        """See `DummyLabels`."""
        return functional.cross_entropy(outputs, self._known)

    def read(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `DummyLabels`."""
        return tokens, self._known


class Classes:
    """One an example."""

    def __init__(self, batch: int, classes: int) -> None:
        self.shape = torch.Size((batch, classes))

    def loss(self, outputs: Tensor, logits: Tensor) -> Tensor:
        """See `DummyLabels`."""
        return -(logits.softmax(1) * outputs.log_softmax(1)).sum(1).mean()

    def read(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `DummyLabels`."""
        return tokens, logits.argmax(1)


class NextTokens:
    """One a token, but for the first of a sentence. Of the last, nothing else depends on it."""

    def __init__(self, batch: int, length: int, vocab: int) -> None:
        self.shape = torch.Size((batch, length - 1, vocab))

    def loss(self, outputs: Tensor, logits: Tensor) -> Tensor:
        """See `DummyLabels`."""
        return -(logits.softmax(2) * outputs[:, :-1].log_softmax(2)).sum(2).mean()

    def read(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `DummyLabels`."""
        tokens = torch.cat([tokens[:, :-1], logits[:, -1:].argmax(2)], 1)
        return tokens, tokens


class MaskedTokens:
    """Tokens that are asked for, each in some place.

    Args:
        asked: int64, shape (asked,).
        places: of the whole batch.
    """

    def __init__(self, asked: Tensor, places: int) -> None:
        self.shape, self._asked = torch.Size((len(asked), places)), asked

    def loss(self, outputs: Tensor, logits: Tensor) -> Tensor:
        """See `DummyLabels`."""
        surprises = -outputs.flatten(0, 1).log_softmax(1)[:, self._asked].T
        return (logits.softmax(1) * surprises).sum(1).mean()

    def read(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `DummyLabels`."""
        rows, places = linear_sum_assignment(logits.softmax(1).cpu().numpy(), maximize=True)
        labels = torch.full((tokens.numel(),), IGNORED, device=tokens.device)
        labels[torch.as_tensor(places, device=tokens.device)] = self._asked[torch.as_tensor(rows, device=tokens.device)]
        return tokens, labels.view_as(tokens)


def asked_tokens(target: Target, most: int) -> Tensor:
    """Tokens that a masked language model is asked for, int64, as often as each is, ascending.

    The last bias's gradient is mean(p) - counts / asked: negative at these tokens alone. How many they are together is
    taken to be the number with which all counts come nearest to whole ones: right where the model is not yet sure.

    Args:
        most: how many there can be.

    Raises: NoLabel.
    """
    biases = [index for index, shape in enumerate(target.shapes) if shape == (target.classes,)]
    if not biases:
        raise NoLabel("the model has no bias for each token, whose gradient says which are asked for")
    pull, noise = (target.tensors(part)[biases[-1]] for part in (-target.gradient, target.noise))
    tokens = (pull > SURE * noise).nonzero()[:, 0]  # never where unknown: the noise is infinite there
    found: list[tuple[float, Tensor]] = []
    for together in range(max(1, len(tokens)), most + 1):
        shares = together * pull[tokens]
        counts = shares.round().long().clamp(min=1)
        if int(counts.sum()) == together:
            found.append((float((shares - counts).abs().mean()), tokens.repeat_interleave(counts)))
    if not found:
        raise NoLabel(f"{len(tokens)} tokens pull at the last bias, which makes no sense of up to {most}")
    return min(found, key=lambda pair: pair[0])[1]
