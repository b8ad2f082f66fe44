"""The artifact: the one file that is scored.

    8 bytes  magic "LOOPGOLF"    u32 version    u32 header length    header: UTF-8 JSON
    payload: two compressed streams, integer codes and fp16    last 32 bytes: sha256 of all before
    header = {config: the settings that differ from the defaults, tokenizer: {sha256, vocab},
              streams: [{codec, bytes, raw_bytes}]}

The tensors of a file, their order, shapes and formats follow from its config, so no table of them is stored: `describe`
tells them, a function of the stored settings. A setting that is missing has its default, so files outlive new options;
one that is unknown is refused by name. Nothing in a file is executed, and nothing in it is believed before it was
checked. Files of version 2, which stored all settings and a table of tensors, are read by artifact_v2.py.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor

from loopgolf.coder import decode_matrices, decode_rows, encode_rows
from loopgolf.errors import ArtifactError
from loopgolf.quantize import Format, StoredTensor

MAGIC = b"LOOPGOLF"
VERSION = 3
PREFIX_BYTES = 16  # magic, version, header length
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_RAW_BYTES = 1 << 30
STREAMS = (torch.int8, torch.float16)  # what lies in each stream, in the order of the file
MATRIX_CODECS = {
    "rans_classes": decode_rows,
    "rans": decode_matrices,  # of files from before equal rows were stored once, with classes of columns only
}


class Described(NamedTuple):
    """A parameter as the settings of a file imply it."""

    shape: tuple[int, ...]
    format: Format

    def stored(self, name: str) -> dict[str, StoredTensor]:
        return {f"{name}{tensor.suffix}": tensor for tensor in self.format.layout(self.shape)}


Layout = dict[str, Described]
Describe = Callable[[dict[str, Any]], Layout]


@dataclass(frozen=True)
class Stream:
    """One compressed stream of a file."""

    codec: str
    bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the settings that it stores, what tells its tokenizer apart, its tensors as they lie in the
    file (codes, steps, fp16) and as the model uses them, size and digest of the whole file."""

    version: int
    stored: dict[str, Any]
    tokenizer: dict[str, Any]
    layout: Layout
    streams: list[Stream]
    raw: dict[str, Tensor]
    tensors: dict[str, Tensor]
    size: int
    sha256: str


def require(is_good: bool, otherwise: str) -> None:
    if not is_good:
        raise ArtifactError(otherwise)


# --- writing


