"""What a data set is, and which of its examples a rank takes at a step."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from harness.errors import DataError
from harness.seeding import derive, generator
from harness.types import Batch


class Dataset(Protocol):
    """Examples in memory, of any kind."""

    @property
    def name(self) -> str:
        """As a person named it."""

    @property
    def kind(self) -> str:
        """What its examples are: `pictures`."""

    @property
    def size(self) -> str:
        """How large they are: `3x32x32`."""

    def __len__(self) -> int:
        """How many examples there are."""

    def model_options(self, loss: str) -> dict[str, Any]:
        """What a built-in model takes from the data. Raises: ConfigError: this set has no labels for that loss."""

    def outputs(self, loss: str) -> int:
        """How many different labels that loss sees."""

    def take(self, chosen: np.ndarray, *, loss: str, seed: int) -> Batch:
        """These examples, int64, shape (batch,), with the labels that `loss` needs; `seed` fixes what is drawn."""

    def part(self, chosen: np.ndarray) -> Dataset:
        """The set of these examples alone, int64, ascending. Raises: DataError where there are none."""


def batch_at(
    data: Dataset,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    batch_size: int,
    loss: str = "cross_entropy",
) -> Batch:
    """The examples that a rank takes at a step: a pure function of its arguments.

    Each epoch goes once through the set in an order drawn from (seed, epoch), leaving out the last examples that do not
    fill a step of all ranks. The batches of all ranks at a step, joined in rank order, are the batch that one process
    of `batch_size * world_size` takes at that step.

    Raises: DataError, where the set is smaller than one step of all ranks.
    """
    together = batch_size * world_size
    steps_an_epoch = len(data) // together
    if not steps_an_epoch:
        raise DataError(
            f"{data.name}: {len(data)} {data.kind}, but one step takes {world_size} ranks x "
            f"{batch_size} = {together}; lower the batch size or take a larger set"
        )
    epoch, at = divmod(step, steps_an_epoch)
    order = torch.randperm(len(data), generator=generator(seed, "order", epoch)).numpy()
    first = at * together + rank * batch_size
    return data.take(order[first : first + batch_size], loss=loss, seed=derive(seed, "take", epoch))
