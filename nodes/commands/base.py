"""What every command of `gradtap` is: a frozen dataclass of options with a `run` that returns a `Result`."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

from harness.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """How a command ended."""

    json: dict[str, Any]
    """What `--json` prints: plain values only."""
    text: str
    """What a person reads instead; rich markup is not interpreted."""
    ok: bool = True
    """False where the command ran and failed: the exit code is then 1."""
    quiet: bool = False
    """Whether nothing is printed: the first of several processes does that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    """Options that every command has. The subclass's docstring is its help, a field's docstring that of its flag."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there; progress and logs go to standard error."""

    @abc.abstractmethod
    def run(self) -> Result:
        """Does it. Raises: GradtapError, TapError or OSError, which end the program as one line."""

    def with_command(self, argv: tuple[str, ...]) -> Self:
        """The same command with what stood after `--`. Raises: ConfigError, unless the subclass takes it."""
        raise ConfigError(f"{type(self).__name__.lower()} takes no command after --; got: {' '.join(argv)}")