def pack_artifact(
    stored: dict[str, Any], layout: Layout, raw: Mapping[str, Tensor], tokenizer: dict[str, Any]
) -> bytes:
    """`raw`: the stored tensors by name. The same tensors always give the same bytes: no time, host or user in it."""
    streams: list[Stream] = []
    payload = b""
    for dtype in STREAMS:
        tensors = [raw[name].cpu().contiguous() for name, _ in stored_tensors(layout, dtype)]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        codec, packed = compress(content, tensors if dtype == torch.int8 else [])
        streams.append(Stream(codec, len(packed), len(content)))
        payload += packed
    fields = dict(config=stored, tokenizer=tokenizer, streams=[vars(stream) for stream in streams])
    header = json.dumps(fields, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<II", VERSION, len(header)) + header + payload
    return body + hashlib.sha256(body).digest()


def stored_tensors(layout: Layout, dtype: torch.dtype) -> Iterable[tuple[str, StoredTensor]]:
    """Name and description of everything in the stream of a dtype, in the order of the file."""
    for name, described in layout.items():
        for stored_name, tensor in described.stored(name).items():
            if tensor.dtype == dtype:
                yield stored_name, tensor


def compress(content: bytes, matrices: list[Tensor]) -> tuple[str, bytes]:
    """The codec that makes a stream smallest, and its bytes. zstd-22 takes half a minute for millions of codes and
    loses on them, so there it is only tried where a quick level wins already."""
    choices = {"rans_classes": encode_rows(matrices)} if matrices else {}
    if not matrices or len(zstandard.compress(content, 3)) < len(choices["rans_classes"]):
        choices["zstd"] = zstandard.compress(content, 22)
    if not matrices:
        # first bytes are alike, second ones are noise: parameter-golf #1089
        choices["zstd_split"] = zstandard.compress(content[0::2] + content[1::2], 22)
    codec = min(choices, key=lambda name: len(choices[name]))
    return codec, choices[codec]


# --- reading


def unpack_artifact(content: bytes, describe: Describe) -> Artifact:
    """Checks everything before it allocates anything that the file asks for."""
    least = PREFIX_BYTES + DIGEST_BYTES
    require(len(content) >= least and content[:8] == MAGIC, "it is too short or does not start like an artifact")
    version, header_bytes = struct.unpack("<II", content[8:PREFIX_BYTES])
    require(version in (2, VERSION), f"it has version {version}, this script reads 2 and {VERSION}")
    room = min(MAX_HEADER_BYTES, len(content) - least)
    require(header_bytes <= room, f"its header claims {header_bytes} bytes, more than it can hold")
    is_whole = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
    require(is_whole, "its digest does not match: truncated or changed")
    header = content[PREFIX_BYTES : PREFIX_BYTES + header_bytes]
    payload = content[PREFIX_BYTES + header_bytes : -DIGEST_BYTES]
    if version == 2:
        stored, tokenizer, layout, streams, raw = import_v2()(header, payload, describe)
    else:
        stored, tokenizer, streams = read_header(header)
        layout = describe(stored)
        raw = read_streams(payload, streams, [list(stored_tensors(layout, dtype)) for dtype in STREAMS])
    tensors = dequantize_all(layout, raw)
    return Artifact(
        version=version,
        stored=stored,
        tokenizer=tokenizer,
        layout=layout,
        streams=streams,
        raw=raw,
        tensors=tensors,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def import_v2() -> Any:
    """The reader of old files, which packed scripts leave out."""
    try:
        from loopgolf.artifact_v2 import read_v2
    except ModuleNotFoundError:
        raise ArtifactError("it has version 2, which packed scripts do not read; use the repository's script") from None
    return read_v2


def read_header(header: bytes) -> tuple[dict[str, Any], dict[str, Any], list[Stream]]:
    """Settings, tokenizer and streams, each of the right kind."""
    try:
        content = json.loads(header.decode("utf-8"))
        stored, tokenizer = content["config"], content["tokenizer"]
        streams = [Stream(entry["codec"], entry["bytes"], entry["raw_bytes"]) for entry in content["streams"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"its header cannot be read ({error.__class__.__name__})") from None
    sizes = [size for stream in streams for size in (stream.bytes, stream.raw_bytes)]
    are_sizes = all(type(size) is int and size >= 0 for size in sizes) and len(streams) == len(STREAMS)
    have_names = all(isinstance(stream.codec, str) for stream in streams)
    is_known = isinstance(stored, dict) and isinstance(tokenizer, dict) and set(tokenizer) == {"sha256", "vocab"}
    require(are_sizes and have_names and is_known, "its header holds values of another kind")
    return stored, tokenizer, streams


def read_streams(
    payload: bytes, streams: list[Stream], tables: list[list[tuple[str, StoredTensor]]]
) -> dict[str, Tensor]:
    """The tensors of all streams, once their sizes are those that the tables need."""
    needed = [sum(tensor.n_bytes for _, tensor in table) for table in tables]
    are_sized = [stream.raw_bytes for stream in streams] == needed and sum(needed) <= MAX_RAW_BYTES
    is_filled = sum(stream.bytes for stream in streams) == len(payload)
    require(are_sized and is_filled, "its streams do not fit its config and its size")
    raw: dict[str, Tensor] = {}
    start = 0
    for stream, table in zip(streams, tables):
        packed = payload[start : start + stream.bytes]
        start += stream.bytes
        shapes = [tensor.shape for _, tensor in table if tensor.dtype == torch.int8]
        raw |= split_stream(decompress(stream, packed, shapes), table)
    return raw


def decompress(stream: Stream, packed: bytes, shapes: list[tuple[int, ...]]) -> bytes:
    """`shapes`: of the matrices of codes in this stream."""
    try:
        if stream.codec in MATRIX_CODECS and shapes:
            decode = MATRIX_CODECS[stream.codec]
            matrices = [(rows, columns) for rows, columns in shapes]
            return b"".join(codes.numpy().tobytes() for codes in decode(packed, matrices))
        is_known = stream.codec in ("zstd", "zstd_split")
        require(is_known, f"a stream has the codec {stream.codec!r}, unknown to this version")
        is_sized = zstandard.frame_content_size(packed) == stream.raw_bytes
        require(is_sized, "a stream has not the size that it promises")
        if not stream.raw_bytes:
            return b""
        content = zstandard.ZstdDecompressor().decompress(packed, max_output_size=stream.raw_bytes)
        if stream.codec == "zstd_split":
            content = join_bytes(content)
    except (ValueError, zstandard.ZstdError) as error:
        raise ArtifactError(f"a stream does not decode: {error}") from None
    require(len(content) == stream.raw_bytes, "a stream has not the size that it promises")
    return content


def join_bytes(content: bytes) -> bytes:
    """Numbers of two bytes, from all their first and then all their second bytes."""
    whole = bytearray(len(content))
    half = (len(content) + 1) // 2
    whole[0::2], whole[1::2] = content[:half], content[half:]
    return bytes(whole)


def split_stream(content: bytes, table: list[tuple[str, StoredTensor]]) -> dict[str, Tensor]:
    tensors = {}
    start = 0
    for name, described in table:
        piece = bytearray(content[start : start + described.n_bytes])
        start += described.n_bytes
        flat = torch.frombuffer(piece, dtype=described.dtype) if piece else torch.empty(0, dtype=described.dtype)
        tensors[name] = flat.view(described.shape)
    return tensors


def dequantize_all(layout: Layout, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the model computes with, once the stored ones are known to be good."""
    weights = {}
    for name, described in layout.items():
        stored = [raw[stored_name] for stored_name in described.stored(name)]
        is_valid = described.format.is_valid(stored)
        require(is_valid, f"tensor {name} holds codes beyond its bits or values that are not finite")
        weights[name] = described.format.dequantize(stored)
    return weights
