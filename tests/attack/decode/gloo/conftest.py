"""One recorded job with many models, which several files look at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attack.capture.reassembly import read_streams
from attack.capture.streams import StreamEvent
from attack.observation import Observation
from tests.attack.decode.gloo.recordings import observe, read_truth, record_many

MANY: list[dict[str, Any]] = [
    {"model": "norm", "talk": True, "steps": 3},
    {"model": "lenet", "ranks": [0, 1]},
    {"model": "norm", "ranks": [1, 2], "talk": True, "steps": 3},
    {"model": "norm", "ranks": [0, 1, 2], "dtype": "float64", "cap": 0.001},
    {"model": "norm", "ranks": [0, 2], "dtype": "float64", "hook": "fp16"},
    {"model": "norm", "ranks": [0, 1, 2], "dtype": "bfloat16", "cap": 0.001},
    {"model": "lenet", "ranks": [1, 2], "dtype": "bfloat16"},
    {"model": "norm", "ranks": [0, 1, 2], "dtype": "float16"},
    {"model": "resnet", "ranks": [0, 1], "last": True, "cap": 0.05},
    {"model": "norm", "ranks": [0, 1, 2], "hook": "powersgd", "steps": 5},
    {"model": "tiny", "ranks": [0, 1, 2]},
    {"model": "mixed", "ranks": [0, 1, 2], "cap": 0.001, "steps": 3},
]
"""Over IPv6, where no other address is left; the first over the group of all ranks, the others over their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Many:
    """What was recorded, what the ranks left, and what is read."""

    capture: Path
    events: list[StreamEvent]
    truth: dict[str, np.ndarray]
    found: list[Observation]
    notes: list[str]

    def of(self, job: int) -> list[Observation]:
        """What is read of one of the jobs."""
        return [seen for seen in self.found if seen.group == (str(job) if job else None)]


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Many:
    run = record_many(MANY, tmp_path_factory.mktemp("many") / "run", world=3, ipv6=True)
    events = list(read_streams(run / "wire.pcapng"))
    found, desk = observe(events)
    return Many(
        capture=run / "wire.pcapng",
        events=events,
        truth=read_truth(run / "truth"),
        found=found,
        notes=desk.notes.lines(),
    )
