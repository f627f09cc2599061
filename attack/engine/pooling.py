"""Blocks of convolution, ReLU and max pooling, and what the last layer says of a net that is two of them.

With z = conv(u), a block's output is v = max(0, z over a pooling window). A *cell* is one window of one channel; which
of its positions passed is its *pattern*. Backwards, the error of v goes to that position and to no other. Shapes: z is
(channels, height, width), cells of it (channels, rows, columns, positions). Knows no search.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from attack.engine.chain import Link, NoChain, trace
from attack.engine.labels import last_layer_signal
from attack.engine.layers import RESHAPES
from attack.engine.target import Target

SURE = 6.0
"""Standard errors above zero from which on a feature counts as active."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A convolution, ReLU, and pooling over windows that do not overlap."""

    conv: nn.Conv2d
    window: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    """Of z."""

    @property
    def bias(self) -> Tensor:
        """Shape (channels, 1, 1)."""
        bias = torch.zeros(self.output_shape[0]) if self.conv.bias is None else self.conv.bias.detach()
        return bias.to(self.conv.weight)[:, None, None]

    @property
    def gain(self) -> float:
        """Standard deviation of z where the inputs' is 1 and they are independent."""
        return float(self.conv.weight.detach().square().sum() / len(self.conv.weight)) ** 0.5

    def apply(self, u: Tensor) -> Tensor:
        """The linear part of z."""
        conv = self.conv
        return functional.conv2d(u[None], conv.weight.detach(), None, conv.stride, conv.padding, conv.dilation)[0]

    def back(self, z: Tensor, *, squared: bool = False) -> Tensor:
        """The transpose of `apply`; or that of the layer with its weights squared."""
        conv = self.conv
        weight = conv.weight.detach().square() if squared else conv.weight.detach()
        shape = [1, *self.input_shape]
        return conv2d_input(shape, weight, z[None], conv.stride, conv.padding, conv.dilation)[0]

    def forward(self, u: Tensor) -> Tensor:
        """z."""
        return self.apply(u) + self.bias

    def output(self, u: Tensor) -> Tensor:
        """v."""
        return self.cells(self.forward(u)).amax(-1).clamp(min=0)

    def cells(self, z: Tensor) -> Tensor:
        """(channels, height, width) -> (channels, rows, columns, positions)."""
        channels, height, width = z.shape
        tall, wide = self.window
        parts = z.view(channels, height // tall, tall, width // wide, wide)
        return parts.transpose(2, 3).reshape(channels, height // tall, width // wide, tall * wide)

    def uncells(self, cells: Tensor) -> Tensor:
        """The inverse of `cells`."""
        channels, rows, columns, _ = cells.shape
        tall, wide = self.window
        parts = cells.reshape(channels, rows, columns, tall, wide).transpose(2, 3)
        return parts.reshape(channels, rows * tall, columns * wide)

    @property
    def padding(self) -> tuple[int, ...]:
        """Of the convolution, at each side."""
        padding = self.conv.padding
        assert not isinstance(padding, str)  # as `_block` found
        return padding

    def patches(self, u: Tensor) -> Tensor:
        """What each position of z sees of u: (input channels x kernel, height x width). With the error E at z flat,
        the weight's gradient is E @ patches'."""
        conv = self.conv
        return functional.unfold(u[None], conv.kernel_size, conv.dilation, self.padding, conv.stride)[0]

    def unpatch(self, patches: Tensor) -> Tensor:
        """The transpose of `patches`."""
        conv = self.conv
        size = self.input_shape[1:]
        return functional.fold(patches[None], size, conv.kernel_size, conv.dilation, self.padding, conv.stride)[0]

    def gather(self, matrix: Tensor) -> Tensor:
        """Of a quadratic form in what one kernel element of all positions sees of a channel of u, the sum over the
        kernel elements: positions of z, squared -> positions of u, squared."""
        channel = self.input_shape[1:]
        numbers = torch.arange(1, math.prod(channel) + 1, device=matrix.device).view(1, 1, *channel)
        conv = self.conv
        seen = functional.unfold(numbers.to(matrix), conv.kernel_size, conv.dilation, self.padding, conv.stride)[0]
        out = matrix.new_zeros(numbers.numel(), numbers.numel())
        for element in seen.long():  # 0 is padding
            (inside,) = element.nonzero(as_tuple=True)
            at = element[inside] - 1
            out[at[:, None], at] += matrix[inside[:, None], inside]
        return out


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """A net of two blocks and a linear layer, and what is exact of it for one example."""

    lower: Block
    upper: Block
    features: Tensor
    """v of the upper block."""
    active: Tensor
    """bool: where it is above zero."""
    error: Tensor
    """Derivative of the loss by the features; 0 where they are not active."""
    gradient: Tensor
    """Of the upper weight, shape (channels, input channels x kernel)."""
    noise: Tensor
    """Standard deviation of the errors of each of its rows, shape (channels, 1)."""
    lower_gradient: Tensor
    """The same of the lower weight; ..."""
    lower_noise: Tensor
    """... infinite where a row is not known in full."""


def read(target: Target) -> Pooled:
    """Takes the net apart, and reads features and error from the last layer's gradient: an outer product, e_L v'.

    Raises: NoChain: it is another kind of net, or the gradients that are needed are not known in full.
        NoLabel: the last layer's are not.
    """
    links = trace(target.model, target.input_shape)
    lower, upper = _blocks(links)
    last_layer_signal(target)
    gradients, noises, places = target.tensors(target.gradient), target.tensors(target.noise), target.places
    weight, logit_error = gradients[-2], gradients[-1]
    at, below = (places[id(block.conv.weight)] for block in (upper, lower))
    noise, lower_noise = (noises[place].flatten(1).square().mean(1, keepdim=True).sqrt() for place in (at, below))
    if not (noises[-2].isfinite().all() and noise.isfinite().all()):
        raise NoChain("the gradients of the last two layers are not known in full")
    size = logit_error.square().sum()
    features = weight.T @ logit_error / size
    doubt = (noises[-2].square().T @ logit_error.square()).sqrt() / size
    rows, columns = (upper.output_shape[1] // upper.window[0], upper.output_shape[2] // upper.window[1])
    shape = (upper.output_shape[0], rows, columns)
    active = (features > SURE * doubt).view(shape)
    head = links[-1].module
    assert isinstance(head, nn.Linear)  # as `_blocks` found
    error = (head.weight.detach().T @ logit_error).view(shape)
    return Pooled(
        lower=lower,
        upper=upper,
        features=torch.where(active, features.view(shape), 0.0),
        active=active,
        error=torch.where(active, error, 0.0),
        gradient=gradients[at].flatten(1),
        noise=noise,
        lower_gradient=gradients[below].flatten(1),
        lower_noise=lower_noise,
    )


def _blocks(links: list[Link]) -> tuple[Block, Block]:
    kept = [link for link in links if not isinstance(link.module, RESHAPES)]
    kinds = [type(link.module) for link in kept]
    block = [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    if kinds != [*block, *block, nn.Linear] or kept[-1].module.bias is None:
        raise NoChain(
            "the model is not two blocks of convolution, ReLU and max pooling, and a linear layer with a bias"
        )
    return _block(kept[0], kept[2]), _block(kept[3], kept[5])


def _block(convolution: Link, pooling: Link) -> Block:
    conv, pool = convolution.module, pooling.module
    assert isinstance(conv, nn.Conv2d) and isinstance(pool, nn.MaxPool2d)
    if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise NoChain(f"layer {convolution.name}: only convolutions with one group and zero padding are served")
    window, stride = _pair(pool.kernel_size), _pair(pool.stride)
    height, width = convolution.output_shape[1:]
    plain = window == stride and _pair(pool.padding) == (0, 0) and _pair(pool.dilation) == (1, 1)
    if not plain or height % window[0] or width % window[1] or math.prod(window) < 2:
        raise NoChain(f"layer {pooling.name}: only windows that share no element and leave none out are served")
    return Block(conv=conv, window=window, input_shape=convolution.input_shape, output_shape=convolution.output_shape)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
