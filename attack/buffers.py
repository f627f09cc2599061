"""What the buffers of one step say of another: DDP sends rank 0's at the beginning of each, others only once.

In: observations in order. Out: the same, each with the buffers of an earlier step where its own were not seen, and with
those that the next step began with. Knows no model: what moved, and what that means, is for others to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import Tensor

from attack.observation import Observation


def complete_buffers(observations: Iterable[Observation]) -> Iterator[Observation]:
    """The same observations, one step later: those of one step are held until the next one begins.

    Args:
        observations: in order of step and rank, of one process group after the other or in turns.
    """
    held: dict[str | None, list[Observation]] = {}
    latest: dict[str | None, Tensor] = {}
    for observation in observations:
        group, waiting = observation.group, held.setdefault(observation.group, [])
        if waiting and waiting[0].step != observation.step:
            yield from _finish(waiting, observation, latest.get(group))
            if waiting[0].buffers is not None:
                latest[group] = waiting[0].buffers
            waiting.clear()
        waiting.append(observation)
    for group, waiting in held.items():
        yield from _finish(waiting, None, latest.get(group))


def _finish(step: list[Observation], following: Observation | None, latest: Tensor | None) -> Iterator[Observation]:
    for observation in step:
        if observation.buffers is None:
            yield dataclasses.replace(observation, buffers=latest)
        elif following is not None and following.step == observation.step + 1:
            yield dataclasses.replace(observation, buffers_after=following.buffers)
        else:
            yield observation
