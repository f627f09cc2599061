"""The exact algebra of single layers: what a layer's output and its weights' gradient say, linearly, of its input.

For one example, a linear or convolutional layer z = F u + b with error e = d loss / d z gives two kinds of equations in
its input u: *forward rows*, F u = z - b, and *gradient rows*, dW = E(e) u. In the gradient of the weight of one input
channel only that channel takes part, so the gradient rows are one block E, the same for every channel:

    Linear  dW[o, i] = e[o] u[i]                                     E: (outputs, 1)
    Conv2d  dW[o, i, k] = sum over positions p of e[o, p] u[i, p + k]   E: (outputs x kernel, height x width)

An activation has no weights; its inverse carries a known output to a known input. Knows neither model nor observation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from attack.engine.chain import Link, NoChain

RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d)
"""Layers that change no value in evaluation mode."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """An elementwise function that can be undone from its output h."""

    inverse: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """Derivative at the input that gave h; 0 where h does not tell that input."""
    mean: float
    """Prior of an output: where it lies when nothing else is known, ..."""
    variance: float
    """... and how far from there."""


EDGE = 1e-9
"""How near to its asymptote an output may lie before it is moved off it, so that its logarithm is finite."""


def activation(module: nn.Module) -> Activation | None:
    """The inverse of a module, or None where it is not an activation that has one."""
    if isinstance(module, nn.Sigmoid):
        return Activation(
            inverse=lambda h: torch.logit(h, eps=EDGE),
            slope=lambda h: (h * (1 - h)).clamp(min=EDGE),
            mean=0.5,
            variance=1 / 12,
        )
    if isinstance(module, nn.Tanh):
        return Activation(
            inverse=lambda h: torch.atanh(h.clamp(EDGE - 1, 1 - EDGE)),
            slope=lambda h: (1 - h * h).clamp(min=EDGE),
            mean=0.0,
            variance=1 / 3,
        )
    if isinstance(module, nn.ReLU):
        # A unit counts as off below 1e-4 of the largest: a float32 gradient knows its input to about 1e-6.
        return Activation(inverse=lambda h: h, slope=lambda h: (h > 1e-4 * h.max()).to(h.dtype), mean=0.0, variance=1e4)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        below = module.negative_slope
        return Activation(
            inverse=lambda h: torch.where(h > 0, h, h / below),
            slope=lambda h: torch.where(h > 0, 1.0, below).to(h.dtype),
            mean=0.0,
            variance=1e4,
        )
    return None


def check(links: list[Link]) -> None:
    """Raises NoChain where a link has no inverse here, naming the last such link."""
    for link in reversed(links):
        module, kind = link.module, type(link.module).__name__
        if isinstance(module, nn.Conv2d):
            if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
                raise NoChain(f"layer {link.name}: only convolutions with one group and zero padding are walked back")
        elif not (isinstance(module, (nn.Linear, *RESHAPES)) or activation(module)):
            raise NoChain(f"layer {link.name} ({kind}) has no closed inverse")
    if not links or not isinstance(links[-1].module, nn.Linear) or links[-1].module.bias is None:
        raise NoChain("the last layer is not linear with a bias")


def push(link: Link, columns: Tensor, weight: Tensor | None = None) -> Tensor:
    """F u of each row of `columns`: (vectors, inputs) -> (vectors, outputs).

    Args:
        weight: in place of the layer's own.
    """
    module = link.module
    if isinstance(module, nn.Linear):
        return columns @ (module.weight if weight is None else weight).T
    assert isinstance(module, nn.Conv2d)
    return functional.conv2d(
        columns.view(len(columns), *link.input_shape),
        module.weight if weight is None else weight,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    ).flatten(1)


def weight_of(link: Link) -> Tensor:
    """The layer's weight."""
    weight = link.module.weight
    assert isinstance(weight, Tensor)
    return weight


