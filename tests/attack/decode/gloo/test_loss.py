"""Real captures with packets taken away, through the whole desk: what is said to be known is so, and it is not nothing.

Golden captures of small jobs, cut into packets of 100 bytes so that even their messages break apart; and jobs recorded
here, large enough for packets of an Ethernet's size.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest

from attack.capture.packets import Segment
from tests.attack.decode.gloo.loss import SEVERITIES, measure, read_segments, reassembled
from tests.attack.decode.gloo.recordings import CASES, FOLDER, LARGER, Case, observe, read_truth, record

LEAST = {
    "nothing": 1.0,
    "1 %": 0.8,
    "5 %": 0.4,
    "5 % in bursts of 20": 0.4,
    "one connection": 0.0,
    "end cut off": 0.3,
}
"""Share of all elements that must be known, by severity: well below what `loss.py` prints, of which the chance of a
recording is part."""

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
    share = known(golden(case), severity, range(4))
    assert share == 1.0 or severity != "nothing"


@pytest.fixture(scope="module", params=[4])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    run = record(Case(world=request.param, options=("wide",)), tmp_path_factory.mktemp("wide") / "run")
    return read_segments(Path(run) / "wire.pcapng"), read_truth(run / "truth")


@pytest.mark.lab
def test_what_can_still_be_proven_is_reported(wide: Recorded) -> None:
    shares = {severity: known(wide, severity, range(6)) for severity in SEVERITIES}
    assert not {severity: share for severity, share in shares.items() if share < LEAST.get(severity, 0.0)}, shares
