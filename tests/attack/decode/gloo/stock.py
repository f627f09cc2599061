"""A stock DistributedDataParallel script that knows nothing of this project, but leaves the truth behind.

    torchrun --nproc-per-node 2 stock.py OUT [norm] [unused] [static] [half] [wide] [buckets]

OUT/step{S}.rank{R}.npz has the gradient that the rank computed without DDP, and the weights it was taken at.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Imported once the group is there, it would keep the group, and torch 2.13 now and then aborts at exit.
import torch.distributed.nn
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

STEPS, LEARNING_RATE = 3, 0.1


def flat(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy().copy()


def main(out: str, *options: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # every rank has weights of its own, until DDP broadcasts those of rank 0
    width = 300 if "wide" in options else 11
    layers = [nn.Linear(7, width), *([nn.BatchNorm1d(width)] if "norm" in options else []), nn.ReLU()]
    layers += [nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 3)] if "wide" in options else [nn.Linear(11, 3)]
    model = nn.Sequential(*layers)
    ddp = DistributedDataParallel(
        model,
        find_unused_parameters="unused" in options,
        static_graph="static" in options,
        bucket_cap_mb=0.0002 if "unused" in options else 0.05 if "buckets" in options else 25,
    )
    if "half" in options:
        ddp.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LEARNING_RATE)
    Path(out).mkdir(parents=True, exist_ok=True)
    for step in range(STEPS):
        inputs, labels = torch.randn(5, 7), torch.randint(0, 3, (5,))
        buffers = [buffer.clone() for buffer in model.buffers()]
        alone = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), labels), list(model.parameters()))
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        np.savez(Path(out, f"step{step}.rank{rank}.npz"), gradient=flat(alone), weights=flat(model.parameters()))
        nn.functional.cross_entropy(ddp(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    del ddp  # holds the group too
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
