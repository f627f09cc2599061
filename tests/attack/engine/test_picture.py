"""The picture behind a block's exact features: what annealing leaves wrong is mended."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attack.engine.picture import SLACK, STEPS, Picture
from attack.engine.pooling import Block
from tests.attack.toys import unhurried


@torch.no_grad()
def test_what_annealing_leaves_wrong_is_mended() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 24, 3, padding=1).double()
    block = Block(conv=conv, window=(2, 2), input_shape=(3, 16, 16), output_shape=(24, 16, 16))
    blobs = nn.functional.interpolate(torch.rand(1, 3, 6, 6), size=(16, 16), mode="bicubic").double()[0].clamp(0, 1)
    start = (blobs + 0.03 * torch.randn(blobs.shape, dtype=torch.float64)).clamp(0, 1)
    context = unhurried()
    features = block.output(blobs)
    error = torch.randn(features.shape, dtype=torch.float64) * (features > 0)
    cells = block.cells(block.forward(blobs))
    passed = nn.functional.one_hot(cells.argmax(-1), cells.shape[-1]) * error[..., None]
    gradient = block.uncells(passed).flatten(1) @ block.patches(blobs).T
    noise = torch.full((len(gradient), 1), 1e-7, dtype=torch.float64)
    search = Picture(block, features, error, gradient, noise, (0.0, 1.0), context)
    annealed = search._anneal(start, torch.full_like(features, SLACK), STEPS)
    assert off(annealed, blobs) > 1e-3 and search._unexplained(annealed)[0].any()
    found = search.search(start)
    assert off(found, blobs) < 1e-6 and not search._unexplained(found)[0].any()
    assert off(search.polish(found, start), blobs) < 1e-9


def off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max())
