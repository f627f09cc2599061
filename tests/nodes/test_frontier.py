"""A sweep over defenses, tiny, on real jobs: what is done stays done, and is never taken for something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from attack.frontier.leak import Plan
from harness.errors import ConfigError
from harness.models.tokens import minilm_folder
from nodes.commands.frontier import Frontier
from nodes.frontier import Cell, Prose, Sweep, read_cell, slug, units


def sweep(out: Path) -> Sweep:
    return Sweep(
        out=out,
        model="lenet",
        data="mnist",
        pictures="fashion-mnist",
        images=1,
        num_workers=1,
        batch_size=8,
        train_steps=3,
        optimizer="sgd:lr=0.1",
        exchange="zeromq",
        seed=0,
        plan=Plan(),
    )


def keep(sweep: Sweep, cell: Cell, **more: object) -> Path:
    path = sweep.out / "cells" / f"{cell.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"question": sweep.question(cell.stage), **dataclasses.asdict(cell), **more}))
    return path


def test_a_cell_counts_for_its_own_question_alone(tmp_path):
    asked, cell = sweep(tmp_path), Cell(defense="int8", stage="training", seed=0)
    path = keep(asked, cell, accuracy=0.5)
    assert read_cell(asked, cell)["accuracy"] == 0.5
    assert read_cell(asked, dataclasses.replace(cell, seed=1)) is None
    other = dataclasses.replace(asked, train_steps=4)
    with pytest.raises(ConfigError, match=r"its train_steps was 3, not 4"):
        read_cell(other, cell)
    assert read_cell(dataclasses.replace(other, overwrite=True), cell) is None
    assert read_cell(dataclasses.replace(asked, pictures="cifar100", images=9), cell)["accuracy"] == 0.5
    fresh = Cell(defense="int8", stage="initial", seed=0)
    keep(asked, fresh)
    assert read_cell(other, fresh) is not None
    with pytest.raises(ConfigError, match=r"its images was 1, not 9"):
        read_cell(dataclasses.replace(other, images=9), fresh)
    path.write_bytes(path.read_bytes()[:-9])  # what a full disk leaves
    assert read_cell(asked, cell) is None


def test_sentences_are_a_question_of_their_own(tmp_path):
    asked = sweep(tmp_path)
    text = dataclasses.replace(asked, text=Prose(model="gpt2", loss="causal_lm", data="prose", tokenizer="minilm"))
    assert text.question("trained") == asked.question("trained")
    assert text.question("text")["text"]["loss"] == "causal_lm" and "model" not in text.question("text")
    assert [cell.stage for cell in units(("int8",), 1, ("text",))[0]] == ["text"]


def test_sentences_are_read_by_the_tokenizer_of_their_own_data():
    own = str(minilm_folder() / "tokenizer.json")
    assert Frontier(text_data=f"prose:length=8,tokenizer={own}")._prose().tokenizer == own
    assert Frontier(text_data="prose:length=8")._prose().tokenizer == "minilm"


def test_units_cover_all_and_train_before_what_needs_it():
    done = units(("", "int8"), 2)
    assert [unit[0].defense for unit in done] == ["", "int8", "", "int8"]
    assert all([cell.stage for cell in unit] == ["training", "initial", "trained"] for unit in done)
    assert slug("") == "none" and "/" not in slug("file:a/../b") and slug("a+b:1") != slug("a-b:1")


def test_wrong_use_is_said_before_a_job_runs(tmp_path):
    with pytest.raises(ConfigError, match="--seeds: wanted at least 1"):
        Frontier(out=tmp_path, seeds=0).run()
    with pytest.raises(ConfigError, match="trained needs training"):
        Frontier(out=tmp_path, stages=("trained",)).run()
    with pytest.raises(ConfigError, match="'prun' is not known"):
        Frontier(out=tmp_path, defenses=("prun:0.5",)).run()


@pytest.mark.lab
def test_a_sweep_measures_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a torchrun around it")
    asked = sweep(tmp_path)
    fields = {name: getattr(asked, name) for name in ("model", "data", "pictures", "images", "num_workers")}
    command = Frontier(
        out=tmp_path,
        defenses=("prune:0.3",),
        stages=("training", "trained"),
        seeds=1,
        batch_size=8,
        train_steps=3,
        processes=1,
        naive_deadline_s=1.0,
        deadline_s=150.0,
        **fields,
    )
    done = command.run()
    (row,) = done.json["rows"]
    assert row["failed"] is None and 0 <= row["accuracy"] <= 1 and 0.6 < row["bytes_share"] < 0.8
    assert row["trained_adaptive_below_1e-3"] == row["trained_adaptive_label_accuracy"] == 1
    assert (row["trained_naive_pictures"], row["trained_naive_below_1e-3"], row["initial_naive_pictures"]) == (1, 0, 0)
    cells = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    assert len(cells) == 2 and not any((tmp_path / "runs").iterdir()) and done.json["cpu_seconds"] > 1
    again = dataclasses.replace(command, time_limit_s=0).run()  # all is kept, so that no time is needed
    assert again.json["rows"] == done.json["rows"]
    assert cells == {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    assert Path(again.json["report"]).exists() and (tmp_path / "frontier.csv").read_text().startswith("defense,")


@pytest.mark.lab
def test_a_picture_that_comes_again_is_one_victim(tmp_path):
    done = Frontier(
        out=tmp_path,
        defenses=("sign",),
        stages=("initial",),
        pictures="fashion-mnist",
        model="lenet",
        seeds=1,
        images=1,
        repeats=8,
        processes=1,
        naive_deadline_s=0.5,
        deadline_s=150.0,
    ).run()
    (row,) = done.json["rows"]
    assert row["failed"] is None and row["initial_naive_below_1e-2"] == 0
    assert row["initial_adaptive_pictures"] == row["initial_adaptive_below_1e-2"] == 1
