"""What a defense is: a pure step from a rank's gradient to what it sends in its place.

Four kinds, and in a chain they come in this order, each optional, and of the first two only one:

    ExampleStep   the gradients of the batch's examples -> one gradient     clipping of each example
    BatchStep     a gradient, the model and the batch -> a gradient         pruning of a layer's features
    Step          a gradient -> a gradient                                  noise, clipping
    Coder         a gradient -> a coded vector (`harness.wire`)             pruning, rounding, signs

A step keeps nothing: what it remembers from one training step to the next comes in and goes out as `State`, and is part
of a checkpoint; what it draws is fixed by `Moment`. It knows one rank, and nothing of peers, sockets or who listens.

A state is handed over: a step may write its tensors, and give them back. A long vector that is read and written in
place costs half of what it costs to write another; what a step makes of it, it makes block by block, so that what lies
between stays in the cache (`harness.defenses.blocks`).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from harness.seeding import Draws
from harness.types import Batch
from harness.wire.coded import Coded

State: TypeAlias = dict[str, Tensor]
"""What a step remembers: flat tensors by name."""
Sizes: TypeAlias = tuple[int, ...]
"""Elements of each parameter, in `model.parameters()` order: where a flat gradient is cut into tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Whose gradient it is, and when."""

    seed: int
    """Of the run. What hides behind a draw is as secret as this number: give a run that must hide something one of 128
    random bits."""
    rank: int
    step: int
    link: int = 0
    """Place in the chain: two steps of one chain never share a draw."""

    def draws(self) -> Draws:
        """The same at every call; others for every rank, step and place in the chain."""
        return Draws(self.seed, "defense", self.link, self.rank, self.step)


def nothing_yet(sizes: Sizes) -> Tensor:
    """Zeros for all elements. numpy's, which asks the kernel for large pages: they are walked a tenth quicker."""
    return torch.from_numpy(np.zeros(sum(sizes), np.float32))


class Link:
    """What the kinds share."""

    def fit(self, model: nn.Module) -> Self:
        """The link for this model: some need the shapes of its parameters, or its layers. Comes before all else."""
        return self

    def begin(self, sizes: Sizes) -> State:
        """What it remembers before the first step."""
        return {}


class ExampleStep(Link, abc.ABC):
    """Takes part before the batch's mean."""

    @abc.abstractmethod
    def __call__(self, examples: Tensor, moment: Moment) -> Tensor:
        """float32, shape (batch, parameters) -> float32, shape (parameters,): in place of their mean."""


class BatchStep(Link, abc.ABC):
    """Takes part first, as it looks at the batch itself."""

    @abc.abstractmethod
    def __call__(self, gradient: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        """The mean gradient of the batch, float32, shape (parameters,), which is not changed -> one in its place.

        What `model` remembers of batches is not changed; draws of its forward pass come from torch's global generator.
        """


class Step(Link, abc.ABC):
    """Takes part between the mean and the code."""

    @abc.abstractmethod
    def __call__(self, gradient: Tensor, state: State, moment: Moment) -> tuple[Tensor, State]:
        """float32, shape (parameters,), which is not changed -> the same, and what to remember."""


class Coder(Link, abc.ABC):
    """Comes last."""

    @abc.abstractmethod
    def __call__(self, gradient: Tensor, sizes: Sizes, state: State, moment: Moment) -> tuple[Coded, State]:
        """float32, shape (parameters,), on the CPU, not changed -> what is sent, and what to remember."""
