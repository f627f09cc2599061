"""What every exchange promises: "take the weights of rank 0, then average these with my peers, step after step".

An exchange knows vectors, ranks, steps and deadlines; nothing of data, losses, optimizers or who listens.
"""

from __future__ import annotations

import abc
import dataclasses
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from harness.wire import Layout
from harness.wire.coded import Coded
from harness.wire.dense import Dense


@dataclasses.dataclass(kw_only=True, slots=True)
class Traffic:
    """Payload bytes that this rank handed to, and took from, the transport; its headers are not counted."""

    bytes_out: int = 0
    bytes_in: int = 0


class Exchange(abc.ABC):
    """One rank's end. The order of calls is: `start` once, `average` for each step, `close`.

    Every call blocks until it is done or its deadline has passed, and raises `harness.errors.ExchangeError` (a
    `DeadlineError` where a peer did not answer) with one line that names rank, step, wanted and got.
    """

    rank: int
    world_size: int
    traffic: Traffic

    @abc.abstractmethod
    def start(self, model: nn.Module, *, step: int) -> None:
        """Overwrites parameters and floating-point buffers of `model`, in place, with those of rank 0.

        Args:
            model: on every rank of the same architecture.
            step: the first step that will be averaged; more than 0 when a run is resumed.
        """

    @abc.abstractmethod
    def average(self, gradient: Tensor | Coded, *, step: int) -> Tensor:
        """The mean of all ranks' gradients at this step.

        Args:
            gradient: float32, shape (parameters,), contiguous; the caller may overwrite it as soon as this returns. Or
                coded, of as many elements, and so it travels; the mean is that of what the code says.

        Returns:
            float32, shape (parameters,), the same bits on every rank. Valid until the next call of `average`.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends this rank's part; waits for nobody. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_coded(gradient: Tensor | Coded) -> Coded:
    """A tensor as the dense code of itself, which shares its memory where that is on the CPU."""
    if not isinstance(gradient, Tensor):
        return gradient
    return Dense(np.ascontiguousarray(gradient.detach().cpu().numpy(), "<f4"))


def as_tensor(gradient: Tensor | Coded) -> Tensor:
    """float32, shape (parameters,): what a coded gradient says."""
    return gradient.detach() if isinstance(gradient, Tensor) else torch.from_numpy(gradient.values())


def flat_state(model: nn.Module) -> Tensor:
    """Parameters in `model.parameters()` order, then floating-point buffers: float32, shape (elements,)."""
    tensors = [tensor.detach().reshape(-1).float() for tensor in state_tensors(model)]
    return torch.cat(tensors) if tensors else torch.zeros(0)


def load_flat_state(model: nn.Module, state: Tensor) -> None:
    """The inverse of `flat_state`, in place."""
    at = 0
    with torch.no_grad():
        for tensor in state_tensors(model):
            tensor.copy_(state[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()


def layout_of(model: nn.Module, *, world_size: int) -> Layout:
    """What ranks tell each other of a model, so that all train the same."""
    parameters, shapes = len(list(model.parameters())), [tuple(tensor.shape) for tensor in state_tensors(model)]
    return Layout(world=world_size, parameters=tuple(shapes[:parameters]), buffers=tuple(shapes[parameters:]))


def state_tensors(model: nn.Module) -> list[Tensor]:
    """What `start` makes equal: all parameters, then the floating-point buffers, each once."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
