"""Stock DistributedDataParallel, fed with gradients that are already known.

DistributedDataParallel averages what its own backward pass computes, so it is given one whose result is known: a
carrier around the model whose backward hands each parameter exactly its part of the flat gradient. Parameters, order,
buckets, buffer broadcasts and traffic are those of any DDP job that trains the same model; nothing of DDP is changed.
DDP broadcasts rank 0's buffers before its forward pass; here the model's own has moved them by then, so DDP gets those
from before, and the model has its own back afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from harness.errors import ExchangeError
from harness.exchange.process_group import ProcessGroupExchange, all_reduced_bytes


class DDPExchange(ProcessGroupExchange):
    """One rank of a stock DDP job. Uses the parameters' `.grad`, and leaves them None."""

    _ddp: DistributedDataParallel | None = None

    def start(self, model: nn.Module, *, step: int) -> None:
        """See `Exchange.start`. Also raises ExchangeError where a parameter is frozen: stock DDP would not send it."""
        self._step = step
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise ExchangeError(f"rank {self.rank}: stock DDP does not average {name}, which is frozen")
        self._parameters = list(model.parameters())
        with self._one_line("weights of rank 0"):
            self._ddp = DistributedDataParallel(Carrier(model))
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    def close(self) -> None:
        # The reducer holds the group too: let go of it first, or the group would outlive `destroy_process_group`, and
        # end without its peers, which hangs.
        self._ddp = None
        super().close()

    def average(self, gradient: Tensor, *, step: int) -> Tensor:
        self._step = step
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
        moved = all_reduced_bytes(average.numel(), rank_count=self.world_size)
        self.traffic.bytes_out += moved
        self.traffic.bytes_in += moved
        return average

    def _set_buffers(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)


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
