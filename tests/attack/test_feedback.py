"""What the steps of one batch say of its gradient, where what was not sent is kept for later."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from attack.engine.target import prepare
from attack.feedback import settle
from attack.observation import Knowledge, Known, Observation
from harness.defenses import load_defense
from harness.exchange.base import as_coded
from harness.models import load_model
from tests.attack import toys

PARTS = 6
"""Parameter tensors of the toy."""


def sent(
    spec: str, steps: int, *, seed: int = 0, name: str = "convolution", batch: int = 1
) -> tuple[Observation, Tensor]:
    """One gradient at so many steps, as a receiver makes it of each, and the gradient itself."""
    model, inputs, labels = toys.example(name, seed=seed, batch=batch)
    return coded(model, toys.observe(model, inputs, labels), spec, steps, seed=seed)


def coded(model: nn.Module, plain: Observation, spec: str, steps: int, *, seed: int) -> tuple[Observation, Tensor]:
    """The same of a gradient that was observed."""
    sizes = tuple(math.prod(shape) for shape in plain.shapes)
    chain = load_defense(spec).fit(model)
    state, seen = chain.begin(sizes), []
    for step in range(steps):
        message, state = chain(plain.gradient.clone(), sizes, state, seed=seed, rank=0, step=step)
        values = torch.from_numpy(as_coded(message).values().copy())
        matrices = torch.cat([torch.full((math.prod(shape),), len(shape) > 1) for shape in plain.shapes])
        bound = torch.where(matrices, math.inf, 0.0) if "powersgd" in spec else torch.full_like(values, math.inf)
        known = torch.where(bound > 0, int(Known.CODED), int(Known.RAW)).to(torch.uint8)
        seen.append(dataclasses.replace(plain, step=step, gradient=values, known=known, bound=bound, defense=spec))
    return dataclasses.replace(seen[0], again=tuple(seen[1:])), plain.gradient.double()


def turned(flat: Tensor, found: Observation) -> Tensor:
    """In the bases in which an observation is given."""
    parts = list(flat.split([math.prod(shape) for shape in found.shapes]))
    for basis in found.bases:
        parts[basis.parameter] = (basis.rows @ parts[basis.parameter].view(len(basis.rows), -1)).flatten()
    return torch.cat(parts)


@pytest.mark.parametrize("spec", ["topk:0.9", "topk:0.5", "topk-dgc:0.8,momentum=0.7", "powersgd:1", "powersgd:2"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_within_its_bounds(spec, steps, seed):
    seen, gradient = sent(spec, steps, seed=seed)
    found = settle(seen)
    # A RAW element of the first step is what was sent, to the bit.
    assert found.bound is not None and ((turned(gradient, found) - found.gradient).abs() <= found.bound).all()
    assert found.again == () and found.known_fraction > 0.2


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_hold_for_many_rows_and_columns(rank, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 200), nn.Sigmoid(), nn.Linear(200, 5))
    plain = toys.observe(model, torch.rand(3, 784), torch.tensor([0, 1, 2]))
    seen, gradient = coded(model, plain, f"powersgd:{rank}", 1, seed=seed)
    found = settle(seen, ranks={0: 3, 2: 3})
    assert found.bound is not None and ((turned(gradient, found) - found.gradient).abs() <= found.bound).all()
    assert len(found.bases) == (0 if rank == 3 else 2) and found.known_fraction > 0.005


def test_directions_too_small_to_be_sent_are_within_the_bounds():
    """Of a batch in which the model is sure of all examples but one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20))
    weight = torch.randn(20, 3) * torch.tensor([1.0, 3e-6, 2e-6]) @ torch.randn(3, 30)
    plain = toys.observe_gradient(model, torch.cat([weight.flatten(), torch.randn(20)]))
    seen, gradient = coded(model, plain, "powersgd:2", 1, seed=0)
    found = settle(seen)
    assert found.bases == () and found.bound is not None
    assert ((gradient - found.gradient).abs() <= found.bound).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_signs_close_in(seed):
    widths = []
    for steps in (4, 8, 32):
        seen, gradient = sent("sign", steps, seed=seed)
        found = settle(seen)
        assert found.bound is not None
        off = (gradient - found.gradient).abs()
        # Those whose sign never changed count with a law's width, which a few may lie beyond.
        assert float((off > found.bound).double().mean()) < 0.05
        widths.append(float(found.bound.median()))
    assert widths[0] > widths[1] > widths[2] and widths[0] > 4 * widths[2]


def test_products_say_more_of_a_matrix_at_every_step():
    found = [settle(sent("powersgd:2", steps)[0]) for steps in (1, 2, 4)]
    assert found[0].known_fraction < found[1].known_fraction < found[2].known_fraction == 1
    # Known along all directions, it is known by its elements.
    _, gradient = sent("powersgd:2", 1)
    assert found[2].bases == () and found[2].bound is not None
    assert ((found[2].gradient - gradient).abs() <= found[2].bound).all() and found[2].bound.max() < 1e-3


