"""Pooling patterns: found for the unmodified net, and admitted where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attack.algorithms import Status
from attack.observation import Knowledge
from attack.reconstruct import reconstruct
from harness.models import load_model
from tests.attack.toys import example, observe, spec, told

MODEL = "convnet:input=3x16x16,classes=20"


def picture(seed: int) -> Tensor:
    """Soft blobs, shape (1, 3, 16, 16): as smooth as a photo scaled down."""
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=(16, 16), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("seed", range(2))
def test_picture_comes_back_through_max_pooling(seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs, labels = load_model(MODEL), picture(seed), torch.tensor([7])
    knowledge = Knowledge(model=MODEL, input_shape=(3, 16, 16), batch_size=1)
    found = reconstruct(observe(model, inputs, labels), knowledge, seed=seed)
    assert found.status is Status.CONVERGED and found.method == "patterns", found.reason
    assert found.inputs is not None and found.labels is not None and found.labels.equal(labels)
    error = float((found.inputs - inputs).square().mean())
    assert error < 1e-6  # 60 dB; some 130 are usual
    assert found.predicted_mse is not None and error < found.predicted_mse < 1e-6


def test_pools_may_be_functions() -> None:
    torch.manual_seed(1)
    model, inputs, labels = load_model(spec("by_function")), picture(1), torch.tensor([7])
    knowledge = Knowledge(model=spec("by_function"), input_shape=(3, 16, 16), batch_size=1)
    found = reconstruct(observe(model, inputs, labels), knowledge)
    assert found.status is Status.CONVERGED and found.method == "patterns", found.reason
    assert found.inputs is not None and (found.inputs - inputs).square().mean() < 1e-6


def test_net_without_pooling_is_walked_back() -> None:
    model, inputs, labels = example("convolution")
    found = reconstruct(observe(model, inputs, labels), told("convolution", inputs), method="patterns")
    assert found.status is Status.CONVERGED


def test_batch_is_refused_in_one_line() -> None:
    model, inputs, labels = load_model(MODEL), torch.cat([picture(0), picture(1)]), torch.tensor([7, 3])
    knowledge = Knowledge(model=MODEL, input_shape=(3, 16, 16))
    found = reconstruct(observe(model, inputs, labels), knowledge, method="patterns")
    assert found.status is Status.NOT_CONVERGED and found.inputs is None and found.reason
    assert "\n" not in found.reason
