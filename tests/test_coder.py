"""The entropy coder of the codes: exact on anything, close to the order-0 entropy, and never more than a ValueError.

The entropy is the one of each matrix on its own, counted from its histogram; tables and states are in the bytes.
CPU, seconds: python -m pytest tests/test_rans.py
"""

import random
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loopgolf import coder as rans
from loopgolf.coder import classify_columns, decode_matrices, decode_rows, encode_rows, find_kept, label_rows

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def encode_plainly(matrices: list[Tensor]) -> bytes:
    """As in older files: all rows, classes of columns."""
    return rans.encode_matrices([(codes, classify_columns(codes)) for codes in matrices])


@pytest.fixture(autouse=True)
def fewer_symbols_per_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """More lanes in small matrices, and fewer steps to wait for."""
    monkeypatch.setattr(rans, "LANE_SYMBOLS", 64)


def build_gaussian(rows: int, columns: int, spread: float, largest: int = 31, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, columns, generator=generator) * spread).round()
    return codes.clamp(-largest, largest).to(torch.int8)


def build_uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Columns of very different sizes, like the inputs from hidden units of which some died."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return (torch.randn(rows, columns, generator=generator) * sizes * 6).round().clamp(-127, 127).to(torch.int8)


def compute_entropy_bytes(codes: Tensor) -> float:
    share = (codes.flatten().long() + 128).bincount().double() / codes.numel()
    share = share[share > 0]
    return float(-(share * share.log2()).sum()) * codes.numel() / 8


def assert_round_trip(matrices: list[Tensor]) -> bytes:
    data = encode_plainly(matrices)
    decoded = decode_matrices(data, [tuple(codes.shape) for codes in matrices])
    assert [codes.dtype for codes in decoded] == [torch.int8] * len(matrices)
    assert all(torch.equal(found, codes) for found, codes in zip(decoded, matrices))
    return data


@st.composite
def codes_of_any_kind(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    low = draw(st.integers(-128, 127))
    high = draw(st.integers(low, 127))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator)
    if draw(st.booleans()):  # most of them equal: frequencies from the smallest to nearly all
        codes = torch.where(torch.rand(rows, columns, generator=generator) < 0.99, low, codes)
    return codes.to(torch.int8)


@repeatable
@given(st.lists(codes_of_any_kind(), max_size=4))
def test_any_codes_come_back(matrices: list[Tensor]) -> None:
    assert_round_trip(matrices)


@st.composite
def codes_with_repeats(draw: st.DrawFn) -> Tensor:
    codes = draw(codes_of_any_kind())
    order = draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=90))
    return codes[order]


@repeatable
@given(st.lists(codes_with_repeats(), max_size=4))
def test_equal_rows_are_stored_once_and_come_back(matrices: list[Tensor]) -> None:
    data = encode_rows(matrices)
    decoded = decode_rows(data, [tuple(codes.shape) for codes in matrices])
    assert all(torch.equal(found, codes) for found, codes in zip(decoded, matrices))
    for codes in matrices:
        assert len(find_kept(label_rows(codes))[0]) == len(codes.unique(dim=0))


def test_equal_rows_cost_three_bits_each_at_most() -> None:
    codes = build_gaussian(400, 64, 5.0)
    longer = torch.cat((codes, codes[7].expand(200, -1), codes[9].expand(100, -1)))[torch.randperm(700)]
    assert len(encode_rows([longer])) < len(encode_rows([codes])) + 3 * 700 / 8
    assert len(encode_rows([codes])) < len(encode_plainly([codes])) + 32


def test_rows_of_different_spread_get_classes_of_rows() -> None:
    spreads = torch.tensor([1.0, 4.0, 16.0]).repeat(200)[:, None]
    codes = (torch.randn(600, 64, generator=torch.Generator().manual_seed(0)) * spreads).round().clamp(-127, 127)
    tall = codes.to(torch.int8)
    wide = tall.T.contiguous()
    assert len(encode_rows([tall])) < 0.92 * len(encode_plainly([tall]))
    assert len(encode_rows([tall])) < len(encode_plainly([wide])) + 64
    both = encode_rows([tall, wide])
    for found, given_codes in zip(decode_rows(both, [(600, 64), (64, 600)]), (tall, wide)):
        assert torch.equal(found, given_codes)


def build_rows(labels: bytes, rest: bytes) -> bytes:
    packed = rans.compress_side(labels)
    return struct.pack("<II", zlib.crc32(packed), len(packed)) + packed + rest


@repeatable
@given(st.lists(st.integers(0, 6), min_size=8, max_size=8), st.integers(0, 255))
def test_any_labels_with_a_good_checksum_end_in_codes_or_a_value_error(labels: list[int], kind: int) -> None:
    codes = build_gaussian(5, 20, 3.0)
    coded = encode_plainly([codes.T.contiguous() if kind else codes])
    data = build_rows(struct.pack("<B8H", kind, *labels), coded)
    n_kept = labels.count(0) + len(set(labels) - {0})
    if n_kept == 5:
        (found,) = decode_rows(data, [(8, 20)])
        for label in set(labels) - {0}:
            rows = found[[i for i, other in enumerate(labels) if other == label]]
            assert (rows == rows[0]).all()
    else:
        with pytest.raises(ValueError):
            decode_rows(data, [(8, 20)])


