"""What every benchmark of `gradtap bench` is: a command with options of its own whose result lists cases."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import torch

from harness.errors import ConfigError
from nodes.benchmarks.timing import Case, as_json, as_text
from nodes.commands.base import Command, Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(Command):
    """Everything that a benchmark compares takes turns in one run, and ratios are paired."""

    def check_positive(self, *names: str) -> None:
        """Raises: ConfigError where one of these options, or an element of it, is below 1."""
        for name in names:
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if each < 1:
                    raise ConfigError(f"bench: --{name.replace('_', '-')}: wanted at least 1, got {each}")

    def report(self, cases: Sequence[dict[str, Any]], text: str) -> Result:
        """The cases, and what they were measured on."""
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        name = type(self).__name__.lower()
        return Result(
            json={"benchmark": name, "cases": list(cases), "versions": versions, "machine": machine}, text=text
        )

    def report_times(self, cases: Sequence[Case]) -> Result:
        """The same for cases that are times beside a baseline's."""
        return self.report(as_json(cases), as_text(cases, title=f"bench {type(self).__name__.lower()}"))
