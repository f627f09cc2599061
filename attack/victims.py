"""Many observations -> reconstructions, several at once in processes of their own, and the answer's files.

In: observations, the declared knowledge, and how to attack. Out: what `attack.json` holds. It never opens the truth.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attack.algorithms import METHODS, Reconstruction, Status
from attack.answer import describe, write_answer
from attack.engine.context import Progress
from attack.errors import AnswerError, AttackError
from attack.observation import Knowledge, Observation
from attack.reconstruct import DEADLINE_S, pick_device, reconstruct

POLL_S = 0.2
TELL_S = 0.5
"""Between two reports of one victim's progress."""


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
class VictimProgress:
    """What a person may want to see while victims are attacked."""

    rank: int
    step: int
    now: Progress | None = None
    """How far this victim's attack has come; None when it is done, and then ..."""
    status: Status | None = None
    """... how it ended."""
    done: int
    """Victims that are done."""
    total: int


Listener = Callable[[VictimProgress], None]


def attack_all(
    observations: Iterable[Observation],
    knowledge: Knowledge,
    out: Path,
    *,
    plan: Plan | None = None,
    listener: Listener = lambda _: None,
) -> dict[str, Any]:
    """Attacks every observation and writes the answer's files under `out`. Blocks until all are done.

    Returns: what `attack.json` holds: `victims[]` by step and rank, and what they were attacked with.

    Raises: AttackError: the plan or the knowledge cannot be. AnswerError: an attacking process died.
    """
    plan = plan or Plan()
    device = pick_device(plan.device)
    seen = sorted(observations, key=lambda observation: (observation.step, observation.rank))
    parallel = min(plan.parallel, len(seen)) if device.type == "cpu" or plan.processes else 1
    began = time.monotonic()
    run = _in_processes if parallel > 1 else _one_by_one
    reconstructions = run(seen, knowledge, plan, listener, parallel)
    answer = {
        "method": plan.method,
        "seed": plan.seed,
        "device": str(device),
        "deadline_s": plan.deadline_s,
        "processes": parallel,
        "seconds": time.monotonic() - began,
        "knowledge": knowledge.summary(),
        "victims": [
            describe(found) | {"observation": observation.summary()}
            for observation, found in zip(seen, reconstructions, strict=True)
        ],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    return write_answer(out, answer, reconstructions, knowledge.input_range)


def _attack(
    observation: Observation, knowledge: Knowledge, plan: Plan, tell: Callable[[Progress], None]
) -> Reconstruction:
    return reconstruct(
        observation,
        knowledge,
        method=plan.method,
        seed=plan.seed,
        device=plan.device,
        deadline_s=plan.deadline_s,
        progress=_throttled(tell),
    )


def _throttled(tell: Callable[[Progress], None]) -> Callable[[Progress], None]:
    last = float("-inf")

    def sometimes(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_S:
            last = time.monotonic()
            tell(progress)

    return sometimes


def _one_by_one(
    seen: list[Observation], knowledge: Knowledge, plan: Plan, listener: Listener, parallel: int
) -> list[Reconstruction]:
    found: list[Reconstruction] = []
    for at in seen:

        def tell(progress: Progress, at: Observation = at) -> None:
            listener(VictimProgress(rank=at.rank, step=at.step, now=progress, done=len(found), total=len(seen)))

        found.append(_attack(at, knowledge, plan, tell))
        ended = found[-1].status
        listener(VictimProgress(rank=at.rank, step=at.step, status=ended, done=len(found), total=len(seen)))
    return found


def _in_processes(
    seen: list[Observation], knowledge: Knowledge, plan: Plan, listener: Listener, parallel: int
) -> list[Reconstruction]:
    """Processes and not threads: the attacks hold the interpreter's lock. One torch thread in each."""
    # A fork server imports torch once for all; a plain fork of a process that runs threads may deadlock.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    start = multiprocessing.get_context(method)
    start.set_forkserver_preload(["attack.reconstruct"])
    news: SimpleQueue[tuple[int, Progress]] = start.SimpleQueue()
    found: dict[int, Reconstruction] = {}
    with futures.ProcessPoolExecutor(parallel, mp_context=start, initializer=_begin, initargs=(news,)) as pool:
        # Tensors travel as plain bytes: torch would pass them as open files, of which a process has few.
        running = {
            pool.submit(_work, index, pickle.dumps((at, knowledge, plan))): index for index, at in enumerate(seen)
        }
        try:
            while len(found) < len(seen):
                done, _ = futures.wait(running, timeout=POLL_S, return_when=futures.FIRST_COMPLETED)
                while not news.empty():
                    index, progress = news.get()
                    at = seen[index]
                    listener(VictimProgress(rank=at.rank, step=at.step, now=progress, done=len(found), total=len(seen)))
                for future in done:
                    index = running.pop(future)
                    at, found[index] = seen[index], pickle.loads(future.result())
                    ended = found[index].status
                    listener(VictimProgress(rank=at.rank, step=at.step, status=ended, done=len(found), total=len(seen)))
        except BrokenProcessPool as error:
            missing = ", ".join(f"step {seen[i].step} rank {seen[i].rank}" for i in range(len(seen)) if i not in found)
            raise AnswerError(
                f"an attacking process died, perhaps for want of memory; not done: {missing}; try fewer processes"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [found[index] for index in range(len(seen))]


_news: SimpleQueue[tuple[int, Progress]] | None = None
"""In an attacking process: where to tell its progress. A pool hands such a thing over at its start only."""


def _begin(news: SimpleQueue[tuple[int, Progress]]) -> None:
    global _news
    _news = news
    torch.set_num_threads(1)


def _work(index: int, task: bytes) -> bytes:
    observation, knowledge, plan = pickle.loads(task)
    assert _news is not None
    news = _news
    return pickle.dumps(_attack(observation, knowledge, plan, lambda progress: news.put((index, progress))))
