"""The arithmetic of secure aggregation: fixed point, and masks that cancel to the bit.

    words = round(x / unit) + stream(own seed) + those shared with later ranks - those with earlier ones  mod 2**32

A stream is AES-128 in counter mode, key and first counter a seed of 32 bytes; no seed is used for two vectors. Works in
blocks that stay in the cache. Knows numbers and seeds; nothing of whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR

from harness.wire.coded import Float32
from harness.wire.masked import Words

SEED_BYTES = 32
BLOCK = 1 << 14
"""Elements worked on at a time: 64 KiB of words, and as much of a stream."""
_ZEROS = bytes(4 * BLOCK)

Mask = tuple[bytes, int]
"""A seed, and 1 to add its stream or -1 to subtract it."""


def quantize(numbers: Float32, unit: float) -> Words:
    """float32, shape (elements,), within the range of the unit -> counts of it, rounded to nearest, as u32."""
    return mask(numbers, unit, ())


def mask(numbers: Float32, unit: float, masks: Sequence[Mask], *, out: Words | None = None) -> Words:
    """The same, with masks, in `out` if given. An exact power of two as unit makes the scaling exact."""
    words, scale = np.empty(numbers.size, np.uint32) if out is None else out, np.float32(1 / unit)
    streams = [(_Stream(seed), sign) for seed, sign in masks]
    scaled = np.empty(BLOCK, np.float32)
    for at in range(0, numbers.size, BLOCK):
        part = words[at : at + BLOCK]
        values = scaled[: part.size]
        np.multiply(numbers[at : at + BLOCK], scale, out=values)
        np.rint(values, out=values)
        np.copyto(part.view(np.int32), values, casting="unsafe")
        for stream, sign in streams:
            stream.add_to(part, sign)
    return words


def add_masks(words: Words, masks: Sequence[Mask]) -> None:
    """Adds more masks, in place."""
    streams = [(_Stream(seed), sign) for seed, sign in masks]
    for at in range(0, words.size, BLOCK):
        for stream, sign in streams:
            stream.add_to(words[at : at + BLOCK], sign)


class _Stream:
    """One seed's, from its beginning."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"seed: wanted {SEED_BYTES} bytes, got {len(seed)}")
        self._encryptor = Cipher(AES128(seed[:16]), CTR(seed[16:])).encryptor()
        self._block = np.empty(BLOCK + 4, np.uint32)  # the library wants room for a cipher's block more

    def add_to(self, words: Words, sign: int) -> None:
        size = 4 * words.size
        self._encryptor.update_into(memoryview(_ZEROS)[:size], self._block.data.cast("B"))
        (np.add if sign > 0 else np.subtract)(words, self._block[: words.size], out=words)