@pytest.mark.parametrize("change", ["none", "cut", "long", "huge"])
def test_labels_of_another_length_are_refused(change: str) -> None:
    labels, rest = bytes(1 + 2 * 5), encode_plainly([build_gaussian(5, 4, 2.0)])
    content = dict(none=b"", cut=labels[:-2], long=labels + b"\0\0", huge=bytes(50_000_000))[change]
    with pytest.raises(ValueError, match="labels"):
        decode_rows(build_rows(content, rest), [(5, 4)])


def test_a_change_of_labels_is_refused() -> None:
    data = encode_rows([build_gaussian(60, 20, 3.0)[torch.arange(90) % 60]])
    for at in range(8 + struct.unpack("<I", data[4:8])[0]):
        changed = bytearray(data)
        changed[at] ^= 1
        for damaged in (data[:at], bytes(changed)):
            with pytest.raises(ValueError, match="labels"):
                decode_rows(damaged, [(90, 20)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 9000), (9000, 1), (256, 300)])
def test_constant_matrices_come_back_and_cost_nothing_but_their_table(shape: tuple[int, int]) -> None:
    for value in (-127, 0, 127):
        data = assert_round_trip([torch.full(shape, value, dtype=torch.int8)])
        lanes = max(1, shape[0] * shape[1] // 64)
        assert len(data) <= 40 + 4 * lanes + shape[1] // 50


def test_every_value_comes_back() -> None:
    every = torch.arange(-127, 128).to(torch.int8)
    assert_round_trip([every[None], every[:, None], every.repeat(100, 1), build_uneven(300, 200)])


def test_no_matrices() -> None:
    assert encode_plainly([]) == b"" and decode_matrices(b"", []) == []
    with pytest.raises(ValueError, match="after the last"):
        decode_matrices(b"x", [])


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 3), torch.zeros(0, 3, dtype=torch.int8)])
def test_what_cannot_be_encoded_is_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="only 2-D int8"):
        encode_rows([wrong])


@pytest.mark.slow
@pytest.mark.parametrize(
    "matrices",
    [
        [build_gaussian(512, 400, 7.75)],
        [build_gaussian(64, 3200, 5.2)],
        [build_gaussian(3200, 64, 2.0)],
        [build_gaussian(400, 500, 9.0, 127), build_gaussian(256, 512, 7.75)],
        [build_gaussian(512, 256, 7.75, seed=seed) for seed in range(4)],
    ],
    ids=["medium", "wide", "tall", "bytes", "four"],
)
def test_size_is_within_three_thousandths_of_the_entropy(
    matrices: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rans, "LANE_SYMBOLS", 1 << 12)  # a quarter of what is shipped: quicker, and harder to pass
    assert len(assert_round_trip(matrices)) <= 1.003 * sum(map(compute_entropy_bytes, matrices))


def test_columns_of_different_sizes_go_below_the_entropy_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rans, "LANE_SYMBOLS", 1 << 10)
    codes = build_uneven(512, 512)
    assert len(assert_round_trip([codes])) < 0.92 * compute_entropy_bytes(codes)


def test_same_codes_give_the_same_bytes_on_any_number_of_threads() -> None:
    matrices, before = [build_uneven(300, 200), build_gaussian(128, 256, 4.0)], torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.add(encode_plainly([codes.clone() for codes in matrices]))
            found.add(encode_plainly([codes.T.contiguous().T for codes in matrices]))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_a_stream_written_earlier_still_decodes() -> None:
    """Finished artifacts have to stay readable: the format, not only the pair of functions, is fixed."""
    codes = (torch.arange(60).view(6, 10) ** 2 % 17 - 8).to(torch.int8)
    assert torch.equal(decode_matrices(bytes.fromhex(EARLIER), [(6, 10)])[0], codes)


EARLIER = (
    "a75761c020000000e0001d0018000000a0099b339b6dd07c0bad12a6e2a7553948635bcc37280000a0808d27db4ab8778b13"
    "fccedb28b79b1eb9935f22a76ecd9a57"
)


def seal(rest: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(rest)) + rest


def build_stream(side: bytes, rest: bytes) -> bytes:
    """A stream with a valid checksum around tables of our own."""
    packed = rans.compress_side(side)
    return seal(struct.pack("<I", len(packed)) + packed + rest)


def split_stream(data: bytes) -> tuple[bytes, bytes]:
    """The tables of a stream, and its states and words."""
    end = 8 + struct.unpack("<I", data[4:8])[0]
    return rans.lzma.decompress(data[8:end], rans.lzma.FORMAT_RAW, filters=rans.FILTERS), data[end:]


