"""Data sets: what is read is what is stored, what is damaged is one clear line, and nothing is ever executed."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.data import batch_at, load_data
from harness.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("spec", "count", "shape", "classes"),
    [
        ("cifar100", 20, (3, 32, 32), 100),
        ("cifar10", 20, (3, 32, 32), 10),
        ("mnist", 5000, (1, 28, 28), 10),
        ("fashion-mnist", 20, (1, 28, 28), 10),
        ("faces", 100, (1, 25, 25), 100),
        ("photos", 27, (3, 32, 32), 100),
        ("photos:size=64x48", 27, (3, 64, 48), 100),
    ],
)
def test_the_sets_that_packages_ship(spec: str, count: int, shape: tuple[int, ...], classes: int) -> None:
    data = load_data(spec)
    assert (len(data.pictures), data.input_shape, data.classes) == (count, shape, classes)
    assert data.pictures.std() > 10  # pictures, not a constant


def write_idx(file: Path, numbers: np.ndarray) -> None:
    head = bytes((0, 0, 8, numbers.ndim)) + b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wb") as out:
        out.write(head + numbers.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_own_idx_files(tmp_path: Path, suffix: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pictures)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels)
    data = load_data(f"mnist:path={tmp_path}")
    assert (data.pictures[:, 0] == pictures).all() and (data.labels == labels).all()


def test_a_damaged_idx_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    write_idx(file, np.zeros((3, 28, 28), np.uint8))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: wanted 3x28x28 bytes after its header, got 2351"):
        load_data(f"mnist:path={tmp_path}")
    file.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="not an idx file"):
        load_data(f"mnist:path={tmp_path}")
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(f"mnist:path={tmp_path}")


def cifar_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.integers(0, 256, (count, 3072), np.uint8), random.integers(0, 10, count)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("name", "key"), [("cifar10", b"labels"), ("cifar100", b"fine_labels")])
def test_own_python_batches(tmp_path: Path, name: str, key: bytes, protocol: int) -> None:
    pictures, labels = cifar_rows(5)
    files = [f"data_batch_{n}" for n in range(1, 6)] if name == "cifar10" else ["train"]
    for file in files:
        (tmp_path / file).write_bytes(pickle.dumps({b"data": pictures, key: labels.tolist()}, protocol=protocol))
    data = load_data(f"{name}:path={tmp_path}")
    assert len(data.pictures) == 5 * len(files)
    assert (data.pictures[:5].reshape(5, -1) == pictures).all() and (data.labels[:5] == labels).all()


@pytest.mark.parametrize(
    ("name", "file", "label_bytes"), [("cifar10", "data_batch_1.bin", 1), ("cifar100", "train.bin", 2)]
)
def test_own_binary_batches(tmp_path: Path, name: str, file: str, label_bytes: int) -> None:
    pictures, labels = cifar_rows(4)
    rows = np.concatenate([np.repeat(labels[:, None], label_bytes, axis=1).astype(np.uint8), pictures], axis=1)
    rows.tofile(tmp_path / file)
    data = load_data(f"{name}:path={tmp_path}")
    assert (data.pictures.reshape(4, -1) == pictures).all() and (data.labels == labels).all()
    (tmp_path / file).write_bytes(rows.tobytes()[:-1])
    with pytest.raises(DataError, match="wanted rows of"):
        load_data(f"{name}:path={tmp_path}")


class Trap:
    """What a tampered batch may hold: an object whose unpickling runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_a_tampered_batch_never_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": Trap(mark)}))
    with pytest.raises(DataError, match="no CIFAR batch needs"):
        load_data(f"cifar100:path={tmp_path}")
    assert not mark.exists()


def test_own_folder_of_pictures(tmp_path: Path) -> None:
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (50, 40), (label * 200, 10, 20)).save(tmp_path / name / "a.png")
    data = load_data(f"images:path={tmp_path},size=16x24")
    assert data.input_shape == (3, 16, 24) and data.labels.tolist() == [0, 1]
    assert (data.pictures[1, 0] == 200).all()
    (tmp_path / "cats" / "b.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"b\.jpg: not a picture"):
        load_data(f"images:path={tmp_path}")


def test_wrong_names_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cifar100, cifar10, mnist"):
        load_data("imagenet")
    with pytest.raises(DataError, match="no such folder"):
        load_data(f"images:path={tmp_path}/none")
    with pytest.raises(DataError, match="no file data_batch_1"):
        load_data(f"cifar10:path={tmp_path}")


def test_ranks_together_take_what_one_process_takes() -> None:
    data = load_data("cifar100")
    for step in range(7):  # beyond one epoch of 20 pictures
        parts = [batch_at(data, seed=3, step=step, rank=rank, world_size=4, batch_size=2) for rank in range(4)]
        whole = batch_at(data, seed=3, step=step, rank=0, world_size=1, batch_size=8)
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_order_is_fixed_by_the_seed_and_changes_with_epoch() -> None:
    data = load_data("cifar100")

    def labels(seed: int, first: int) -> list[int]:
        take = [batch_at(data, seed=seed, step=first + n, rank=0, world_size=1, batch_size=1) for n in range(20)]
        return [int(batch.labels) for batch in take]

    assert labels(0, 0) == labels(0, 0) and sorted(labels(0, 0)) == sorted(data.labels.tolist())
    assert labels(0, 0) != labels(1, 0) and labels(0, 0) != labels(0, 20)


def test_a_set_smaller_than_a_step_says_so() -> None:
    with pytest.raises(DataError, match="20 pictures, but one step takes 4 ranks x 8 = 32"):
        batch_at(load_data("cifar10"), seed=0, step=0, rank=0, world_size=4, batch_size=8)


def test_parts_of_a_set_are_apart_and_whole_together() -> None:
    whole, train, test = (load_data(f"mnist{part}") for part in ("", ":part=train", ":part=test"))
    assert len(train.labels) + len(test.labels) == len(whole.labels) == 5 * len(test.labels)
    assert (np.bincount(test.labels) == 100).all()  # the file has one class after the other
    seen = {picture.tobytes() for picture in train.pictures}
    assert not any(picture.tobytes() in seen for picture in test.pictures)
    only = load_data("mnist:part=test,only=3")
    batches = [batch_at(only, seed=1, step=step, rank=0, world_size=1, batch_size=1) for step in range(3)]
    assert all(batch.inputs.equal(test.take(np.array([3]), loss="cross_entropy", seed=0).inputs) for batch in batches)
    with pytest.raises(ConfigError, match="only: wanted an example from 0 to 999, got 1000"):
        load_data("mnist:part=test,only=1000")
    with pytest.raises(ConfigError, match="part: wanted train or test, got dev"):
        load_data("mnist:part=dev")
