"""Features, labels and batch size from the last layer's gradient: exact on untrained nets, labels repeated or not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from attack.engine.features import NoFeatures, count_examples, read_features
from attack.engine.target import Target, prepare
from attack.observation import Knowledge, Known, Observation
from harness.models import load_model
from tests.attack.toys import observe, unhurried

LABELS = [7, 7, 7, 12, 30, 30, 55, 99]


def seen_by(model: str, labels: list[int]) -> tuple[Observation, torch.Tensor]:
    """What a tap sees of one batch, and the features behind it, float64."""
    torch.manual_seed(len(labels))
    net, inputs = load_model(model), torch.rand(len(labels), 3, 32, 32)
    seen = observe(net, inputs, torch.tensor(labels))
    with torch.no_grad():
        return seen, net.double().body(inputs.double())


def target_of(seen: Observation, model: str) -> Target:
    return prepare(seen, Knowledge(model=model, input_shape=(3, 32, 32)), device=torch.device("cpu"))


@pytest.mark.parametrize("model", ["mlp", "mlp:hidden=200x200", "lenet"])
@pytest.mark.parametrize("labels", [[42], [3, 4], LABELS], ids=len)
def test_every_example_is_told_apart(model: str, labels: list[int]) -> None:
    seen, features = seen_by(model, labels)
    target = target_of(seen, model)
    assert count_examples(target) == len(labels)
    found = read_features(target, unhurried())
    assert found.labels.tolist() == labels
    distance = torch.cdist(features, found.values) / torch.linalg.vector_norm(features, dim=1)
    nearest = distance.min(1)
    assert sorted(nearest.indices.tolist()) == list(range(len(labels)))
    assert nearest.values.max() < 1e-3  # 1e-6 to 4e-4 are usual
    assert found.error.sum(1).abs().max() < 1e-12


def test_same_generator_same_features() -> None:
    target = target_of(seen_by("mlp", LABELS)[0], "mlp")
    one, two = (read_features(target, unhurried(seed=5)) for _ in range(2))
    assert one.values.equal(two.values) and one.labels.equal(two.labels)


@pytest.mark.parametrize("model", ["mlp:classes=10", "lenet:classes=10"])
def test_examples_almost_as_many_as_classes_are_told_apart_at_once(model: str) -> None:
    seen, features = seen_by(model, [0, 1, 2, 3, 3, 5, 6])
    found = read_features(target_of(seen, model), unhurried())
    assert found.labels.tolist() == [0, 1, 2, 3, 3, 5, 6]
    distance = torch.cdist(features, found.values) / torch.linalg.vector_norm(features, dim=1)
    assert distance.min(1).values.max() < 1e-2


def test_more_examples_than_classes_are_refused() -> None:
    target = target_of(seen_by("mlp:classes=10", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 4])[0], "mlp:classes=10")
    with pytest.raises(NoFeatures, match="rank 9, and no labels were found that explain it"):
        read_features(target, unhurried())


def test_noise_of_a_defense_is_no_batch_size() -> None:
    seen, _ = seen_by("mlp", LABELS)
    noise = torch.randn(seen.gradient.shape, generator=torch.Generator().manual_seed(0))
    target = target_of(dataclasses.replace(seen, gradient=seen.gradient + 1e-2 * noise), "mlp")
    with pytest.raises(NoFeatures, match="rank"):
        count_examples(target)


def test_scaled_gradient_has_no_equal_shares() -> None:
    seen, _ = seen_by("mlp", [1, 2, 3])
    target = target_of(dataclasses.replace(seen, gradient=seen.gradient / 2), "mlp")
    with pytest.raises(NoFeatures, match="equal shares"):
        read_features(target, unhurried())


def test_last_layer_that_is_known_in_part_is_refused() -> None:
    seen, _ = seen_by("mlp", [1, 2, 3])
    known = seen.known.clone()
    known[-200] = Known.UNKNOWN
    with pytest.raises(NoFeatures, match="not known in full"):
        count_examples(target_of(dataclasses.replace(seen, known=known), "mlp"))


@pytest.mark.parametrize("labels", [LABELS, [5, 17, 29, 41, 53, 65, 77, 89]], ids=["repeated", "distinct"])
def test_saturated_softmax_is_no_obstacle(labels: list[int]) -> None:
    """Logits of 3072 features with weights of U(-0.5, 0.5) have a standard deviation of 11."""
    seen, features = seen_by("lenet:channels=48", labels)
    found = read_features(target_of(seen, "lenet:channels=48"), unhurried())
    assert found.labels.tolist() == labels
    nearest = torch.cdist(features, found.values).min(1)
    assert sorted(nearest.indices.tolist()) == list(range(len(labels)))
    assert nearest.values.max() < 1e-2 * math.sqrt(features.shape[1])
