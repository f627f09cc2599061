"""A data set in memory, and which of its examples a rank takes at a step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from harness.errors import DataError
from harness.seeding import generator
from harness.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Pictures as they are stored; a batch has them as float32 from 0 to 1."""

    name: str
    pictures: np.ndarray
    """uint8, shape (examples, channels, height, width)."""
    labels: np.ndarray
    """int64, shape (examples,), from 0 to classes - 1."""
    classes: int
    """Number of classes."""

    def __post_init__(self) -> None:
        """Raises: DataError, naming the set and what is wrong with it."""
        if self.pictures.ndim != 4 or self.pictures.dtype != np.uint8:
            raise DataError(
                f"{self.name}: wanted bytes of shape (N, C, H, W), got {self.pictures.dtype} of shape "
                f"{self.pictures.shape}"
            )
        if len(self.pictures) == 0:
            raise DataError(f"{self.name}: holds no picture")
        if self.labels.shape != (len(self.pictures),):
            raise DataError(f"{self.name}: {len(self.pictures)} pictures, but labels of shape {self.labels.shape}")
        if self.labels.min() < 0 or self.labels.max() >= self.classes:
            raise DataError(
                f"{self.name}: labels from {self.labels.min()} to {self.labels.max()}, wanted 0 to {self.classes - 1}"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (channels, height, width)."""
        return self.pictures.shape[1:]


def batch_at(data: Dataset, *, seed: int, step: int, rank: int, world_size: int, batch_size: int) -> Batch:
    """The examples that a rank takes at a step: a pure function of its arguments.

    Each epoch goes once through the set in an order drawn from (seed, epoch), leaving out the last examples that do not
    fill a step of all ranks. The batches of all ranks at a step, joined in rank order, are the batch that one process
    of `batch_size * world_size` takes at that step.

    Raises: DataError, where the set is smaller than one step of all ranks.
    """
    together = batch_size * world_size
    steps_an_epoch = len(data.pictures) // together
    if not steps_an_epoch:
        raise DataError(
            f"{data.name}: {len(data.pictures)} pictures, but one step takes {world_size} ranks x "
            f"{batch_size} = {together}; lower the batch size or take a larger set"
        )
    epoch, at = divmod(step, steps_an_epoch)
    order = torch.randperm(len(data.pictures), generator=generator(seed, "order", epoch)).numpy()
    first = at * together + rank * batch_size
    chosen = order[first : first + batch_size]
    return Batch(
        inputs=torch.from_numpy(data.pictures[chosen]).float() / 255,
        labels=torch.from_numpy(data.labels[chosen].astype(np.int64)),
    )
