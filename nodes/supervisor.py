"""The supervisor: starts nodes, watches them by process id, and ends them all, in order and in time.

In: nodes. Out: how each one ended, its log, and its output live on standard error.
Refuses to know what the nodes are for, and to wait without a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TypeAlias

from nodes.errors import NodeError
from nodes.namespaces import inside
from nodes.node import Node, NodeEnd, signal_name

LineHandler: TypeAlias = Callable[[str], bool]
"""Gets each line that a node prints; True where the line was for the handler and not for people."""

READ_BYTES = 1 << 16
"""The capacity of a pipe: one read takes all that a node could write without waiting."""


class Stopped(Exception):
    """The run must end before its nodes have: the deadline passed, or somebody asked."""


@dataclasses.dataclass(kw_only=True, slots=True)
class _Process:
    """A node that was started."""

    node: Node
    popen: subprocess.Popen[bytes]
    output: IO[bytes]
    log: IO[bytes]
    started: float
    on_line: LineHandler | None
    rest: bytes = b""
    told: bool = False
    end: NodeEnd | None = None


class Supervisor:
    """Runs nodes in the main thread of a process that does nothing else: it takes SIGCHLD, SIGTERM and SIGINT.

    Every wait ends early, by `Stopped`, at the deadline, on a signal, or when the control pipe closes.
    """

    def __init__(self, *, logs: Path, deadline_s: float, control: int | None, echo: bool) -> None:
        """
        Args:
            logs: folder in which each node has its `NAME.log`.
            deadline_s: for all waits together, from now.
            control: a pipe; once its other end is closed, everything ends. So a caller that was killed takes its nodes
                along.
            echo: repeat the nodes' output on standard error, line by line with their names.
        """
        self.logs, self.echo, self.deadline_s = logs, echo, deadline_s
        self.failed: list[NodeEnd] = []
        """Nodes that failed before they were told to end, the first one first."""
        self.deadline = time.monotonic() + deadline_s
        self._processes: dict[str, _Process] = {}
        self._stop_reason: str | None = None
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        for descriptor in (self._wake, self._waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._stop(f"ended by {signal_name(number)}"))
        self._selector.register(self._wake, selectors.EVENT_READ, self._reap)
        if control is not None:
            # Nothing is said on this pipe: it becomes readable when it closes.
            self._selector.register(control, selectors.EVENT_READ, lambda: self._control_closed(control))

    def start(self, node: Node, *, namespace: int | None = None, on_line: LineHandler | None = None) -> None:
        """Starts a node, in a network namespace of its own if one is given. Raises: NodeError."""
        try:
            log = open(self.logs / f"{node.name}.log", "wb", buffering=0)
            with inside(namespace) if namespace is not None else contextlib.nullcontext():
                popen = subprocess.Popen(
                    node.argv,
                    env=os.environ | node.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # all of its group can be ended, and a Ctrl-C goes to the lab alone
                )
        except OSError as error:
            raise NodeError(f"{node.name}: cannot be started: {error.filename}: {error.strerror}") from error
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        process = _Process(
            node=node, popen=popen, output=popen.stdout, log=log, started=time.monotonic(), on_line=on_line
        )
        self._processes[node.name] = process
        self._selector.register(process.output, selectors.EVENT_READ, lambda: self._read(process))

    def wait(self, until: Callable[[], bool], *, patience_s: float = math.inf) -> None:
        """Returns when `until()` holds, or a node has failed that nobody told to end, or the patience is at its end.

        Raises: Stopped.
        """
        patience_end = time.monotonic() + patience_s
        while not until() and not self.failed and time.monotonic() < patience_end:
            if self._stop_reason is not None:
                raise Stopped(self._stop_reason)
            if time.monotonic() >= self.deadline:
                running = ", ".join(name for name, process in self._processes.items() if process.end is None)
                raise Stopped(f"deadline of {self.deadline_s:g} s passed; still running: {running}")
            self._turn(min(self.deadline, patience_end))

    def end(self, names: Iterable[str], *, grace_s: float) -> None:
        """Ends these nodes, as far as they were started: SIGTERM, the grace, SIGKILL. Returns when all have ended."""
        processes = [self._processes[name] for name in names if name in self._processes]
        for number, until in ((signal.SIGTERM, time.monotonic() + grace_s), (signal.SIGKILL, None)):
            for process in processes:
                if process.end is None:
                    process.told = True
                    with contextlib.suppress(ProcessLookupError):  # it ended, and this was not yet told
                        os.killpg(process.popen.pid, number)
            while any(process.end is None for process in processes) and (until is None or time.monotonic() < until):
                self._turn(until)

    def ended(self, names: Iterable[str]) -> bool:
        """True where all of these nodes have ended."""
        return all(self._processes[name].end is not None for name in names)

    @property
    def ends(self) -> list[NodeEnd]:
        """How those nodes ended that did, in the order in which they were started."""
        return [process.end for process in self._processes.values() if process.end is not None]

    def _control_closed(self, control: int) -> None:
        self._selector.unregister(control)
        self._stop("ended by its caller")

    def _stop(self, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason

    def _turn(self, until: float | None) -> None:
        """Waits for the next event, at most until then, and handles it."""
        patience_s = None if until is None else max(0.0, until - time.monotonic())
        for key, _ in self._selector.select(patience_s):
            key.data()

    def _reap(self) -> None:
        """A signal came. Nodes that end together may share one SIGCHLD, so all are asked."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, READ_BYTES)
        for process in self._processes.values():
            if process.end is None and (code := process.popen.poll()) is not None:
                process.end = NodeEnd(
                    name=process.node.name,
                    code=code,
                    seconds=round(time.monotonic() - process.started, 3),
                    told=process.told,
                )
                self._read(process)
                if not process.end.ok and not process.told:
                    self.failed.append(process.end)

    def _read(self, process: _Process) -> None:
        """Takes what a node has printed. Its children may hold the pipe open for longer than it lives."""
        with contextlib.suppress(BlockingIOError):
            while not process.output.closed:
                text = os.read(process.output.fileno(), READ_BYTES)
                with contextlib.suppress(OSError):  # the disk is full, which whoever fails of it will say
                    process.log.write(text)
                *lines, process.rest = (process.rest + text).split(b"\n")
                if not text:
                    lines = [process.rest] if process.rest else []
                    self._selector.unregister(process.output)
                    process.output.close()
                    process.log.close()
                for line in lines:
                    self._line(process, line)

    def _line(self, process: _Process, line: bytes) -> None:
        handled = process.on_line is not None and process.on_line(line.decode(errors="replace"))
        # What a node says of being told to end, as torchrun does at length, is in its log for those who want it.
        if self.echo and not handled and not process.told:
            with contextlib.suppress(OSError):  # nobody reads any more: the log has it all
                os.write(sys.stderr.fileno(), b"[%s] %s\n" % (process.node.name.encode(), line))
