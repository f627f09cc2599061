"""How well what was trained does on examples that it has not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from harness.checkpoint import load_weights
from harness.data import Dataset
from harness.models import LOSSES, load_model

CHUNK = 500
"""Examples at a time."""


@torch.no_grad()
def accuracy(model_spec: str, weights: Path, data: Dataset, *, loss: str = "cross_entropy") -> float:
    """Share of a set's labels that a checkpoint's model names first, 0 to 1.

    Args:
        model_spec: full name, as `harness.training.resolve_model` makes it.
        weights: checkpoint file.

    Raises: ModelError; CheckpointError, naming the file.
    """
    with torch.random.fork_rng(devices=[]):  # a fresh model draws weights
        model = load_model(model_spec).eval()
    load_weights(weights, model)
    right = 0.0
    for first in range(0, len(data), CHUNK):
        batch = data.take(np.arange(first, min(first + CHUNK, len(data))), loss=loss, seed=0)
        right += LOSSES[loss].correct(model(batch.inputs), batch.labels) * len(batch.labels)
    return right / len(data)
