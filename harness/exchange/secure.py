"""One rank's secrets in secure aggregation, without a socket: keys, a step's masks, and what it gives away at its end.

Every two ranks agree on a secret by X25519, and from it, by HKDF-SHA256, on a seed for each step. A rank masks its
vector by these, so that they cancel in the sum, and by a seed of its own drawn for the step. When the server has all
vectors that will come, it names the ranks present; each of these then gives away its own seed, and the step's seeds
that it shares with those that are missing, whose part in its mask nothing cancels.

Who may see what: an eavesdropper on every link, and a server that keeps to the protocol and remembers all, learn the
sum over the ranks that are present, and of a single rank nothing, if at least two are. For a vector to be bare, its
own seed and all others must be known: the own one is only given away by a rank that was named present, and the others
only for one that was not. Hence a rank answers once a step, and whoever comes late is out of the run. Nothing here
proves who a public key belongs to: against someone who alters messages, take CURVE too.

Reference: Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS, section 4.
Differs: seeds of missing ranks come from those who share them, not from Shamir shares of a key, so that a key outlives
a step in which its owner was missing; a rank that is lost between being named present and its answer costs the step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from harness.defenses.secure import Private
from harness.errors import ExchangeError, PeerError
from harness.exchange.masks import SEED_BYTES, Mask, mask
from harness.wire.masked import Masked

KEY_BYTES = 32
LEAST_PRESENT = 2
"""The mean of one rank would be its gradient."""


class Member:
    """A rank, from the agreement on keys to the end of the run."""

    def __init__(self, *, run: bytes, rank: int, world_size: int) -> None:
        self._run, self._rank, self._world_size = run, rank, world_size
        self._key = X25519PrivateKey.generate()
        self._secrets: dict[int, bytes] = {}
        self._members: tuple[int, ...] = tuple(range(world_size))
        self._step = -1
        self._words = np.empty(0, np.uint32)
        self._own_seed: bytes | None = None
        """Of the step that was masked last, until it is given away."""

    @property
    def public_key(self) -> bytes:
        """What the others need."""
        return self._key.public_key().public_bytes_raw()

    def meet(self, keys: Sequence[bytes]) -> None:
        """Takes all ranks' public keys, in rank order. Raises: PeerError."""
        if len(keys) != self._world_size or keys[self._rank] != self.public_key or len(set(keys)) != len(keys):
            raise PeerError(f"rank {self._rank}: wanted {self._world_size} ranks' keys, this rank's among them")
        for rank, key in enumerate(keys):
            if rank != self._rank:
                try:
                    self._secrets[rank] = self._key.exchange(X25519PublicKey.from_public_bytes(key))
                except ValueError as error:
                    raise PeerError(f"rank {self._rank}: rank {rank} has no key: {error}") from error

    def mask(self, private: Private, *, step: int, own: bool = True) -> Masked:
        """What may be sent in place of a vector at a step. Valid until the next call, which needs its memory again.

        Args:
            own: whether the rank's own seed masks it too, which it then has to give away (`release`). Without it, the
                masks cancel in the sum over all ranks, and no other sum may ever be taken.

        Raises: ExchangeError, if a step is masked twice: two vectors under one mask show their difference.
        """
        if step <= self._step:
            raise ExchangeError(f"rank {self._rank}: step {step} was masked already; a mask is used once")
        self._step = step
        masks = [self._mask_with(other) for other in self._members if other != self._rank]
        if own:
            self._own_seed = os.urandom(SEED_BYTES)
            masks.append((self._own_seed, 1))
        unit = private.unit(self._world_size)
        if self._words.size != private.size:
            self._words = np.empty(private.size, np.uint32)
        return Masked(mask(private.numbers, unit, masks, out=self._words), unit)

    def release(self, present: Sequence[int], *, step: int) -> bytes:
        """The answer to a server that named the ranks whose vectors it has: the own seed, then that shared with each
        member that is missing, in rank order. They are members no more. Raises: PeerError."""
        seed, self._own_seed = self._own_seed, None
        allowed = set(present) <= set(self._members) and self._rank in present and len(present) >= LEAST_PRESENT
        if seed is None or step != self._step or not allowed:
            raise PeerError(f"rank {self._rank}, step {step}: the server asks for seeds that nobody may have")
        missing = [rank for rank in self._members if rank not in present]
        seeds = [seed, *(self._shared_seed(other) for other in missing)]
        self._members = tuple(present)
        return b"".join(seeds)

    def _mask_with(self, other: int) -> Mask:
        return self._shared_seed(other), 1 if other > self._rank else -1

    def _shared_seed(self, other: int) -> bytes:
        """With another rank, of this step: what is derived from it says nothing of any other step's."""
        low, high = sorted((self._rank, other))
        info = b"gradtap mask" + b"".join(number.to_bytes(8, "little") for number in (low, high, self._step))
        return HKDF(SHA256(), SEED_BYTES, salt=self._run, info=info).derive(self._secrets[other])


def unmasking(present: Sequence[int], missing: Sequence[int], released: Mapping[int, bytes]) -> list[Mask]:
    """What to add to the sum of the vectors of those present to bare it, from what each of them released.

    Raises: PeerError.
    """
    masks: list[Mask] = []
    for rank in present:
        seeds = [released[rank][at : at + SEED_BYTES] for at in range(0, len(released[rank]), SEED_BYTES)]
        if len(released[rank]) != SEED_BYTES * (1 + len(missing)):
            raise PeerError(f"rank {rank} released {len(released[rank])} bytes, wanted {1 + len(missing)} seeds")
        masks.append((seeds[0], -1))
        masks += [(seed, -1 if other > rank else 1) for other, seed in zip(missing, seeds[1:], strict=True)]
    return masks
