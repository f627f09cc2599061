"""One seed fixes a run: every draw gets a generator of its own, derived from the seed and a purpose."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "order", epoch)`. Equal arguments give equal seeds."""
    return int.from_bytes(_digest(seed, purpose)[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


class Draws:
    """Random bits for one purpose, which nobody can tell without the seed, however many of them they have seen.

    The keystream of AES-128 in counter mode, its key and first counter drawn from the seed by SHA-256. For what must
    not be guessed: of a seed, torch's `manual_seed` takes the lowest 32 bits and no more, and the Mersenne Twister's
    words tell all that follow. It is also several times quicker.
    """

    def __init__(self, seed: int, *purpose: int | str) -> None:
        key = _digest(seed, purpose)
        self._cipher = Cipher(algorithms.AES128(key[:16]), modes.CTR(key[16:])).encryptor()

    def words(self, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
        """The next `count` whole numbers of this dtype, all values equally likely; read-only."""
        return np.frombuffer(self._cipher.update(bytes(count * np.dtype(dtype).itemsize)), dtype)


def _digest(seed: int, purpose: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, (seed, *purpose))).encode()).digest()
