"""A residual network as a graph of few kinds of operations, found by symbolic tracing; or the reason why it is none.

In: a module and the shape of one input. Out: its operations in the order in which they run, each with where its inputs
come from. What was read is run beside the model itself, and counts only if both agree. Knows no gradient.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class NoGraph(ValueError):
    """The model is not made of these operations alone; one line that says which does not belong."""


class Kind(enum.Enum):
    """What an operation does."""

    INPUT = enum.auto()
    CONVOLUTION = enum.auto()
    NORM = enum.auto()
    """Batch norm, by the batch or by running statistics."""
    RELU = enum.auto()
    ADD = enum.auto()
    POOL = enum.auto()
    """The mean over all positions."""
    SAME = enum.auto()
    """Changes no value in evaluation mode; it may reshape."""
    LINEAR = enum.auto()


MODULES: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind.CONVOLUTION,
    nn.BatchNorm2d: Kind.NORM,
    nn.ReLU: Kind.RELU,
    nn.AdaptiveAvgPool2d: Kind.POOL,
    nn.AvgPool2d: Kind.POOL,
    nn.Flatten: Kind.SAME,
    nn.Identity: Kind.SAME,
    nn.Dropout: Kind.SAME,
    nn.Dropout2d: Kind.SAME,
    nn.Linear: Kind.LINEAR,
}
FUNCTIONS: dict[Any, Kind] = {
    functional.relu: Kind.RELU,
    torch.relu: Kind.RELU,
    "relu": Kind.RELU,
    "relu_": Kind.RELU,
    operator.add: Kind.ADD,
    operator.iadd: Kind.ADD,
    torch.add: Kind.ADD,
    "add": Kind.ADD,
    "add_": Kind.ADD,
    functional.adaptive_avg_pool2d: Kind.POOL,
    functional.avg_pool2d: Kind.POOL,
    torch.mean: Kind.POOL,
    "mean": Kind.POOL,
    torch.flatten: Kind.SAME,
    "flatten": Kind.SAME,
    "view": Kind.SAME,
    "reshape": Kind.SAME,
    functional.dropout: Kind.SAME,
}
SIZES = ("size", "shape", getattr)
"""Of a tensor, for a reshape."""
ALIKE = 1e-9
"""Relative difference between the graph's logits and the model's, in float64."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One operation."""

    kind: Kind
    name: str
    module: nn.Module | None
    sources: tuple[int, ...]
    """Places of its inputs in the graph."""
    shape: tuple[int, ...]
    """Of one example's output."""

    @property
    def layer(self) -> nn.Module:
        """The module, of an operation that has one."""
        assert self.module is not None
        return self.module


class Graph:
    """A model's operations, the input's first and the last linear layer's last."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        """Raises: NoGraph."""
        self.nodes = _read(model, input_shape)
        self.users: list[list[int]] = [[] for _ in self.nodes]
        for place, node in enumerate(self.nodes):
            for source in node.sources:
                self.users[source].append(place)
        if self.nodes[-1].kind is not Kind.LINEAR or self.nodes[-1].layer.bias is None:
            raise NoGraph("the last layer is not linear with a bias")
        probe = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probe = probe.to(next(model.parameters()).device)
        with torch.no_grad():
            wanted = model(probe)
            got = self.run({0: probe}, [len(self.nodes) - 1])[0]
        if wanted.shape != got.shape or not torch.allclose(wanted, got, rtol=ALIKE, atol=ALIKE):
            raise NoGraph("its operations, read one by one, do not make up the model")

    def run(
        self,
        values: Mapping[int, Tensor],
        wanted: list[int],
        norm: Callable[[int, Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """The outputs of some nodes, from those of others that are given.

        Args:
            values: by place, shape (batch, ...).
            norm: what a norm at a place makes of its input; None: what its module does.
        """
        found = dict(values)

        def value(place: int) -> Tensor:
            if place not in found:
                node = self.nodes[place]
                inputs = [value(source) for source in node.sources]
                found[place] = norm(place, inputs[0]) if norm and node.kind is Kind.NORM else _apply(node, inputs)
            return found[place]

        return [value(place) for place in wanted]

    def depends(self, place: int, given: Mapping[int, Tensor]) -> bool:
        """Whether a node's output is open where some outputs are given."""
        if place in given:
            return False
        return not place or any(self.depends(source, given) for source in self.nodes[place].sources)


def _apply(node: Node, inputs: list[Tensor]) -> Tensor:
    if node.kind is Kind.RELU:
        return functional.relu(inputs[0])
    if node.kind is Kind.ADD:
        return inputs[0] + inputs[1]
    if node.kind is Kind.POOL:
        return inputs[0].mean((2, 3)).reshape(-1, *node.shape)
    if node.kind is Kind.SAME:
        return inputs[0].reshape(-1, *node.shape)
    output: Tensor = node.layer(inputs[0])
    return output


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(MODULES)) or super().is_leaf_module(m, module_qualified_name)


def _read(model: nn.Module, input_shape: tuple[int, ...]) -> list[Node]:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a user's forward does that cannot be traced
        raise NoGraph(f"its forward pass cannot be traced: {str(error).splitlines()[0]}") from error
    parameter = next(model.parameters())
    sample = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
    shapes = _shapes(model, graph, sample)
    modules = dict(model.named_modules())
    nodes: list[Node] = []
    places: dict[fx.Node, int] = {}
    for each in graph.nodes:
        if each.op == "output":
            if places.get(each.args[0]) != len(nodes) - 1:
                raise NoGraph("what the last operation makes is not the output")
            break
        if each.target in SIZES or each not in shapes:
            continue
        module = modules[each.target] if each.op == "call_module" else None
        kind = Kind.INPUT if each.op == "placeholder" else _kind(each, module)
        taken = each.args[: {Kind.INPUT: 0, Kind.ADD: 2}.get(kind, 1)]
        sources = tuple(places.get(source, -1) for source in taken)
        if (
            -1 in sources
            or (kind is Kind.INPUT) != (not nodes)
            or (kind is Kind.POOL and shapes[each][1:] not in ((), (1, 1)))
        ):
            raise NoGraph(f"{each.name} is not fed by operations that are known")
        places[each] = len(nodes)
        nodes.append(Node(kind=kind, name=str(each.target), module=module, sources=sources, shape=shapes[each]))
    return nodes


def _kind(node: fx.Node, module: nn.Module | None) -> Kind:
    if module is None:
        kind = FUNCTIONS.get(node.target)
    else:
        kind = next((kind for known, kind in MODULES.items() if isinstance(module, known)), None)
    if kind is None:
        raise NoGraph(f"{node.name} ({node.target if module is None else type(module).__name__}) is not served")
    return kind


def _shapes(model: nn.Module, graph: fx.Graph, sample: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Of one example, of every node that makes a tensor of examples."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n] = tuple(result.shape[1:])
            return result

    with torch.no_grad():
        Watcher(fx.GraphModule(model, graph)).run(sample)
    return shapes
