"""A sweep over defenses, cell by cell: each runs a real job in the lab, and keeps what came of it as one small file.

    OUT/cells/{defense}.{stage}.seed{N}.json     a cell that is done, with the question that it answers
    OUT/weights/{defense}.seed{N}.safetensors    what a training ended with, which `trained` goes on from
    OUT/runs/{defense}.{stage}.seed{N}/          the job under way; gone when the cell is done

A cell is there whole or not at all: a sweep that was killed goes on from the cells that are there, and several
processes share one folder. Defenses of one seed train and are attacked with the same weights and the same pictures.
Runs jobs and asks `attack.frontier` what they gave away; measures nothing itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from attack.files import write_atomically
from attack.frontier.leak import Plan, measure
from attack.frontier.summary import STAGES, TEXT
from attack.observation import Knowledge
from harness.accuracy import accuracy
from harness.config import TrainConfig, versions
from harness.data import load_data, load_pictures
from harness.errors import ConfigError
from harness.models import load_model
from harness.seeding import derive
from harness.training import resolve_model
from nodes.commands.lab import Lab
from nodes.lab import CAPTURE_NAME

TRAINING, LOSS = "training", "cross_entropy"
ALL_STAGES = (TRAINING, *STAGES, TEXT)
"""In the order in which they need each other."""
PICTURES = (TRAINING, *STAGES)
"""Those about pictures."""
STILL = "sgd:lr=1e-6"
"""The update rule of jobs that are attacked: the weights are to stay what they are."""
SETTLING = 0.1
"""Share of a training's steps, the first, that its times leave out."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prose:
    """Jobs of text that are attacked, one sentence a rank and step."""

    model: str
    loss: str
    data: str
    tokenizer: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What is asked of every defense."""

    out: Path
    model: str
    data: str
    """To train and test on, and of the pictures attacked after training."""
    pictures: str
    """Of the pictures attacked at initialization."""
    images: int
    """Pictures attacked in a cell, at least."""
    num_workers: int
    batch_size: int
    """Of a rank while it trains; what is attacked is single pictures."""
    train_steps: int
    optimizer: str
    exchange: str
    seed: int
    plan: Plan
    repeats: int = 1
    """Steps at which each picture that is attacked comes again, one after the other."""
    text: Prose | None = None
    """Sentences to attack, where they are asked for."""
    overwrite: bool = False
    """Whether cells of another question count as not there."""

    def question(self, stage: str | None = None) -> dict[str, Any]:
        """What decides a cell of this stage beside its own name; without one, what decides the whole sweep."""
        apart = {"out", "overwrite", "plan"} | _NO_MATTER.get(stage, set())
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}
        limits = {} if stage == TRAINING else {"naive_s": self.plan.naive_s, "adaptive_s": self.plan.adaptive_s}
        return fields | limits | {"versions": versions()}


_NO_MATTER: dict[str | None, set[str]] = {
    TRAINING: {"pictures", "images", "repeats", "text"},
    "initial": {"data", "batch_size", "train_steps", "optimizer", "text"},
    "trained": {"pictures", "text"},
    TEXT: {"model", "data", "pictures", "batch_size", "train_steps", "optimizer", "repeats"},
}
"""What a stage does not ask for: its cells are kept where nothing but that is changed."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One job, and what it gave away."""

    defense: str
    """A chain; empty for none."""
    stage: str
    """Of `ALL_STAGES`."""
    seed: int
    """Counted from 0; the sweep's own is mixed in."""

    @property
    def name(self) -> str:
        """How its file is called."""
        return f"{slug(self.defense)}.{self.stage}.seed{self.seed}"


def units(defenses: tuple[str, ...], seeds: int, stages: tuple[str, ...] = PICTURES) -> list[tuple[Cell, ...]]:
    """All cells, in units that one process does in order; seed by seed, so that early on there is something of all."""
    return [
        tuple(Cell(defense=defense, stage=stage, seed=seed) for stage in ALL_STAGES if stage in stages)
        for seed in range(seeds)
        for defense in defenses
    ]


def slug(defense: str) -> str:
    """A defense's name as a part of a file's."""
    return re.sub(r"[^\w.=+,-]", "_", defense) or "none"


