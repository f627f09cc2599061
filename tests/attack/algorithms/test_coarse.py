"""Rounded, pruned and noisy gradients of one example, and what may be claimed of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attack.algorithms import Status
from attack.algorithms.coarse import FLAT, roughness
from attack.capture.streams import Flow
from attack.decode.assembly import Assembly
from attack.decode.defended import PublicSide
from attack.decode.vector import Origin, Piece, Place
from attack.engine.features import NoFeatures
from attack.engine.last_layer import read_coarsely
from attack.engine.target import prepare
from attack.observation import Knowledge, Known, Observation
from attack.reconstruct import reconstruct
from harness.data import load_data
from harness.defenses import load_defense
from harness.exchange.base import as_coded
from harness.models import load_model
from harness.wire.codec import decode
from harness.wire.coded import Coded
from tests.attack import toys

LENET = "lenet:input=1x16x16,classes=10"
KNOWLEDGE = Knowledge(model=LENET, input_shape=(1, 16, 16), batch_size=1)


def defended(spec: str, seen: Observation) -> Observation:
    """The observation of what a rank would have sent in place of this gradient, as the decoder puts it together."""
    sizes = tuple(torch.Size(shape).numel() for shape in seen.shapes)
    chain = load_defense(spec)
    return observed_code(spec, seen, chain(seen.gradient, sizes, chain.begin(sizes), seed=3, rank=0, step=0)[0], 0)


def observed_code(spec: str, seen: Observation, vector: Tensor | Coded, step: int) -> Observation:
    coded = as_coded(vector)
    codec, params, payload = coded.part(0, coded.size)
    assembly = Assembly(coded.size)
    said = decode(codec, coded.size, params, payload)
    origin = Origin(Flow(source="10.0.0.1:1", destination="10.0.0.2:2"), 0, 0, 0)
    assembly.place(Piece(Place(0, coded.size), said, (), spec, origin, codec=codec))
    found = PublicSide().limit(0, step, assembly.gradient(), seen.shapes)
    return dataclasses.replace(
        seen,
        step=step,
        gradient=torch.from_numpy(found.values.copy()),
        known=torch.from_numpy(found.known),
        bound=None if found.bound is None else torch.from_numpy(found.bound),
        defense=spec,
    )


def picture(index: int) -> tuple[Tensor, Tensor]:
    """A photograph, scaled down and gray, and a label."""
    inputs = torch.from_numpy(load_data("cifar100").pictures[index : index + 1]).float() / 255
    return torch.nn.functional.avg_pool2d(inputs, 2).mean(1, keepdim=True), torch.tensor([3 + index])


def observed(index: int, model: str = LENET) -> tuple[Observation, Tensor, Tensor]:
    torch.manual_seed(index)
    inputs, labels = picture(index)
    return toys.observe(load_model(model), inputs, labels), inputs, labels


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().mean())


@pytest.mark.parametrize(
    ("spec", "index"), [("int8", 0), ("int8", 4), ("int8:rounding=stochastic", 5), ("prune:0.3", 0), ("prune:0.7", 6)]
)
def test_what_the_code_leaves_is_enough(spec, index):
    seen, inputs, labels = observed(index)
    found = reconstruct(defended(spec, seen), KNOWLEDGE, deadline_s=60)
    assert found.status in (Status.FILLED, Status.CONVERGED), found.reason
    assert found.labels is not None and found.labels.equal(labels) and found.inputs is not None
    assert found.predicted_mse is not None and error(found.inputs, inputs) < min(found.predicted_mse, 1e-2)


@pytest.mark.parametrize(
    ("spec", "index"),
    [("prune:0.5", 1), ("prune:0.5", 2), ("prune:0.8", 1), ("prune:0.8", 6), ("int8", 0), ("int8", 6)],
)
def test_a_first_linear_layer_says_where_to_begin(spec, index):
    """Nine of the last layer's ten biases are about as large, so that what is pruned of them is just below the rest."""
    model = "mlp:input=1x16x16,classes=10,hidden=32x24"
    seen, inputs, labels = observed(index, model)
    knowledge = dataclasses.replace(KNOWLEDGE, model=model)
    found = reconstruct(defended(spec, seen), knowledge, method="coarse", deadline_s=60)
    assert found.labels is not None and found.labels.equal(labels) and found.inputs is not None, found.reason
    assert error(found.inputs, inputs) < (1e-3 if spec == "int8" else 1e-8)


