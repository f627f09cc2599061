"""`bench decode`: captures decoded to gradients, beside a plain read of the same file.

Makes the captures in a temporary folder; what is decoded is compared with what was sent, once. Both ways take turns in
one process, so CPU time is of the same machine at the same time.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import track

from attack.decode.recording import Recording
from harness.errors import GradtapError
from nodes.benchmarks.base import Benchmark
from nodes.benchmarks.timing import Case
from nodes.benchmarks.traffic import write_gloo, write_zeromq
from nodes.commands.base import Result
from nodes.console import console

READ = "plain read"
_READ_BYTES = 1 << 20
_WRITERS = {"gloo": write_gloo, "zeromq": write_zeromq}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Benchmark):
    """Captures of Gloo's and of ZeroMQ's traffic decoded to every rank's gradient, beside a plain read of the file."""

    numel: int = 10_000_000
    """Elements of the gradient (float32)."""
    worlds: tuple[int, ...] = (2, 4)
    """Numbers of ranks."""
    repetitions: int = 15
    """Timed rounds; in each, every case has one turn."""
    steps: int = 4
    """Steps of a capture."""

    def run(self) -> Result:
        """Both protocols for each number of ranks. Raises: GradtapError where a gradient is not what was sent."""
        self.check_positive("numel", "worlds", "repetitions", "steps")
        cases = []
        for world_size in self.worlds:
            for protocol, write in _WRITERS.items():
                with tempfile.TemporaryDirectory(prefix="gradtap-bench-") as folder:
                    path = Path(folder) / "wire.pcapng"
                    sent = write(path, world_size=world_size, numel=self.numel, steps=self.steps)
                    _check(path, sent, observations=world_size * self.steps)
                    sizes = {"floats": self.numel, "steps": self.steps, "file_bytes": path.stat().st_size}
                    cases += _time(protocol, path, self.repetitions, {"ranks": world_size, **sizes})
        return self.report_times(cases)


def _time(protocol: str, path: Path, repetitions: int, setting: dict[str, int]) -> list[Case]:
    read = f"{READ}, {protocol}"
    ways: dict[str, Callable[[Path], None]] = {read: _read, f"decode, {protocol}": _decode}
    seconds: dict[str, list[float]] = {case: [] for case in ways}
    cpu_s = dict.fromkeys(ways, 0.0)
    order = random.Random(0)
    title = f"{setting['ranks']} ranks, {protocol}"
    for _ in track(range(repetitions), description=title, console=console, transient=True):
        for case in order.sample(sorted(ways), len(ways)):
            cpu, begin = time.process_time(), time.perf_counter()
            ways[case](path)
            seconds[case].append(time.perf_counter() - begin)
            cpu_s[case] += (time.process_time() - cpu) / repetitions
    return [
        Case.of(
            case,
            seconds[case],
            baseline=(read, seconds[read]),
            setting=setting,
            cpu_s=cpu_s[case],
            mb_per_cpu_s=setting["file_bytes"] / 1e6 / max(cpu_s[case], 1e-9),
        )
        for case in ways
    ]


def _read(path: Path) -> None:
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _decode(path: Path) -> None:
    for _ in Recording(path).observations():
        pass


def _check(path: Path, sent: npt.NDArray[np.float32], *, observations: int) -> None:
    """Raises: GradtapError."""
    seen = 0
    for one in Recording(path).observations():
        seen += 1
        if not one.complete:
            raise GradtapError(f"bench decode: rank {one.rank}, step {one.step}: not all of the gradient was decoded")
        if one.rank == 0:
            error = np.abs(one.gradient.numpy() - sent)
            # An observation says how far off it may be; without that it must be exact.
            if not (error <= (0 if one.bound is None else one.bound.numpy())).all():
                raise GradtapError(f"bench decode: step {one.step}: a decoded gradient is not the one that was sent")
    if seen != observations:
        raise GradtapError(f"bench decode: wanted {observations} observations, got {seen}")
