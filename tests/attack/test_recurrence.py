"""Which observations are taken to be of one batch."""

from __future__ import annotations

import dataclasses

import pytest

from attack.errors import AttackError
from attack.recurrence import join_steps
from tests.attack.toys import example, observe


def test_batches_come_again_after_an_epoch() -> None:
    one = observe(*example("linear"), world_size=2)
    seen = [dataclasses.replace(one, step=step, rank=rank) for step in range(5) for rank in range(2)]
    seen[0] = dataclasses.replace(seen[0], weights=None)
    joined = list(join_steps(iter(seen), every=2))
    steps = [(first.rank, first.step, [other.step for other in first.again]) for first in joined]
    # Without its weights a step cannot be the one that is attacked first.
    assert steps == [(0, 2, [4, 0]), (1, 0, [2, 4]), (0, 1, [3]), (1, 1, [3])]
    assert joined[0].summary()["same_batch_steps"] == [4, 0]


def test_wrong_period_is_one_line() -> None:
    with pytest.raises(AttackError, match="after 1 step or more, got 0"):
        list(join_steps([], every=0))
