"""What an attack is: a function from a `Target` and a `Context` to an `Answer`; and what comes of it, a
`Reconstruction`.

An attack only proposes. Whether a proposal counts is judged in one place, `attack.reconstruct`, by
the gradient match and its conditioning alone.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable

from torch import Tensor

from attack.engine.context import Context
from attack.engine.film import Film
from attack.engine.target import Target
from attack.engine.walk import Belief


class Status(enum.StrEnum):
    """How an attack on one observation ended."""

    CONVERGED = "converged"
    """The answer's gradient is the observed one, within what the observation's exactness allows."""
    FILLED = "filled"
    """The gradient matches and the equations leave part open, which a prior on pictures filled: a likely picture, not
    a proven one."""
    NOT_CONVERGED = "not_converged"
    """It is not; there is no answer."""
    NOT_OBSERVED = "not_observed"
    """The wire did not show enough to start."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an attack proposes."""

    inputs: Tensor | None
    """float64, shape (batch, *input_shape); None where it has nothing to propose."""
    labels: Tensor | None
    """int64, shape (batch,)."""
    soft_labels: Tensor | None = None
    """float64, shape (batch, classes), where labels were optimized as probabilities."""
    film: Film = dataclasses.field(default_factory=Film)
    belief: Belief | None = None
    """How well the equations determine `inputs`, where the method knows."""
    again: Callable[[Iterable[Target]], Iterable[Tensor]] | None = None
    """The inputs that each of some slightly moved gradients gives, found from these: where the method can tell for
    little. At once or one by one, whichever takes less; the next gradient is then asked for when it is needed. May
    raise NoChain or NoFeatures where one moved too far."""
    left_open: float | None = None
    """Mean square of what is left open of `inputs`, the answer's own misfit and the prior included, where the method
    solved for that."""
    filled: bool = False
    """Whether a prior on pictures decided what the equations leave open; `reason` then says how much."""
    rivals_ruled_out: bool = False
    """Of text: whether `attack.engine.rivals.doubt` was asked already, and had none."""
    batch_size_read: bool = False
    """Whether the batch size was not told, but read from the gradient."""
    evaluations: int = 0
    """Gradients of the model computed."""
    restarts: int = 0
    reason: str | None = None
    """Why there is nothing to propose, or why the search ended early."""
    method: str | None = None
    """The method that made it, where it was chosen by another."""
    route: str | None = None
    """Why that method was chosen."""


Method = Callable[[Target, Context], Answer]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """What an attack on one observation ends with. Without convergence it holds no picture, only how it failed."""

    rank: int
    step: int
    status: Status
    method: str
    route: str | None = None
    """Why this method, where `auto` chose."""
    inputs: Tensor | None = None
    """float32, shape (batch, *input_shape), in model input units."""
    labels: Tensor | None = None
    """int64, shape (batch,)."""
    soft_labels: Tensor | None = None
    """float32, shape (batch, classes), where labels were optimized as probabilities."""
    frames: Tensor | None = None
    """float32, shape (frames, batch, *input_shape): the answer over iterations."""
    frame_iterations: tuple[int, ...] = ()
    history: tuple[tuple[int, float], ...] = ()
    """(iteration, relative gradient residual)."""
    gradient_residual: float | None = None
    """||gradient of the answer - observed|| / ||observed|| over the known elements; None where nothing was tried."""
    steps: tuple[int, ...] = ()
    """Of an answer: all whose gradients it explains, of those that were declared to hold one batch; its own first."""
    predicted_mse: float | None = None
    """What the eavesdropper may expect of the mean squared error, without the truth; None where it cannot be had."""
    batch_size_assumed: bool = False
    """Whether the batch size was a guess (1), because it was not told."""
    batch_norm: str | None = None
    """How the model's batch norms were taken to normalize, and how that is known."""
    reason: str | None = None
    """One line, where not converged, or filled."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    evaluations: int = 0
    restarts: int = 0
