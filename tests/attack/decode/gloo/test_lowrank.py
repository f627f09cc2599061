"""PowerSGD's factors: recognized by their sizes, and given as what they are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from attack.decode.export import read_observations, write_observations
from attack.decode.gloo.lowrank import Compression, Matrix, solve_compression
from attack.decode.recording import Recording
from attack.observation import Known
from tests.attack.decode.gloo.conftest import MANY, Many
from tests.attack.decode.gloo.recordings import name_of

SHAPES = ((24, 20), (24,), (24, 24), (24,), (5, 24), (5,), (16, 3, 3, 3))
PSGD = next(at for at, job in enumerate(MANY) if job.get("hook") == "powersgd")
MODEL = ((24, 20), (24,), (24,), (24,), (5, 24), (5,))
START = 2
"""The first step that is compressed."""


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.5, 2, 3])
def test_the_sizes_of_three_sums_tell_how_a_bucket_was_compressed(rank: int, rate: float) -> None:
    order = [6, 5, 4, 3, 2, 1, 0]
    matrices = [Matrix(i, SHAPES[i][0], math.prod(SHAPES[i][1:]), 0) for i in order]
    matrices = [one._replace(rank=min(one.rows, one.columns, rank)) for one in matrices]
    # As torch's _should_compress has it; then those of one shape together, the first one's place counts.
    chosen = [one for one in matrices if (one.rows + one.columns) * one.rank * rate < one.rows * one.columns]
    grouped = sorted(chosen, key=lambda one: [(other.rows, other.columns) for other in chosen].index(one[1:3]))
    plain = [one for one in matrices if one not in chosen]
    sizes = (
        sum(one.rows * one.columns for one in plain),
        sum(one.rows * one.rank for one in grouped),
        sum(one.columns * one.rank for one in grouped),
    )
    assert solve_compression(SHAPES, order, sizes) == Compression(tuple(one.parameter for one in plain), tuple(grouped))
    assert solve_compression(SHAPES, order, (sizes[0] + 1, *sizes[1:])) is None


def test_what_fits_two_ways_is_not_believed() -> None:
    assert solve_compression(((8, 8), (8, 8)), [0, 1], (64, 8, 8)) is None


@pytest.mark.lab
def test_each_rank_s_parts_of_the_factors_are_read_and_are_no_gradients(many: Many) -> None:
    for seen in many.of(PSGD):
        if seen.step < START:
            assert seen.complete and not seen.factors
            continue
        true = {name: many.truth[f"{name_of(seen)}.{name}"] for name in ("sent", "p", "q")}
        names = {(factor.parameter, factor.name): tuple(factor.values.shape) for factor in seen.factors}
        sent = {(index, "sent"): MODEL[index] for index in (1, 2, 3, 5)}
        assert names == {**sent, (0, "p"): (24, 2), (4, "p"): (5, 2), (0, "q"): (20, 2), (4, "q"): (24, 2)}
        for name, vector in true.items():
            ours = [factor for factor in seen.factors if factor.name == name]
            got, known, bound = (
                torch.cat([getattr(one, what).reshape(-1) for one in ours]).numpy()
                for what in ("values", "known", "bound")
            )
            assert (known != Known.UNKNOWN).all() and (known == Known.RAW).any()
            assert (np.abs(got.astype(np.float64) - vector) <= bound).all()
        matrices = seen.known[: 24 * 20], seen.known[24 * 20 + 72 : -5]
        assert not any(part.any() for part in matrices)
        assert bool(seen.known.any()) == (seen.step == START)  # later, an error from before is in what is sent


@pytest.mark.lab
def test_factors_are_named_by_inspect_and_kept_by_decode(many: Many, tmp_path: Path) -> None:
    steps = Recording(many.capture).inspect()["steps"]
    ours = [rank for rank in steps[START]["ranks"] if rank.get("group") == str(PSGD)]
    assert [rank["rank"] for rank in ours] == [0, 1, 2] and not any(rank["complete"] for rank in ours)
    assert {"parameter": 0, "name": "p", "shape": [24, 2], "complete": True} in ours[0]["factors"]
    write_observations(many.found, tmp_path / "seen.safetensors")
    for seen, again in zip(many.found, read_observations(tmp_path / "seen.safetensors"), strict=True):
        assert (seen.group, seen.step, seen.rank) == (again.group, again.step, again.rank)
        assert torch.equal(seen.gradient, again.gradient) and seen.shapes == again.shapes
        assert len(seen.factors) == len(again.factors)
        for one, other in zip(seen.factors, again.factors, strict=True):
            assert (one.parameter, one.name) == (other.parameter, other.name)
            assert torch.equal(one.values, other.values) and torch.equal(one.known, other.known)
