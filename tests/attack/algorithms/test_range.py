"""Exact methods do not ask what values inputs have: normalized ones come back whether or not that is known."""

from __future__ import annotations

import pytest
import torch

from attack.algorithms import Status
from attack.observation import Knowledge
from attack.reconstruct import reconstruct
from attack.shades import input_range_of
from harness.models import load_model, load_normalize
from tests.attack.algorithms.test_patterns import MODEL as CONVNET
from tests.attack.algorithms.test_patterns import picture
from tests.attack.toys import observe

BY = "mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
LENET, MLP = "lenet:input=3x16x16,classes=20", "mlp:input=3x16x16,hidden=64,classes=20"
RANGES = {"told": input_range_of(BY), "unknown": input_range_of("unknown"), "wrong": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("method", "model", "batch", "known"),
    [
        *[("rgap", LENET, 1, known) for known in RANGES],
        *[("unmix", MLP, 3, known) for known in RANGES],
        ("patterns", CONVNET, 1, "unknown"),
    ],
)
def test_normalized_inputs_come_back(method: str, model: str, batch: int, known: str) -> None:
    torch.manual_seed(0)
    net, pictures = load_model(model), torch.cat([picture(seed) for seed in range(batch)])
    inputs, labels = load_normalize(BY)(pictures), torch.arange(batch)
    knowledge = Knowledge(
        model=model, input_shape=(3, 16, 16), input_range=RANGES[known], batch_size=batch, normalize="unknown"
    )
    found = reconstruct(observe(net, inputs, labels), knowledge, method=method)
    assert found.status is Status.CONVERGED and found.inputs is not None, found.reason
    error = torch.cdist(found.inputs.flatten(1), inputs.flatten(1)).amin(0).square().mean() / inputs[0].numel()
    assert error < 1e-6 and found.predicted_mse is not None and error < found.predicted_mse
