"""Buffers of one step from those of another."""

from __future__ import annotations

import torch

from attack.buffers import complete_buffers
from attack.observation import Known, Observation


def observation(step: int, rank: int, buffers: float | None, *, group: str | None = None) -> Observation:
    return Observation(
        rank=rank,
        step=step,
        world_size=2,
        exchange="gloo",
        group=group,
        gradient=torch.zeros(1),
        known=torch.full((1,), Known.RAW, dtype=torch.uint8),
        weights=None,
        buffers=None if buffers is None else torch.tensor([buffers]),
        shapes=((1,),),
    )


def complete(*observations: Observation) -> list[tuple[int, int, float | None, float | None]]:
    return [
        (
            one.step,
            one.rank,
            None if one.buffers is None else one.buffers.item(),
            None if one.buffers_after is None else one.buffers_after.item(),
        )
        for one in complete_buffers(observations)
    ]


def test_the_next_steps_are_those_after() -> None:
    got = complete(*(observation(step, rank, step / 2) for step in range(3) for rank in range(2)))
    assert got == [(0, 0, 0, 0.5), (0, 1, 0, 0.5), (1, 0, 0.5, 1), (1, 1, 0.5, 1), (2, 0, 1, None), (2, 1, 1, None)]


def test_a_step_that_was_missed_proves_nothing_of_the_one_before() -> None:
    assert complete(observation(0, 0, 0.0), observation(2, 0, 1.0)) == [(0, 0, 0, None), (2, 0, 1, None)]


def test_those_that_were_sent_once_stay_known() -> None:
    got = complete(observation(0, 0, 7.0), observation(1, 0, None), observation(2, 0, None))
    assert got == [(0, 0, 7, None), (1, 0, 7, None), (2, 0, 7, None)]


def test_groups_do_not_mix() -> None:
    mixed = [observation(step, 0, step + (10 if group else 0), group=group) for step in range(2) for group in ("", "b")]
    assert sorted(complete(*mixed), key=lambda row: row[2] or 0) == [
        (0, 0, 0, 1), (1, 0, 1, None), (0, 0, 10, 11), (1, 0, 11, None),
    ]  # fmt: skip
