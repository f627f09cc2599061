"""`gradtap demo`: the whole story on real pictures, from training to the report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from attack.report import Chapter, write_report
from harness.config import TrainConfig
from harness.errors import GradtapError
from nodes.commands.attack import Attack
from nodes.commands.base import Command, Result
from nodes.commands.evaluate import score, victims_table
from nodes.commands.lab import Lab
from nodes.console import console
from nodes.lab import CAPTURE_NAME

EXCHANGES = {"zeromq": "a ZeroMQ parameter server", "ddp": "stock DistributedDataParallel, a ring all-reduce"}
"""The exchanges that are shown, and what the report calls them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """The whole story on real pictures: train, tap, decode, attack, evaluate, report.

    Two workers train a LeNet on CIFAR pictures in a private network, one picture each a step, first over a parameter
    server, then over all-reduce. An eavesdropper records their traffic and reads the pictures back out of it.
    """

    out: Path = Path("demo")
    """Folder to write; what an earlier demo left there is replaced."""
    steps: int = 3
    """Training steps: each gives two pictures to read back."""
    seed: int = 0
    """Fixes weights, pictures and every other draw."""

    def run(self) -> Result:
        """Records each exchange, attacks each recording, writes one report. Raises: GradtapError where a job fails."""
        began = time.monotonic()
        recordings: list[dict[str, Any]] = []
        chapters: list[Chapter] = []
        for exchange, title in EXCHANGES.items():
            found, chapter = self._record_and_attack(exchange, title)
            recordings.append({"exchange": exchange, **found})
            chapters.append(chapter)
        report = write_report(chapters, self.out / "report")
        seconds = time.monotonic() - began
        tables = [
            victims_table(found["victims"], title=f"Read back from {EXCHANGES[found['exchange']]}")
            for found in recordings
        ]
        text = "\n".join([*tables, f"{seconds:.0f} seconds in all. The report, with the pictures:", str(report)])
        return Result(
            json={"report": str(report), "recordings": recordings, "seconds": seconds},
            text=text,
            ok=any(victim["status"] == "converged" for found in recordings for victim in found["victims"]),
        )

    def _record_and_attack(self, exchange: str, title: str) -> tuple[dict[str, Any], Chapter]:
        run, optimizer = self.out / exchange, "sgd:lr=0.1"
        train = TrainConfig(exchange=exchange, steps=self.steps, seed=self.seed, optimizer=optimizer)
        console.print(f"Two workers train over {title} in a private network; the tap records ...", markup=False)
        # The job sends 5 MB in all; the ring that the lab takes by default is made for gigabytes.
        recorded = Lab(out=run, overwrite=True, ring_mib=32, train=train).run()
        if not recorded.ok:
            raise GradtapError(f"demo: {recorded.text}")
        console.print(f"{recorded.text}\nThe eavesdropper reads {run / CAPTURE_NAME} ...", markup=False)
        Attack(
            file=run / CAPTURE_NAME, model=train.model, optimizer=optimizer, out=run / "attack", seed=self.seed
        ).run()
        return score(run, title=title[0].upper() + title[1:])
