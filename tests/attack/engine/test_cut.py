"""Equations are counted without counting any twice, and the descent ends where they are too few."""

from __future__ import annotations

import pytest
import torch

from attack.engine.chain import trace
from attack.engine.cut import count, descend, equations
from attack.engine.features import read_features
from attack.engine.target import prepare
from attack.observation import Knowledge
from harness.models import load_model
from tests.attack.toys import observe, unhurried


@pytest.mark.parametrize(
    ("model", "batch", "known", "unknown"),
    [
        ("lenet", 1, 3072, 3072),
        # 2 x 768 features, 12 x 12 x 25 gradients of the second convolution, 12 x 3 x 25 + 12 of the first.
        ("lenet", 2, 6048, 6144),
        ("lenet", 8, 10656, 24576),
        ("lenet:channels=48", 8, 24576, 24576),
        ("mlp:hidden=200x200", 32, 32 * 3072, 32 * 3072),
    ],
)
def test_count(model: str, batch: int, known: int, unknown: int) -> None:
    counted = count(trace(load_model(model), (3, 32, 32)), batch)
    assert (counted.equations, counted.unknowns) == (known, unknown)


@pytest.mark.parametrize(("size", "end"), [(16, "1 convolution"), (32, "2 convolutions")])
def test_truth_satisfies_the_equations_of_the_cut(size: int, end: str) -> None:
    """Of small pictures the second convolution's equations determine its inputs too."""
    model, shape = f"lenet:input=3x{size}x{size}", (3, size, size)
    torch.manual_seed(0)
    net, inputs, labels = load_model(model), torch.rand(2, *shape), torch.tensor([3, 40])
    target = prepare(
        observe(net, inputs, labels), Knowledge(model=model, input_shape=shape), device=torch.device("cpu")
    )
    context = unhurried()
    cut = descend(target, trace(target.model, shape), read_features(target, context), context)
    assert sum(type(link.module).__name__ == "Conv2d" for link in cut.links) == int(end[0])
    rows = equations(target, cut)
    right, wrong = (float(rows(x.double()).detach().square().mean()) for x in (inputs, inputs.flip(0)))
    assert right < 1e3 and wrong > 1e6  # 1, were the errors at the cut exact