def test_a_product_of_less_than_its_rank_is_the_matrix():
    """Of one example a linear layer's gradient has rank one."""
    seen, gradient = sent("powersgd:2", 1)
    found = settle(seen)
    last = slice(-85, None)  # 5 x 16 weights and 5 biases
    assert not any(basis.parameter == PARTS - 2 for basis in found.bases)
    torch.testing.assert_close(found.gradient[last], gradient[last], rtol=1e-5, atol=1e-6)
    alone, _ = sent("powersgd:1", 1)
    assert any(basis.parameter == PARTS - 2 for basis in settle(alone).bases)
    assert not any(basis.parameter == PARTS - 2 for basis in settle(alone, ranks={PARTS - 2: 1}).bases)


@pytest.mark.parametrize(
    ("name", "batch", "told"),
    [
        ("tanh", 3, {"batch_size": None}),
        ("tanh", 3, {"batch_size": None, "labels": (0, 1, 2)}),
        ("tanh", 3, {}),
        ("several_rows", 1, {}),
    ],
)
def test_of_several_rows_a_product_is_not_the_matrix(name, batch, told):
    seen, gradient = sent("powersgd:1", 1, name=name, batch=batch)
    assert seen.weights is not None
    target = prepare(seen, toys.told(name, torch.zeros(batch, 12), **told), device=torch.device("cpu"))
    off = ((target.turned(gradient) - target.gradient).abs() - target.bound) * target.known
    assert target.bases and off.max() <= 1e-6 * gradient.abs().max()


def test_of_one_example_told_linear_layers_are_known_whole():
    seen, gradient = sent("powersgd:1", 1, name="tanh")
    target = prepare(seen, toys.told("tanh", torch.zeros(1, 12)), device=torch.device("cpu"))
    assert target.bases == () and target.known.all()
    torch.testing.assert_close(target.gradient, gradient, rtol=1e-5, atol=1e-6)


def test_what_is_not_to_be_turned_or_has_too_many_rows_is_not_known(monkeypatch):
    seen, gradient = sent("powersgd:1", 2)
    monkeypatch.setattr("attack.feedback.MOST_ROWS", 5)
    few, none = settle(seen), settle(seen, turn=False)
    assert [basis.parameter for basis in few.bases] == [2, PARTS - 2] and none.bases == ()
    for found in (few, none):
        off = (turned(gradient, found) - found.gradient).abs()
        assert found.bound is not None and (off <= found.bound).all() and 0 < found.known_fraction < 0.5


def test_tokens_have_no_bases():
    spec = "bert:vocab=40,hidden=8,depth=1,heads=2,length=6"
    model = load_model(spec)
    plain = toys.observe_gradient(model, torch.randn(sum(parameter.numel() for parameter in model.parameters())))
    seen, _ = coded(model, plain, "powersgd:1", 2, seed=0)
    told = Knowledge(model=spec, loss="masked_lm", input_shape=(6,), tokens=model.tokens, batch_size=1)
    target = prepare(seen, told, device=torch.device("cpu"))
    assert target.bases == () and target.known.equal((seen.bound == 0).double())


def altered(seen: Observation, at: int, **changes: object) -> Observation:
    again = tuple(dataclasses.replace(other, **changes) if other.step == at else other for other in seen.again)
    return dataclasses.replace(seen, again=again)


def test_what_breaks_the_chain_ends_it():
    seen, _ = sent("sign", 6)
    assert seen.weights is not None
    for broken in (
        altered(seen, 3, step=9),
        altered(seen, 3, weights=seen.weights * 1.01),
        altered(seen, 3, known=torch.zeros_like(seen.known)),
        altered(seen, 3, defense="int8"),
    ):
        found = settle(broken)
        assert found.gradient.equal(settle(dataclasses.replace(seen, again=seen.again[:2])).gradient)
        assert len(found.again) == 3


@pytest.mark.parametrize("spec", ["sign", "topk:0.9", "powersgd:2"])
def test_of_a_memory_that_is_not_known_nothing_is_concluded(spec):
    seen, _ = sent(spec, 4)
    late = dataclasses.replace(seen.again[0], again=seen.again[1:])
    assert settle(late) is late
    noisy = dataclasses.replace(seen, defense=f"noise-gaussian:1e-3+{spec}")
    assert settle(noisy) is noisy
    assert settle(seen.taken_literally()).bases == ()


def test_a_plain_gradient_stays_what_it_is():
    seen, _ = sent("topk:0.9", 2)
    plain = dataclasses.replace(seen, defense=None)
    assert settle(plain) is plain
