"""A stock script with several DistributedDataParallel models, one after the other, that leaves the truth behind.

    many.py OUT WORLD JOBS

JOBS is JSON, a list of jobs: see `train`. Under torchrun it is one rank; else it forks all of them. A job's model is
wrapped over all ranks, or over a process group of its own where the job says `ranks`. The truth is as in `stock.py`, in
OUT/step{S}.rank{R}.npz, with `group{NAME}.` before it for a group; of PowerSGD also what was summed.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# Imported once a group is there, it would keep the group, and torch 2.13 now and then aborts at exit.
import torch.distributed.nn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from harness.models import load_model

LEARNING_RATE = 0.1


def bf16_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What torch's `bf16_compress_hook` does, which torch refuses wherever there is no NCCL."""
    buffer = bucket.buffer()
    small = buffer.to(torch.bfloat16).div_(dist.get_world_size(group))
    future = dist.all_reduce(small, group=group, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": bf16_hook}


class Tiny(nn.Module):
    """Parameters of one element, of none, and without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.layer = nn.Linear(4, 5)
        self.nothing = nn.Parameter(torch.ones(0, 5))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.shift + self.nothing.sum()


class Mixed(nn.Module):
    """Layers of float32 and of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 24), nn.Linear(24, 16).double()
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x).relu().double()).relu().float()))


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model, and the shape of one example."""
    if name == "norm":
        return nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5)), (20,)
    if name == "lenet":
        return load_model("lenet:input=3x16x16,channels=6,classes=5"), (3, 16, 16)
    if name == "resnet":
        return load_model("resnet:input=3x8x8,depth=10,width=4,classes=5"), (3, 8, 8)
    if name == "tiny":
        return Tiny(), (4,)
    if name == "mixed":
        return Mixed(), (20,)
    raise ValueError(name)


def flat(tensors: Any) -> np.ndarray:
    wide = [tensor.detach().reshape(-1) for tensor in tensors]
    double = any(tensor.dtype == torch.float64 for tensor in wide)
    return torch.cat([tensor.to(torch.float64 if double else torch.float32) for tensor in wide]).numpy().copy()


@contextlib.contextmanager
def listening() -> Iterator[list[np.ndarray]]:
    """What this rank gives to `all_reduce`, as hooks written in Python call it."""
    sums: list[np.ndarray] = []
    real = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sums.append(tensor.detach().float().numpy().copy())
        return real(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        yield sums
    finally:
        dist.all_reduce = real


def talk(group: dist.ProcessGroup) -> None:
    """Everything else that torch's Gloo can do, once."""
    world, rank = group.size(), group.rank()
    own = torch.arange(7.0) + rank
    dist.all_gather([torch.empty(7) for _ in range(world)], own, group=group)
    dist.all_gather_object([None] * world, {"rank": rank}, group=group)
    dist.all_reduce(own.clone(), group=group)
    dist.all_reduce(own.double(), op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(torch.empty(0), group=group)
    dist.reduce(own.clone(), group=group, group_dst=1)
    dist.broadcast(own.clone(), group=group, group_src=1)
    dist.gather(own, [torch.empty(7) for _ in range(world)] if rank == 1 else None, group=group, group_dst=1)
    dist.scatter(torch.empty(7), [own.clone() for _ in range(world)] if not rank else None, group=group, group_src=0)
    dist.reduce_scatter(torch.empty(7), [own.clone() for _ in range(world)], group=group)
    dist.all_to_all_single(torch.empty(2 * world), torch.ones(2 * world), group=group)
    dist.all_to_all_single(
        torch.empty((rank + 1) * world), torch.ones(sum(range(world + 1))), [rank + 1] * world,
        list(range(1, world + 1)), group=group,
    )  # fmt: skip
    ring = [
        dist.P2POp(dist.isend, own, group=group, group_peer=(rank + 1) % world, tag=3),
        dist.P2POp(dist.irecv, torch.empty(7), group=group, group_peer=(rank - 1) % world, tag=3),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    dist.barrier(group)
    dist.monitored_barrier(group)


def train(out: Path, job: dict[str, Any]) -> None:
    """One model. Keys of a job: `model`; and if wanted `ranks`, `hook`, `cap` (MB of a bucket), `dtype`, `steps`,
    `last` (channels last in memory) and `talk` (other collectives behind each step)."""
    rank, steps = dist.get_rank(), job.get("steps", 2)
    group = dist.new_group(job["ranks"]) if "ranks" in job else dist.group.WORLD
    if rank not in job.get("ranks", [rank]):
        return
    torch.manual_seed(100 * rank)  # every rank has weights of its own, until DDP broadcasts those of its first rank
    model, shape = build(job["model"])
    dtype = getattr(torch, job.get("dtype", "float32"))
    if "dtype" in job:
        model.to(dtype)
    if job.get("last"):
        model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=job.get("cap", 25))
    if job.get("hook") == "powersgd":
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif "hook" in job:
        ddp.register_comm_hook(group, HOOKS[job["hook"]])
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LEARNING_RATE)
    prefix = f"group{group.group_name}." if "ranks" in job else ""
    for step in range(steps):
        inputs, labels = torch.randn(3, *shape).to(dtype), torch.randint(0, 5, (3,))
        buffers = [buffer.clone() for buffer in model.buffers()]
        alone = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), list(model.parameters()))
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        truth = {"gradient": flat(alone), "weights": flat(model.parameters())}
        with listening() as sums:
            functional.cross_entropy(ddp(inputs), labels).backward()
        if len(sums) == 3:
            truth |= dict(zip(("sent", "p", "q"), sums, strict=True))
        np.savez(out / f"{prefix}step{step}.rank{rank}.npz", **truth)
        optimizer.step()
        optimizer.zero_grad()
        if job.get("talk"):
            talk(group)
    dist.barrier(group)


def main(out: Path, jobs: list[dict[str, Any]]) -> None:
    """All jobs, as one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        train(out, job)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    here = Path(sys.argv[1]), json.loads(sys.argv[3])
    if "RANK" not in os.environ:
        os.environ |= {"MASTER_PORT": "29500", "WORLD_SIZE": sys.argv[2]}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        children = []
        for rank in range(int(sys.argv[2])):
            if not (pid := os.fork()):
                os.environ["RANK"] = str(rank)
                break
            children.append(pid)
        if "RANK" not in os.environ:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
            sys.exit(next((code if code > 0 else 128 - code for code in codes if code), 0))
    main(*here)
