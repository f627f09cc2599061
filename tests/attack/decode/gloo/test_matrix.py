"""Stock DDP jobs of every kind that torch runs over Gloo, recorded, against what their ranks themselves left.

    GRADTAP_FULL=1 python -m pytest tests/attack/decode/gloo/test_matrix.py

runs every combination, one launch of torchrun for each number of ranks, which takes minutes.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from attack.capture.reassembly import read_streams
from attack.observation import Observation
from tests.attack.decode.gloo.recordings import check, name_of, observe, read_truth, record_many

MODELS, HOOKS, WORLDS = ("lenet", "norm", "resnet"), (None, "fp16", "bf16"), (2, 3, 4, 8)
SEVERAL = {"lenet": 0.005, "norm": 0.001, "resnet": 0.05}
"""MB of a bucket, for more than one."""


def job(model: str, hook: str | None, *, several: bool, world: int | None = None, **others: Any) -> dict[str, Any]:
    """As `many.train` takes it; over the last ranks of 8, where not all are meant."""
    ranks = {} if world is None else {"ranks": list(range(8 - world, 8))}
    return {"model": model, **({"hook": hook} if hook else {}), **({"cap": SEVERAL[model]} if several else {})} | (
        ranks | others
    )


PAIRS = [
    job("lenet", None, several=True),
    job("lenet", None, several=False, world=2),
    job("lenet", "fp16", several=True, world=3),
    job("lenet", "bf16", several=False, world=4),
    job("norm", None, several=True, world=4),
    job("norm", "fp16", several=False, world=8),
    job("norm", "bf16", several=True, world=2),
    job("resnet", None, several=False, world=3),
    job("resnet", "fp16", several=True, world=2),
    job("resnet", "bf16", several=True, world=3),
    job("resnet", "bf16", several=False, world=8),
]
"""Every two of model, hook, world and number of buckets together."""

TYPES = [
    job("norm", None, several=True, dtype="float64"),
    job("norm", None, several=False, dtype="float64", world=3),
    job("norm", "fp16", several=False, dtype="float64", world=2),
    job("norm", None, several=True, dtype="bfloat16", world=3),
    job("lenet", None, several=False, dtype="bfloat16", world=2),
    job("norm", None, several=False, dtype="float16", world=3),
    job("resnet", None, several=True, last=True, world=2),
]


@pytest.mark.lab
@pytest.mark.parametrize(("jobs", "ipv6"), [(PAIRS, False), (TYPES, True)], ids=["pairs", "types"])
def test_every_kind_of_job_is_read(jobs: list[dict[str, Any]], ipv6: bool, tmp_path: Path) -> None:
    world = 8 if jobs is PAIRS else 3
    jobs = [one | {"ranks": [rank - 8 + world for rank in one["ranks"]]} if "ranks" in one else one for one in jobs]
    run = record_many(jobs, tmp_path / "run", world=world, ipv6=ipv6)
    found = whole(run)
    for one, group in zip(jobs, (None, *map(str, range(1, len(jobs)))), strict=True):
        ours = [seen for seen in found if seen.group == group]
        assert {seen.rank for seen in ours} == set(one.get("ranks", range(world))), one
        wire = {"fp16": "float16", "bf16": "bfloat16"}.get(one.get("hook", ""), one.get("dtype", "float32"))
        assert {seen.defense for seen in ours} == {None if wire in ("float32", "float64") else f"{wire} on the wire"}


@pytest.mark.lab
@pytest.mark.timeout(900)
@pytest.mark.skipif("GRADTAP_FULL" not in os.environ, reason="only on request: GRADTAP_FULL=1")
@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_combination_is_read(world: int, ipv6: bool, tmp_path: Path) -> None:
    jobs = [
        job(model, hook, several=several, steps=3) | ({} if not index else {"ranks": list(range(world))})
        for index, (model, hook, several) in enumerate(itertools.product(MODELS, HOOKS, (False, True)))
    ]
    run = record_many(jobs, tmp_path / "run", world=world, ipv6=ipv6, launcher=True)
    assert len(whole(run)) == len(jobs) * 3 * world


def whole(run: Path) -> list[Observation]:
    """What is read of a run; fails where it is not all that there was, with the weights of every step."""
    truth = read_truth(run / "truth")
    found, desk = observe(list(read_streams(run / "wire.pcapng")))
    check(truth, found)
    assert {name_of(seen) for seen in found} == {name.rpartition(".")[0] for name in truth}, desk.notes.lines()
    assert all(seen.complete and seen.weights is not None for seen in found), desk.notes.lines()
    return found
