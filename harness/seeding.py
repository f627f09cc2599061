"""One seed fixes a run: every draw gets a generator of its own, derived from the seed and a purpose."""

from __future__ import annotations

import hashlib

import torch

_STATE_AT, _WORDS = 24, 624
"""Where, in the bytes of torch's CPU generator, the Mersenne Twister keeps its words, each in 8 bytes."""


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "order", epoch)`. Equal arguments give equal seeds."""
    return int.from_bytes(_digest(seed, purpose)[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def wide_generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose whose whole state is drawn from the seed, by SHAKE-256.

    For draws that must not be guessed: torch's `manual_seed` takes the lowest 32 bits of a seed and no more, and all of
    those can be tried. The Mersenne Twister itself is no cipher: who sees 624 of its words knows all others.
    """
    made = torch.Generator().manual_seed(0)
    state = made.get_state()
    words = bytearray(8 * _WORDS)
    key = hashlib.shake_256(_digest(seed, purpose)).digest(4 * _WORDS)
    for byte in range(4):
        words[byte::8] = key[byte::4]
    state[_STATE_AT : _STATE_AT + len(words)] = torch.frombuffer(words, dtype=torch.uint8)
    made.set_state(state)
    return made


def _digest(seed: int, purpose: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, (seed, *purpose))).encode()).digest()
