"""The whole threat model, as two frozen values: what was seen on the wire, and what is assumed beside it.

Nothing else reaches an attack. Neither value holds, or has a way to reach, the truth.
"""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

from harness.models import Tokens

Shapes = tuple[tuple[int, ...], ...]


EVERYONE = -1
"""`Observation.rank` where no rank alone was seen, but the mean of several."""

BATCH_NORM_MODES = ("train", "eval")
"""Batch norm normalizes by the batch, or by running statistics."""


class Known(enum.IntEnum):
    """How an element of a gradient is known."""

    UNKNOWN = 0
    """Not seen, or not provable; its value is 0 and means nothing."""
    RAW = 1
    """It was on the wire as it is: equal to what the rank sent, to the bit."""
    DIFFERENCED = 2
    """Computed from sums on the wire; within `Observation.bound` of what the rank sent."""
    CODED = 3
    """It was on the wire in a defense's code. The value is what a receiver makes of it, 0 where the sender left it out;
    the gradient's own is within `Observation.bound` of that, which is infinite where the code does not limit it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """What a rank sent in place of a parameter's gradient, and is none: PowerSGD's (arXiv 1905.13727)."""

    parameter: int
    """Which, in `model.parameters()` order."""
    name: str
    """`p` or `q`: the rank's part of the sum that becomes that factor, shape (rows, rank) or (columns, rank). `sent`:
    its part of a sum that is not compressed, of the parameter's shape; error feedback adds last step's error to it."""
    values: Tensor
    known: Tensor
    """uint8: a `Known` for each element."""
    bound: Tensor
    """Largest absolute error of each differenced element."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """The basis in which a parameter's gradient is given: a matrix of as many rows as its first dimension has, from the
    left times `rows`."""

    parameter: int
    """Which, in `model.parameters()` order."""
    rows: Tensor
    """float64, orthonormal, shape (rows, rows)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What the wire said of one rank at one step."""

    rank: int
    step: int
    world_size: int
    exchange: str
    """`zeromq` or `gloo`: where it was read."""
    group: str | None = None
    """The process group that exchanged it, as torch names it; None: the group of all ranks. Steps count in a group."""
    gradient: Tensor
    """float32, or float64 where the job's is; shape (parameters,), in `model.parameters()` order: the rank's own mean
    gradient, as it was sent."""
    known: Tensor
    """uint8, shape (parameters,): a `Known` for each element."""
    bound: Tensor | None = None
    """As the gradient: largest absolute error of each differenced or coded element; None where none is."""
    average: Tensor | None = None
    """As the gradient: what every rank took its step with; None where it is not known to the bit."""
    weights: Tensor | None
    """As the gradient: the weights that this gradient was taken at; None where they are not known."""
    buffers: Tensor | None = None
    """As the gradient, shape (buffers,): floating-point buffers that the step began with, in order; None where there
    are none, or none was seen. Where they were not seen again, those of an earlier step (`attack.buffers`)."""
    buffers_after: Tensor | None = None
    """The same of the next step: those of rank 0 after its forward pass. None where one of the two was not seen."""
    shapes: Shapes
    """Shape of each parameter, in order."""
    ranks: tuple[int, ...] = ()
    """Of EVERYONE: the ranks whose mean it is, as secure aggregation shows it: the gradient of their joined batch."""
    factors: tuple[Factor, ...] = ()
    """What was sent in place of gradients; where these are not known but for that."""
    bases: tuple[Basis, ...] = ()
    """Of parameters whose gradient is not known by its elements, but along some directions (`attack.feedback`)."""
    defense: str | None = None
    """The public side of the sender's defense, as the wire says it; None for a plain gradient."""
    again: tuple[Observation, ...] = ()
    """Other steps of this rank that are declared to hold the same batch; none has any of its own."""
    joined: tuple[int, ...] = ()
    """Steps beside its own of which this is put together (`attack.averaged`, `attack.feedback`)."""

    def __post_init__(self) -> None:
        count = self.gradient.numel()
        for name in ("gradient", "known", "bound", "average", "weights"):
            value = getattr(self, name)
            if value is not None and value.shape != (count,):
                raise ValueError(f"observation, {name}: wanted shape ({count},), got {tuple(value.shape)}")

    @property
    def complete(self) -> bool:
        """Whether all that was sent of the gradient is known."""
        return bool((self.known != Known.UNKNOWN).all())

    @property
    def limited(self) -> Tensor:
        """bool, shape (parameters,): whether an element of the gradient is known, to the bit or within its bound."""
        seen = self.known != Known.UNKNOWN
        return seen if self.bound is None else seen & self.bound.isfinite()

    @property
    def known_fraction(self) -> float:
        """Share of the gradient's elements that are known, 0 to 1."""
        return float(self.limited.float().mean()) if self.known.numel() else 1.0

    @property
    def exact_fraction(self) -> float:
        """Share of the gradient's elements that are known to the bit, 0 to 1."""
        return float((self.known == Known.RAW).float().mean()) if self.known.numel() else 1.0

    def taken_literally(self) -> Observation:
        """As who knows nothing of defenses sees it: what was sent is the gradient, and what was not sent is zero."""
        coded = self.known == Known.CODED
        known = torch.where(coded, torch.tensor(int(Known.RAW), dtype=torch.uint8), self.known)
        bound = None if self.bound is None else torch.where(coded, 0.0, self.bound)
        return dataclasses.replace(self, known=known, bound=bound, defense=None)

    def summary(self) -> dict[str, object]:
        """What a report prints of it: plain numbers and texts."""
        return {
            "rank": self.rank,
            **({"ranks": list(self.ranks)} if self.ranks else {}),
            "step": self.step,
            "world_size": self.world_size,
            "exchange": self.exchange,
            "group": self.group,
            "parameters": self.gradient.numel(),
            "known_fraction": self.known_fraction,
            "exact_fraction": self.exact_fraction,
            "gradient_norm": float(torch.linalg.vector_norm(self.gradient)),
            "weights_known": self.weights is not None,
            "defense": self.defense,
            "same_batch_steps": [other.step for other in self.again],
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """What the eavesdropper assumes beside the wire. Printed in every report; None means unknown."""

    model: str
    """Model specification, as `harness.models.load_model` reads it: the public architecture."""
    loss: str = "cross_entropy"
    """The public loss, mean over the batch."""
    input_shape: tuple[int, ...]
    """Shape of one input, e.g. (3, 32, 32); for tokens, how many an input has at most."""
    tokens: Tokens | None = None
    """What the inputs are made of, where that is tokens and not numbers."""
    tokenizer: str | None = None
    """How they are read as text, as `harness.models.load_tokenizer` reads it; no attack needs it."""
    input_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value of an input element, in model input units."""
    normalize: str | None = None
    """How the job normalizes pictures from 0 to 1, as `harness.models.load_normalize` reads it; `unknown`: it may do
    so. Pictures and scores are then in units of the pictures; None: in those of `input_range`."""
    batch_size: int | None = None
    """Examples in a rank's batch."""
    labels: tuple[int, ...] | None = None
    """The batch's labels."""
    batch_norm: str | None = None
    """Of `BATCH_NORM_MODES`: how the job's batch norms normalize; None: each is found out from the wire."""
    optimizer: str | None = None
    """Optimizer specification, as `harness.models.load_optimizer` reads it: keeps the shadow's weights in step."""
    optimizer_source: str | None = None
    """`declared`, or what the traffic says of it: `inferred` or `unknown`."""
    optimizer_evidence: str | None = None
    """What speaks for one that is inferred, or why it cannot be told; one line."""

    def summary(self) -> dict[str, object]:
        """What a report prints of it: plain numbers and texts."""
        return dataclasses.asdict(self)
