"""What a run under DP-SGD has given away of one example: (epsilon, delta), by Google's dp-accounting.

Whether an example took part changes the distribution of all that is observed by a factor of at most exp(epsilon), but
for events of probability delta. Two observers:

    links    who sees what every rank sends: noise multiplier S, as each rank adds noise for itself alone
    model    who sees averages over W ranks, or the weights, and nothing else: their noise is sqrt(W) S

Each rank's batches come from a shuffled set, so an example is in one batch an epoch, and everybody may know in which:
`epsilon_links` and `epsilon_model` count an example's batches, and hold. What is mostly published counts steps, as if
each example were drawn anew for each, with probability `sampling_rate`: the `..._poisson` figures, smaller, and not
proven for batches like these (Chua et al. 2024, How Private are DP-SGD Implementations?, arXiv 2403.17673).

All of it supposes that the run's seed, of which the noise is drawn, is unknown to the observer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.defenses.dp_sgd import DPSGD

FILE = "privacy.json"
"""In a run folder."""
_ORDERS = (*range(2, 64), 128, 256, 512, 1024)
"""Of Rényi divergences. Whole ones have a closed form."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What observers of so many steps have learned at most. An epsilon of None: there is no bound."""

    steps: int
    examples: int
    """In the set."""
    sampling_rate: float
    """Share of the set that one step takes, all ranks together."""
    batches_of_an_example: int
    """At most, over the run."""
    noise_multiplier: float
    clip: float
    delta: float
    epsilon_links: float | None
    epsilon_model: float | None
    epsilon_links_poisson: float | None
    epsilon_model_poisson: float | None
    accountant: str

    def write(self, run: Path) -> None:
        """Into a run's folder."""
        (run / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        def told(epsilon: float | None) -> str:
            return "no bound" if epsilon is None else f"epsilon {epsilon:.3g}"

        return (
            f"privacy of an example after {self.steps} steps, delta {self.delta:g}: on the links "
            f"{told(self.epsilon_links)}, of the model alone {told(self.epsilon_model)} (as if batches were drawn anew "
            f"for each step: {told(self.epsilon_links_poisson)}, {told(self.epsilon_model_poisson)})"
        )


def read_spent(run: Path) -> Spent | None:
    """What a run has given away, where it was under DP-SGD and has ended."""
    file = run / FILE
    return Spent(**json.loads(file.read_text())) if file.exists() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accountant:
    """Of one run."""

    defense: DPSGD
    examples: int
    batch_size: int
    """Of a rank."""
    world_size: int

    def epsilon(self, steps: int) -> float | None:
        """On the links, after so many steps."""
        return _gaussian(self.defense.noise, self._batches(steps), self.defense.delta)

    def spent(self, steps: int) -> Spent:
        """All figures, after so many steps."""
        noise, delta = self.defense.noise, self.defense.delta
        together, rate = noise * math.sqrt(self.world_size), self.batch_size * self.world_size / self.examples
        return Spent(
            steps=steps,
            examples=self.examples,
            sampling_rate=rate,
            batches_of_an_example=self._batches(steps),
            noise_multiplier=noise,
            clip=self.defense.clip,
            delta=delta,
            epsilon_links=self.epsilon(steps),
            epsilon_model=_gaussian(together, self._batches(steps), delta),
            epsilon_links_poisson=_poisson(noise, rate, steps, delta),
            epsilon_model_poisson=_poisson(together, rate, steps, delta),
            accountant=f"dp-accounting {metadata.version('dp-accounting')}",
        )

    def _batches(self, steps: int) -> int:
        """In which one example is, at most: one in each epoch that has begun."""
        return -(-steps // (self.examples // (self.batch_size * self.world_size)))


@functools.cache
def _gaussian(noise: float, times: int, delta: float) -> float | None:
    """Of one example in `times` sums with noise: as in one with the noise of `times` observations' mean."""
    import dp_accounting  # takes seconds to import, and other defenses do not need it

    return float(dp_accounting.get_epsilon_gaussian(noise / math.sqrt(times), delta)) if noise and times else None


def _poisson(noise: float, rate: float, steps: int, delta: float) -> float | None:
    import dp_accounting

    if not noise or not steps:
        return None
    accountant = dp_accounting.rdp.RdpAccountant(orders=_ORDERS)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if math.isfinite(epsilon) else None
