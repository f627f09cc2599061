"""The oracle: ranks of one process meet at a table, and the mean is taken in float64, slowly and obviously.

Vectors in, vectors out, and nothing in between that could be wrong: no chunks, no wire. Ranks are threads, or one rank
alone that exchanges with nobody.
"""

from __future__ import annotations

import itertools
import threading
from typing import Self

import torch
from torch import Tensor, nn

from harness.defenses.powersgd_averaged import rounds_of
from harness.errors import DeadlineError, PeerError
from harness.exchange.base import Exchange, Traffic, as_tensor, flat_state, load_flat_state
from harness.wire.coded import Coded, Float32


def mean_of(gradients: list[Tensor]) -> Tensor:
    """The mean in float64, rounded once to float32: what every exchange should come close to."""
    return torch.stack([gradient.double() for gradient in gradients]).mean(dim=0).float()


class LocalExchange(Exchange):
    """One rank of a group in this process; each but a lone one needs a thread of its own, as its calls block."""

    def __init__(self, *, rank: int = 0, table: Table | None = None, deadline_s: float = 30.0) -> None:
        """Without a table, the only rank of a world of one."""
        self._table = Table(1) if table is None else table
        self.rank, self.world_size, self.traffic = rank, self._table.world_size, Traffic()
        self._deadline_s = deadline_s

    @classmethod
    def group(cls, world_size: int, *, deadline_s: float = 30.0) -> list[Self]:
        """The ends of all ranks, in rank order."""
        table = Table(world_size)
        return [cls(rank=rank, table=table, deadline_s=deadline_s) for rank in range(world_size)]

    def start(self, model: nn.Module, *, step: int) -> None:
        states = self._table.meet("weights", step, self.rank, flat_state(model), self._deadline_s)
        load_flat_state(model, states[0])

    def average(self, gradient: Tensor | Coded, *, step: int) -> Tensor:
        if (rounds := rounds_of(gradient)) is not None:
            numbers = itertools.count()

            def mean(vector: Float32) -> Float32:
                kind = f"round {next(numbers)} of a gradient"
                given = self._table.meet(kind, step, self.rank, torch.from_numpy(vector), self._deadline_s)
                return mean_of(given).numpy()

            return torch.from_numpy(rounds.average(range(len(rounds.matrices)), mean))
        mine = as_tensor(gradient).clone()
        return mean_of(self._table.meet("gradient", step, self.rank, mine, self._deadline_s))

    def close(self) -> None:
        self._table.leave(self.rank)


class Table:
    """Where threads put one vector each, and get everybody's when the last has come."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._changed = threading.Condition()
        self._given: dict[tuple[str, int], dict[int, Tensor]] = {}
        self._taken: dict[tuple[str, int], int] = {}
        self._left: set[int] = set()

    def meet(self, kind: str, step: int, rank: int, vector: Tensor, deadline_s: float) -> list[Tensor]:
        """Everybody's vector of this kind at this step, in rank order."""
        key = (kind, step)
        with self._changed:
            given = self._given.setdefault(key, {})
            given[rank] = vector
            self._changed.notify_all()

            def missing() -> set[int]:
                return set(range(self.world_size)) - set(given)

            self._changed.wait_for(lambda: not missing() or missing() & self._left, deadline_s)
            if gone := missing() & self._left:
                raise PeerError(f"rank {rank}, step {step}: wanted a {kind} of rank {min(gone)}, which has left")
            if late := missing():
                raise DeadlineError(
                    f"rank {rank}, step {step}: no {kind} from rank {min(late)} within {deadline_s:g} s; "
                    "it is gone or slow"
                )
            self._taken[key] = self._taken.get(key, 0) + 1
            if self._taken[key] == self.world_size:
                del self._given[key], self._taken[key]
        return [given[other] for other in range(self.world_size)]

    def leave(self, rank: int) -> None:
        """Whoever waits for this rank waits no longer."""
        with self._changed:
            self._left.add(rank)
            self._changed.notify_all()
