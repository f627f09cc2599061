"""One seed fixes a run: every draw gets a generator of its own, derived from the seed and a purpose."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive(seed, "order", epoch)`. Equal arguments give equal seeds."""
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A fresh CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
