"""Tasks -> results, several at once in processes of their own, which never outlive the one that asked.

Processes and not threads: the attacks hold the interpreter's lock. One torch thread in each. Knows nothing of what the
tasks are.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

from attack.engine.context import Progress

POLL_S = 0.2
AHEAD = 1
"""Tasks that wait beside those under way: the next one is there when one is done."""

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
Tell = Callable[[Progress], None]


class WorkerDied(Exception):
    """A process ended in the middle of its task."""


def work_in_processes(
    work: Callable[[Task, Tell], Outcome],
    tasks: Iterable[Task],
    parallel: int,
    *,
    told: Callable[[int, Progress], None],
    ended: Callable[[int, Outcome], None],
) -> None:
    """Does every task. Blocks until all are done.

    Args:
        work: can be pickled, as tasks and outcomes can. Is given a task, and whom to tell how far it has come.
        tasks: asked for as they can be done, and let go of when they are under way: they may be large, and many.
        told, ended: called in this thread, in the order in which it happens, with the task's number, from 0.

    Raises: WorkerDied; and whatever `work` does, or a signal: then the tasks under way have been broken off.
    """
    # A fork server imports torch once for all; a plain fork of a process that runs threads may deadlock.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    start = multiprocessing.get_context(method)
    start.set_forkserver_preload(["attack.reconstruct"])
    news: SimpleQueue[tuple[int, Progress]] = start.SimpleQueue()
    others = set(multiprocessing.active_children())
    pool = futures.ProcessPoolExecutor(parallel, mp_context=start, initializer=_begin, initargs=(news,))
    waiting, numbers = iter(tasks), itertools.count()
    running: dict[futures.Future[bytes], int] = {}

    def begin_next() -> bool:
        """Whether there was another task. A function, so that nothing here holds on to it."""
        for task in waiting:
            index = next(numbers)
            # Tensors travel as plain bytes: torch would pass them as open files, of which a process has few.
            running[pool.submit(_do, index, pickle.dumps((work, task)))] = index
            return True
        return False

    try:
        while True:
            while len(running) < parallel + AHEAD and begin_next():
                pass
            if not running:
                break
            done, _ = futures.wait(running, timeout=POLL_S, return_when=futures.FIRST_COMPLETED)
            while not news.empty():
                told(*news.get())
            for future in done:
                ended(running.pop(future), pickle.loads(future.result()))
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise WorkerDied from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_news: SimpleQueue[tuple[int, Progress]] | None = None
"""In a working process: where to tell its progress. A pool hands such a thing over at its start only."""


def _begin(news: SimpleQueue[tuple[int, Progress]]) -> None:
    global _news
    _news = news
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(index: int, pickled: bytes) -> bytes:
    work, task = pickle.loads(pickled)
    assert _news is not None
    news = _news
    return pickle.dumps(work(task, lambda progress: news.put((index, progress))))
