"""One message that carries a part of a vector -> the piece of that vector which it proves, whoever carried it.

Checks that the header can be a part of the vector of a job; knows nothing of which messages follow which.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from attack.capture.streams import Flow
from attack.decode.messages import Message
from attack.decode.vector import Origin, Piece, Place
from harness.wire import Header, Kind
from harness.wire.codec import READERS, decode
from harness.wire.coded import Decoded

MAX_ELEMENTS = 1 << 30
"""Elements of a vector that is put together: 4 GiB. A header that says more is not believed."""


def place_of(header: Header) -> Place:
    """Where its elements belong."""
    return Place(header.at, header.at + header.count)


def origin_of(flow: Flow, message: Message) -> Origin:
    """Where it lies in its stream."""
    return Origin(flow, message.offset, message.payload_at, message.payload_at + message.header.size)


def piece_of(flow: Flow, message: Message, tag: Hashable) -> Piece:
    """What it says; `tag` as `Piece` has it. Raises: WireError where the payload is not what its header says."""
    header, place = message.header, place_of(message.header)
    if header.codec != "dense" and message.holes:  # zeros in its place may read as anything
        said = Decoded(np.zeros(header.count, np.float32))
    else:
        said = decode(header.codec, header.count, header.params, message.payload)
    return Piece(place, said, message.holes, tag, origin_of(flow, message), codec=header.codec)


def defense_of(header: Header) -> str | None:
    """The chain of defenses, as the header says it, else its code and what there is to say of that, as
    `codec:key=value,key=value`; None for a plain gradient."""
    if isinstance(said := header.params.get("defense"), str):
        return said
    params = ",".join(f"{key}={value}" for key, value in header.params.items())
    return f"{header.codec}:{params}" if params else None if header.codec == "dense" else header.codec


def implausible(header: Header, total: int | None) -> str | None:
    """Why a chunk cannot be a part of the vector of `total` elements, if so."""
    if header.codec not in (READERS if header.kind is Kind.GRADIENT else ("dense",)) or header.dtype != "float32":
        return f"coded as {header.codec} {header.dtype}, which is not read"
    if not header.count:
        return "an empty chunk"
    if total is not None and header.total != total:
        return f"a part of {header.total} elements, the others of {total}"
    if header.total > MAX_ELEMENTS:
        return f"a part of {header.total} elements, at most {MAX_ELEMENTS} are put together"
    return None