def read_cell(sweep: Sweep, cell: Cell) -> dict[str, Any] | None:
    """A cell that is done, with how its job failed if it did; None where there is none, or a damaged one.

    Raises: ConfigError: it answers another question.
    """
    path = _path(sweep, cell)
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        asked = found["question"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = sweep.question(cell.stage)
    differ = [name for name in wanted | asked if wanted.get(name) != asked.get(name)]
    if not differ:
        return found
    if sweep.overwrite:
        return None
    name = differ[0]
    raise ConfigError(
        f"{path}: its {name} was {asked.get(name)}, not {wanted.get(name)}; go on with what was asked, name "
        "another folder, or add --overwrite to start anew"
    )


def work(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """Does a cell and keeps it. Blocks until it is done.

    Returns: what its file holds; `failed`, in one line, where the job did not end well.

    Raises: GradtapError, TapError, OSError: not the job, but the measurement failed.
    """
    run, began = sweep.out / "runs" / cell.name, _cpu_seconds()
    do = {TRAINING: _train, TEXT: _read}.get(cell.stage, _attack)
    done: dict[str, Any] = do(sweep, cell, run)
    spent = {"cpu_seconds": _cpu_seconds() - began + done.get("cpu_seconds", 0.0)}
    told = {"question": sweep.question(cell.stage), **dataclasses.asdict(cell), **done, **spent}
    write_atomically(_path(sweep, cell), json.dumps(told, allow_nan=False), durable=True)
    shutil.rmtree(run, ignore_errors=True)
    return told


def _cpu_seconds() -> float:
    """Of the processes that this one has waited for, which are those of jobs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _path(sweep: Sweep, cell: Cell) -> Path:
    return sweep.out / "cells" / f"{cell.name}.json"


def _weights(sweep: Sweep, cell: Cell) -> Path:
    return (sweep.out / "weights" / f"{slug(cell.defense)}.seed{cell.seed}.safetensors").absolute()


def _seed(sweep: Sweep, cell: Cell) -> int:
    """Of the job: the same for every defense."""
    return derive(sweep.seed, "frontier", cell.stage, cell.seed) % 2**31


def _train(sweep: Sweep, cell: Cell, run: Path) -> dict[str, Any]:
    train = TrainConfig(
        model=sweep.model,
        data=_part(sweep.data, "train"),
        batch_size=sweep.batch_size,
        steps=sweep.train_steps,
        optimizer=sweep.optimizer,
        defense=cell.defense,
        exchange=sweep.exchange,
        seed=_seed(sweep, cell),
        checkpoint_every=sweep.train_steps,
        truth=False,
        tensorboard=False,
    )
    recorded = Lab(out=run, overwrite=True, num_workers=sweep.num_workers, tap="none", quiet=True, train=train).run()
    if not recorded.ok:
        return {"failed": recorded.text.splitlines()[0]}
    weights = _weights(sweep, cell)
    weights.parent.mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / f"step{sweep.train_steps}.safetensors").replace(weights)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settled = [line["seconds"] for line in lines if line["step"] >= SETTLING * sweep.train_steps]
    test = load_data(_part(sweep.data, "test"))
    model = resolve_model(sweep.model, test, LOSS)
    return {
        "accuracy": accuracy(model, weights, test),
        "bytes_per_step": statistics.fmean(line["bytes_out"] for line in lines),
        "plain_bytes": 4 * _parameters(model),
        "step_ms": 1e3 * statistics.median(sum(seconds.values()) for seconds in settled),
        "defense_ms": 1e3 * statistics.median(seconds["defense"] for seconds in settled),
    }


def _attack(sweep: Sweep, cell: Cell, run: Path) -> dict[str, Any]:
    trained = cell.stage == "trained"
    weights = _weights(sweep, cell)
    if trained and not weights.exists():
        return {"failed": "its training failed"}
    spec = _part(sweep.data, "train") if trained else sweep.pictures
    data = load_pictures(spec)
    knowledge = Knowledge(
        model=resolve_model(sweep.model, data, LOSS),
        input_shape=data.input_shape,
        optimizer=STILL,
        optimizer_source="declared",
    )
    if sweep.repeats == 1:
        jobs = [(spec, sweep.num_workers, -(-sweep.images // sweep.num_workers))]
    else:  # a rank of its own, as the order of a set changes between ranks
        chosen = [derive(_seed(sweep, cell), "picture", place) % len(data) for place in range(sweep.images)]
        jobs = [(_with(spec, f"only={index}"), 1, sweep.repeats) for index in chosen]
    measured = []
    for job, num_workers, steps in jobs:
        train = TrainConfig(
            model=sweep.model,
            weights=str(weights) if trained else "",
            data=job,
            steps=steps,
            optimizer=STILL,
            defense=cell.defense,
            exchange=sweep.exchange,
            seed=_seed(sweep, cell),
            tensorboard=False,
        )
        recorded = Lab(out=run, overwrite=True, num_workers=num_workers, ring_mib=32, quiet=True, train=train).run()
        if not recorded.ok:
            return {"failed": recorded.text.splitlines()[0]}
        measured.append(
            measure(
                run / CAPTURE_NAME,
                run / "truth",
                knowledge,
                optimizer=STILL,
                defense=cell.defense,
                plan=sweep.plan,
                one_batch=sweep.repeats > 1,
            )
        )
    return {
        "known_fraction": statistics.fmean(each["known_fraction"] for each in measured),
        "cpu_seconds": sum(each["cpu_seconds"] for each in measured),
        "victims": [victim for each in measured for victim in each["victims"]],
        "pictures": [picture for each in measured for picture in each["pictures"]][: sweep.plan.pictures],
    }


def _read(sweep: Sweep, cell: Cell, run: Path) -> dict[str, Any]:
    """Single sentences, attacked."""
    assert sweep.text is not None
    text, data = sweep.text, load_data(sweep.text.data)
    model = resolve_model(text.model, data, text.loss)
    train = TrainConfig(
        model=model,
        loss=text.loss,
        data=text.data,
        batch_size=1,
        steps=-(-sweep.images // sweep.num_workers),
        optimizer=STILL,
        defense=cell.defense,
        exchange=sweep.exchange,
        seed=_seed(sweep, cell),
        tensorboard=False,
    )
    recorded = Lab(out=run, overwrite=True, num_workers=sweep.num_workers, quiet=True, train=train).run()
    if not recorded.ok:
        return {"failed": recorded.text.splitlines()[0]}
    with torch.random.fork_rng(devices=[]):
        shape: Any = load_model(model)
    knowledge = Knowledge(
        model=model,
        loss=text.loss,
        input_shape=tuple(shape.input_shape),
        tokens=shape.tokens,
        tokenizer=text.tokenizer,
        batch_size=1,
        optimizer=STILL,
        optimizer_source="declared",
    )
    capture, truth = run / CAPTURE_NAME, run / "truth"
    return measure(capture, truth, knowledge, optimizer=STILL, defense=cell.defense, plan=sweep.plan)


def _part(data: str, part: str) -> str:
    """A data set's name, with the part that is trained on, or held out."""
    return _with(data, f"part={part}")


def _with(data: str, option: str) -> str:
    return f"{data}{',' if ':' in data else ':'}{option}"


def _parameters(model: str) -> int:
    with torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in load_model(model).parameters())
