"""Matrices as products of two thin ones, P Q^T; what is no matrix, or too small for that, as it is.

    payload  u32 pieces; for each: u32 elements, u32 first, u32 columns, u32 rank; then their numbers, float32
    piece    what lies in the chunk of one tensor, row by row; `first` is the column of its first element
             rank 0: `elements` numbers; else P, rows x rank, of the rows that the chunk touches, then Q, columns x rank
    value    p[0] q[0] + p[1] q[1] + ... in this order, each product and each sum rounded: the same everywhere

A matrix that is cut into several chunks says its Q in each of them. Of the numbers behind a product nothing is limited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.wire.coded import Decoded, Float32, Part
from harness.wire.message import WireError

_PIECE = np.dtype([("elements", "<u4"), ("first", "<u4"), ("columns", "<u4"), ("rank", "<u4")])


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """A matrix, by its rows."""

    p: Float32
    """Shape (rows, rank)."""
    q: Float32
    """Shape (columns, rank)."""

    @property
    def size(self) -> int:
        """Elements of the matrix."""
        return len(self.p) * len(self.q)

    def product(self) -> Float32:
        """float32, shape (rows * columns,)."""
        product = np.zeros((len(self.p), len(self.q)), np.float32)
        for p, q in zip(self.p.T, self.q.T, strict=True):
            product += np.multiply.outer(p, q)
        return product.reshape(-1)


@dataclasses.dataclass(frozen=True, slots=True)
class LowRank:
    """A vector of tensors, one after the other."""

    tensors: tuple[Factors | Float32, ...]

    @property
    def codec(self) -> str:
        return "lowrank"

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def values(self) -> Float32:
        parts = [tensor.product() if isinstance(tensor, Factors) else tensor for tensor in self.tensors]
        return np.concatenate([*parts, np.empty(0, np.float32)])

    def part(self, at: int, count: int) -> Part:
        table, numbers, begin = [], [], 0
        for tensor in self.tensors:
            low, high = max(at - begin, 0), min(at + count - begin, tensor.size)
            begin += tensor.size
            if low >= high:
                continue
            if isinstance(tensor, Factors):
                columns, rank = tensor.q.shape
                table.append((high - low, low % columns, columns, rank))
                numbers += [tensor.p[low // columns : -(-high // columns)], tensor.q]
            else:
                table.append((high - low, 0, 0, 0))
                numbers.append(tensor[low:high])
        head = np.uint32(len(table)).astype("<u4").tobytes() + np.array(table, _PIECE).tobytes()
        return Part("lowrank", {}, head + b"".join(each.astype("<f4").tobytes() for each in numbers))


def read(count: int, params: Mapping[str, Any], payload: memoryview) -> Decoded:
    """Raises: WireError, for pieces that do not make up the chunk, or that are longer than their numbers."""
    pieces, at = int.from_bytes(payload[:4], "little"), 4
    begin = at + pieces * _PIECE.itemsize
    if begin > len(payload):
        raise WireError(f"lowrank: wanted {pieces} pieces, got {len(payload)} bytes of payload")
    table = np.frombuffer(payload[at:begin], _PIECE).tolist()
    if sum(elements for elements, *_ in table) != count or not all(elements for elements, *_ in table):
        raise WireError(f"lowrank: wanted pieces of {count} elements, got others")
    values = [np.empty(0, np.float32)]
    numbers = _Numbers(payload[begin:])
    for elements, first, columns, rank in table:
        if rank:
            if first >= columns or rank > columns:
                raise WireError(f"lowrank: wanted a place below {columns} columns, of rank at most that, got others")
            rows = -(-(first + elements) // columns)
            made = Factors(numbers.take(rows, rank), numbers.take(columns, rank))
            with np.errstate(all="ignore"):  # numbers that a sender made up
                values.append(made.product()[first : first + elements])
        else:
            values.append(numbers.take(elements, 1)[:, 0])
    if numbers.left:
        raise WireError(f"lowrank: {numbers.left} numbers more than the pieces hold")

    def error() -> Float32:
        limits = [np.inf if rank else 0.0 for _, _, _, rank in table]
        return np.repeat(np.array(limits, np.float32), [elements for elements, *_ in table])

    return Decoded(np.concatenate(values), error=error)


class _Numbers:
    """The payload behind the table, from its beginning to its end."""

    def __init__(self, payload: memoryview) -> None:
        if len(payload) % 4:
            raise WireError(f"lowrank: wanted numbers of 4 bytes, got {len(payload)} bytes")
        self._numbers: npt.NDArray[np.float32] = np.frombuffer(payload, "<f4").astype(np.float32)

    @property
    def left(self) -> int:
        return self._numbers.size

    def take(self, rows: int, columns: int) -> Float32:
        """The next numbers, row by row. Raises: WireError where there are too few."""
        if rows * columns > self.left:
            raise WireError(f"lowrank: wanted {rows} x {columns} numbers, got {self.left}")
        taken, self._numbers = np.split(self._numbers, [rows * columns])
        return taken.reshape(rows, columns)
