"""What an attack may use beside its target: randomness, time, and somebody to tell how far it has come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far one attack has come."""

    method: str
    evaluations: int
    """Gradients of the model computed so far."""
    residual: float
    """Relative gradient residual of the best answer so far; NaN before the first."""
    seconds_left: float
    """Until the attack's deadline: it ends no later than that."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What an attack may use beside its target."""

    generator: torch.Generator
    """Every random draw comes from here (a CPU generator): equal seeds give equal answers on one device."""
    deadline: float
    """On `clock`."""
    progress: Callable[[Progress], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    """In seconds; `time.process_time` for what is to come to the same on a machine that is busy with other work."""

    @property
    def seconds_left(self) -> float:
        """Time until the deadline, never negative."""
        return max(0.0, self.deadline - self.clock())

    def normal(self, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers, on the CPU."""
        return torch.randn(shape, generator=self.generator, dtype=dtype)
