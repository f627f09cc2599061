"""What scripts write to update their weights, in plain torch, beside what the eavesdropper declares for it.

    torchrun --nproc-per-node 2 stock_rules.py OUT

trains one network with DDP, and does to copies of it, with the same averaged gradients, what each rule says:
OUT/step{S}.npz has the weights of every copy before step S.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

Update = Callable[[], None]
STEPS = 7


def plain(optimizer: optim.Optimizer, *schedules: lr_scheduler.LRScheduler, every: int = 1) -> Update:
    """A script's last lines of a step."""
    done = 0

    def update() -> None:
        nonlocal done
        optimizer.step()
        done += 1
        for schedule in schedules if done % every == 0 else ():
            schedule.step()

    return update


def clipped(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()

    return update


def value_clipped(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.AdamW(parameters, lr=0.01)

    def update() -> None:
        torch.nn.utils.clip_grad_value_(parameters, 0.01)
        optimizer.step()

    return update


def stepped(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.SGD(parameters, lr=0.1)
    return plain(optimizer, lr_scheduler.StepLR(optimizer, 1, gamma=0.5), every=2)


def cosine(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return plain(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=10))


def warmed_up(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.Adam(parameters, lr=0.01)
    up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    down = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    return plain(optimizer, lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[3]))


def chained(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.SGD(parameters, lr=0.1)
    milestones = lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    return plain(optimizer, milestones, lr_scheduler.ExponentialLR(optimizer, 0.9))


def one_cycle(parameters: list[nn.Parameter]) -> Update:
    optimizer = optim.SGD(parameters, lr=0.01, momentum=0.9)
    return plain(optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10))


def matrices(parameters: list[nn.Parameter]) -> Update:
    tensors = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1}]
    tensors += [{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return plain(optim.AdamW(tensors, lr=0.001, betas=(0.9, 0.95)))


STOCK: dict[str, Callable[[list[nn.Parameter]], Update]] = {
    "sgd:lr=0.1": lambda p: plain(optim.SGD(p, lr=0.1)),
    "sgd:lr=0.1,momentum=0.9": lambda p: plain(optim.SGD(p, lr=0.1, momentum=0.9)),
    "sgd:lr=0.05,momentum=0.9,dampening=0.5": lambda p: plain(optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5)),
    "sgd:lr=0.05,momentum=0.9,weight_decay=0.0005,nesterov=true": lambda p: plain(
        optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    ),
    "sgd:lr=0.1,fused=true,momentum=0.9": lambda p: plain(optim.SGD(p, lr=0.1, momentum=0.9, fused=True)),
    "adam:lr=0.001": lambda p: plain(optim.Adam(p, lr=1e-3)),
    "adam:lr=0.001,weight_decay=0.01,amsgrad=true": lambda p: plain(
        optim.Adam(p, lr=1e-3, weight_decay=0.01, amsgrad=True)
    ),
    "adam:lr=0.001,fused=true": lambda p: plain(optim.Adam(p, lr=1e-3, fused=True)),
    "adamw:lr=0.001,foreach=true": lambda p: plain(optim.AdamW(p, lr=1e-3, foreach=True)),
    "adamw:lr=0.001,weight_decay=0.1,betas=0.9/0.95,decay=matrices": matrices,
    "rmsprop:lr=0.001,momentum=0.9": lambda p: plain(optim.RMSprop(p, lr=1e-3, momentum=0.9)),
    "adagrad:lr=0.01": lambda p: plain(optim.Adagrad(p, lr=1e-2)),
    "adadelta:lr=1": lambda p: plain(optim.Adadelta(p, lr=1.0)),
    "adamax:lr=0.002": lambda p: plain(optim.Adamax(p)),
    "nadam:lr=0.002": lambda p: plain(optim.NAdam(p)),
    "radam:lr=0.001": lambda p: plain(optim.RAdam(p)),
    "clip:norm=0.3+sgd:lr=0.1,momentum=0.9": clipped,
    "clip:value=0.01+adamw:lr=0.01": value_clipped,
    "sgd:lr=0.1+step:step_size=1,gamma=0.5,every=2": stepped,
    "sgd:lr=0.1,momentum=0.9,nesterov=true,weight_decay=5e-4+cosine:T_max=10": cosine,
    "adam:lr=0.01+linear:start_factor=0.1,total_iters=3,until=3+cosine:T_max=5": warmed_up,
    "sgd:lr=0.1+multistep:milestones=2/4,gamma=0.5+exponential:gamma=0.9": chained,
    "sgd:lr=0.01,momentum=0.9+onecycle:max_lr=0.1,total_steps=10": one_cycle,
}
"""By declaration, what a script has in its place."""


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 12))
    ddp = DistributedDataParallel(model)
    copies = {name: [nn.Parameter(p.detach().clone()) for p in model.parameters()] for name in STOCK}
    updates = {name: build(copies[name]) for name, build in STOCK.items()}
    for step in range(STEPS):
        if rank == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            flat = {name: torch.cat([p.detach().flatten() for p in copy]).numpy() for name, copy in copies.items()}
            np.savez(Path(out, f"step{step}.npz"), **flat)
        nn.functional.cross_entropy(ddp(torch.randn(3, 20)), torch.randint(0, 12, (3,))).backward()
        for name, copy in copies.items():
            for own, trained in zip(copy, model.parameters(), strict=True):
                assert trained.grad is not None
                own.grad = trained.grad.clone()
            updates[name]()
        with torch.no_grad():
            for parameter, own in zip(model.parameters(), copies["sgd:lr=0.1"], strict=True):
                parameter.copy_(own)
        ddp.zero_grad()
    # A reducer that outlives its group's peers hangs or aborts in torch's destructors, now and then.
    del ddp
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
