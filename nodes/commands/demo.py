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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What is trained, and how."""

    train: TrainConfig
    ring_mib: int
    """Memory for packets: what the lab takes by default is made for large jobs."""
    tokenizer: str | None = None
    """Of text."""


PICTURES = Story(train=TrainConfig(steps=3, optimizer="sgd:lr=0.1"), ring_mib=32)
"""LeNet on CIFAR: 5 MB of traffic in all."""
TEXT = Story(
    train=TrainConfig(
        model="bert:init=minilm", data="prose:length=30", loss="masked_lm", steps=2, optimizer="sgd:lr=0.01"
    ),
    ring_mib=512,
    tokenizer="minilm",
)
"""MiniLM on Python's reference: 91 MB for each gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """The whole story on real pictures or text: train, tap, decode, attack, evaluate, report.

    Two workers train a LeNet on CIFAR pictures, or MiniLM as a masked language model on English prose, in a private
    network, one example each a step, first over a parameter server, then over all-reduce. An eavesdropper records their
    traffic and reads the examples back out of it.
    """

    text: bool = False
    """Sentences instead of pictures; needs pip install 'gradtap[text]'."""

    out: Path = Path("demo")
    """Folder to write; what an earlier demo left there is replaced."""
    steps: int | None = None
    """Training steps: each gives two pictures or sentences to read back. Left out: 3, of text 2."""
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
        text = "\n".join([*tables, f"{seconds:.0f} seconds in all. The report, original beside answer:", str(report)])
        return Result(
            json={"report": str(report), "recordings": recordings, "seconds": seconds},
            text=text,
            ok=any(victim["status"] == "converged" for found in recordings for victim in found["victims"]),
        )

    def _record_and_attack(self, exchange: str, title: str) -> tuple[dict[str, Any], Chapter]:
        run, story = self.out / exchange, TEXT if self.text else PICTURES
        steps = story.train.steps if self.steps is None else self.steps
        train = dataclasses.replace(story.train, exchange=exchange, steps=steps, seed=self.seed)
        console.print(f"Two workers train over {title} in a private network; the tap records ...", markup=False)
        recorded = Lab(out=run, overwrite=True, ring_mib=story.ring_mib, train=train).run()
        if not recorded.ok:
            raise GradtapError(f"demo: {recorded.text}")
        console.print(f"{recorded.text}\nThe eavesdropper reads {run / CAPTURE_NAME} ...", markup=False)
        Attack(
            file=run / CAPTURE_NAME,
            model=train.model,
            loss=train.loss,
            tokenizer=story.tokenizer,
            optimizer=train.optimizer,
            out=run / "attack",
            seed=self.seed,
        ).run()
        return score(run, title=title[0].upper() + title[1:])
