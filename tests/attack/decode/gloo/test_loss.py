"""Real captures with packets taken away, through the whole desk: what is said to be known is so, and it is not little.

Golden captures of small jobs, cut into packets of 100 bytes so that even their messages break apart; and jobs recorded
here, large enough for packets of an Ethernet's size.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from pathlib import Path

import numpy as np
import pytest

from attack.capture.packets import Segment
from attack.capture.streams import Closed
from tests.attack.decode.gloo.jobs import PaperJob, events
from tests.attack.decode.gloo.loss import SEVERITIES, measure, read_segments, reassembled
from tests.attack.decode.gloo.recordings import CASES, FOLDER, LARGER, Case, check, observe, read_truth, record

LEAST = {
    "nothing": 1.0,
    "1 %": 0.9,
    "5 %": 0.6,
    "20 %": 0.2,
    "5 % in bursts of 20": 0.55,
    "20 % in bursts of 20": 0.3,
    "one connection": 0.25,
    "one direction": 0.25,
    "end cut off": 0.35,
    "5 %, repeated and out of order": 0.6,
    "5 % and one direction": 0.2,
}
"""Share of all elements that must be known: some three quarters of what it was when this was written."""

Recorded = tuple[list[Segment], dict[str, np.ndarray]]


@functools.cache
def golden(case: Case) -> Recorded:
    with np.load(FOLDER / f"{case.name}.npz") as truth:
        return read_segments(FOLDER / f"{case.name}.pcapng", size=100), dict(truth)


def known(recorded: Recorded, severity: str, seeds: range) -> float:
    """Mean share that is known; fails where any of it is not so."""
    segments, truth = recorded
    found = [
        measure(truth, observe(reassembled(SEVERITIES[severity](list(segments), random.Random(seed))))[0])
        for seed in seeds
    ]
    return float(np.mean([one.known for one in found]))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("case", [*CASES, LARGER], ids=lambda case: case.name)
def test_nothing_known_is_wrong_whatever_packets_were_missed(case: Case, severity: str) -> None:
    least = LEAST.get(severity, 0.0) if case in (CASES[0], LARGER) else 0.0
    share = known(golden(case), severity, range(6 if least else 3))
    assert share >= least
    assert share == 1.0 or severity != "nothing"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    run = record(Case(world=4, options=("wide",)), tmp_path_factory.mktemp("wide") / "run")
    return read_segments(Path(run) / "wire.pcapng"), read_truth(run / "truth")


@pytest.mark.lab
def test_what_can_still_be_proven_is_reported(wide: Recorded) -> None:
    shares = {severity: known(wide, severity, range(4)) for severity in SEVERITIES}
    assert not {severity: share for severity, share in shares.items() if share < LEAST.get(severity, 0.0)}, shares
    # Of one draw in four hardly anything is left to be proven, so that four at once may well be such.
    assert known(wide, "50 %", range(32)) > 0.0


@pytest.mark.parametrize("elements", [1, 3, 4])
def test_a_part_of_a_small_sum_between_steps_is_not_taken_for_a_small_bucket(elements: int) -> None:
    # The first bucket has three elements: what a capture shows of the other sum before it ends can look just like it.
    job = PaperJob(world=3, steps=4, buckets=((3,), (2,), (0, 1)), between=elements)
    for cut in range(len(job.writes) // 3, len(job.writes), 3):
        seen = [
            dataclasses.replace(event, how="capture ended") if isinstance(event, Closed) else event
            for event in events(job.writes[:cut])
        ]
        check(job.truth, observe(seen)[0])
    whole = {one.step for one in observe(list(events(job.writes)))[0] if one.complete}
    # One of just the bucket's size is found out by what follows, and no more is read.
    assert whole == ({0, 1} if elements == 3 else {0, 1, 2, 3})
