"""The files of an attack's answer: `attack.json`, `reconstructions.safetensors`, and a picture for each example.

In: reconstructions. Out: files, and what is read back from them. It knows no model and never opens the truth.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from attack.algorithms import Reconstruction
from attack.errors import AnswerError
from attack.files import write_atomically
from attack.observation import EVERYONE
from attack.shades import Shades

ANSWER, TENSORS, PICTURES = "attack.json", "reconstructions.safetensors", "pictures"
HISTORY_POINTS = 100
"""Points of the gradient match over iterations that `attack.json` keeps of each victim."""
SCALARS = (
    "rank", "step", "status", "method", "route", "reason", "gradient_residual", "predicted_mse", "seconds",
    "cpu_seconds", "evaluations", "restarts", "batch_size_assumed", "batch_norm",
)  # fmt: skip
"""Fields of a `Reconstruction` that a victim's entry holds as they are."""


def victim_name(rank: int, step: int) -> str:
    """`step3.rank1`: how a victim's tensors and pictures begin, in the answer and in the truth. Of several ranks' mean,
    `step3.mean`."""
    return f"step{step}.mean" if rank == EVERYONE else f"step{step}.rank{rank}"


def whose(rank: int) -> str:
    """As a person reads it."""
    return "the mean" if rank == EVERYONE else f"rank {rank}"


def describe(found: Reconstruction) -> dict[str, Any]:
    """One entry of `victims[]`: plain numbers and texts."""
    stride = max(1, math.ceil(len(found.history) / HISTORY_POINTS))
    points = [*found.history[:-1:stride], *found.history[-1:]]
    return {
        **{name: getattr(found, name) for name in SCALARS},
        "status": found.status.value,
        "steps": list(found.steps),
        "labels": None if found.labels is None else found.labels.tolist(),
        "history": [list(point) for point in points],
    }


def write_answer(
    out: Path,
    answer: Mapping[str, Any],
    reconstructions: Sequence[Reconstruction],
    shades: Shades | None,
) -> dict[str, Any]:
    """Pictures and tensors first, `attack.json` last: where it stands, the answer is whole.

    Args:
        shades: black and white of the pictures; None: of each its own.

    Returns: what `attack.json` holds: plain values, NaN and infinities as None.
    """
    (out / ANSWER).unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for found in reconstructions:
        if found.inputs is None or found.labels is None:
            continue
        name = victim_name(found.rank, found.step)
        tensors[f"{name}.inputs"] = found.inputs.contiguous()
        tensors[f"{name}.labels"] = found.labels
        if found.soft_labels is not None:
            tensors[f"{name}.soft_labels"] = found.soft_labels.contiguous()
        if found.frames is not None:
            tensors[f"{name}.frames"] = found.frames.contiguous()
            tensors[f"{name}.frame_iterations"] = torch.tensor(found.frame_iterations)
        for index, example in enumerate(found.inputs):
            picture = to_picture(example, shades)
            if picture is not None:
                write_atomically(out / PICTURES / f"{name}.example{index}.png", to_png(picture))
    write_atomically(out / TENSORS, safetensors.torch.save(tensors))
    plain: dict[str, Any] = to_plain(answer)
    write_atomically(out / ANSWER, json.dumps(plain, indent=1, allow_nan=False))
    return plain


def to_plain(value: Any) -> Any:
    """What strict JSON can hold: lists for tuples, and None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, hint: str) -> dict[str, Any]:
    """A JSON object from a file. Raises: AnswerError, one line that names the file and what to do (`hint`)."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AnswerError(f"{path}: no such file; {hint}") from None
    except (ValueError, OSError) as error:
        raise AnswerError(f"{path}: damaged, or not JSON ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise AnswerError(f"{path}: wanted a JSON object, got {type(content).__name__}; {hint}")
    return content


def read_tensors(path: Path, *, hint: str, names: Container[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, or those of these names that it has, without reading the others.

    Raises: AnswerError, one line that names the file and what to do (`hint`).
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if names is None or name in names}
    except FileNotFoundError:
        raise AnswerError(f"{path}: no such file; {hint}") from None
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise AnswerError(f"{path}: damaged, or not safetensors ({error}); {hint}") from error


def to_picture(example: Tensor, shades: Shades | None) -> Image.Image | None:
    """An example as a picture; None for a shape that is not one. Without shades, from its least to its greatest
    value."""
    if example.ndim != 3 or example.shape[0] not in (1, 3):
        return None
    unit = (shades or Shades.own(example)).unit(example.float()).nan_to_num().clamp(0, 1)
    pixels = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def to_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
