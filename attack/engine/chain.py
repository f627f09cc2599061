"""A model as a chain of layers, found by watching one forward pass; or the reason why it is not one.

In: a module and the shape of one input. Out: its leaf modules in the order in which they ran, each fed by the one
before and by nothing else. It knows no gradient and no weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn


class NoChain(ValueError):
    """The model is not a chain of layers, or one of them cannot be walked back; one line that says which."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One leaf module of a chain."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    """Of one example."""
    output_shape: tuple[int, ...]

    def __call__(self, value: Tensor) -> Tensor:
        """What the layer makes of what the one before gave, shape (batch, ...), which the model may view otherwise."""
        output: Tensor = self.module(value.reshape(len(value), *self.input_shape))
        return output

    @property
    def inputs(self) -> int:
        """Elements of one example's input."""
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        """Elements of one example's output."""
        return math.prod(self.output_shape)


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> list[Link]:
    """The links of a model, first to last.

    A link must take the very tensor that the link before it gave, or a view of all of it; arithmetic between two
    modules (a shortcut, a functional ReLU) makes a new tensor and so breaks the chain.

    Raises: NoChain.
    """
    links: list[Link] = []
    given: list[Tensor] = []
    versions: list[int] = []

    def watch(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise NoChain(f"layer {name} ({type(module).__name__}) does not map one tensor to one")
        _expect_same(given[-1], versions[-1], inputs[0], where=f"before layer {name} ({type(module).__name__})")
        if len(inputs[0]) != 1:
            raise NoChain(f"layer {name} ({type(module).__name__}) takes parts of an example as if they were several")
        given.append(output)
        versions.append(output._version)
        links.append(
            Link(
                name=name,
                module=module,
                input_shape=tuple(inputs[0].shape[1:]),
                output_shape=tuple(output.shape[1:]),
            )
        )

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: watch(name, module, inputs, output))
        for name, module in leaves
    ]
    try:
        parameter = next(model.parameters())
        given.append(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
        versions.append(given[0]._version)
        with torch.no_grad():
            logits = model(given[0])
    finally:
        for hook in hooks:
            hook.remove()
    _expect_same(given[-1], versions[-1], logits, where="after the last layer")
    seen = sum(1 for link in links for _ in link.module.parameters())
    if seen != len(list(model.parameters())):
        raise NoChain("some parameters take no part in the forward pass, or take part twice")
    return links


def _expect_same(given: Tensor, version: int, taken: Tensor, *, where: str) -> None:
    same = (
        taken.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        and taken.numel() == given.numel()
        and taken.is_contiguous()
        and taken._version == version  # an operation in place, such as relu_, counts the version up
    )
    if not same:
        raise NoChain(f"something happens to the tensor {where} that is not a layer")
