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
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from attack.capture.reassembly import read_streams
from attack.observation import Observation
from tests.attack.decode.gloo.conftest import MANY, Many
from tests.attack.decode.gloo.recordings import check, name_of, observe, read_truth, record_many

MODELS, HOOKS, WORLDS = ("lenet", "norm", "resnet"), (None, "fp16", "bf16"), (2, 3, 4, 8)
WIRE = {None: None, "fp16": "float16 on the wire", "bf16": "bfloat16 on the wire"}
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


@pytest.mark.lab
def test_hooks_worlds_models_and_buckets_of_every_kind_are_read(tmp_path: Path) -> None:
    run = record_many(PAIRS, tmp_path / "run", world=8)
    found = whole(run)
    for at, one in enumerate(PAIRS):
        ours = [seen for seen in found if seen.group == (str(at) if at else None)]
        assert {seen.rank for seen in ours} == set(one.get("ranks", range(8))), one
        assert {seen.defense for seen in ours} == {WIRE[one.get("hook")]}


@pytest.mark.lab
def test_number_types_and_memory_orders_of_every_kind_are_read(many: Many) -> None:
    check(many.truth, many.found)
    for at, one in enumerate(MANY):
        ours = many.of(at)
        steps = one.get("steps", 2)
        wanted = [(step, rank) for step in range(steps) for rank in one.get("ranks", range(3))]
        assert [(seen.step, seen.rank) for seen in ours] == wanted, many.notes
        if one.get("hook") == "powersgd":
            continue
        assert all(seen.complete for seen in ours), many.notes
        mixed = one["model"] == "mixed"  # then the optimizer's arithmetic is not followed
        assert all(seen.weights is not None for seen in ours if not mixed or not seen.step), many.notes
        dtype = "float64" if mixed else one.get("dtype", "float32")
        assert {str(seen.gradient.dtype) for seen in ours} == {
            "torch.float64" if dtype == "float64" else "torch.float32"
        }
        wire = WIRE[one["hook"]] if "hook" in one else f"{dtype} on the wire" if "16" in dtype else None
        assert {seen.defense for seen in ours} == {wire}


def test_torch_refuses_its_own_bf16_hook_without_nccl() -> None:
    """Its GPU and NCCL are asked for by name; what the hook does runs over Gloo, and is read above."""
    ddp = object.__new__(DistributedDataParallel)
    ddp.logger = None
    with pytest.raises(TypeError, match="BF16 all reduce communication hook required CUDA 11"):
        ddp._check_comm_hook(default_hooks.bf16_compress_hook)


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
