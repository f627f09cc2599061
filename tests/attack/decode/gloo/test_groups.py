"""Jobs with several process groups, and with every other collective beside their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from attack.capture.reassembly import read_streams
from attack.decode.directory import Directory
from attack.decode.recording import Recording
from tests.attack.decode.gloo.recordings import check, observe, read_truth, record_many

JOBS = [
    {"model": "norm", "talk": True, "steps": 3},
    {"model": "lenet", "ranks": [0, 1]},
    {"model": "norm", "ranks": [1, 2], "talk": True, "steps": 3},
    {"model": "norm", "ranks": [0, 1, 2]},
]


@pytest.mark.lab
def test_each_group_is_read_by_itself_whatever_else_it_says(tmp_path: Path) -> None:
    run = record_many(JOBS, tmp_path / "run", world=3)
    truth = read_truth(run / "truth")
    found, desk = observe(list(read_streams(run / "wire.pcapng")))
    check(truth, found)
    assert all(seen.complete and seen.weights is not None for seen in found), desk.notes.lines()
    wanted = [
        (None if not index else str(index), step, rank)
        for index, job in enumerate(JOBS)
        for step in range(job.get("steps", 2))
        for rank in job.get("ranks", range(3))
    ]
    assert sorted(map(str, wanted)) == sorted(str((seen.group, seen.step, seen.rank)) for seen in found)

    groups = {group["group"]: group for group in Recording(run / "wire.pcapng").inspect()["groups"]}
    assert [groups[name]["ranks"] for name in (None, "1", "2", "3")] == [[0, 1, 2], [0, 1], [1, 2], [0, 1, 2]]
    for name, world in ((None, 3), ("2", 2)):
        counts = {one["kind"]: (one["count"], one["messages"], one["bytes"]) for one in groups[name]["collectives"]}
        ring, others = world * (world - 1), world - 1
        assert counts["point_to_point"] == (3 * (world + 2 * others),) * 2 + (3 * (28 * world + 4 * 2 * others),)
        assert counts["gather"] == (3, 3 * others, 3 * others * 28) == counts["scatter"]
        assert counts["reduce"][0] == 3
        assert counts["alltoall"][:2] == (6, 6 * ring)
        # Once when DDP is built, and of tensors once, of objects twice: their sizes, and them.
        assert counts["allgather"][:2] == (10, 10 * 2 * ring)
        # One bucket, two of 7 elements, and reduce_scatter: of each rank's share, one.
        assert counts["allreduce"][0] == 3 * (1 + 2 + world)
        assert counts["barrier"][0] == 3 + (2 if name is None else 1)


def test_ranks_of_a_group_are_named_only_where_it_is_certain_who_they_are() -> None:
    directory = Directory()
    for rank in range(3):
        directory.add("/default_pg/0//cpu//0", rank, f"127.0.0.1:{100 + rank}", 3, f"store {rank}")
    directory.add("/default_pg/0//1//cpu//0", 0, "127.0.0.1:200", 2, "store 1")
    everyone, pair = directory.groups()
    assert (everyone.label, pair.label) == ("0", "1")
    assert directory.global_ranks(everyone) == (0, 1, 2)
    assert directory.global_ranks(pair) is None
    directory.add("/default_pg/0//1//cpu//0", 1, "127.0.0.1:201", 2)  # heard in an answer: who said so is not
    assert directory.global_ranks(pair) is None
    directory.add("/default_pg/0//1//cpu//0", 1, "127.0.0.1:201", 2, "store 2")
    assert directory.global_ranks(pair) == (1, 2)


def test_hosts_name_the_ranks_too() -> None:
    directory = Directory()
    for rank in range(2):
        directory.add("/default_pg/0//cpu//0", rank, f"10.0.0.{rank + 1}:100", 3)
    directory.add("/default_pg/0//1//cpu//0", 0, "10.0.0.2:200", 1)
    assert directory.global_ranks(directory.groups()[1]) is None  # the third rank may be on the same host
    directory.add("/default_pg/0//cpu//0", 2, "10.0.0.3:100", 3)
    assert directory.global_ranks(directory.groups()[1]) == (1,)
