"""What a tap at one rank's host learns of a stock DDP job: the table of docs/tap-placement.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attack.decode.recording import Recording
from nodes.node import PROJECT
from tests.integration.test_audit import gradtap, pictures, pytestmark  # noqa: F401

RANKS = 3


def test_a_tap_at_one_host_knows_that_rank_and_a_share_of_its_neighbors(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", RANKS)
    script = (PROJECT / "examples/ddp_train.py", *pictures(2 * RANKS))
    gradtap("lab", "--out", tmp_path / "run", "--hosts", "--tap", "rank:1", "--", *torchrun, *script)
    seen = list(Recording(tmp_path / "run/wire.pcapng", optimizer="sgd:lr=0.1").observations())
    assert [(one.step, one.rank) for one in seen] == [(step, rank) for step in range(2) for rank in range(RANKS)]
    for one in seen:
        share = 1 if one.rank == 1 else 1 / RANKS
        assert one.known_fraction == pytest.approx(share, abs=1e-3), (one.step, one.rank)  # chunks differ by an element
        assert one.weights is not None
