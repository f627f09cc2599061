"""`gradtap frontier`: what each defense costs and what it is worth, on real jobs; a table, plots and a page."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attack.files import write_atomically
from attack.frontier.leak import Plan
from attack.frontier.summary import LEAKED, STAGES, TEXT, below, key, summarize
from attack.report.frontier import write_frontier
from attack.victims import Share
from harness.config import versions
from harness.data import load_data
from harness.data.text import TextSet
from harness.defenses import load_defense
from harness.errors import ConfigError, GradtapError
from nodes.commands.attack import share_of_victims
from nodes.commands.base import Command, Result
from nodes.console import console, table
from nodes.frontier import ALL_STAGES, PICTURES, TRAINING, Cell, Prose, Sweep, read_cell, units, work
from nodes.signals import sigterm_interrupts

DEFENSES = (
    "none", "int8", "prune:0.3", "prune:0.8", "prune:0.9", "prune:0.99", "topk-dgc:0.99,clip=0.5", "ternary", "sign",
    "noise-gaussian:1e-3", "noise-gaussian:1e-2", "noise-gaussian:1e-1",
)  # fmt: skip
"""All of them train the default model at the default rate, DGC as its paper has it with the gradient clipped."""
READ = ("exact", "token_accuracy", "rougeL")
"""What is told of sentences."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")
"""How the names begin by which torchrun tells a rank its place: a job that this rank starts is not to know it."""
Tell = Callable[[Cell, dict[str, Any], bool], None]
"""Is told of each cell that is done, what came of it, and whether an earlier sweep had it."""
POLL_S = 1.0
PATIENCE_S = 1800.0
"""The first rank waits so long for another's next cell."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier(Command):
    """What each defense costs, and what it is worth against an attacker who ignores it and one who adapts to it.

    For each defense and seed: a training on real data in the lab, which says accuracy, bytes and time; and recordings
    of single pictures, at initialization and after that training, which both attackers read. What is done is kept: the
    same command goes on where it was ended. Under torchrun, each rank does its share:
    torchrun --nproc-per-node 4 --no-python gradtap frontier --out DIR
    """

    out: Path = Path("frontier")
    """Folder for frontier.csv, frontier.json, plots and index.html; cells/ has what is done."""
    defenses: tuple[str, ...] = DEFENSES
    """Chains to compare (docs/defenses.md); none for no defense."""
    stages: tuple[str, ...] = PICTURES
    """What to measure: training (accuracy, bytes, time), initial (pictures at initialization), trained (pictures after
    that training), text (single sentences)."""
    model: str = "lenet"
    """What the jobs train."""
    data: str = "mnist"
    """Data set to train on, and to test on with what is held out of it; after training, its pictures are attacked."""
    pictures: str = "cifar100"
    """Data set whose pictures are attacked at initialization."""
    text_model: str = "bert:init=minilm"
    """What the jobs of the stage text train."""
    text_loss: str = "masked_lm"
    """Their loss: masked_lm, causal_lm (for gpt2) or cross_entropy."""
    text_data: str = "prose:length=30"
    """Their sentences."""
    seeds: int = 3
    """Jobs of each kind, with weights and pictures of their own."""
    images: int = 2
    """Pictures, or sentences, attacked for each defense and seed and in each stage."""
    repeats: int = 1
    """Steps at which each attacked picture comes, with weights that stay; beyond 1, both attackers read its steps
    together: the naive one their mean."""
    num_workers: int = 2
    """Ranks of each job."""
    batch_size: int = 32
    """Examples of a rank in training; what is attacked is one example at a time."""
    train_steps: int = 500
    """Steps of training."""
    optimizer: str = "sgd:lr=0.3"
    """Update rule of the training: SGD, for which error feedback is made; under Adam nets learn little with it."""
    exchange: str = "zeromq"
    """What the jobs talk over: zeromq, allreduce or ddp."""
    deadline_s: float = 25.0
    """Longest time of the adaptive attack on one picture, in CPU seconds."""
    naive_deadline_s: float = 6.0
    """The same of the naive one."""
    processes: int | None = None
    """Pictures attacked at once; left out: one for each core."""
    time_limit_s: float | None = None
    """Start no more cells after this long, and report on what there is; 0 to see how far a sweep has come."""
    seed: int = 0
    """Fixes every random draw."""
    overwrite: bool = False
    """Forget what an earlier sweep with other options left in OUT/cells."""

    def run(self) -> Result:
        """Does what is not done yet, and writes the report. Raises: GradtapError, TapError where a cell cannot be."""
        share = share_of_victims()
        torch.set_num_threads(1)  # beside the jobs and other attacks, more only wait for each other
        for name in [name for name in os.environ if name.startswith(TORCHRUN)]:
            del os.environ[name]
        sweep = self._sweep(share)
        cells = units(tuple("" if name == "none" else name for name in self.defenses), self.seeds, self.stages)
        began = time.monotonic()
        mine = [cell for place, unit in enumerate(cells) if place % share.size == share.rank for cell in unit]
        # Early on there is something of all defenses, what is quick first; a cell's training is before it.
        mine.sort(key=lambda cell: (cell.seed, ALL_STAGES.index(cell.stage)))
        every = [cell for unit in cells for cell in unit]
        try:
            with sigterm_interrupts(), _progress(len(every), show=share.rank == 0) as tell:
                self._work(sweep, mine, began, tell)
                if share.rank:
                    return Result(json={}, text="", quiet=True)
                self._wait(sweep, [cell for cell in every if cell not in mine], began, tell)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what is done is kept in {self.out / 'cells'}: the same command goes on from there"
            ) from None
        return self._report(sweep, every, began)

    def _sweep(self, share: Share) -> Sweep:
        """Raises: ConfigError."""
        for name in ("seeds", "images", "repeats", "num_workers", "batch_size", "train_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"frontier: --{name.replace('_', '-')}: wanted at least 1, got {getattr(self, name)}")
        if not self.defenses:
            raise ConfigError("frontier: --defenses: wanted at least one; none is the name of no defense")
        if not set(self.stages) <= set(ALL_STAGES) or not self.stages:
            raise ConfigError(f"frontier: --stages: wanted some of {', '.join(ALL_STAGES)}, got {self.stages}")
        if "trained" in self.stages and TRAINING not in self.stages:
            raise ConfigError("frontier: --stages: trained needs training beside it")
        for name in self.defenses:
            load_defense("" if name == "none" else name)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Sweep(
            out=self.out,
            model=self.model,
            data=self.data,
            pictures=self.pictures,
            images=self.images,
            repeats=self.repeats,
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            train_steps=self.train_steps,
            optimizer=self.optimizer,
            exchange=self.exchange,
            seed=self.seed,
            plan=Plan(
                seed=self.seed,
                adaptive_s=self.deadline_s,
                naive_s=self.naive_deadline_s,
                processes=self.processes or max(1, cores // share.local_size),
            ),
            text=self._prose() if TEXT in self.stages else None,
            overwrite=self.overwrite,
        )

    def _prose(self) -> Prose:
        """Raises: ConfigError."""
        sentences = load_data(self.text_data)
        if not isinstance(sentences, TextSet):
            raise ConfigError(f"frontier: --text-data: wanted sentences, got {self.text_data}")
        tokenizer = sentences.tokenizer.name
        return Prose(model=self.text_model, loss=self.text_loss, data=self.text_data, tokenizer=tokenizer)

    def _late(self, began: float) -> bool:
        return self.time_limit_s is not None and time.monotonic() - began >= self.time_limit_s

    def _work(self, sweep: Sweep, cells: list[Cell], began: float, tell: Tell) -> None:
        for cell in cells:
            found = read_cell(sweep, cell)
            kept = found is not None and "failed" not in found  # what failed may have failed for want of memory
            if not kept and self._late(began):
                continue
            tell(cell, found if found is not None and kept else work(sweep, cell), kept)

    def _wait(
        self,
        sweep: Sweep,
        cells: list[Cell],
        began: float,
        tell: Tell,
    ) -> None:
        """Until the other ranks have done these. Raises: GradtapError: none has come for so long."""
        missing, heard = cells, time.monotonic()
        while missing and not self._late(began):
            still = []
            for cell in missing:
                found = read_cell(sweep, cell)
                if found is None:
                    still.append(cell)
                else:
                    tell(cell, found, False)
            if len(still) < len(missing):
                missing, heard = still, time.monotonic()
            elif time.monotonic() - heard > PATIENCE_S:
                raise GradtapError(
                    f"frontier: no other rank has done a cell for {PATIENCE_S:.0f} s; not done: "
                    f"{', '.join(cell.name for cell in missing)}; the same command goes on from what is kept"
                )
            else:
                time.sleep(POLL_S)

    def _report(self, sweep: Sweep, cells: list[Cell], began: float) -> Result:
        found = [cell for cell in (read_cell(sweep, cell) for cell in cells) if cell is not None]
        if not found:
            raise GradtapError(f"frontier: {self.out / 'cells'}: no cell is done; give it more time")
        rows = summarize(found)
        made = {
            "cells": len(found),
            "cells_wanted": len(cells),
            "seconds": time.monotonic() - began,
            "cpu_seconds": sum(cell["cpu_seconds"] for cell in found),
            "question": sweep.question(),
            "versions": versions(),
        }
        write_atomically(self.out / "frontier.csv", _csv(rows))
        write_atomically(self.out / "frontier.json", json.dumps({"rows": rows, **made}, indent=1, allow_nan=False))
        page = write_frontier(rows, found, made, self.out)
        note = f"{len(found)} of {len(cells)} cells are done; the same command goes on from there\n"
        text = f"{_text(rows)}\n{'' if len(found) == len(cells) else note}{page}"
        return Result(json={"rows": rows, "report": str(page), **made}, text=text)


def _text(rows: list[dict[str, Any]]) -> str:
    columns = ["defense", "accuracy", "bytes", "step ms"]
    columns += [f"{stage}, {attacker}" for stage in STAGES for attacker in ("naive", "adaptive")]
    body = [
        [
            row["defense"],
            _percent(row["accuracy"]),
            _percent(row["bytes_share"]),
            row["step_ms"],
            *(_leak(row, stage, attacker) for stage in STAGES for attacker in ("naive", "adaptive")),
        ]
        for row in rows
    ]
    lines = [table(columns, body, title=f"Pictures read back: mean squared error below {LEAKED:g} (median PSNR, dB)")]
    if any(row[key(TEXT, "adaptive", "sentences")] for row in rows):
        columns = ["defense", *(f"{attacker}: {what}" for attacker in ("naive", "adaptive") for what in READ)]
        read = [
            [row["defense"], *(_read(row, attacker, what) for attacker in ("naive", "adaptive") for what in READ)]
            for row in rows
        ]
        lines.append(table(columns, read, title="Sentences read back"))
    lines += [f"{row['defense']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join(lines)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def _leak(row: dict[str, Any], stage: str, attacker: str) -> str | None:
    pictures, share = row[key(stage, attacker, "pictures")], row[key(stage, attacker, below(LEAKED))]
    psnr = row[key(stage, attacker, "median_psnr_db")]
    return f"{share * pictures:.0f}/{pictures} ({'-' if psnr is None else f'{psnr:.0f}'})" if pictures else None


def _read(row: dict[str, Any], attacker: str, what: str) -> str | None:
    sentences, found = row[key(TEXT, attacker, "sentences")], row[key(TEXT, attacker, what)]
    if found is None:
        return None
    return f"{found * sentences:.0f}/{sentences}" if what == "exact" else f"{found:.2f}"


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@contextlib.contextmanager
def _progress(total: int, *, show: bool) -> Iterator[Tell]:
    """Shows how far the sweep is, and how long it will take: a bar on a terminal, elsewhere a line for each cell."""
    columns = (
        TextColumn("frontier"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[now]}"),
    )
    began, done, fresh = time.monotonic(), 0, 0
    with Progress(*columns, console=console, disable=not show or not console.is_terminal) as bar:
        task = bar.add_task("frontier", total=total, now="", left="")

        def tell(cell: Cell, found: dict[str, Any], kept: bool) -> None:
            nonlocal done, fresh
            done, fresh = done + 1, fresh + (not kept)
            left = f"about {(time.monotonic() - began) / fresh * (total - done) / 60:.0f} min left" if fresh else ""
            bar.update(task, advance=1, now=f"{cell.name}: {_said(found)}", left=left)
            if show and not kept and not console.is_terminal:
                console.print(f"{done} of {total} cells, {left}: {cell.name}: {_said(found)}", markup=False)

        yield tell


def _said(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    if "accuracy" in found:
        return f"accuracy {100 * found['accuracy']:.1f} %"
    if found["stage"] == TEXT:
        exact = sum(victim["attacker"] == "adaptive" and victim["exact"] for victim in found["victims"])
        return f"{exact} of {len(found['victims']) // 2} sentences read back"
    leaked = sum(
        victim["attacker"] == "adaptive" and victim["mse"] is not None and victim["mse"] < LEAKED
        for victim in found["victims"]
    )
    return f"{leaked} of {len(found['victims']) // 2} read back"
