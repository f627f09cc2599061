"""Jobs with several process groups, and with every other collective beside their steps."""

from __future__ import annotations

import random

import pytest

from attack.capture.streams import Data
from attack.decode.directory import Directory
from attack.decode.recording import Recording
from tests.attack.decode.gloo.conftest import MANY, Many
from tests.attack.decode.gloo.recordings import check, observe
from tests.attack.decode.gloo.test_recordings import cut, hole, with_holes


@pytest.mark.lab
def test_groups_are_told_apart_and_all_that_they_say_is_counted(many: Many) -> None:
    groups = {group["group"]: group for group in Recording(many.capture).inspect()["groups"]}
    assert list(groups) == [None, *map(str, range(1, len(MANY)))]
    assert [group["ranks"] for group in groups.values()] == [job.get("ranks", [0, 1, 2]) for job in MANY]
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
    shapes = [[24, 20], [24], [24], [24], [5, 24], [5]]
    assert groups[None]["shapes"] == groups["5"]["shapes"] == shapes


@pytest.mark.lab
@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2])
def test_what_is_known_of_many_groups_and_number_types_is_right_whatever_was_missed(many: Many, share: float) -> None:
    for seed in range(5):
        check(many.truth, observe(list(with_holes(many.events, share=share, seed=seed)))[0])


@pytest.mark.lab
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.0, 0.9), (0.3, 1.0)])
def test_of_many_groups_a_part_of_the_capture_says_nothing_wrong(many: Many, start: float, stop: float) -> None:
    check(many.truth, observe(list(cut(many.events, start, stop)))[0])


@pytest.mark.lab
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_groups_are_not_taken_for_each_other_where_the_store_was_missed(many: Many, share: float) -> None:
    desk = observe(many.events)[1]
    stores = {flow for flow, stream in desk._streams.items() if stream.protocol == "tcpstore"}
    stores |= {flow.reverse for flow in stores}
    for seed in range(3):
        draw = random.Random(seed)
        missed = [
            hole(event) if isinstance(event, Data) and event.flow in stores and draw.random() < share else event
            for event in many.events
        ]
        check(many.truth, observe(missed)[0])


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