@pytest.mark.parametrize("spec", ["prune:0.5", "int8"])
def test_the_first_layer_is_the_one_that_runs_first(spec):
    seen, inputs, labels = observed(1, toys.spec("turned"))
    knowledge = dataclasses.replace(KNOWLEDGE, model=toys.spec("turned"))
    found = reconstruct(defended(spec, seen), knowledge, method="coarse", deadline_s=60)
    assert found.labels is not None and found.labels.equal(labels) and found.inputs is not None, found.reason
    assert error(found.inputs, inputs) < (1e-3 if spec == "int8" else 1e-8)


@pytest.mark.parametrize("index", [2, 6])
def test_where_next_to_nothing_is_known_it_is_doubted(index):
    seen, inputs, _ = observed(index)
    found = reconstruct(defended("ternary", seen), KNOWLEDGE, method="coarse", deadline_s=60)
    if found.inputs is None:
        assert found.status is Status.NOT_CONVERGED and found.reason is not None
    else:
        assert found.status is Status.FILLED and error(found.inputs, inputs) < found.predicted_mse


@pytest.mark.parametrize("index", [0, 2])
def test_what_is_all_but_flat_is_no_picture(index):
    """Of rank 1 the draw that tells how much is open comes out low; the flat picture is no surer for that."""
    torch.manual_seed(index)
    inputs = torch.from_numpy(load_data("cifar100").pictures[index : index + 1]).float() / 255
    seen = toys.observe(load_model("lenet"), inputs, torch.tensor([3]))
    sent = dataclasses.replace(defended("noise-gaussian:1e-1", seen), rank=1)
    knowledge = dataclasses.replace(KNOWLEDGE, model="lenet", input_shape=(3, 32, 32))
    found = reconstruct(sent, knowledge, method="coarse", deadline_s=60)
    assert found.inputs is None and "made all of it flat" in str(found.reason)
    assert roughness(inputs) > 2 * FLAT


@pytest.mark.parametrize(("spec", "index"), [("fp16", 0), ("bf16", 3)])
def test_short_floats_are_read_without_a_prior(spec, index):
    seen, inputs, labels = observed(index)
    found = reconstruct(defended(spec, seen), KNOWLEDGE, deadline_s=60)
    assert found.status is Status.CONVERGED and found.method == "coarse", found.reason
    assert found.labels is not None and found.labels.equal(labels)
    assert error(found.inputs, inputs) < min(found.predicted_mse, 1e-4)


def test_who_ignores_the_code_gets_nothing():
    seen, _, _ = observed(1)
    literally = defended("prune:0.5", seen).taken_literally()
    assert literally.defense is None and (literally.known == Known.RAW).all()
    found = reconstruct(literally, KNOWLEDGE, deadline_s=3)
    assert found.status is Status.NOT_CONVERGED and found.inputs is None


def test_a_known_law_of_noise_is_an_error_of_that_size():
    seen, inputs, labels = observed(2)
    noisy = dataclasses.replace(
        seen, gradient=load_defense("noise-gaussian:1e-4")(seen.gradient, (), {}, seed=0, rank=0, step=0)[0]
    )
    told = dataclasses.replace(noisy, defense="noise-gaussian:1e-4")
    target = prepare(told, KNOWLEDGE, device=torch.device("cpu"))
    assert float(target.noise.median()) == pytest.approx(1e-4, rel=1e-2)
    assert target.residual(inputs.double(), labels) < target.tolerance
    found = reconstruct(told, KNOWLEDGE, deadline_s=60)
    assert found.inputs is not None and error(found.inputs, inputs) < min(found.predicted_mse, 1e-2)


