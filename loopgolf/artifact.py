"""The artifact: the one file that is scored.

    8 bytes  magic "LOOPGOLF"    u32 version    u32 header length    header: UTF-8 JSON
    payload: two compressed streams    last 32 bytes: sha256 of all before
    header = {config: the model and how it is scored, tokenizer: {sha256, vocab}, tensors: [{name, shape, bits, scheme,
              stream, offset, bytes}], streams: [{codec, bytes, raw_bytes}]}

Nothing in a file is executed, and nothing in it is believed before it was checked: its table of tensors has to be the
one that follows from its config. What tensors a config has, only the model knows: `shapes_of` tells, in their order,
with a `NAME.step` behind each matrix that lies on a grid as integer codes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zstandard
from torch import Tensor

from loopgolf.coder import decode_matrices, encode_matrices
from loopgolf.errors import ArtifactError
from loopgolf.quantize import Grid, dequantize_tensor, quantize_tensor, round_with_feedback

MAGIC, VERSION = b"LOOPGOLF", 2
MAX_HEADER_BYTES, MAX_RAW_BYTES = 1 << 20, 1 << 30
CODES, PLAIN = 0, 1  # streams: integer codes, and everything in fp16
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the config fields it stores, its tensors as they lie in the file (codes, steps, fp16) and as
    the model uses them, what tells the tokenizer apart, size and digest of the whole file."""

    stored: dict
    tokenizer: dict
    layout: list[dict]
    streams: list[dict]
    raw: dict[str, Tensor]
    tensors: dict[str, Tensor]
    size: int
    sha256: str


def require(is_good: bool, otherwise: str) -> None:
    if not is_good:
        raise ArtifactError(otherwise)


def build_layout(shapes: Shapes, bits: dict[str, int]) -> list[dict]:
    """The table of tensors: `bits` of each that lies on a grid, the rest in fp16."""
    layout, ends = [], [0, 0]
    for name, shape in shapes.items():
        is_code = f"{name}.step" in shapes
        width, scheme, stream = (bits.get(name, 0), "int", CODES) if is_code else (16, "fp16", PLAIN)
        entry = dict(name=name, shape=list(shape), bits=width, scheme=scheme, stream=stream, offset=ends[stream])
        layout.append(entry | dict(bytes=math.prod(shape) * (1 if is_code else 2)))
        ends[stream] += layout[-1]["bytes"]
    return layout


def quantize_weights(weights: dict, grids: dict[str, Grid | None], hessians: dict) -> dict[str, Tensor]:
    """What is stored: codes and steps on the grids, with feedback where the inputs are known, fp16 for the rest."""
    tensors = {}
    for name, grid in grids.items():
        weight, hessian = weights[name], hessians.get(name)
        if not grid:
            tensors[name] = weight.half()
            continue
        rounded = quantize_tensor(weight, grid) if hessian is None else round_with_feedback(weight, hessian, grid)
        tensors[name], tensors[f"{name}.step"] = rounded
    return tensors


