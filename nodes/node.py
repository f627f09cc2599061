"""A node: one process of a job, as it is started, and how it ended.

In and out: plain values that travel between processes as JSON. Refuses to know what a node computes.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import nodes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A process to start."""

    name: str
    """Unique in its lab; names its log file and its line in every message."""
    argv: tuple[str, ...]
    """Program and arguments."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Added to the environment of the caller."""
    host: str | None = None
    """The host of the private network that it runs on; None where there is one network without hosts."""
    service: bool = False
    """True for a node that serves the others: the run is over without it, and it is then told to end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NodeEnd:
    """How a node ended."""

    name: str
    code: int
    """Exit code; minus the signal's number where a signal killed it."""
    seconds: float
    """From its start."""
    told: bool
    """True where the supervisor had told it to end."""

    @property
    def ok(self) -> bool:
        """True where it did its part: a service that was told to end may die of the signal that told it."""
        return self.code == 0 or (self.told and self.code == -signal.SIGTERM)

    def __str__(self) -> str:
        how = f"killed by {signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"
        return f"{self.name}: {how} after {self.seconds:.1f} s"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal, which has no name
        return f"signal {number}"


PROJECT = Path(nodes.__file__).parent.parent
"""The folder that holds this project's packages."""


def module_argv(module: str, *arguments: str) -> tuple[str, ...]:
    """Runs a module of this project, and never a folder of the same name in the directory of the caller."""
    start = (
        f"import runpy, sys; sys.path.insert(0, {str(PROJECT)!r}); "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return (sys.executable, "-P", "-c", start, *arguments)


def module_environment() -> dict[str, str]:
    """The same for a module that another program starts, as torchrun does; the caller's directory comes last."""
    before = os.environ.get("PYTHONPATH")
    return {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *([before] if before else []), os.getcwd()]),
    }
