"""Many observations -> reconstructions, several at once in processes and ranks, and the answer's files.

In: observations, the declared knowledge, and how to attack. Out: what `attack.json` holds. Each victim is kept as soon
as it is done (`attack.kept`), and an attack that was interrupted goes on from there. It never opens the truth.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attack.algorithms import METHODS, Reconstruction, Status
from attack.answer import describe, to_plain, write_answer
from attack.engine.context import Progress
from attack.errors import AnswerError, AttackError
from attack.kept import Kept, Victim
from attack.observation import Knowledge, Observation
from attack.pool import Tell, WorkerDied, work_in_processes
from attack.reconstruct import DEADLINE_S, pick_device, reconstruct
from attack.shades import Shades
from harness.models import load_tokenizer

POLL_S = 0.2
TELL_S = 0.5
"""Between two reports of one victim's progress."""
PATIENCE_S = 60.0
"""The first rank waits for the others' next answer for two victims' deadlines, and so much longer."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How to attack, the same for every victim."""

    method: str = "auto"
    seed: int = 0
    device: str = "auto"
    """`auto`: a GPU where there is one."""
    deadline_s: float = DEADLINE_S
    """For each victim."""
    processes: int | None = None
    """Victims attacked at once; None: as many as cores that this process may use, one on a GPU."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AttackError(f"method {self.method!r} is not known; there are: {', '.join(METHODS)}")
        if not self.deadline_s > 0:
            raise AttackError(f"deadline: wanted more than 0 s, got {self.deadline_s}")
        if self.processes is not None and self.processes < 1:
            raise AttackError(f"processes: wanted at least 1, got {self.processes}")

    @property
    def parallel(self) -> int:
        """Victims attacked at once."""
        if self.processes is not None:
            return self.processes
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of several processes that attack together this one is: each takes every `size`-th victim."""

    rank: int = 0
    """The first gathers all answers, from a folder that all see."""
    size: int = 1
    local_rank: int = 0
    """Among those on this machine: each takes a GPU of its own, ..."""
    local_size: int = 1
    """... or its part of the cores."""

    def plan(self, plan: Plan) -> Plan:
        """The plan, with this process's own part of the machine."""
        if self.size == 1:
            return plan
        if plan.device in ("auto", "cuda") and torch.cuda.is_available():
            return dataclasses.replace(plan, device=f"cuda:{self.local_rank % torch.cuda.device_count()}")
        return dataclasses.replace(plan, processes=plan.processes or max(1, plan.parallel // self.local_size))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VictimProgress:
    """What a person may want to see while victims are attacked."""

    rank: int
    step: int
    now: Progress | None = None
    """How far this victim's attack has come; None when it is done, and then ..."""
    status: Status | None = None
    """... how it ended."""
    kept: bool = False
    """Whether an earlier attack, which was interrupted, had it done already."""
    done: int
    """Victims that are done."""
    total: int


Listener = Callable[[VictimProgress], None]


class _News:
    """Counts what is done, and tells the listener."""

    def __init__(self, listener: Listener, total: int) -> None:
        self._listener, self._total, self._done = listener, total, 0

    def told(self, victim: Victim, progress: Progress) -> None:
        self._tell(victim, now=progress)

    def ended(self, victim: Victim, status: Status, *, kept: bool = False) -> None:
        self._done += 1
        self._tell(victim, status=status, kept=kept)

    def _tell(self, victim: Victim, **more: Any) -> None:
        self._listener(VictimProgress(rank=victim.rank, step=victim.step, done=self._done, total=self._total, **more))


_Task = tuple[Victim, Observation]


def attack_all(
    observations: Iterable[Observation],
    knowledge: Knowledge,
    out: Path,
    *,
    plan: Plan | None = None,
    share: Share | None = None,
    overwrite: bool = False,
    listener: Listener = lambda _: None,
) -> dict[str, Any] | None:
    """Attacks every observation and writes the answer's files under `out`. Blocks until all are done.

    Args:
        observations: all of them, in the same order in every process of an attack.
        share: where several processes attack together, which one this is.
        overwrite: forget what an interrupted attack left in `out` that asked something else.

    Returns: what `attack.json` holds: `victims[]` by step and rank, and what they were attacked with; None from any
        process but the first.

    Raises: AttackError: the plan or the knowledge cannot be, or an interrupted attack that asked something else is in
        the way. AnswerError: an attacking process died. KeyboardInterrupt, saying what is kept.
    """
    share = share or Share()
    plan = share.plan(plan or Plan())
    device = pick_device(plan.device)
    began = time.monotonic()
    kept = Kept(out=out, question=_question(plan, device, knowledge), overwrite=overwrite)
    victims: list[Victim] = []
    mine: list[_Task] = []
    for place, observation in enumerate(observations):
        victims.append(Victim.of(observation))
        if place % share.size == share.rank:
            mine.append((victims[-1], observation))
    # By all that there are, though some be kept: one thread each or many can change an answer's last bits.
    parallel = min(plan.parallel, len(mine)) if device.type == "cpu" or plan.processes else 1
    news = _News(listener, len(mine) if share.rank else len(victims))
    try:
        left = [task for task in mine if not _is_kept(task[0], kept, news)]
        if share.rank == 0:  # an answer in the way is found now, not after all the work
            resumed = len(mine) - len(left) + sum(kept.status(victim) is not None for victim in _others(victims, mine))
        _attack_each(left, functools.partial(_attack, knowledge, plan, kept), parallel, news)
        if share.rank:
            return None
        _wait_for(_others(victims, mine), kept, news, patience_s=2 * plan.deadline_s + PATIENCE_S)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_what_is_kept(victims, kept)}") from None
    except WorkerDied as error:
        reason = "an attacking process died, perhaps for want of memory: try fewer processes"
        raise AnswerError(f"{reason}; {_what_is_kept(victims, kept)}") from error
    victims.sort(key=lambda victim: (victim.step, victim.rank))
    reconstructions = [kept.read(victim) for victim in victims]
    answer = {
        "method": plan.method,
        "seed": plan.seed,
        "device": str(device),
        "deadline_s": plan.deadline_s,
        "processes": parallel,
        "ranks": share.size,
        "resumed": resumed,
        "seconds": time.monotonic() - began,
        "knowledge": knowledge.summary(),
        "victims": [
            describe(found) | {"observation": victim.summary, "text": _text(found, knowledge)}
            for victim, found in zip(victims, reconstructions, strict=True)
        ],
        "versions": _versions(),
    }
    plain = write_answer(out, answer, reconstructions, Shades.of(knowledge.summary()))
    kept.forget(victims)
    return plain


def _question(plan: Plan, device: torch.device, knowledge: Knowledge) -> dict[str, Any]:
    """What decides an answer beside the observation."""
    asked = {
        "method": plan.method,
        "seed": plan.seed,
        "device": device.type,
        "deadline_s": plan.deadline_s,
        "knowledge": knowledge.summary(),
        "versions": _versions(),
    }
    plain: dict[str, Any] = to_plain(asked)
    return plain


def _text(found: Reconstruction, knowledge: Knowledge) -> list[str] | None:
    """An answer's sentences in words, where its tokens are told how to be read."""
    if found.inputs is None or knowledge.tokens is None or knowledge.tokenizer is None:
        return None
    reader = load_tokenizer(knowledge.tokenizer)
    return [reader.decode(row) for row in knowledge.tokens.rows(found.inputs)]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def _others(victims: Sequence[Victim], mine: Sequence[_Task]) -> list[Victim]:
    own = {victim.name for victim, _ in mine}
    return [victim for victim in victims if victim.name not in own]


def _is_kept(victim: Victim, kept: Kept, news: _News) -> bool:
    status = kept.status(victim)
    if status is not None:
        news.ended(victim, status, kept=True)
    return status is not None


def _what_is_kept(victims: Sequence[Victim], kept: Kept) -> str:
    done = sum(kept.status(victim) is not None for victim in victims)
    return f"{done} of {len(victims)} victims are done and kept in {kept.folder}: the same command goes on from there"


def _attack(knowledge: Knowledge, plan: Plan, kept: Kept, task: _Task, tell: Tell) -> Status:
    """Attacks one victim, and keeps the answer."""
    victim, observation = task
    found = reconstruct(
        observation,
        knowledge,
        method=plan.method,
        seed=plan.seed,
        device=plan.device,
        deadline_s=plan.deadline_s,
        progress=_throttled(tell),
    )
    kept.write(victim, found)
    return found.status


def _throttled(tell: Tell) -> Tell:
    last = float("-inf")

    def sometimes(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_S:
            last = time.monotonic()
            tell(progress)

    return sometimes


def _attack_each(tasks: Sequence[_Task], attack: Callable[[_Task, Tell], Status], parallel: int, news: _News) -> None:
    if parallel > 1:
        work_in_processes(
            attack,
            tasks,
            parallel,
            told=lambda task, progress: news.told(task[0], progress),
            ended=lambda task, status: news.ended(task[0], status),
        )
        return
    for task in tasks:
        news.ended(task[0], attack(task, functools.partial(news.told, task[0])))


def _wait_for(victims: Sequence[Victim], kept: Kept, news: _News, *, patience_s: float) -> None:
    """Until the other processes have kept these. Raises: AnswerError: for so long none has come."""
    missing, heard = list(victims), time.monotonic()
    while missing:
        still = []
        for victim in missing:
            status = kept.status(victim)
            if status is None:
                still.append(victim)
            else:
                news.ended(victim, status)
        if len(still) < len(missing):
            missing, heard = still, time.monotonic()
        elif time.monotonic() - heard > patience_s:
            names = ", ".join(victim.name for victim in missing)
            raise AnswerError(
                f"no other process has finished a victim for {patience_s:.0f} s; not done: {names}; "
                "what is done is kept: the same command goes on from there"
            )
        else:
            time.sleep(POLL_S)
