"""CIFAR-10 and CIFAR-100 as their authors publish them: the python batches, or the binary ones.

The python batches are pickles. They are read by an unpickler that can build numpy arrays of numbers and nothing else,
so that a file that was tampered with is an error and never runs.

    binary, CIFAR-10:   label byte, then 3072 bytes (red, green, blue planes of 32 rows), picture after picture
    binary, CIFAR-100:  coarse label byte, fine label byte, then 3072 bytes
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.pictures import PictureSet
from harness.errors import DataError

PICTURE_BYTES = 3 * 32 * 32
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""What a published batch names; `_codecs.encode` is how Python 2's byte strings are written by protocol 2."""


def load(path: str, *, classes: int) -> PictureSet:
    """The training set in this folder. Raises: DataError, naming the folder or the file and what is wrong with it."""
    folder = Path(path)
    names = [f"data_batch_{number}" for number in range(1, 6)] if classes == 10 else ["train"]
    python = [folder / name for name in names if (folder / name).is_file()]
    binary = [folder / f"{name}.bin" for name in names if (folder / f"{name}.bin").is_file()]
    if not python and not binary:
        raise DataError(f"{folder}: no file {names[0]} or {names[0]}.bin of CIFAR-{classes}")
    parts = [_python(file, classes) for file in python] or [_binary(file, classes) for file in binary]
    return PictureSet(
        name=path,
        pictures=np.concatenate([pictures for pictures, _ in parts]).reshape(-1, 3, 32, 32),
        labels=np.concatenate([labels for _, labels in parts]).astype(np.int64),
        classes=classes,
    )


def _python(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _Batches(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pictures = np.asarray(content[b"data"])
        labels = np.asarray(content[b"labels" if classes == 10 else b"fine_labels"])
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{file}: not a python batch of CIFAR-{classes}: {type(error).__name__}: {error}") from error
    if pictures.dtype != np.uint8 or pictures.ndim != 2 or pictures.shape[1] != PICTURE_BYTES:
        raise DataError(f"{file}: wanted rows of {PICTURE_BYTES} bytes, got {pictures.dtype} of {pictures.shape}")
    return pictures, labels


def _binary(file: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    label_bytes = 1 if classes == 10 else 2
    content = np.fromfile(file, np.uint8)
    if not len(content) or len(content) % (label_bytes + PICTURE_BYTES):
        raise DataError(f"{file}: {len(content)} bytes, wanted rows of {label_bytes + PICTURE_BYTES}")
    rows = content.reshape(-1, label_bytes + PICTURE_BYTES)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]


class _Batches(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no CIFAR batch needs")
        return super().find_class(module, name)
