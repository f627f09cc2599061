"""The update rules that are tried on a job that declares none: which hyper-parameters are free, and where to start.

The order is that of preference: of two that explain as much, the earlier one is simpler. Knows names and numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

Values = Mapping[str, float]
"""Hyper-parameters by name; `beta1` and `beta2` for torch's `betas`."""

NEAR_ONE = {"momentum", "beta1", "beta2", "alpha", "rho"}
"""Those of which the distance to 1 is what counts."""
DEFAULTS = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "beta1": 0.9, "beta2": 0.999, "alpha": 0.99}
"""torch's, where a rule has the name at all; but AdamW's weight decay is 0.01."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One optimizer with `lr` and some other hyper-parameters free."""

    optimizer: str
    free: tuple[str, ...] = ()
    fixed: str = ""
    starts: tuple[tuple[float, ...], ...] = ((),)
    """Values to start the free ones at, each in its turn."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.optimizer}:{','.join(filter(None, ('lr', *self.free, self.fixed)))}"

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is free."""
        return ("lr", *self.free)

    def spec(self, values: Values) -> str:
        """As `harness.models.load_optimizer` reads it; numbers to the bit."""
        parts = [f"{name}={values[name]!r}" for name in self.names if not name.startswith("beta")]
        if "beta1" in values:
            parts.append(f"betas={values['beta1']!r}/{values['beta2']!r}")
        return f"{self.optimizer}:{','.join([*parts, *filter(None, (self.fixed,))])}"

    def direction(self, start: tuple[float, ...]) -> str:
        """The specification that takes a first step of the length of the learning rate: that of 1, without decay."""
        values = {"lr": 1.0, **dict(zip(self.free, start, strict=True)), "weight_decay": 0.0}
        return self.spec(values) + ("" if "weight_decay" in self.free else ",weight_decay=0.0")

    def contains(self, other: Variant) -> bool:
        """Whether the other one is a special case of it."""
        same = self.optimizer == other.optimizer
        if self.optimizer == "adamw" and "weight_decay" in self.free:
            same = other.optimizer in ("adam", "adamw")  # without decay they are one
        without = "" if "momentum" in self.free and "momentum" not in other.free else self.fixed
        return same and set(other.free) <= set(self.free) and other.fixed in (without, self.fixed)


_MOMENTUM = ((0.9,), (0.5,), (0.99,))
_BETAS = ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99))

VARIANTS = (
    Variant(optimizer="sgd"),
    Variant(optimizer="sgd", free=("weight_decay",), starts=((1e-3,),)),
    Variant(optimizer="sgd", free=("momentum",), starts=_MOMENTUM),
    Variant(optimizer="sgd", free=("momentum", "weight_decay"), starts=tuple((*m, 1e-3) for m in _MOMENTUM)),
    Variant(optimizer="sgd", free=("momentum",), fixed="nesterov=true", starts=_MOMENTUM),
    Variant(
        optimizer="sgd",
        free=("momentum", "weight_decay"),
        fixed="nesterov=true",
        starts=tuple((*m, 1e-3) for m in _MOMENTUM),
    ),
    Variant(optimizer="sgd", free=("momentum", "dampening"), starts=tuple((*m, 0.1) for m in _MOMENTUM)),
    Variant(optimizer="adam"),
    Variant(optimizer="adamw"),
    Variant(optimizer="adam", fixed="amsgrad=true"),
    Variant(optimizer="adam", free=("beta1", "beta2"), starts=_BETAS),
    Variant(optimizer="adamw", free=("weight_decay",), starts=((0.1,),)),
    Variant(optimizer="adamw", free=("beta1", "beta2", "weight_decay"), starts=tuple((*b, 0.1) for b in _BETAS)),
    Variant(optimizer="adam", free=("weight_decay",), starts=((1e-3,),)),
    Variant(optimizer="rmsprop"),
    Variant(optimizer="rmsprop", free=("alpha",), starts=((0.9,),)),
    Variant(optimizer="rmsprop", free=("momentum",), starts=_MOMENTUM),
    Variant(optimizer="adagrad"),
    Variant(optimizer="adamax"),
    Variant(optimizer="nadam"),
    Variant(optimizer="radam"),
    Variant(optimizer="adadelta"),
)


def to_line(name: str, value: float) -> float:
    """A hyper-parameter on a scale on which it may take any value."""
    if name in NEAR_ONE:
        return math.log(max(1 - value, 1e-12))
    return value if name == "dampening" else math.log(max(value, 1e-30))


def from_line(name: str, x: float) -> float:
    """The inverse; what cannot be is moved to where it can."""
    if name in NEAR_ONE:
        return min(max(1e-6, 1 - math.exp(min(x, 0.0))), 1 - 1e-9)  # torch takes neither 0 everywhere nor 1
    return x if name == "dampening" else math.exp(min(x, 50.0))


def rounded(name: str, value: float, error: float, *, default: float | None = None) -> float | None:
    """The roundest number within the error: the default, else the one with fewest digits, at most four; or None."""
    if default is not None and abs(default - value) <= error:
        return default
    off = 1 - value if name in NEAR_ONE else value
    if off <= 0:
        return None
    for digits in range(1, 5):
        near = float(f"{off:.{digits - 1}e}")
        near = round(1 - near, 12) if name in NEAR_ONE else near
        if abs(near - value) <= error:
            return near
    return None
