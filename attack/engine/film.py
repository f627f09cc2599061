"""How one attack went: its gradient match over iterations, and a bounded number of frames of its answer."""

from __future__ import annotations

from torch import Tensor

MAX_FRAMES = 24
"""Enough for a smooth animation; 300 kB for a picture of 3x32x32."""


class Film:
    """Takes every iteration, keeps every residual and evenly spread frames."""

    def __init__(self) -> None:
        self.history: list[tuple[int, float]] = []
        """(iteration, relative gradient residual)."""
        self.frames: list[tuple[int, Tensor]] = []
        """(iteration, inputs), float32 on the CPU."""
        self._stride = 1

    def take(self, iteration: int, residual: float, inputs: Tensor) -> None:
        """Records one iteration. `inputs` is copied: the caller may change it afterwards."""
        self.history.append((iteration, residual))
        if (len(self.history) - 1) % self._stride == 0:
            self.frames.append((iteration, inputs.detach().float().cpu().clone()))
        if len(self.frames) > MAX_FRAMES:
            self.frames = self.frames[::2]
            self._stride *= 2
