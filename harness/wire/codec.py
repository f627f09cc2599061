"""How a gradient's elements are coded in a payload: what `Header.codec` names, and how each is read.

| codec          | one element                                    | file     | made by                       |
| -------------- | ---------------------------------------------- | -------- | ----------------------------- |
| `dense`        | float32                                        | `dense`  | no defense, noise, clipping   |
| `fp16`, `bf16` | 2 bytes                                        | `dense`  | rounding to a short float     |
| `sparse`       | its place and a float32, or nothing            | `sparse` | pruning, top-k                |
| `levels`       | 1, 2, 4 or 8 bits, and a unit for each segment | `levels` | int8, sign, ternary, QSGD     |
| `lowrank`      | none: factors of matrices; of others float32   | `lowrank` | PowerSGD                     |
| `masked`       | a u32 that says nothing without the others'    | `masked` | secure aggregation            |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from harness.wire import dense, levels, lowrank, masked, sparse
from harness.wire.coded import Decoded
from harness.wire.message import WireError

Read: TypeAlias = Callable[[int, Mapping[str, Any], memoryview], Decoded]
"""(elements, params, payload) -> what it says. Raises: WireError for any bytes that no sender would have made."""

READERS: dict[str, Read] = {
    "dense": dense.read_float32,
    "fp16": dense.read_fp16,
    "bf16": dense.read_bf16,
    "sparse": sparse.read,
    "levels": levels.read,
    "lowrank": lowrank.read,
    "masked": masked.read,
}


def decode(codec: str, count: int, params: Mapping[str, Any], payload: Any) -> Decoded:
    """Reads the payload, any buffer, of `count` elements. Raises: WireError where it is not what its header says."""
    if codec not in READERS:
        raise WireError(f"codec {codec!r:.40} is not known; there are: {', '.join(READERS)}")
    view = memoryview(payload)
    return READERS[codec](count, params, view.cast("B") if view.nbytes else memoryview(b""))
