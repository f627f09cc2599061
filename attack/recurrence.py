"""Observations of one batch at several steps, where it is declared that each rank's batches come again.

In: observations, and after how many steps a batch comes again. Out: the first observation of each batch, with the
others beside it. Whether it is true, the match of their gradients says.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator

from attack.errors import AttackError
from attack.observation import Observation


def join_steps(observations: Iterable[Observation], *, every: int) -> Iterator[Observation]:
    """One observation for each batch: of the first step at which its weights are known, if they are at any.

    Args:
        observations: of any ranks and steps; held until the last has come.
        every: 1: a rank always has the same batch; else as many steps as an epoch has, where its order stays.

    Raises: AttackError.
    """
    if every < 1:
        raise AttackError(f"same batch: wanted that it comes again after 1 step or more, got {every}")
    found: defaultdict[tuple[str | None, int, int], list[Observation]] = defaultdict(list)
    for seen in observations:
        found[seen.group, seen.rank, seen.step % every].append(seen)
    for same in found.values():
        same.sort(key=lambda seen: (seen.weights is None, seen.step))
        yield dataclasses.replace(same[0], again=tuple(same[1:]))
