"""The idx files of MNIST and Fashion-MNIST, plain or gzipped.

bytes 0-1  zero          byte 2  type, 0x08 for unsigned bytes          byte 3  number of dimensions
then       each dimension as four bytes, big endian, and the numbers, last dimension fastest
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from harness.data.pictures import PictureSet
from harness.errors import DataError

PREFIX = {"train": "train", "test": "t10k"}


def load(path: str, *, split: str = "train") -> PictureSet:
    """The set in this folder, from its four files under their usual names. Raises: DataError, naming the file."""
    if split not in PREFIX:
        raise DataError(f"split {split!r} is not known; there are: {', '.join(PREFIX)}")
    pictures = read(_find(Path(path), f"{PREFIX[split]}-images-idx3-ubyte"), dimensions=3)
    labels = read(_find(Path(path), f"{PREFIX[split]}-labels-idx1-ubyte"), dimensions=1)
    return PictureSet(name=path, pictures=pictures[:, None], labels=labels.astype(np.int64), classes=10)


def read(file: Path, *, dimensions: int) -> np.ndarray:
    """One idx file: uint8, of that many dimensions. Raises: DataError, naming the file and what is wrong with it."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{file}: not an idx file of bytes in {dimensions} dimensions; it begins {content[:4].hex()}")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, head, 4))
    if len(content) - head != math.prod(shape):
        raise DataError(f"{file}: wanted {'x'.join(map(str, shape))} bytes after its header, got {len(content) - head}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder}: no file {name} or {name}.gz")
