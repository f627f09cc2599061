"""Codes of a gradient: both directions, cut anywhere, their size as the formula says, and any bytes at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.wire import WireError
from harness.wire.codec import READERS, decode
from harness.wire.coded import Coded, Defended
from harness.wire.dense import Dense, Half
from harness.wire.levels import BITS, Levels
from harness.wire.lowrank import Factors, LowRank
from harness.wire.sparse import Sparse

SIZE = 1000
CUTS = ((0, SIZE), (0, 1), (1, 7), (8, 64), (250, 500), (999, 1))


def draw(size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def half(codec: str, values: np.ndarray) -> Half:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[codec]
    return Half(codec, torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16))


def levels(bits: int) -> Levels:
    most = max(1, (1 << (bits - 1)) - 1)
    drawn = np.random.default_rng(bits).integers(-most, most + 1, SIZE).astype(np.int8)
    if bits == 1:
        drawn[drawn == 0] = 1
    borders = np.array([0, 3, 300, 301, SIZE])
    return Levels(drawn, bits, "nearest", borders, np.array([0.5, 2, 0, 1e-3], np.float32))


def sparse(kept: int) -> Sparse:
    places = np.sort(np.random.default_rng(kept).choice(SIZE, kept, replace=False)).astype(np.int64)
    return Sparse(SIZE, places, draw(kept))


def factors(rows: int, columns: int, rank: int) -> Factors:
    return Factors(draw(rows * rank, 1).reshape(rows, rank), draw(columns * rank, 2).reshape(columns, rank))


CODED: dict[str, Coded] = {
    "dense": Dense(draw()),
    "fp16": half("fp16", draw()),
    "bf16": half("bf16", draw()),
    **{f"sparse {kept}": sparse(kept) for kept in (0, 1, 40, 500, SIZE)},
    **{f"levels {bits}": levels(bits) for bits in BITS},
    "lowrank": LowRank((draw(7), factors(30, 20, 2), draw(0), factors(3, 131, 1))),
    "defended": Defended(levels(4), "qsgd:7"),
}


@pytest.mark.parametrize("name", CODED)
def test_what_was_sent_is_read_however_it_is_cut(name):
    coded = CODED[name]
    for at, count in CUTS:
        codec, params, payload = coded.part(at, count)
        assert codec == coded.codec and codec in READERS
        # As it arrives: bytes of the message's own, anywhere in memory.
        said = decode(codec, count, params, bytearray(b"x" + bytes(payload))[1:])
        assert said.values.dtype == np.float32
        assert np.array_equal(said.values, coded.values()[at : at + count])


@pytest.mark.parametrize(
    "kept, index, places", [(0, "u16", 0), (40, "u16", 80), (63, "mask", 125), (SIZE, "mask", 125)]
)
def test_places_are_said_in_the_shortest_way(kept, index, places):
    _, params, payload = sparse(kept).part(0, SIZE)
    assert params["index"] == index and len(payload) == places + 4 * kept


def test_places_in_a_long_chunk_take_four_bytes():
    size = (1 << 16) + 1
    coded = Sparse(size, np.array([0, size - 1]), draw(2))
    _, params, payload = coded.part(0, size)
    assert params["index"] == "u32" and len(payload) == 2 * (4 + 4)
    assert np.array_equal(decode("sparse", size, params, payload).values, coded.values())


@pytest.mark.parametrize("bits", BITS)
def test_levels_take_their_bits_and_a_table_of_segments(bits):
    _, _, payload = levels(bits).part(0, SIZE)
    assert len(payload) == 4 + 4 * 8 + -(-SIZE * bits // 8)


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-8, 1e-4, 1.0, 1e4, 5e37])
def test_a_short_float_limits_the_number_behind_it(codec, scale):
    values = draw(10_000) * np.float32(scale)
    values[:3] = (0, scale, -scale)
    _, params, payload = half(codec, values).part(0, values.size)
    said = decode(codec, values.size, params, payload)
    with np.errstate(all="ignore"):
        assert (np.abs(said.values.astype(np.float64) - values) <= said.error).all()
    assert np.isinf(said.error[np.isinf(said.values)]).all()
    if 1e-4 <= scale <= 1e4:  # and not by much more than it has to
        assert (said.error[3:] <= np.abs(said.values[3:]) * {"fp16": 2.0**-11, "bf16": 2.0**-8}[codec] + 1e-7).all()


def test_elements_that_were_not_sent_are_not_limited():
    coded = sparse(40)
    said = decode("sparse", SIZE, *coded.part(0, SIZE)[1:])
    assert said.sent.sum() == 40 and np.isinf(said.error[~said.sent]).all() and not said.error[said.sent].any()


@pytest.mark.parametrize("at, count", [(0, 1000), (7, 600), (8, 64), (17, 20), (600, 300)])
def test_factors_say_the_rows_that_a_chunk_touches_and_all_columns(at, count):
    _, _, payload = CODED["lowrank"].part(at, count)
    rows = {index // 20 for index in range(600) if at <= index + 7 < at + count}
    last = {index // 131 for index in range(393) if at <= index + 607 < at + count}
    plain = sum(at <= index < at + count for index in range(7))
    pieces = (plain > 0) + (len(rows) > 0) + (len(last) > 0)
    numbers = plain + (len(rows) + 20) * 2 * (len(rows) > 0) + (len(last) + 131) * (len(last) > 0)
    assert len(payload) == 4 + 16 * pieces + 4 * numbers


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(data):
    codec = data.draw(st.sampled_from(sorted(READERS)))
    count = data.draw(st.integers(0, 40))
    params = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "index": st.sampled_from(["mask", "u16", "u32", "other", 3]),
                "kept": st.one_of(st.integers(-1, 50), st.just(True)),
                "bits": st.sampled_from([0, 1, 2, 3, 4, 8, True, "8"]),
                "rounding": st.sampled_from(["nearest", "stochastic", "clipped", "sign", "up", 1]),
            },
        )
    )
    payload = data.draw(st.binary(max_size=200))
    try:
        said = decode(codec, count, params, payload)
    except WireError:
        return
    assert said.values.shape == (count,)
    for also in (said.sent, said.error):
        assert also is None or also.shape == (count,)


def piece(*numbers: int) -> bytes:
    return np.array([1, *numbers], "<u4").tobytes()


@pytest.mark.parametrize(
    "codec, count, params, payload, text",
    [
        ("zip", 1, {}, b"", "codec 'zip' is not known; there are: dense"),
        ("dense", 2, {}, b"1234", "wanted 8 bytes of payload, got 4"),
        ("sparse", 3, {"index": "u16", "kept": 2}, b"\1\0\1\0" + bytes(8), "ascending places below 3"),
        ("sparse", 3, {"index": "u16", "kept": 1}, b"\3\0" + bytes(4), "ascending places below 3"),
        ("sparse", 3, {"index": "mask", "kept": 1}, b"\x0f" + bytes(4), "wanted 1 bits of 3 set"),
        ("sparse", 3, {"index": "mask", "kept": 4}, b"\x0f" + bytes(16), "wanted 0 to 3 elements kept, got 4"),
        ("levels", 3, {"bits": 8, "rounding": "up"}, bytes(7), "wanted"),
        ("levels", 3, {"bits": 8, "rounding": "sign"}, bytes(7), "wanted segments of 3 elements"),
        ("levels", 3, {"bits": 8, "rounding": "sign"}, b"\xff\xff\xff\xff", "bytes of payload, got 4"),
        ("lowrank", 3, {}, b"\xff\xff\xff\xff", "wanted 4294967295 pieces, got 4 bytes"),
        ("lowrank", 3, {}, piece(2, 0, 0, 0) + bytes(8), "wanted pieces of 3 elements"),
        ("lowrank", 3, {}, piece(3, 0, 0, 0) + bytes(8), "wanted 3 x 1 numbers, got 2"),
        ("lowrank", 3, {}, piece(3, 0, 0, 0) + bytes(16), "1 numbers more"),
        ("lowrank", 3, {}, piece(3, 2, 2, 1) + bytes(16), "wanted a place below 2 columns"),
        ("lowrank", 3, {}, piece(3, 0, 1 << 31, 1) + bytes(16), "wanted 2147483648 x 1 numbers, got 3"),
    ],
)
def test_what_no_sender_makes_is_refused_in_one_line(codec, count, params, payload, text):
    with pytest.raises(WireError, match=text):
        decode(codec, count, params, payload)
