"""A model as a chain of layers, found by watching one forward pass; or the reason why it is not one.

In: a module and the shape of one input. Out: its leaf modules in the order in which they ran, each fed by the one
before and by nothing else; a function such as `torch.relu` counts as the module that does the same. It knows no
gradient and no weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class NoChain(ValueError):
    """The model is not a chain of layers, or one of them cannot be walked back; one line that says which."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One leaf module of a chain."""

    name: str
    """The module's in the model; of a function, the function's."""
    module: nn.Module
    """It leaves its input as it was, even where the model's own works in place."""
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


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    """The function takes the last two in the other order than the module."""
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


FUNCTIONS: dict[Callable[..., Any], Callable[..., nn.Module]] = {
    functional.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU,
    Tensor.relu_: nn.ReLU,
    functional.leaky_relu: lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    torch.sigmoid: nn.Sigmoid,
    torch.sigmoid_: nn.Sigmoid,
    Tensor.sigmoid: nn.Sigmoid,
    Tensor.sigmoid_: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    torch.tanh_: nn.Tanh,
    Tensor.tanh: nn.Tanh,
    Tensor.tanh_: nn.Tanh,
    functional.softplus: nn.Softplus,
    functional.gelu: nn.GELU,
    functional.silu: lambda inplace=False: nn.SiLU(),
    functional.elu: lambda alpha=1.0, inplace=False: nn.ELU(alpha),
    functional.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
}
"""By a function of one tensor: from its other arguments, the module that does the same."""


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> list[Link]:
    """The links of a model, first to last.

    A link must take the very tensor that the link before it gave, or a view of all of it; other arithmetic between two
    links (a shortcut, a factor) makes a new tensor and so breaks the chain.

    Raises: NoChain.
    """
    parameter = next(model.parameters())
    walk = _Walk(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [
        hook
        for name, module in leaves
        for hook in (
            module.register_forward_pre_hook(lambda module, inputs, name=name: walk.enter(name, module, inputs)),
            module.register_forward_hook(lambda module, inputs, output: walk.leave(module, inputs, output)),
        )
    ]
    try:
        with torch.no_grad(), walk:
            logits = model(walk.given)
    finally:
        for hook in hooks:
            hook.remove()
    walk.expect(logits, where="after the last layer")
    seen = sum(1 for link in walk.links for _ in link.module.parameters())
    if seen != len(list(model.parameters())):
        raise NoChain("some parameters take no part in the forward pass, or take part twice")
    return walk.links


def layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[nn.Module]:
    """What a model is made of: the layers of its chain, functions as modules; all modules of one that is no chain."""
    try:
        return [link.module for link in trace(model, input_shape)]
    except NoChain:
        return list(model.modules())


class _Walk(TorchFunctionMode):
    """What a forward pass does to its input, layer by layer."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.links: list[Link] = []
        self.given = given
        """What the last layer gave."""
        self._version = given._version
        self._entered: str | None = None
        """The layer that is at work, and whose functions are its own."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        module = None if self._entered is not None else _as_module(function, args[1:], kwargs)
        if module is None:
            return function(*args, **kwargs)
        self.enter(function.__name__, module, args[:1])
        output = function(*args, **kwargs)
        self.leave(module, args[:1], output)
        return output

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """To be told before a layer runs: only then is its input as it was, as it may work in place."""
        where = f"layer {name} ({type(module).__name__})"
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise NoChain(f"{where} does not map one tensor to one")
        self.expect(inputs[0], where=f"before {where}")
        if len(inputs[0]) != 1:
            raise NoChain(f"{where} takes parts of an example as if they were several")
        self._entered = name

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name = self._entered
        assert name is not None, "it was entered"
        if not isinstance(output, Tensor):
            raise NoChain(f"layer {name} ({type(module).__name__}) does not map one tensor to one")
        self._entered, self.given, self._version = None, output, output._version
        shapes = {"input_shape": tuple(inputs[0].shape[1:]), "output_shape": tuple(output.shape[1:])}
        self.links.append(Link(name=name, module=_not_in_place(module), **shapes))

    def expect(self, taken: Tensor, *, where: str) -> None:
        """Raises: NoChain, where this is not what the last layer gave."""
        same = (
            taken.untyped_storage().data_ptr() == self.given.untyped_storage().data_ptr()
            and taken.numel() == self.given.numel()
            and taken.is_contiguous()
            and taken._version == self._version  # an operation in place counts the version up
        )
        if not same:
            raise NoChain(f"something happens to the tensor {where} that is not a layer")


def _as_module(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module | None:
    """What does the same; None where nothing is known to, for that function or with these arguments."""
    try:
        return FUNCTIONS[function](*args, **kwargs)
    except (KeyError, TypeError):
        return None


def _not_in_place(module: nn.Module) -> nn.Module:
    if not getattr(module, "inplace", False):
        return module
    module = copy.copy(module)
    vars(module)["inplace"] = False
    return module
