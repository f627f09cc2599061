"""The truth in both forms that a job may leave it in, and one line for what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from attack.errors import AnswerError
from attack.truth import read_truth

INPUTS, LABELS = torch.rand(2, 3, 4, 4), torch.tensor([5, 1])


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_both_forms_are_read_alike(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"step7.rank1.{form}"
    if form == "npz":
        np.savez(path, inputs=INPUTS.numpy(), labels=LABELS.numpy().astype(np.int32), more=np.zeros(1))
    else:
        safetensors.torch.save_file({"inputs": INPUTS, "labels": LABELS}, path)
    inputs, labels = read_truth(tmp_path, rank=1, step=7)
    assert torch.equal(inputs, INPUTS) and torch.equal(labels, LABELS)
    with pytest.raises(AnswerError, match=r"step7\.rank0\.safetensors: no such file; nor \.npz; .* --truth DIR"):
        read_truth(tmp_path, rank=0, step=7)


def test_what_is_none_is_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "step0.rank0.npz", inputs=INPUTS.numpy())
    with pytest.raises(AnswerError, match="tensor 'labels' is missing; of inputs and labels it holds: inputs"):
        read_truth(tmp_path, rank=0, step=0)
    np.savez(tmp_path / "step0.rank1.npz", inputs=np.array([{}]), labels=LABELS.numpy())
    (tmp_path / "step0.rank2.npz").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "step0.rank3.npz").write_bytes(b"")
    for rank in (1, 2, 3):
        with pytest.raises(AnswerError, match=r"damaged, or not as numpy\.savez writes it"):
            read_truth(tmp_path, rank=rank, step=0)
