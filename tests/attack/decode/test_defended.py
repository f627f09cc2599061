"""Traffic of defended jobs: what is said of a gradient holds of the one behind the defense, and no more is said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from attack.decode.export import read_observations, write_observations
from attack.decode.recording import Desk
from attack.observation import Known, Observation
from harness.defenses import load_defense
from harness.exchange.base import as_coded
from harness.wire.coded import Coded
from tests.attack.decode.checking import check
from tests.attack.decode.job import Job, events

SIZES = (900, 12, 610, 10)
SPECS = (
    "prune:0.3", "prune:0.95", "topk:0.9", "topk-dgc:0.9", "fp16", "bf16", "int8", "int8:rounding=stochastic",
    "qsgd:7", "ternary", "ternary:clip=1.0", "sign",
)  # fmt: skip


def coding(spec: str) -> Callable[[int, int, np.ndarray], Coded]:
    """What each rank sends, with what it remembers."""
    chain = load_defense(spec)
    states = {}

    def code(rank: int, step: int, gradient: np.ndarray) -> Coded:
        state = states.setdefault(rank, chain.begin(SIZES))
        sent, states[rank] = chain(torch.from_numpy(gradient), SIZES, state, seed=0, rank=rank, step=step)
        return as_coded(sent)

    return code


def defended(spec: str, **options) -> Job:
    return Job(code=coding(spec), steps=4, **options)


def desk(job: Job, **how) -> list[Observation]:
    return list(Desk(events(job.writes, **how), optimizer=job.optimizer).observations())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("options", [{}, {"servers": 2}, {"ranks_serve": True}, {"first_step": 3}])
def test_what_is_known_is_the_undefended_gradients(spec, options):
    job = defended(spec, **options)
    found = check(job, desk(job))
    assert len(found) == 8 and all(seen.weights is not None for seen in found)
    if not options.get("ranks_serve"):
        assert all(seen.complete and seen.defense == spec for seen in found)


@pytest.mark.parametrize("spec", SPECS)
def test_holes_in_a_code_are_not_known(spec):
    job = defended(spec)
    generator = np.random.default_rng(1)
    found = check(job, desk(job, segment=100, lost=lambda index: generator.random() < 0.02))
    assert found and any((seen.known == Known.UNKNOWN).any() for seen in found)


@pytest.mark.parametrize("spec", ["int8", "int8:rounding=stochastic", "qsgd:7", "ternary", "fp16", "bf16"])
def test_a_rounded_gradient_is_known_within_its_cell(spec):
    for seen in desk(defended(spec)):
        assert seen.known_fraction == 1 and not (seen.known == Known.DIFFERENCED).any()
        assert seen.bound is not None and float((seen.bound / seen.gradient.abs().max()).max()) <= 1.001


def test_of_a_pruned_gradient_the_rest_is_known_to_be_small():
    job = defended("prune:0.3")
    for seen in desk(job):
        truth = torch.from_numpy(job.gradients[seen.step, seen.rank])
        left_out = seen.known == Known.CODED
        assert int(left_out.sum()) == sum(round(0.3 * size) for size in SIZES)
        assert not seen.gradient[left_out].any() and torch.equal(seen.gradient[~left_out], truth[~left_out])
        assert seen.bound is not None and seen.limited.all()
        for part, out, bound in zip(truth.split(SIZES), left_out.split(SIZES), seen.bound.split(SIZES), strict=True):
            assert torch.equal(bound[out], part[~out].abs().min().expand(int(out.sum())))


@pytest.mark.parametrize("spec", ["topk:0.5", "topk-dgc:0.5"])
def test_what_was_kept_is_not_taken_for_a_steps_own(spec):
    """Whatever is sent at the first step is its own; later only what was sent at the step before as well."""
    job = defended(spec)
    by_rank: dict[int, list[Observation]] = {}
    for seen in check(job, desk(job)):
        by_rank.setdefault(seen.rank, []).append(seen)
    for steps in by_rank.values():
        sent = [seen.gradient != 0 for seen in steps]
        for step, seen in enumerate(steps):
            own = sent[step] & sent[step - 1] if step else sent[0]
            assert torch.equal(seen.known == Known.RAW, own) and (step or own.any())
            assert torch.equal(seen.limited, own)


def test_of_a_resumed_job_nobody_knows_what_was_kept():
    first = [seen for seen in desk(defended("topk:0.5", first_step=3)) if seen.step == 3]
    assert first and not any(seen.limited.any() for seen in first)


def test_a_defended_observation_is_read_back_as_it_was_written(tmp_path):
    seen = desk(defended("prune:0.5"))
    counts = write_observations(seen, tmp_path / "seen.safetensors")
    assert counts["complete"] == len(seen) and counts["known_fraction"] == 1
    for wrote, read in zip(seen, read_observations(tmp_path / "seen.safetensors"), strict=True):
        assert wrote.defense == read.defense == "prune:0.5" and torch.equal(wrote.known, read.known)
        assert torch.equal(wrote.bound, read.bound) and torch.equal(wrote.gradient, read.gradient)
