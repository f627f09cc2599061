"""`gradtap evaluate RUN`: opens the sealed truth beside an attack's answer, adds metrics, writes the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from attack.answer import whose
from attack.decode.recording import Recording
from attack.evaluate import evaluate
from attack.report import Chapter, write_report
from harness.privacy import read_spent
from nodes.commands.base import Command, Result
from nodes.console import table
from nodes.lab import CAPTURE_NAME

PICTURE_COLUMNS = {"psnr_db": "PSNR dB", "mse": "MSE", "ssim": "SSIM", "label_ok": "label right"}
TEXT_COLUMNS = {
    "token_accuracy": "tokens right",
    "exact": "exact",
    "sentences": "sentences",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "label_ok": "labels right",
}
"""Metrics of a victim that a table shows, and its headings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Opens the truth beside an attack that has written its answer, adds metrics, and writes the report."""

    run_folder: tyro.conf.Positional[Path]
    """Run folder, with attack/ in it."""
    truth: Path | None = None
    """Folder where the job left its batches: step{S}.rank{R}.npz or .safetensors with inputs and labels. Left out:
    RUN/truth."""

    def run(self) -> Result:
        """Scores RUN/attack with the truth; writes RUN/attack/evaluation.json and RUN/report/index.html."""
        found, chapter = score(self.run_folder, title=self.run_folder.name, truth=self.truth)
        report, text = write_report([chapter], self.run_folder / "report"), victims_table(found["victims"])
        if (privacy := read_spent(self.run_folder)) is not None:
            found, text = found | {"privacy": dataclasses.asdict(privacy)}, f"{text}\n{privacy}"
        return Result(json={"report": str(report), **found}, text=f"{text}\n{report}")


def score(run: Path, *, title: str, truth: Path | None = None) -> tuple[dict[str, Any], Chapter]:
    """The evaluation of a run, and its chapter of the report."""
    found = evaluate(run, truth=truth)
    capture = run / CAPTURE_NAME
    inspected = Recording(capture).inspect() if capture.exists() else None
    return found, Chapter(title=title, run=run, truth=truth, inspect=inspected)


def victims_table(victims: Sequence[dict[str, Any]], *, title: str | None = None) -> str:
    """One row a victim, and a line for each failure."""
    shown = TEXT_COLUMNS if any("token_accuracy" in v for v in victims) else PICTURE_COLUMNS
    rows = [[v["step"], whose(v["rank"]), v["status"], *(v[key] for key in shown)] for v in victims]
    lines = [table(["step", "of", "status", *shown.values()], rows, title=title)]
    lines += [f"step {v['step']} {whose(v['rank'])}: {v['reason']}" for v in victims if v["reason"]]
    return "\n".join(lines)
