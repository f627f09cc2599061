"""torchrun's command line, taken apart and put together again."""

from __future__ import annotations

import argparse

import pytest

from harness.errors import ConfigError
from nodes.torchrun import FLAGS, PLACEMENT, TORCHRUN, root_cause, split_launcher, split_placement, start_apart


def test_options_are_those_of_the_installed_torchrun() -> None:
    from torch.distributed.run import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    spelled = {action: {name for name in action.option_strings if "_" not in name} for action in parser._actions}
    flags = {name for action, names in spelled.items() if action.nargs == 0 for name in names}
    assert flags - {"-h", "--help"} == FLAGS
    assert {name for names in spelled.values() for name in names} >= PLACEMENT


@pytest.mark.parametrize(
    ("arguments", "num_ranks", "kept"),
    [
        ("--nproc-per-node 3 train.py --lr 1", 3, "train.py --lr 1"),
        ("--standalone --nproc_per_node=2 train.py --nnodes 9", 2, "train.py --nnodes 9"),
        ("--nnodes 2 --nproc-per-node 2 --rdzv_backend c10d --rdzv-endpoint a:1 -m pkg.train", 4, "-m pkg.train"),
        ("--max-restarts 0 --no-python --tee 3 ./train", 1, "--max-restarts 0 --no-python --tee 3 ./train"),
    ],
)
def test_placement_is_split_off(arguments: str, num_ranks: int, kept: str) -> None:
    assert split_placement(arguments.split()) == (num_ranks, tuple(kept.split()))


@pytest.mark.parametrize("arguments", ["--nproc-per-node auto train.py", "--nnodes 1:4 train.py", "--nproc-per-node"])
def test_number_of_ranks_must_be_a_number(arguments: str) -> None:
    with pytest.raises(ConfigError, match=r"wanted a (number|value)"):
        split_placement(arguments.split())


def test_launcher_is_found_however_it_is_called() -> None:
    for launcher in (("/bin/torchrun",), ("python3", "-m", "torch.distributed.run"), TORCHRUN):
        assert split_launcher((*launcher, "train.py")) == (launcher, ("train.py",))
    with pytest.raises(ConfigError, match="wanted a torchrun command"):
        split_launcher(("python", "train.py"))


def test_each_rank_gets_a_host_and_a_torchrun() -> None:
    nodes = start_apart(["train.py"], num_ranks=2, env={"A": "b"})
    assert [(node.name, node.host) for node in nodes] == [("rank0", "rank0"), ("rank1", "rank1")]
    assert nodes[1].argv == (
        *TORCHRUN,
        *"--nnodes 2 --node-rank 1 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29500 train.py".split(),
    )


REPORT = """\
[rank1]: Traceback (most recent call last):
[rank1]: ValueError: planned failure
[rank0]: RuntimeError: peer went away
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 8)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_17:12:35
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 9)
  error_file: <N/A>
============================================================
"""


@pytest.mark.parametrize(("code", "how"), [(1, "ended with exit code 1"), (-9, "was killed by SIGKILL")])
def test_first_failure_is_the_one_that_torchrun_names(code: int, how: str) -> None:
    assert root_cause(REPORT.format(code=code).splitlines()) == (
        f"torchrun says that rank 1 failed first: it {how} ([rank1]: ValueError: planned failure)"
    )
    assert root_cause(["no report"]) is None
