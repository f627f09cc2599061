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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

AHEAD_BYTES = 512 << 20
"""Observations that are read ahead of their attacks: five thousand of a LeNet, two or three of MiniLM."""
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
    total: int | None
    """Victims there are; None while not all have been read."""


Listener = Callable[[VictimProgress], None]


class _News:
    """Counts what is done, and tells the listener."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._done = listener, 0
        self.total: int | None = None

    def told(self, victim: Victim, progress: Progress) -> None:
        self._tell(victim, now=progress)

    def ended(self, victim: Victim, status: Status, *, kept: bool = False) -> None:
        self._done += 1
        self._tell(victim, status=status, kept=kept)

    def _tell(self, victim: Victim, **more: Any) -> None:
        self._listener(VictimProgress(rank=victim.rank, step=victim.step, done=self._done, total=self.total, **more))


_Task = tuple[Victim, Observation]


class _Line:
    """The victims as they are read, in order, and those among them that are this process's to attack.

    Read ahead is no more than `AHEAD_BYTES`: of most captures all, so that it is known at once how many there are. Of
    large models a victim is read when its turn comes, and let go of when it is under way.
    """

    def __init__(self, observations: Iterable[Observation], share: Share, news: _News) -> None:
        self._observations, self._share, self._news = iter(observations), share, news
        self.victims: list[Victim] = []
        """All that were read."""
        self.mine: list[Victim] = []
        """Of these, this process's."""
        self.whole = False
        """Whether there are no more than these."""
        self._ahead: deque[_Task] = deque()
        self._ahead_bytes = 0
        self._read_ahead(least=2)

    @property
    def several(self) -> bool:
        """Whether this process has more than one to attack, as far as is read ahead."""
        return len(self._ahead) > 1

    def tasks(self) -> Iterator[_Task]:
        """This process's, in order. Ask once."""
        while self._ahead:
            self._ahead_bytes -= _size(self._ahead[0][1])
            self._read_ahead()
            yield self._ahead.popleft()

    def _read_ahead(self, least: int = 0) -> None:
        while self._ahead_bytes < AHEAD_BYTES or len(self._ahead) < least:
            observation = next(self._observations, None)
            if observation is None:
                self.whole = True
                self._news.total = len(self.mine if self._share.rank else self.victims)
                return
            victim = Victim.of(observation)
            self.victims.append(victim)
            if (len(self.victims) - 1) % self._share.size == self._share.rank:
                self.mine.append(victim)
                self._ahead.append((victim, observation))
                self._ahead_bytes += _size(observation)


def _size(observation: Observation) -> int:
    """Bytes of its tensors."""
    values = (getattr(observation, field.name) for field in dataclasses.fields(observation))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


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
        the way. AnswerError: an attacking process died, or those of the other shares have finished no victim for so
        long that they must have ended. KeyboardInterrupt, saying what is kept.
    """
    share = share or Share()
    plan = share.plan(plan or Plan())
    device = pick_device(plan.device)
    began = time.monotonic()
    kept = Kept(out=out, question=_question(plan, device, knowledge), overwrite=overwrite)
    before = kept.digests()  # an answer in the way is found now, not after all the work
    news = _News(listener)
    line = _Line(observations, share, news)
    # By all that there are, though some be kept: one thread each or many can change an answer's last bits.
    parallel = plan.parallel if line.several and (device.type == "cpu" or plan.processes) else 1
    left: list[Victim] = []

    def tasks() -> Iterator[_Task]:
        for victim, observation in line.tasks():
            if (status := kept.status(victim)) is None:
                left.append(victim)
                yield victim, observation
            else:
                news.ended(victim, status, kept=True)

    try:
        _attack_each(tasks(), left, functools.partial(_attack, knowledge, plan, kept), parallel, news)
        if share.rank:
            return None
        others = [victim for victim in line.victims if victim not in line.mine]
        _wait_for(others, kept, before, news, patience_s=2 * plan.deadline_s + PATIENCE_S)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_what_is_kept(line, kept)}") from None
    except WorkerDied as error:
        reason = "an attacking process died, perhaps for want of memory: try fewer processes"
        raise AnswerError(f"{reason}; {_what_is_kept(line, kept)}") from error
    victims = line.victims
    victims.sort(key=lambda victim: (victim.step, victim.rank))
    reconstructions = [kept.read(victim) for victim in victims]
    answer = {
        "method": plan.method,
        "seed": plan.seed,
        "device": str(device),
        "deadline_s": plan.deadline_s,
        "processes": min(parallel, max(1, len(line.mine))),
        "ranks": share.size,
        "resumed": sum(victim.digest in before for victim in victims),
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


def _what_is_kept(line: _Line, kept: Kept) -> str:
    done = sum(kept.status(victim) is not None for victim in line.victims)
    count = f"{done} of {len(line.victims)}" if line.whole else str(done)
    return f"{count} victims are done and kept in {kept.folder}: the same command goes on from there"


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


def _attack_each(
    tasks: Iterator[_Task],
    victims: Sequence[Victim],
    attack: Callable[[_Task, Tell], Status],
    parallel: int,
    news: _News,
) -> None:
    """Attacks every victim; `victims` grows as the tasks are asked for."""
    if parallel > 1:
        work_in_processes(
            attack,
            tasks,
            parallel,
            told=lambda index, progress: news.told(victims[index], progress),
            ended=lambda index, status: news.ended(victims[index], status),
        )
        return
    for task in tasks:
        news.ended(task[0], attack(task, functools.partial(news.told, task[0])))


def _wait_for(victims: Sequence[Victim], kept: Kept, before: frozenset[str], news: _News, *, patience_s: float) -> None:
    """Until the other processes have kept these, or had done so before. Raises: AnswerError: for so long none has
    come."""
    missing, heard = list(victims), time.monotonic()
    while missing:
        still = []
        for victim in missing:
            status = kept.status(victim)
            if status is None:
                still.append(victim)
            else:
                news.ended(victim, status, kept=victim.digest in before)
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
