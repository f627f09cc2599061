"""One message: a msgpack header frame, then one payload frame of raw little-endian numbers (it may be empty).

    frame 0   msgpack map, at most MAX_HEADER_BYTES, the keys of `Header` in its order, first "gradtap": VERSION
    frame 1   payload, exactly header.size long, at most MAX_PAYLOAD_BYTES

A vector is sent in chunks: `at` and `count` place the payload's elements in a flat vector of `total` elements. There
is no checksum: TCP has one, and a CRC-32 of every chunk would cost more than the exchange itself.
Nothing is ever unpickled; every field is checked before it is believed.
"""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Any

import msgpack

VERSION = 1
MAX_HEADER_BYTES = 4096
"""A header of ours is about 150 bytes; msgpack derives its own limits from the input's length, so this bounds them."""
MAX_PAYLOAD_BYTES = 4 << 20
"""Chunks are 0.25 to 2 MiB; a frame above this is refused before anything is allocated for it."""
MAX_ELEMENTS = 1 << 40
MAX_RANKS = 1 << 16
MAX_STEPS = 1 << 48
SERVER_RANK = -1
"""`rank` of a message from a server process that is not itself a rank."""
MAGIC = b"\xa7gradtap"
"""The first key as msgpack writes it: one byte into the header frame, it marks a message of ours in any stream."""

DTYPE_BYTES = {"float32": 4}


class WireError(ValueError):
    """A frame that is not what this format says."""


class Kind(StrEnum):
    """What a message says; in brackets who sends it."""

    HELLO = "hello"
    """[rank] I am here; the payload is the msgpack `Layout` of the model."""
    WELCOME = "welcome"
    """[server] every rank is here with the same layout; no payload."""
    WEIGHTS = "weights"
    """[rank 0, then server] a chunk of the initial state: all parameters, then all floating-point buffers, flat."""
    GRADIENT = "gradient"
    """[rank] a chunk of the rank's own gradient at `step`."""
    AVERAGE = "average"
    """[server] the same chunk, averaged over the ranks."""
    KEY = "key"
    """[rank] its public key for secure aggregation, 32 bytes; [server] those of all ranks, in rank order."""
    RELEASE = "release"
    """[server] the ranks whose masked vectors it has, u32 each; [rank] the seeds that these may give away for it."""
    ERROR = "error"
    """[either] the sender gives up; the payload is one line of UTF-8 that says why."""
    BYE = "bye"
    """[rank] no more messages will come."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The first frame of a message."""

    kind: Kind
    run: bytes
    """8 random bytes, drawn by rank 0 for the run; equal in all of its messages."""
    rank: int
    """The sender; `SERVER_RANK` for a server process. Where ranks serve shards, the owner answers with its rank."""
    step: int
    """Training step, from 0."""
    at: int = 0
    """Index of the payload's first element in the flat vector."""
    count: int = 0
    """Elements in the payload."""
    total: int = 0
    """Elements of the whole flat vector."""
    dtype: str = "float32"
    codec: str = "dense"
    """How the elements are coded; `params` holds what a reader needs to know (the public side of a defense)."""
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 0
    """Length of the payload frame."""

    def __post_init__(self) -> None:
        """Raises: WireError, naming the field, what was wanted and what was got."""
        if type(self.kind) is not Kind:
            raise WireError(f"header field kind: wanted one of {', '.join(Kind)}, got {self.kind!r}")
        if type(self.run) is not bytes or len(self.run) != 8:
            raise WireError(f"header field run: wanted 8 bytes, got {self.run!r}")
        for name, value, low, high in (
            ("rank", self.rank, SERVER_RANK, MAX_RANKS),
            ("step", self.step, 0, MAX_STEPS),
            ("at", self.at, 0, MAX_ELEMENTS),
            ("count", self.count, 0, MAX_PAYLOAD_BYTES),
            ("total", self.total, 0, MAX_ELEMENTS),
            ("size", self.size, 0, MAX_PAYLOAD_BYTES),
        ):
            if type(value) is not int or not low <= value <= high:  # bool is an int, and not wanted here
                raise WireError(f"header field {name}: wanted an integer from {low} to {high}, got {value!r:.40}")
        if self.at + self.count > self.total:
            raise WireError(f"header: elements {self.at} to {self.at + self.count} of a vector of {self.total}")
        if self.dtype not in DTYPE_BYTES:
            raise WireError(f"header field dtype: wanted one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r:.40}")
        if type(self.codec) is not str or len(self.codec) > 64:
            raise WireError(f"header field codec: wanted a short name, got {self.codec!r:.40}")
        if type(self.params) is not dict:
            raise WireError(f"header field params: wanted a map, got {self.params!r:.40}")
        for key, value in self.params.items():
            if type(key) is not str or type(value) not in (bool, int, float, str):
                raise WireError(f"header field params: wanted plain numbers and texts, got {self.params!r:.80}")
        if self.codec == "dense" and self.count and self.size != self.count * DTYPE_BYTES[self.dtype]:
            raise WireError(f"header: {self.count} dense {self.dtype} elements in {self.size} bytes")

    def pack(self) -> bytes:
        """The header frame."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields["kind"] = self.kind.value
        frame: bytes = msgpack.packb({"gradtap": VERSION, **fields})
        if len(frame) > MAX_HEADER_BYTES:
            raise WireError(f"header of {len(frame)} bytes, at most {MAX_HEADER_BYTES}: params are too large")
        return frame

    @classmethod
    def unpack(cls, frame: bytes | memoryview) -> Header:
        """Reads a header frame. Raises: WireError for any bytes that `pack` would not have written."""
        if len(frame) > MAX_HEADER_BYTES:
            raise WireError(f"header of {len(frame)} bytes, at most {MAX_HEADER_BYTES}")
        try:
            fields = msgpack.unpackb(frame, strict_map_key=True)
        except Exception as error:  # msgpack lets out ValueError, StackError, ExtraData, UnicodeDecodeError, ...
            raise WireError(f"header is not msgpack: {error}") from error
        if type(fields) is not dict or fields.pop("gradtap", None) != VERSION:
            raise WireError(f"header: wanted a map that begins with gradtap: {VERSION}")
        if list(fields) != list(_FIELDS):
            raise WireError(f"header keys: wanted {', '.join(_FIELDS)}, got {', '.join(map(str, fields))[:200]}")
        try:
            fields["kind"] = Kind(fields["kind"])
        except ValueError:
            raise WireError(f"header field kind: wanted one of {', '.join(Kind)}, got {fields['kind']!r:.40}") from None
        return cls(**fields)


_FIELDS = tuple(field.name for field in dataclasses.fields(Header))
