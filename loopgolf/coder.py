"""A lossless entropy coder for the int8 codes of quantized weight matrices: interleaved rANS over many lanes at once.

    content = encode_rows([codes, ...])                        2-D int8 tensors
    codes = decode_rows(content, [(rows, columns), ...])       the same tensors, or ValueError
    codes = decode_matrices(data, [(rows, columns), ...])      of the part `data` alone, which older files are made of

The columns of a matrix fall into 1 to 16 classes that compress best together (a hidden unit that died has small
weights), or its rows do (a rare token has coarse codes), whichever takes fewer bytes: such a matrix is turned. Every
class has its own frequency table. All matrices, class after class, column after column, form one row of symbols; lane
j of L codes symbols j, L + j, 2L + j, ... so one step is a few tensor operations on L states. A state lives in
[2^16, 2^32) and moves 16-bit words. No float decides what is decoded, so every machine agrees.

    content := u32 crc of the labels | u32 label bytes | labels | data
    labels := LZMA of u8 per matrix: 1 if it is turned in `data`, 0 if not; u16 per row: 0, or a label of equal rows
    data := u32 crc of the rest | u32 side bytes | side | u32 state per lane | u16 words    (little endian)
    side := LZMA of, per matrix: class count, lowest and highest symbol, class of each column, one table per class

Rows of tokens that never occur in training become equal, and are stored once.
"""

import lzma
import struct
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_BITS = 14  # the frequencies of a table sum to 2^14
LOWEST = 1 << 16  # a state starts at this value in the encoder, so it has to end there in the decoder
LANE_SYMBOLS = 1 << 14  # per lane: a state costs 3 bytes more than it carries, 0.03% of its symbols
MOST_LABELS = (1 << 16) - 1
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]


class Classes(NamedTuple):
    """Of the columns of a matrix, and the bytes that it takes with them."""

    n_bytes: float
    side: bytes
    labels: Tensor
    roots: Tensor  # (classes, 256)


def encode_rows(matrices: list[Tensor]) -> bytes:
    if any(codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel() for codes in matrices):
        raise ValueError("only 2-D int8 tensors with at least one code can be encoded")
    labels = [label_rows(codes) for codes in matrices]
    turned, classified = [], []
    for codes, label in zip(matrices, labels):
        kept = codes[find_kept(label)[0]]
        of_columns, of_rows = classify_columns(kept), classify_columns(kept.T)
        is_turned = of_rows.n_bytes < of_columns.n_bytes
        turned.append(is_turned)
        classified.append((kept.T, of_rows) if is_turned else (kept, of_columns))
    side = bytes(turned) + b"".join(label.numpy().astype("<u2").tobytes() for label in labels)
    packed = compress_side(side)
    return struct.pack("<II", zlib.crc32(packed), len(packed)) + packed + encode_matrices(classified)


def decode_rows(data: bytes, shapes: list[tuple[int, int]]) -> list[Tensor]:
    checksum, size = struct.unpack("<II", data[:8]) if len(data) >= 8 else (0, 0)
    packed = data[8 : 8 + size]
    if not packed or zlib.crc32(packed) != checksum:
        raise ValueError("labels are truncated or changed")
    n_rows = [rows for rows, _ in shapes]
    n_bytes = len(shapes) + 2 * sum(n_rows)
    content = decompress_side(packed, n_bytes, "labels")
    if len(content) != n_bytes:
        raise ValueError("labels are of another number of rows")
    turned = [flag != 0 for flag in content[: len(shapes)]]
    labels = torch.from_numpy(np.frombuffer(content[len(shapes) :], "<u2").astype(np.int32)).split(n_rows)
    found = [find_kept(label) for label in labels]
    coded_shapes = []
    for (rows, _), (_, columns), is_turned in zip(found, shapes, turned):
        coded_shapes.append((columns, len(rows)) if is_turned else (len(rows), columns))
    coded = decode_matrices(data[8 + size :], coded_shapes)
    kept = [codes.T if is_turned else codes for codes, is_turned in zip(coded, turned)]
    return [codes[places] for codes, (_, places) in zip(kept, found)]


def label_rows(codes: Tensor) -> Tensor:
    """0 for a row unlike all others, else the label of its group of equal rows."""
    contents = [row.tobytes() for row in codes.numpy()]
    counts = Counter(contents)
    repeated = [content for content, count in counts.items() if count > 1][:MOST_LABELS]
    names = {content: label for label, content in enumerate(repeated, 1)}
    return torch.tensor([names.get(content, 0) for content in contents])


