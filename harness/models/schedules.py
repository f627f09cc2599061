"""Public learning-rate schedules: torch's own, and the two of `transformers` that most language-model scripts have.

    +cosine:T_max=100                                              torch's keyword arguments
    +linear:start_factor=0.1,total_iters=5,until=5+cosine:T_max=95 one after the other (torch's SequentialLR)
    +step:step_size=1,gamma=0.5,every=500                          ticks once in 500 steps: an epoch
    +warmup-cosine:warmup=10,steps=100                             up from 0, then down to 0
    +table:factors=1/0.5/0.25                                      any other, step by step

`until`, `every` and `table` are ours. Schedules without `until` all tick, each changing what the one before it made.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from torch.optim import Optimizer, lr_scheduler

from harness.models.spec import choose


def _warmup_linear(optimizer: Optimizer, *, warmup: int, steps: int) -> lr_scheduler.LRScheduler:
    """`transformers.get_linear_schedule_with_warmup`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return lr_scheduler.LambdaLR(optimizer, factor)


def _warmup_cosine(optimizer: Optimizer, *, warmup: int, steps: int) -> lr_scheduler.LRScheduler:
    """`transformers.get_cosine_schedule_with_warmup`, half a wave."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    return lr_scheduler.LambdaLR(optimizer, factor)


def _table(optimizer: Optimizer, *, factors: float | tuple[float, ...]) -> lr_scheduler.LRScheduler:
    """The factor of each step, one after the other; the last one stays."""
    values = factors if isinstance(factors, tuple) else (factors,)
    return lr_scheduler.LambdaLR(optimizer, lambda step: values[min(step, len(values) - 1)])


SCHEDULES: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "step": lr_scheduler.StepLR,
    "multistep": lr_scheduler.MultiStepLR,
    "exponential": lr_scheduler.ExponentialLR,
    "cosine": lr_scheduler.CosineAnnealingLR,
    "restarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "linear": lr_scheduler.LinearLR,
    "constant": lr_scheduler.ConstantLR,
    "polynomial": lr_scheduler.PolynomialLR,
    "onecycle": lr_scheduler.OneCycleLR,
    "cyclic": lr_scheduler.CyclicLR,
    "warmup-linear": _warmup_linear,
    "warmup-cosine": _warmup_cosine,
    "table": _table,
}


class Clock:
    """A schedule, and how many steps lie between two of its ticks."""

    def __init__(self, schedule: lr_scheduler.LRScheduler, every: int) -> None:
        self._schedule, self._every = schedule, every
        self._steps = 0

    def tick(self) -> None:
        """One step is done."""
        self._steps += 1
        if self._steps % self._every == 0:
            with warnings.catch_warnings():
                # SequentialLR and a resumed run call torch's schedules in ways that these warn of, and mean to.
                warnings.simplefilter("ignore", UserWarning)
                self._schedule.step()

    def wind(self, steps: int) -> None:
        """So many steps are done."""
        for _ in range(steps):
            self.tick()


def load_clocks(specs: Sequence[str], optimizer: Optimizer) -> tuple[Clock, ...]:
    """The schedules of an optimizer, in this order. Raises: ValueError, naming what is wrong."""
    schedules: list[lr_scheduler.LRScheduler] = []
    everies: list[int] = []
    untils: list[int] = []
    for spec in specs:
        build, options = choose("schedule", spec, SCHEDULES)
        everies.append(options.pop("every", 1))
        if "until" in options:
            untils.append(options.pop("until"))
        if isinstance(options.get("milestones"), int):
            options["milestones"] = (options["milestones"],)
        try:
            if not isinstance(everies[-1], int) or everies[-1] < 1:
                raise ValueError(f"every: wanted a number of steps, got {everies[-1]}")
            schedules.append(build(optimizer, **options))
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"schedule {spec!r}: {error}") from error
    if not untils:
        return tuple(Clock(schedule, every) for schedule, every in zip(schedules, everies, strict=True))
    if len(untils) != len(schedules) - 1 or len(set(everies)) != 1:
        raise ValueError(
            f"schedules {'+'.join(specs)!r}: one after the other, all but the last need until=STEP, and all the same "
            "every"
        )
    return (Clock(lr_scheduler.SequentialLR(optimizer, schedules, untils), everies[0]),)