def pack_artifact(stored: dict, tensors: dict[str, Tensor], bits: dict[str, int], tokenizer: dict) -> bytes:
    """The same tensors always give the same bytes: no time, host or user in it."""
    layout = build_layout({name: t.shape for name, t in tensors.items()}, bits)
    by_stream = [[tensors[e["name"]].cpu() for e in layout if e["stream"] == stream] for stream in (CODES, PLAIN)]
    raws = [b"".join(t.contiguous().numpy().tobytes() for t in group) for group in by_stream]
    codecs, packed = zip(*(compress(raw, matrices) for raw, matrices in zip(raws, (by_stream[CODES], []))))
    table = [dict(codec=c, bytes=len(p), raw_bytes=len(raw)) for c, p, raw in zip(codecs, packed, raws)]
    content = dict(config=stored, tokenizer=tokenizer, tensors=layout, streams=table)
    header = json.dumps(content, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<II", VERSION, len(header)) + header + b"".join(packed)
    return body + hashlib.sha256(body).digest()


def compress(raw: bytes, matrices: list[Tensor]) -> tuple[str, bytes]:
    """The codec that makes a stream smallest, and its bytes. zstd-22 takes half a minute for millions of codes and
    loses on them, so there it is only tried where a quick level wins already."""
    choices = {"rans": encode_matrices(matrices)} if matrices else {}
    if not matrices or len(zstandard.compress(raw, 3)) < len(choices["rans"]):
        choices["zstd"] = zstandard.compress(raw, 22)
    codec = min(choices, key=lambda name: len(choices[name]))
    return codec, choices[codec]


def unpack_artifact(content: bytes, shapes_of: Callable[[dict], Shapes]) -> Artifact:
    """Checks everything before it allocates anything that the file asks for."""
    require(len(content) >= 48 and content[:8] == MAGIC, "it is too short or does not start like an artifact")
    version, header_bytes = struct.unpack("<II", content[8:16])
    require(version == VERSION, f"it has version {version}, this script reads {VERSION}")
    at, end, digest = 16 + header_bytes, len(content) - 32, hashlib.sha256(content[:-32]).digest()
    require(at <= min(16 + MAX_HEADER_BYTES, end), f"its header claims {header_bytes} bytes, more than it can hold")
    require(digest == content[-32:], "its digest does not match: truncated or changed")
    try:
        header = json.loads(content[16:at].decode("utf-8"))
        stored, tokenizer, tensors, streams = (header[key] for key in ("config", "tokenizer", "tensors", "streams"))
        bits = {entry["name"]: entry["bits"] for entry in tensors}
        codecs, packed_sizes, raw_sizes = zip(*((s["codec"], s["bytes"], s["raw_bytes"]) for s in streams))
        well_typed = all(type(n) is int and n >= 0 for n in (*bits.values(), *packed_sizes))
        require(well_typed and set(tokenizer) == {"sha256", "vocab"}, "its header holds values of another kind")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"its header cannot be read ({error.__class__.__name__})") from None
    layout = build_layout(shapes_of(stored), bits)
    needed = tuple(sum(e["bytes"] for e in layout if e["stream"] == stream) for stream in (CODES, PLAIN))
    is_ours = tensors == layout and all(2 <= e["bits"] <= 8 for e in layout if e["scheme"] == "int")
    is_sized = raw_sizes == needed and sum(needed) <= MAX_RAW_BYTES and at + sum(packed_sizes) == end
    require(is_ours and is_sized, "its tables of tensors and streams do not fit its config and its size")
    shapes, raws = [tuple(e["shape"]) for e in layout if e["stream"] == CODES], []
    for codec, n_bytes, raw_bytes in zip(codecs, packed_sizes, raw_sizes):
        raws.append(decompress(codec, content[at : at + n_bytes], raw_bytes, [] if raws else shapes))
        at += n_bytes
    raw = {e["name"]: read_tensor(raws[e["stream"]], e) for e in layout}
    steps = {name: raw.get(f"{name}.step") for name in raw if not name.endswith(".step")}
    weights = {n: raw[n] if step is None else dequantize_tensor(raw[n], step) for n, step in steps.items()}
    return Artifact(stored, tokenizer, layout, streams, raw, weights, len(content), hashlib.sha256(content).hexdigest())


def decompress(codec: str, packed: bytes, raw_bytes: int, shapes: list[tuple[int, int]]) -> bytes:
    try:
        if codec == "rans" and shapes:
            return b"".join(codes.numpy().tobytes() for codes in decode_matrices(packed, shapes))
        is_sized = codec == "zstd" and zstandard.frame_content_size(packed) == raw_bytes
        reader = zstandard.ZstdDecompressor()
        raw = reader.decompress(packed, max_output_size=raw_bytes) if is_sized and raw_bytes else b""
    except (ValueError, zstandard.ZstdError) as error:
        raise ArtifactError(f"a stream does not decode: {error}") from None
    require(is_sized and len(raw) == raw_bytes, "a stream has an unknown codec or not the size that it promises")
    return raw


def read_tensor(raw: bytes, entry: dict) -> Tensor:
    """One tensor out of its stream."""
    is_code, piece = entry["scheme"] == "int", bytearray(raw[entry["offset"] : entry["offset"] + entry["bytes"]])
    dtype = torch.int8 if is_code else torch.float16
    values = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
    is_good = values.short().abs() <= Grid(entry["bits"], 1.0).largest if is_code else values.isfinite()
    require(is_good.all().item(), f"tensor {entry['name']} holds codes beyond its bits or values that are not finite")
    return values.view(entry["shape"])