def test_noise_averages_out_over_steps_of_one_batch():
    seen, inputs, labels = observed(4)
    spec = "noise-gaussian:3e-3"
    noisy = [
        dataclasses.replace(
            seen,
            step=step,
            defense=spec,
            gradient=load_defense(spec)(seen.gradient, (), {}, seed=1, rank=0, step=step)[0],
        )
        for step in range(6)
    ]
    alone = reconstruct(noisy[0], KNOWLEDGE, method="coarse", deadline_s=60)
    found = reconstruct(dataclasses.replace(noisy[0], again=tuple(noisy[1:])), KNOWLEDGE, method="coarse")
    assert found.inputs is not None and found.labels is not None and found.labels.equal(labels), found.reason
    assert found.predicted_mse is not None and error(found.inputs, inputs) < found.predicted_mse
    assert alone.inputs is None or error(found.inputs, inputs) < 0.5 * error(alone.inputs, inputs)
    assert found.steps == tuple(range(6))


@pytest.mark.parametrize("spec", ["int8", "prune:0.8", "qsgd:7"])
def test_features_are_as_far_off_as_they_are_said_to_be(spec):
    seen, inputs, labels = observed(3)
    target = prepare(defended(spec, seen), KNOWLEDGE, device=torch.device("cpu"))
    *below, last = [module for module in target.model.modules() if not list(module.children())]
    found = read_coarsely(target, last, mean=0.5, variance=1 / 12)
    truth = inputs.double()
    for module in below:
        truth = module(truth)
    off = ((found.values - truth) / found.deviation).square().mean().sqrt()
    # Errors are not normal, and those of 192 features hang together.
    assert found.label.equal(labels) and 0.3 < off < 2.0


def test_two_examples_are_not_one():
    torch.manual_seed(0)
    inputs, labels = torch.cat([picture(0)[0], picture(1)[0]]), torch.tensor([2, 7])
    seen = defended("int8", toys.observe(load_model(LENET), inputs, labels))
    target = prepare(seen, KNOWLEDGE, device=torch.device("cpu"))
    last = [module for module in target.model.modules()][-1]
    with pytest.raises(NoFeatures, match="no one example explains"):
        read_coarsely(target, last, mean=0.5, variance=1 / 12)


def in_steps(spec: str, seen: Observation, steps: int, *, model: str = LENET) -> Observation:
    """What a rank sends of one batch at several steps, under a defense that remembers."""
    sizes = tuple(torch.Size(shape).numel() for shape in seen.shapes)
    chain = load_defense(spec).fit(load_model(model))
    state, found = chain.begin(sizes), []
    for step in range(steps):
        coded, state = chain(seen.gradient.clone(), sizes, state, seed=3, rank=0, step=step)
        found.append(observed_code(spec, seen, coded, step))
    return dataclasses.replace(found[0], again=tuple(found[1:]))


@pytest.mark.parametrize(("spec", "steps"), [("powersgd:2", 1), ("sign", 16)])
def test_error_feedback_is_read(spec, steps):
    seen, inputs, labels = observed(5)
    found = reconstruct(in_steps(spec, seen, steps), KNOWLEDGE, deadline_s=120)
    assert found.method == "coarse" and found.status in (Status.FILLED, Status.CONVERGED), found.reason
    assert found.labels is not None and found.labels.equal(labels) and found.inputs is not None
    assert found.predicted_mse is not None and error(found.inputs, inputs) < min(found.predicted_mse, 1e-2)


def test_signs_of_one_step_are_no_gradient():
    seen, _, _ = observed(5)
    found = reconstruct(in_steps("sign", seen, 1), KNOWLEDGE, deadline_s=60)
    assert found.status is Status.NOT_OBSERVED and found.inputs is None


def test_columns_that_were_left_out_hide_nothing():
    seen, inputs, labels = observed(2)
    rows, columns = seen.shapes[-2]
    gradient = seen.gradient.clone()
    left_out = torch.randperm(columns, generator=torch.Generator().manual_seed(0))[: columns * 2 // 5]
    gradient[-rows * (columns + 1) : -rows].view(rows, columns)[:, left_out] = 0
    found = reconstruct(dataclasses.replace(seen, gradient=gradient, defense="soteria:0.4"), KNOWLEDGE, deadline_s=60)
    assert found.labels is not None and found.labels.equal(labels) and found.inputs is not None
    assert found.predicted_mse is not None and error(found.inputs, inputs) < min(found.predicted_mse, 1e-6)
