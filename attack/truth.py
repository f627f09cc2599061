"""The truth of one rank at one step, as the job left it; for an evaluation and its report alone, never for an attack.

    DIR/step{S}.rank{R}.safetensors   or .npz, as numpy.savez writes it: steps and ranks count from 0
        inputs                        any float or integer dtype, shape (batch, ...): what the model was given
        labels                        integers, shape (batch,), or as many as there are tokens

Any script can write one; more in a file is passed over.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attack.answer import read_tensors, victim_name
from attack.errors import AnswerError
from harness.models import IGNORED, Tokens

FOLDER = "truth"
"""In a run folder, where a job of this project leaves it."""
WANTED = ("inputs", "labels")
"""Of a file. A job's own gradient and weights, beside them, may be as large as the model."""


def read_truth(
    folder: Path, *, rank: int, step: int, ranks: Sequence[int] = (), tokens: Tokens | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs, float32, shape (batch, ...), and labels, int64, shape (batch,): of a rank, or of several together. Where
    the inputs are tokens they are int64, shape (batch, length), and so may be the labels.

    Raises: AnswerError: the file is missing or damaged, or one of the two is not in it.
    """
    if ranks:
        inputs, labels = zip(*(read_truth(folder, rank=one, step=step, tokens=tokens) for one in ranks), strict=True)
        return _below(inputs, tokens.pad if tokens else 0), _below(labels, IGNORED)
    path = folder / f"{victim_name(rank, step)}.safetensors"
    hint = "name the folder where the job left its batches with --truth DIR"
    if not path.exists() and path.with_suffix(".npz").exists():
        path = path.with_suffix(".npz")
        found = _read_npz(path, hint=hint)
    else:
        found = read_tensors(path, hint=f"nor .npz; {hint}" if not path.exists() else hint, names=WANTED)
    missing = [name for name in WANTED if name not in found]
    if missing:
        held = f"of {' and '.join(WANTED)} it holds: {', '.join(found) or 'none'}"
        raise AnswerError(f"{path}: tensor {missing[0]!r} is missing; {held}")
    return found["inputs"].long() if tokens else found["inputs"].float(), found["labels"].long()


def _below(parts: Sequence[Tensor], fill: int) -> Tensor:
    """One batch of several, the shorter ones filled up where they differ in length."""
    if parts[0].ndim != 2:
        return torch.cat(tuple(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


def _read_npz(path: Path, *, hint: str) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name])) for name in file if name in WANTED}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise AnswerError(f"{path}: damaged, or not as numpy.savez writes it ({error}); {hint}") from error
