"""A set of labeled pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from harness.errors import ConfigError, DataError
from harness.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PictureSet:
    """Pictures as they are stored; a batch has them as float32 from 0 to 1. See `Dataset`."""

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

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (channels, height, width)."""
        return self.pictures.shape[1:]

    @property
    def kind(self) -> str:
        """See `Dataset`."""
        return "pictures"

    @property
    def size(self) -> str:
        """See `Dataset`."""
        return "x".join(map(str, self.input_shape))

    def model_options(self, loss: str) -> dict[str, Any]:
        """See `Dataset`."""
        return {"input": self.input_shape, "classes": self.outputs(loss)}

    def outputs(self, loss: str) -> int:
        """See `Dataset`."""
        if loss != "cross_entropy":
            raise ConfigError(f"loss {loss!r} is for text, and {self.name} holds pictures; take cross_entropy")
        return self.classes

    def part(self, chosen: np.ndarray) -> PictureSet:
        """See `Dataset`."""
        return dataclasses.replace(self, pictures=self.pictures[chosen], labels=self.labels[chosen])

    def take(self, chosen: np.ndarray, *, loss: str, seed: int) -> Batch:
        """See `Dataset`. Nothing is drawn."""
        return Batch(
            inputs=torch.from_numpy(self.pictures[chosen]).float() / 255,
            labels=torch.from_numpy(self.labels[chosen].astype(np.int64)),
        )