def bias_of(link: Link) -> Tensor:
    """What the layer adds to each of its outputs, shape (outputs,)."""
    outputs = math.prod(link.output_shape)
    bias = link.module.bias
    return bias.repeat_interleave(outputs // len(bias)) if isinstance(bias, Tensor) else torch.zeros(outputs)


def pull_back(link: Link, rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """rows @ F: (rows, outputs) -> (rows, inputs). Each row is a covector of the layer's output.

    Args:
        weight: in place of the layer's own.
    """
    module = link.module
    if isinstance(module, nn.Linear):
        return rows @ (module.weight if weight is None else weight)
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    return conv2d_input(
        [len(rows), *link.input_shape],
        module.weight if weight is None else weight,
        rows.reshape(len(rows), *link.output_shape),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    ).flatten(1)


def forward_matrix(link: Link, dtype: torch.dtype) -> Tensor:
    """F: (outputs, inputs)."""
    if isinstance(link.module, nn.Linear):
        return link.module.weight.to(dtype)
    (outputs, rows, columns), (channels, height, width) = link.output_shape, link.input_shape
    touched = one_output_row(link, dtype).view(outputs, columns, channels, -1, width)
    forward = touched.new_zeros(outputs, rows, columns, channels, height, width)
    for row in range(rows):
        above, inside = rows_touched(link, row)
        forward[:, row, :, :, above] = touched[:, :, :, inside]
    return forward.view(outputs * rows * columns, -1)


def push_each(link: Link, columns: Tensor, weight: Tensor) -> Tensor:
    """F u for a `u` in one of the input's channels, zero in the others: (vectors, elements of a channel) -> (outputs,
    channels, vectors).

    Args:
        weight: the layer's own, in the dtype of `columns`.
    """
    module = link.module
    if isinstance(module, nn.Linear):
        return weight[:, :, None] * columns[:, 0]
    assert isinstance(module, nn.Conv2d)
    found = functional.conv2d(
        columns.view(-1, 1, *link.input_shape[1:]),
        weight.flatten(0, 1)[:, None],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    )
    return found.unflatten(1, weight.shape[:2]).flatten(3).permute(1, 3, 2, 0).flatten(0, 1)


def phases(link: Link) -> list[Tensor]:
    """Elements of one input channel, int64, flat, in groups that no gradient row has in common (`gradient_rows`)."""
    module = link.module
    if isinstance(module, nn.Linear):
        return [torch.zeros(1, dtype=torch.int64, device=module.weight.device)]
    assert isinstance(module, nn.Conv2d)
    (_, height, width), (down, across) = link.input_shape, module.stride
    elements = torch.arange(height * width, device=module.weight.device).view(height, width)
    return [elements[y::down, x::across].flatten() for y, x in itertools.product(range(down), range(across))]


def push_covariance(link: Link, covariance: Tensor, weight: Tensor) -> Tensor:
    """F C F', (outputs, outputs), where C holds `covariance`, (elements, elements), for each of the input's channels,
    and is zero between elements of different `phases`. What is above the diagonal may be left out.

    Args:
        weight: the layer's own, in the dtype of `covariance`.
    """
    module = link.module
    if isinstance(module, nn.Linear):
        return weight @ weight.T * covariance
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    (outputs, *positions), kernel = link.output_shape, math.prod(module.kernel_size)
    # Kernel elements so far apart, down and across, meet input elements that gradient rows have in common.
    apart = (s // math.gcd(s, d) for s, d in zip(module.stride, module.dilation, strict=True))
    down, across = (min(step, k) for step, k in zip(apart, module.kernel_size, strict=True))
    if (kernel * math.prod(positions)) ** 2 > down * across * link.outputs * link.inputs:
        forward = forward_matrix(link, weight.dtype).view(link.outputs, -1, len(covariance))
        return push(link, (forward @ covariance).flatten(1), weight)
    # The covariance of what a kernel element meets at each position with what another one does.
    (height, width), (top, left) = link.input_shape[1:], module.padding
    windows = functional.pad(covariance.view(height, width, height, width), (left, left, top, top) * 2)
    for axis in range(4):
        reach = module.dilation[axis % 2] * (module.kernel_size[axis % 2] - 1) + 1
        windows = windows.unfold(axis, reach, module.stride[axis % 2])
    windows = windows[..., :: module.dilation[0], :: module.dilation[1], :: module.dilation[0], :: module.dilation[1]]
    first, second = torch.tril_indices(outputs, outputs, device=weight.device)
    total = weight.new_zeros(len(first), math.prod(positions) ** 2)
    for y, x in itertools.product(range(down), range(across)):
        part = weight[:, :, y::down, x::across].flatten(2).transpose(1, 2)
        pairs = (part[first] @ part[second].mT).flatten(1)
        met = windows[..., y::down, x::across, y::down, x::across].permute(4, 5, 6, 7, 0, 1, 2, 3)
        total.addmm_(pairs, met.reshape(pairs.shape[1], -1))
    found = weight.new_zeros(outputs, math.prod(positions), outputs, math.prod(positions))
    found[first, :, second] = total.view(len(first), math.prod(positions), -1)
    return found.view(link.outputs, -1)


def one_output_row(link: Link, dtype: torch.dtype) -> Tensor:
    """The part of a convolution's F that makes one row of its outputs, the same for each: shape (outputs x columns,
    channels, rows touched, width)."""
    module = link.module
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    (outputs, _, columns), (channels, _, width) = link.output_shape, link.input_shape
    ones = torch.eye(outputs * columns, dtype=dtype, device=module.weight.device)
    return conv2d_input(
        [outputs * columns, channels, module.dilation[0] * (module.kernel_size[0] - 1) + 1, width],
        module.weight.to(dtype),
        ones.view(-1, outputs, 1, columns),
        stride=module.stride,
        padding=(0, module.padding[1]),
        dilation=module.dilation,
    )


def rows_touched(link: Link, row: int) -> tuple[slice, slice]:
    """The rows of a convolution's input that a row of its outputs touches; and which of `one_output_row` these are."""
    module, height = link.module, link.input_shape[1]
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    first = row * module.stride[0] - module.padding[0]
    last = min(first + module.dilation[0] * (module.kernel_size[0] - 1) + 1, height)
    return slice(max(first, 0), max(last, 0)), slice(max(-first, 0), max(last - first, 0))


def gradient_rows(link: Link, error: Tensor) -> Tensor:
    """E: (outputs x kernel, elements of one input channel), from the error at the layer's output, flat."""
    module = link.module
    if isinstance(module, nn.Linear):
        return error[:, None]
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    outputs, *positions = link.output_shape
    # One row per output and kernel element k: the error at p stands where k met u, at p stride + k dilation - padding.
    spread = error.new_zeros(outputs, *((p - 1) * s + 1 for p, s in zip(positions, module.stride, strict=True)))
    spread[:, :: module.stride[0], :: module.stride[1]] = error.view(outputs, *positions)
    margins: list[int] = []  # from the last axis to the first, as `pad` wants them; negative where it is to crop
    for axis in (1, 0):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        size, padding = link.input_shape[1 + axis], module.padding[axis]
        margins += [reach - padding, size + padding - spread.shape[1 + axis]]
    moved = functional.pad(spread, margins).unfold(1, link.input_shape[1], 1).unfold(2, link.input_shape[2], 1)
    moved = moved[:, :: module.dilation[0], :: module.dilation[1]].flip(1, 2)
    return moved.reshape(outputs * math.prod(module.kernel_size), -1)


def weight_gradients(link: Link, errors: Tensor, inputs: Tensor) -> Tensor:
    """E(e) u of each e and u, without E: (vectors, outputs), (vectors, inputs) -> (vectors, input channels, rows)."""
    module = link.module
    if isinstance(module, nn.Linear):
        return inputs[:, :, None] * errors[:, None]
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    found = [
        conv2d_weight(
            u.view(1, *link.input_shape),
            module.weight.shape,
            e.reshape(1, *link.output_shape),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
        )
        for e, u in zip(errors, inputs, strict=True)
    ]
    return torch.stack(found).flatten(3).permute(0, 2, 1, 3).flatten(2)


def by_channel(link: Link, weight_gradient: Tensor) -> Tensor:
    """The weight's gradient as (outputs x kernel, input channels), in the order of `gradient_rows`."""
    return weight_gradient.flatten(2).transpose(1, 2).flatten(0, 1) if weight_gradient.ndim > 2 else weight_gradient


def patches_of(link: Link, inputs: Tensor) -> Tensor:
    """What each output position sees: (vectors, inputs) -> (vectors, inputs of one output, positions)."""
    module = link.module
    if isinstance(module, nn.Linear):
        return inputs[:, :, None]
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    return functional.unfold(
        inputs.view(len(inputs), *link.input_shape),
        module.kernel_size,
        dilation=module.dilation,
        padding=module.padding,
        stride=module.stride,
    )