def find_kept(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are kept, the first of each group and those unlike all others; and for each row its place there."""
    rows = torch.arange(len(labels))
    first = torch.full((MOST_LABELS + 1,), len(labels)).scatter_reduce(0, labels.long(), rows, "amin")
    kept, places = torch.where(labels == 0, rows, first[labels]).unique(return_inverse=True)
    return kept, places


def encode_matrices(matrices: list[tuple[Tensor, Classes]]) -> bytes:
    sides, symbols, tables, sizes = [], [], [], []
    for codes, (_, side, labels, roots) in matrices:
        sides.append(side)
        symbols.append((codes.T[labels.argsort(stable=True)].int() + 128).flatten())
        tables.append(build_frequencies(roots))
        sizes.append(labels.bincount() * len(codes))
    if not matrices:
        return b""
    freqs, index = torch.cat(tables), torch.cat(symbols) + find_tables(torch.cat(sizes)).mul_(256)
    starts = (freqs.cumsum(1) - freqs).flatten()
    states = torch.full((count_lanes(len(index)),), LOWEST)
    words = []
    for piece in reversed(index.split(len(states))):  # last symbol first: the decoder runs the other way
        x, f = states[: len(piece)], freqs.take(piece.long())
        full = x >= (f << (32 - TABLE_BITS))
        words.append(x[full].to(torch.int16))
        x = torch.where(full, x >> 16, x)
        states[: len(piece)] = ((x // f) << TABLE_BITS) + x % f + starts.take(piece.long())
    side = compress_side(b"".join(sides))
    states = torch.where(states < (1 << 31), states, states - (1 << 32)).int()  # the same 32 bits, signed
    rest = struct.pack("<I", len(side)) + side + states.numpy().tobytes() + torch.cat(words[::-1]).numpy().tobytes()
    return struct.pack("<I", zlib.crc32(rest)) + rest


def decode_matrices(data: bytes, shapes: list[tuple[int, int]]) -> list[Tensor]:
    if not shapes:
        if data:
            raise ValueError("bytes after the last matrix")
        return []
    total = sum(rows * columns for rows, columns in shapes)
    lanes = count_lanes(total)
    if len(data) < 8 + 4 * lanes or struct.unpack("<I", data[:4])[0] != zlib.crc32(data[4:]):
        raise ValueError("codes are truncated or changed")
    side_end = 8 + struct.unpack("<I", data[4:8])[0]
    words_at = side_end + 4 * lanes
    if words_at > len(data):
        raise ValueError("states are cut short")
    labels, freqs, sizes = read_side(data[8:side_end], shapes)
    states = torch.frombuffer(bytearray(data[side_end:words_at]), dtype=torch.int32).long() & 0xFFFFFFFF
    # a step reads at most one word per lane, so with this much room after them no step reads past the end;
    # half a word is refused by frombuffer with the ValueError that is wanted here
    words = torch.frombuffer(bytearray(data[words_at:]) + bytes(2 * lanes), dtype=torch.int16)
    lookup = build_lookup(freqs)
    symbols = torch.empty(total, dtype=torch.int8)
    mask = (1 << TABLE_BITS) - 1
    at = 0  # the next word
    for out, which in zip(symbols.split(lanes), find_tables(sizes).split(lanes)):
        x = states[: len(out)]  # a view: the in-place operations below move the states themselves
        found = lookup.index_select(0, (x & mask) + (which.long() << TABLE_BITS))
        out.copy_(found)  # the lowest byte, into `symbols`, of which this is a view too
        x.bitwise_right_shift_(TABLE_BITS).mul_(found >> 32).add_((found >> 8) & mask)
        low = (x < LOWEST).nonzero().flatten()
        fresh = words[at : at + len(low)].long() & 0xFFFF
        x.index_copy_(0, low, (x.index_select(0, low) << 16) | fresh)
        at += len(low)
        if at > len(words) - lanes:
            raise ValueError("codes end too early")
    if at != len(words) - lanes or not (states == LOWEST).all():
        raise ValueError("codes do not decode to the end of their stream")
    matrices = []
    for (rows, columns), label, flat in zip(shapes, labels, symbols.split([r * c for r, c in shapes])):
        codes = torch.empty(columns, rows, dtype=torch.int8)
        codes[label.argsort(stable=True)] = flat.view(columns, rows)
        matrices.append(codes.T.contiguous())
    return matrices


def count_lanes(n_symbols: int) -> int:
    return max(1, n_symbols // LANE_SYMBOLS)


def count_classes(rows: int, columns: int) -> int:
    """Most classes: a table has to serve 8192 codes, which also bounds what a hostile stream can make us allocate."""
    return min(16, columns, max(1, (rows * columns) >> 13))


def find_tables(sizes: Tensor) -> Tensor:
    """The table of every symbol, from the number of symbols of every table."""
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes)


def build_lookup(freqs: Tensor) -> Tensor:
    """Per table and low bits of a state: frequency << 32 | (bits - start of the symbol) << 8 | symbol as a byte."""
    owner = torch.repeat_interleave(torch.arange(freqs.numel()), freqs.flatten())
    starts = (freqs.cumsum(1) - freqs).flatten()
    bits = torch.arange(len(owner)) & ((1 << TABLE_BITS) - 1)
    return (freqs.take(owner) << 32) | ((bits - starts[owner]) << 8) | ((owner - 128) & 255)


def build_frequencies(roots: Tensor) -> Tensor:
    """(tables, symbols) square roots of frequencies, 0 to 255, to integer frequencies that sum to 2^14."""
    weights = roots.long().square()
    present, total = (weights > 0).long(), weights.sum(1, keepdim=True)
    freqs = present + weights * ((1 << TABLE_BITS) - present.sum(1, keepdim=True)) // total
    freqs[torch.arange(len(freqs)), freqs.argmax(1)] += (1 << TABLE_BITS) - freqs.sum(1)
    return freqs


def compute_roots(counts: Tensor) -> Tensor:
    """Square roots are as exact for rare symbols as for common ones; in a byte they are finer than their noise."""
    share = counts / counts.sum(1, keepdim=True)
    return torch.where(counts > 0, (share.sqrt() * 256).round().clamp(1, 255), 0).to(torch.uint8)


def read_side(packed: bytes, shapes: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Class of each column per matrix, frequencies of all tables, number of symbols of each table."""
    most = sum(3 + columns + 256 * count_classes(rows, columns) for rows, columns in shapes)
    side = decompress_side(packed, most, "tables")
    labels, roots, sizes, at = [], [], [], 0
    for rows, columns in shapes:
        count, low, high = side[at : at + 3] if len(side) >= at + 3 else (0, 0, 0)
        width, body = high + 1 - low, at + 3 + columns
        at = body + count * width
        if not 0 < count <= count_classes(rows, columns) or width < 1 or at > len(side):
            raise ValueError("tables are cut short or impossible")
        label = torch.frombuffer(side, dtype=torch.uint8, count=columns, offset=body - columns).long()
        deltas = torch.frombuffer(side, dtype=torch.uint8, count=count * width, offset=body).view(count, width)
        table = torch.zeros(count, 256, dtype=torch.uint8)
        table[:, low : high + 1] = deltas.cumsum(1)
        if label.max() >= count or not table.any(1).all():
            raise ValueError("a column has no table")
        labels.append(label)
        roots.append(table)
        sizes.append(label.bincount(minlength=count) * rows)
    if at != len(side):
        raise ValueError("tables do not end where they should")
    return labels, build_frequencies(torch.cat(roots)), torch.cat(sizes)


def classify_columns(codes: Tensor) -> Classes:
    """The number of classes that costs the fewest bytes."""
    columns, low, high = codes.shape[1], int(codes.min()) + 128, int(codes.max()) + 128
    index = (codes.long() + 128 + 256 * torch.arange(columns)).flatten()
    counts = index.bincount(minlength=256 * columns).view(columns, 256)[:, low : high + 1].double()
    by_size = (counts @ (torch.arange(low, high + 1).double() - 128).square()).argsort(stable=True)
    best: Classes | None = None
    for n_classes in (1, 2, 4, 8, 16):
        if n_classes > count_classes(*codes.shape):
            break
        wanted = torch.empty(columns, dtype=torch.long)
        wanted[by_size] = torch.arange(columns) * n_classes // columns
        for _ in range(0 if n_classes == 1 else 5):  # k-means, with the price for a distance
            _, _, prices = price_classes(counts, drop_empty(wanted))
            wanted = (counts @ prices.T).argmin(1)
        labels = drop_empty(wanted)
        sums, roots, prices = price_classes(counts, labels)
        deltas = torch.cat([roots[:, :1], roots.diff(dim=1)], 1)
        side = bytes([len(roots), low, high, *labels.tolist(), *deltas.flatten().tolist()])
        n_bytes = len(compress_side(side)) + float((sums * prices).sum()) / 2048
        if best is None or n_bytes < best.n_bytes:
            best = Classes(n_bytes, side, labels, F.pad(roots, (low, 255 - high)))
    assert best is not None
    return best


def drop_empty(labels: Tensor) -> Tensor:
    """The same classes, counted from 0 without the ones that no column is in."""
    renamed: Tensor = labels.unique(return_inverse=True)[1]
    return renamed


def price_classes(counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per class: how often each symbol occurs, its table, and the price of each symbol in whole 1/256 bits."""
    sums = torch.stack([counts[labels == label].sum(0) for label in range(int(labels.max()) + 1)])
    roots = compute_roots(sums)
    prices = (256 * (TABLE_BITS - build_frequencies(roots).double().clamp_min(2**-40).log2())).round()
    return sums, roots, prices


def compress_side(side: bytes) -> bytes:
    return lzma.compress(side, lzma.FORMAT_RAW, filters=FILTERS)


def decompress_side(packed: bytes, most: int, what: str) -> bytearray:
    """At most so many bytes: a hostile stream cannot make us allocate more."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    try:
        side = bytearray(reader.decompress(packed, most + 1))
    except lzma.LZMAError:
        raise ValueError(f"{what} do not decompress") from None
    if not reader.eof or reader.unused_data:
        raise ValueError(f"{what} do not end where they should")
    return side