MUTATED = [build_uneven(120, 140), build_gaussian(20, 15, 4.0), build_gaussian(1, 50, 2.0)]
SHAPES = [tuple(codes.shape) for codes in MUTATED]


def mutate(data: bytes, draw: random.Random) -> bytes:
    out, at = bytearray(data), draw.randrange(len(data))
    kind = draw.randrange(5)
    if kind == 0:
        out[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = draw.randbytes(draw.randrange(1, 9))
    elif kind == 3:
        out[at : at + 4] = draw.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", draw.randbytes(4)])
    else:
        del out[at : at + draw.randrange(1, 5)]
    return bytes(out)


def test_changed_streams_are_refused() -> None:
    data, draw = encode_plainly(MUTATED), random.Random(1)
    for _ in range(1000):
        if (changed := mutate(data, draw)) != data:
            with pytest.raises(ValueError):
                decode_matrices(changed, SHAPES)


def test_changed_streams_with_a_valid_checksum_are_refused_or_decode_to_the_shapes() -> None:
    """Three targets: the stream as it is, its head and tables alone, and the tables before they are compressed."""
    data, draw, refused = encode_plainly(MUTATED), random.Random(2), 0
    side, coded = split_stream(data)
    for i in range(600):
        if i % 3 == 0:
            changed = seal(mutate(data[4:], draw))
        elif i % 3 == 1:
            changed = seal(mutate(data[4 : -len(coded)], draw) + coded)
        else:
            changed = build_stream(mutate(side, draw), coded)
        try:
            decoded = decode_matrices(changed, SHAPES)
        except ValueError as error:
            assert 0 < len(str(error)) < 100
            refused += 1
        else:
            assert [tuple(codes.shape) for codes in decoded] == SHAPES
    assert refused > 590


def test_other_shapes_are_refused() -> None:
    data = encode_plainly(MUTATED)
    for shapes in ([], SHAPES[:2], [*SHAPES, (1, 1)], [(140, 120), *SHAPES[1:]], [(120, 141), *SHAPES[1:]]):
        with pytest.raises(ValueError):
            decode_matrices(data, shapes)


def test_a_change_that_only_the_checksum_sees_is_refused() -> None:
    """Another constant has other tables and the same states, so that each decodes with the other's."""
    three, five = (encode_plainly([torch.full((8, 9), value, dtype=torch.int8)]) for value in (3, 5))
    assert len(three) == len(five) and three[-8:] == five[-8:]
    with pytest.raises(ValueError, match="changed"):
        decode_matrices(three[:4] + five[4:], [(8, 9)])


TABLE = [1, 100, 102]  # one class, symbols -28 to -26
GOOD = bytes([*TABLE, 0, 0, 9, 9, 9])


@pytest.mark.parametrize(
    "side",
    [
        b"",
        GOOD[:2],
        GOOD[:-1],
        GOOD + b"\0",
        bytes([0, *GOOD[1:]]),
        bytes([2, 100, 102, 0, 1, 9, 9, 9, 9, 9, 9]),
        bytes([1, 102, 101, 0, 0]),
        bytes([1, 102, 100, 0, 0, 9, 9, 9]),
        bytes([1, 255, 0, 0, 0]),
        bytes([*TABLE, 0, 1, 9, 9, 9]),
        bytes([*TABLE, 0, 0, 0, 0, 0]),
    ],
    ids=["none", "head", "cut", "long", "no-class", "classes", "empty", "backward", "far-backward", "label", "zero"],
)
def test_impossible_tables_are_refused(side: bytes) -> None:
    states = struct.pack("<I", rans.LOWEST) + bytes(64)
    rans.read_side(rans.compress_side(GOOD), [(5, 2)])
    with pytest.raises(ValueError, match="table"):
        decode_matrices(build_stream(side, states), [(5, 2)])


def test_states_that_are_cut_short_are_refused() -> None:
    side, rest = split_stream(encode_plainly(MUTATED))
    lanes = rans.count_lanes(sum(rows * columns for rows, columns in SHAPES))
    for size in range(0, 4 * lanes + 40, 4):
        with pytest.raises(ValueError, match=r"truncated|short|early|end of"):
            decode_matrices(build_stream(side, rest[:size]), SHAPES)


def test_a_state_that_reaches_its_limit_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower of two equally frequent symbols doubles the state: 16 times, and 2^16 would not fit its 32 bits."""
    monkeypatch.setattr(rans, "LANE_SYMBOLS", 16)  # the first lane has all the zeros
    assert_round_trip([torch.tensor([[0], [1]] * 16).to(torch.int8)])


def test_tables_that_decompress_to_far_too_much_are_cut_off() -> None:
    stream = build_stream(bytes(50_000_000), bytes(400))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="tables"):
            decode_matrices(stream, SHAPES[1:2])
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
