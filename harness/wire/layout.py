"""What a rank says of its model when it joins: the shapes, in order, and nothing of names or values.

Payload of a HELLO, msgpack: {"world": ranks, "parameters": [[int, ...], ...], "buffers": [[int, ...], ...]}, with
`parameters` in `model.parameters()` order and `buffers` the floating-point ones in `model.buffers()` order.
"""

from __future__ import annotations

import dataclasses
import math

import msgpack

from harness.wire.message import MAX_ELEMENTS, MAX_RANKS, WireError

MAX_LAYOUT_BYTES = 1 << 20
"""A transformer of 1000 layers has some 16,000 tensors, about 100 kB here."""

Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Shapes of a model's parameters and floating-point buffers, and how many ranks train it."""

    world: int
    parameters: Shapes
    buffers: Shapes = ()

    def __post_init__(self) -> None:
        if type(self.world) is not int or not 1 <= self.world <= MAX_RANKS:
            raise WireError(f"layout: wanted 1 to {MAX_RANKS} ranks, got {self.world!r:.40}")
        for shape in (*self.parameters, *self.buffers):
            if len(shape) > 16 or not all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in shape):
                raise WireError(f"layout: not a shape: {shape!r:.80}")
        if self.parameter_count + self.buffer_count > MAX_ELEMENTS:
            raise WireError(f"layout: more than {MAX_ELEMENTS} elements")

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters: the length of a flat gradient."""
        return sum(math.prod(shape) for shape in self.parameters)

    @property
    def buffer_count(self) -> int:
        """Elements of all floating-point buffers."""
        return sum(math.prod(shape) for shape in self.buffers)

    def pack(self) -> bytes:
        """The payload of a HELLO."""
        payload: bytes = msgpack.packb(dataclasses.asdict(self))
        if len(payload) > MAX_LAYOUT_BYTES:
            raise WireError(f"layout of {len(payload)} bytes, at most {MAX_LAYOUT_BYTES}")
        return payload

    @classmethod
    def unpack(cls, payload: bytes | memoryview) -> Layout:
        """Reads the payload of a HELLO. Raises: WireError for any bytes that are not a layout."""
        if len(payload) > MAX_LAYOUT_BYTES:
            raise WireError(f"layout of {len(payload)} bytes, at most {MAX_LAYOUT_BYTES}")
        try:
            fields = msgpack.unpackb(payload, strict_map_key=True)
            shapes = {key: tuple(tuple(shape) for shape in fields[key]) for key in ("parameters", "buffers")}
            if set(fields) != {"world", "parameters", "buffers"}:
                raise ValueError(f"keys {sorted(fields)}")
            return cls(world=fields["world"], **shapes)
        except WireError:
            raise
        except Exception as error:  # msgpack lets out many classes; a missing key or a number for a list are ours
            raise WireError(f"layout is not what was agreed: {error!r:.200}") from error
