"""What a job does to pictures before the model sees them, as torchvision's `Normalize`: a public habit, like the model.

mean=0.485/0.456/0.406,std=0.229/0.224/0.225        a number for each channel, or one for all
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from harness.models.spec import parse_spec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Normalize:
    """(picture - mean) / std, of pictures from 0 to 1; by channel, or one number for all of them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises: ValueError."""
        if len(self.mean) != len(self.std) or not min(self.std) > 0:
            raise ValueError(
                "normalize: wanted as many mean as std, and std above 0, e.g. mean=0.5,std=0.25, got "
                f"mean={self.mean} and std={self.std}"
            )

    def __call__(self, pictures: Tensor) -> Tensor:
        """Shape (batch, channels, height, width), from 0 to 1 -> what the model takes. Raises: ValueError."""
        if pictures.ndim != 4 or len(self.mean) not in (1, pictures.shape[1]):
            raise ValueError(f"normalize: {len(self.mean)} channels do not fit inputs of shape {tuple(pictures.shape)}")
        mean, std = (torch.tensor(each).to(pictures).view(-1, 1, 1) for each in (self.mean, self.std))
        return (pictures - mean) / std

    @property
    def black(self) -> tuple[float, ...]:
        """What 0 becomes, by channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    @property
    def white(self) -> tuple[float, ...]:
        """What 1 becomes, by channel."""
        return tuple((1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))


def load_normalize(text: str) -> Normalize:
    """Reads `mean=...,std=...`. Raises: ValueError, one line."""
    _, options = parse_spec(f"normalize:{text}")
    numbers = {key: value if isinstance(value, tuple) else (value,) for key, value in options.items()}
    if set(numbers) != {"mean", "std"} or not all(
        isinstance(number, (int, float)) for each in numbers.values() for number in each
    ):
        raise ValueError(
            "normalize: wanted e.g. mean=0.485/0.456/0.406,std=0.229/0.224/0.225, a number for each channel or one for "
            f"all, got {text!r}"
        )
    return Normalize(**{key: tuple(map(float, each)) for key, each in numbers.items()})
