"""Residual networks with batch norm: one picture to the last digits, or a reason."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

from attack.algorithms import Status
from attack.engine.graph import Graph, Kind, NoGraph
from attack.engine.labels import read_label
from attack.engine.residual import walk_down
from attack.engine.target import prepare
from attack.observation import Knowledge, Observation
from attack.reconstruct import reconstruct
from harness.data import load_data
from harness.models import load_model
from tests.attack.toys import observe, unhurried

SPEC = "resnet:depth=10,width=32,classes=10,input=3x16x16"
KNOWLEDGE = Knowledge(model=SPEC, input_shape=(3, 16, 16))


@functools.cache
def photo(index: int) -> Tensor:
    whole = torch.from_numpy(load_data("photos").pictures[index].copy())[None].float() / 255
    return nn.functional.avg_pool2d(whole, 2)


def buffers(model: nn.Module) -> Tensor:
    return torch.cat([buffer.flatten().clone() for buffer in model.buffers() if buffer.is_floating_point()])


def seen(*, training: bool, index: int, seed: int = 0) -> tuple[Observation, Tensor]:
    torch.manual_seed(seed)
    model = load_model(SPEC)
    with torch.no_grad():
        for _ in range(10):
            model(torch.cat([photo(other) for other in range(8)]))
    model.train(training)
    inputs, before = photo(index), buffers(model)
    observation = observe(model, inputs, torch.tensor([index % 10]), buffers=before)
    return dataclasses.replace(observation, buffers_after=buffers(model)), inputs


def test_a_picture_comes_back() -> None:
    observation, inputs = seen(training=False, index=9, seed=9)
    answer = reconstruct(observation, KNOWLEDGE, method="residual", deadline_s=150)
    assert answer.status is Status.CONVERGED, answer.reason
    assert answer.inputs is not None and answer.predicted_mse is not None
    error = float((answer.inputs - inputs).square().mean())
    assert error <= answer.predicted_mse < 1e-8 and answer.labels is not None and int(answer.labels) == 9


def test_the_walk_ends_where_gradients_determine_no_more() -> None:
    observation, inputs = seen(training=False, index=15)
    target = prepare(observation, KNOWLEDGE, device=torch.device("cpu"))
    graph = Graph(target.model, (3, 16, 16))
    context = unhurried()
    front = walk_down(target, graph, read_label(target), context)
    with torch.no_grad():
        true = graph.run({0: inputs.double()}, list(front.values))
    assert len(front.values) >= 4 and front.ends
    for got, wanted in zip(front.values.values(), true, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"buffers_after": None}, "whose statistics were not seen"),
        ({"rank": 1}, "whose statistics were not seen"),
    ],
)
def test_statistics_that_were_not_seen_are_named(changes: dict, reason: str) -> None:
    observation, _ = seen(training=True, index=0)
    answer = reconstruct(dataclasses.replace(observation, **changes), KNOWLEDGE, method="residual")
    assert answer.status is Status.NOT_CONVERGED and reason in str(answer.reason)


def test_holes_are_named() -> None:
    observation, _ = seen(training=False, index=0)
    observation.known[5] = 0
    answer = reconstruct(observation, KNOWLEDGE, method="residual")
    assert answer.inputs is None and "some of its elements are not known" in str(answer.reason)


def test_what_is_no_such_net_is_named() -> None:
    with pytest.raises(NoGraph, match="MaxPool2d"):
        Graph(load_model("convnet").double(), (3, 32, 32))
    with pytest.raises(NoGraph, match="not served"):
        Graph(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), (4,))


def test_a_graph_is_read_off_a_residual_network() -> None:
    model = load_model(SPEC).double().eval()
    kinds = [node.kind for node in Graph(model, (3, 16, 16)).nodes]
    assert kinds[0] is Kind.INPUT and kinds[-1] is Kind.LINEAR
    assert [kinds.count(kind) for kind in (Kind.CONVOLUTION, Kind.NORM, Kind.RELU, Kind.ADD, Kind.POOL)] == [
        12,
        12,
        9,
        4,
        1,
    ]
