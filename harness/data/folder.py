"""A folder of the user's own pictures: a subfolder for each class, or a flat folder, each picture then a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.pictures import PictureSet
from harness.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def load(*, path: str | None = None, size: tuple[int, int] = (32, 32), color: bool = True) -> PictureSet:
    """Reads every picture below `path`, cropped to the middle and scaled to `size` (height, width).

    Raises: DataError, naming the folder or the first file that is not a picture.
    """
    if path is None:
        raise DataError("images: the folder is missing; wanted images:path=DIR")
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    groups = [_pictures(root / name) for name in names] if names else [[file] for file in _pictures(root)]
    files = [(file, label) for label, group in enumerate(groups) for file in group]
    if not files:
        raise DataError(f"{root}: holds no picture ({', '.join(sorted(SUFFIXES))})")
    return PictureSet(
        name=f"images:{root}",
        pictures=np.stack([square(file, size, "RGB" if color else "L") for file, _ in files]),
        labels=np.array([label for _, label in files]),
        classes=max(len(groups), 2),
    )


def square(file: Path, size: tuple[int, int], mode: str) -> np.ndarray:
    """One picture, cropped to the middle and scaled: uint8, shape (channels, height, width)."""
    height, width = size
    try:
        with Image.open(file) as opened:
            picture = opened.convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: not a picture that can be read: {error}") from error
    scale = min(picture.width / width, picture.height / height)
    crop_width, crop_height = width * scale, height * scale
    left, top = (picture.width - crop_width) / 2, (picture.height - crop_height) / 2
    scaled = picture.resize(
        (width, height), Image.Resampling.LANCZOS, (left, top, left + crop_width, top + crop_height)
    )
    array = np.asarray(scaled)
    return array.reshape(height, width, -1).transpose(2, 0, 1)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
