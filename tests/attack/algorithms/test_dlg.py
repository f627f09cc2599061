"""Deep Leakage from Gradients, as the paper has it, on a batch: order is lost, labels are found."""

from __future__ import annotations

import torch

from attack.algorithms import Status
from attack.metrics import score
from attack.reconstruct import reconstruct
from tests.attack.toys import example, observe, told


def test_batch_of_two_with_soft_labels_found_together() -> None:
    model, inputs, labels = example("sigmoid", seed=2, batch=2)
    found = reconstruct(observe(model, inputs, labels), told("sigmoid", inputs), method="dlg", seed=2, deadline_s=60)
    assert found.status is Status.CONVERGED
    assert found.inputs is not None and found.labels is not None and found.soft_labels is not None
    assert torch.allclose(found.soft_labels.sum(1), torch.ones(2))
    result = score(found.inputs, found.labels, inputs, labels, input_range=(0, 1))
    assert result.label_ok and result.psnr_db > 40
    assert found.predicted_mse is not None and result.mse < 10 * found.predicted_mse


def test_history_begins_at_the_start_and_frames_are_bounded() -> None:
    model, inputs, labels = example("linear")
    found = reconstruct(observe(model, inputs, labels), told("linear", inputs), method="dlg", deadline_s=60)
    assert found.history[0][0] == 0 and found.history[0][1] > 0.1
    assert found.frames is not None and 1 <= len(found.frames) <= 24
    assert found.evaluations >= len(found.history)
