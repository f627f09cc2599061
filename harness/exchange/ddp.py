"""Stock DistributedDataParallel, fed with gradients that are already known.

DistributedDataParallel averages what its own backward pass computes, so it is given one whose result is known: a
carrier around the model whose backward hands each parameter exactly its part of the flat gradient. Parameters, order,
buckets, buffer broadcasts and traffic are those of any DDP job that trains the same model; nothing of DDP is changed.
DDP broadcasts rank 0's buffers before its forward pass; here the model's own has moved them by then, so DDP gets those
from before, and the model has its own back afterwards.

A coded gradient travels by a communication hook: floats of two bytes are reduced in these, as torch's own hooks do
(fp16_compress_hook; bf16_compress_hook refuses Gloo); for any other code each bucket's parameters are gathered as they
were coded (`harness.exchange.gathering`), or averaged in rounds where they are factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import all_reduce
from torch.nn.parallel import DistributedDataParallel

from harness.defenses.powersgd_averaged import rounds_of
from harness.errors import ExchangeError
from harness.exchange.base import as_tensor, layout_of
from harness.exchange.chunks import LARGE_CHUNK, Chunk
from harness.exchange.process_group import ProcessGroupExchange, all_reduced_bytes, short_floats
from harness.wire.coded import Coded


class DDPExchange(ProcessGroupExchange):
    """One rank of a stock DDP job. Uses the parameters' `.grad`, and leaves them None."""

    _ddp: DistributedDataParallel | None = None
    _hook: Callable[..., torch.futures.Future[Tensor]] | None = None
    _coded: Coded
    _mean: np.ndarray
    """What is being averaged, and where to."""
    _chunks: dict[int, list[Chunk]]
    """By the id of a parameter: how its part of a coded gradient is cut."""

    def start(self, model: nn.Module, *, step: int) -> None:
        """See `Exchange.start`. Also raises ExchangeError where a parameter is frozen: stock DDP would not send it."""
        self._step, self._layout = step, layout_of(model, world_size=self.world_size)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise ExchangeError(f"rank {self.rank}: stock DDP does not average {name}, which is frozen")
        self._parameters = list(model.parameters())
        at, self._chunks = 0, {}
        for parameter in self._parameters:
            cut = range(at, at + parameter.numel(), LARGE_CHUNK)
            at += parameter.numel()
            self._chunks[id(parameter)] = [Chunk(begin, min(LARGE_CHUNK, at - begin)) for begin in cut]
        with self._one_line("weights of rank 0"):
            self._ddp = DistributedDataParallel(Carrier(model))
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def close(self) -> None:
        # The reducer holds the group too: let go of it first, or the group would outlive `destroy_process_group`, and
        # end without its peers, which hangs.
        self._ddp = None
        super().close()

    def average(self, gradient: Tensor | Coded, *, step: int) -> Tensor:
        self._step = step
        gradient = self.shown(gradient)
        if not isinstance(gradient, Tensor):
            self._coded, self._mean = gradient, np.empty(gradient.size, np.float32)
            gradient = self._hooked(gradient)
        for parameter in self._parameters:
            parameter.grad = None
        assert self._ddp is not None, "start comes first"
        after = [buffer.clone() for buffer in self._buffers]
        self._set_buffers(self._before)
        with self._one_line(f"gradients of all {self.world_size} ranks"):
            self._ddp(gradient.detach()).backward()
        self._set_buffers(after)
        self._before = after
        averages = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        for parameter in self._parameters:
            parameter.grad = None
        average = torch.cat([part.reshape(-1) for part in averages])
        if self._hook in (None, self._reduce_bucket):  # the others count what they move
            size = 4 if self._hook is None else 2
            moved = all_reduced_bytes(average.numel(), rank_count=self.world_size, element_bytes=size)
            self.traffic.bytes_out += moved
            self.traffic.bytes_in += moved
        return average

    def _set_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)

    def _hooked(self, coded: Coded) -> Tensor:
        """What the backward pass is to hand to DDP, whose hook then sends it as it was coded."""
        assert self._ddp is not None, "start comes first"
        rounds = rounds_of(coded)
        short = None if rounds else short_floats(coded)
        if self._hook is None:
            if rounds is not None:
                self._hook = self._iterate_bucket
            elif short is None:
                self._hook = self._gather_bucket
            else:
                self._short, self._hook = short.dtype, self._reduce_bucket
            self._ddp.register_comm_hook(None, self._hook)
        values = torch.zeros(coded.size) if rounds else as_tensor(coded)
        return values.to(self._parameters[0].device)

    def _reduce_bucket(self, _, bucket):  # torch refuses annotations that are texts
        """DDP's hook: the mean over the ranks in floats of two bytes."""
        buffer = bucket.buffer()
        short = buffer.to(self._short).div_(self.world_size)
        future = all_reduce(short, async_op=True).get_future()
        return future.then(lambda _: buffer.copy_(short))

    def _gather_bucket(self, _, bucket):
        """DDP's hook: the mean over the ranks of what the code says of a bucket's parameters."""
        chunks = [chunk for parameter in bucket.parameters() for chunk in self._chunks[id(parameter)]]
        self.gathering.average(self._coded, chunks, step=self._step, into=self._mean)
        parts = [self._mean[chunk.at : chunk.at + chunk.size] for chunk in chunks]
        return _done(bucket, np.concatenate([*parts, np.empty(0, np.float32)]))

    def _iterate_bucket(self, _, bucket):
        """DDP's hook: the mean of a bucket's parameters, by factors that are averaged in rounds."""
        rounds = rounds_of(self._coded)
        assert rounds is not None, "the hook of such a defense"
        place = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        return _done(bucket, rounds.average([place[id(parameter)] for parameter in bucket.parameters()], self.mean))


def _done(bucket, average):
    """What a hook answers that has waited for its peers itself."""
    buffer = bucket.buffer()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer.copy_(torch.from_numpy(average)))
    return done


class Carrier(nn.Module):
    """Holds the model; its backward pass gives each parameter exactly its part of the flat gradient, bit for bit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, gradient: Tensor) -> Tensor:
        parameters = list(self.module.parameters())
        parts = torch.split(gradient, [parameter.numel() for parameter in parameters])
        # The last parameter's gradient is ready first, as where a model uses them in order: DDP fills its buckets so.
        return torch.stack([Carry.apply(*pair) for pair in zip(parameters, parts, strict=True)]).sum()


class Carry(torch.autograd.Function):
    """A number that depends on a parameter, with a gradient that was chosen beforehand.

    <parameter, part> would have the same gradient, times a 1; this spares the products.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, part: Tensor) -> Tensor:
        ctx.part = part.view_as(parameter)
        return parameter.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.part.clone(), None
