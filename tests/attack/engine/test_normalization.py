"""Batch norm's mode is found out from what the wire shows, and said."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from attack.engine.target import Refused, Target, prepare
from attack.errors import AttackError
from attack.observation import Knowledge, Known, Observation
from harness.models import load_model
from tests.attack.toys import observe

CPU = torch.device("cpu")
SPEC = "resnet:depth=10,width=8,classes=10,input=3x16x16"
KNOWLEDGE = Knowledge(model=SPEC, input_shape=(3, 16, 16), batch_size=2)


def seen(
    *, training: bool, seed: int = 0, spec: str = SPEC, keep: str = ""
) -> tuple[Observation, nn.Module, Tensor, Tensor]:
    """A rank's gradient, of a net with statistics; modules whose name holds `keep` stay in evaluation mode."""
    torch.manual_seed(seed)
    model = load_model(spec)
    with torch.no_grad():
        model(torch.rand(8, 3, 16, 16))
    model.train(training)
    for name, module in model.named_modules():
        if keep and keep in name:
            module.eval()
    before = buffers(model)
    inputs, labels = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    observation = observe(model, inputs, labels, buffers=before, buffers_after=None)
    return observation, model, inputs, labels


def buffers(model: nn.Module) -> Tensor:
    return torch.cat([buffer.flatten().clone() for buffer in model.buffers() if buffer.is_floating_point()])


def residual(target: Target, inputs: Tensor, labels: Tensor) -> float:
    return target.residual(inputs.double(), labels)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_alone_tells_the_mode(training: bool, seed: int) -> None:
    observation, _, inputs, labels = seen(training=training, seed=seed)
    target = prepare(observation, KNOWLEDGE, device=CPU)
    assert residual(target, inputs, labels) < 1e-3
    wanted = "in training mode (the gradient is orthogonal" if training else "in evaluation mode (the gradient is not"
    assert wanted in str(target.batch_norm)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_that_move_or_stay_tell_the_mode(training: bool) -> None:
    observation, model, inputs, labels = seen(training=training)
    observation = dataclasses.replace(
        observation, buffers_after=buffers(model), known=torch.zeros_like(observation.known)
    )
    observation.known[-10:] = Known.RAW
    target = prepare(observation, KNOWLEDGE, device=CPU)
    assert f"running statistics {'moved' if training else 'did not move'}" in str(target.batch_norm)
    assert residual(target, inputs, labels) < 1e-3


def test_a_net_that_is_frozen_in_part_is_read_as_it_is() -> None:
    observation, _, inputs, labels = seen(training=True, keep="body.0")
    target = prepare(observation, KNOWLEDGE, device=CPU)
    assert residual(target, inputs, labels) < 1e-3
    assert "of 12 in training mode" in str(target.batch_norm) and "2 of 12 in evaluation" in str(target.batch_norm)


def test_what_is_told_is_believed() -> None:
    observation, _, inputs, labels = seen(training=False)
    wrong = prepare(observation, dataclasses.replace(KNOWLEDGE, batch_norm="train"), device=CPU)
    assert residual(wrong, inputs, labels) > 1e-2 and "(told)" in str(wrong.batch_norm)
    right = prepare(observation, dataclasses.replace(KNOWLEDGE, batch_norm="eval"), device=CPU)
    assert residual(right, inputs, labels) < 1e-3
    with pytest.raises(AttackError, match="batch_norm: wanted train or eval, got 'frozen'"):
        prepare(observation, dataclasses.replace(KNOWLEDGE, batch_norm="frozen"), device=CPU)


def test_evaluation_mode_needs_its_statistics() -> None:
    observation, *_ = seen(training=False)
    with pytest.raises(Refused, match=r"evaluation mode .* not seen") as refused:
        prepare(dataclasses.replace(observation, buffers=None), KNOWLEDGE, device=CPU)
    assert not refused.value.observed


def test_where_nothing_tells_training_is_assumed_and_said_so() -> None:
    observation, *_ = seen(training=True)
    observation.known[:-10] = Known.UNKNOWN
    assert "assumed" in str(prepare(observation, KNOWLEDGE, device=CPU).batch_norm)


def test_a_model_that_keeps_its_norms_frozen_is_left_so() -> None:
    spec = SPEC + ",norm=frozen"
    observation, _, inputs, labels = seen(training=True, spec=spec)
    for model in (spec, SPEC):  # an eavesdropper need not know that the model itself freezes them
        target = prepare(observation, dataclasses.replace(KNOWLEDGE, model=model), device=CPU)
        assert "in evaluation mode" in str(target.batch_norm) and residual(target, inputs, labels) < 1e-3


def test_one_value_a_channel_cannot_be_normalized_by_itself() -> None:
    spec = "resnet:depth=10,width=4,classes=10,input=3x8x8"
    torch.manual_seed(0)
    observation = observe(load_model(spec), torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 3, 4]))
    knowledge = Knowledge(model=spec, input_shape=(3, 8, 8), batch_size=1)
    with pytest.raises(AttackError, match=r"one example .* the batch is larger, or --batch-norm is eval"):
        prepare(observation, knowledge, device=CPU)
    assert prepare(observation, dataclasses.replace(knowledge, batch_size=None), device=CPU).batch_size == 2


def test_no_batch_norm_nothing_to_say() -> None:
    torch.manual_seed(0)
    observation = observe(load_model("lenet"), torch.rand(1, 3, 32, 32), torch.tensor([1]))
    assert prepare(observation, Knowledge(model="lenet", input_shape=(3, 32, 32)), device=CPU).batch_norm is None
