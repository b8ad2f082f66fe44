"""The artifact file: exact, deterministic, laid out as the format says, and every kind of damage is one ArtifactError.

Damage that the digest would catch is sealed again first, so that the checks behind it are reached.
CPU: pytest tests/test_artifact.py
"""

import copy
import hashlib
import json
import os
import struct

import pytest
import torch
import zstandard
from helpers import SMALL, pack_weights, plan_formats, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from loopgolf.artifact import STREAMS, VERSION, Stream, decompress, stored_tensors, unpack_artifact
from loopgolf.errors import ArtifactError
from loopgolf.quantize import StoredTensor
from loopgolf.runtime import write_atomic
from train_gpt import LoopedGPT, describe_stored, load_artifact

TOKENIZER = dict(sha256="0" * 64, vocab=384)
CONFIG = tiny_config(**SMALL, core_k=8.0, edge_k=8.0, k_scale=1.0, plan="a(^b)*2")


@pytest.fixture(scope="module")
def model() -> LoopedGPT:
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def content(model) -> bytes:
    return pack_weights(CONFIG, model.state_dict(), TOKENIZER)


def split(content: bytes) -> tuple[dict, list[bytes]]:
    """Header and streams, by the format's description alone."""
    (length,) = struct.unpack("<I", content[12:16])
    header, at, streams = json.loads(content[16 : 16 + length]), 16 + length, []
    for stream in header["streams"]:
        streams.append(content[at : at + stream["bytes"]])
        at += stream["bytes"]
    assert at + 32 == len(content)
    return header, streams


def seal(header: dict | bytes, streams: list[bytes]) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"LOOPGOLF" + struct.pack("<II", VERSION, len(raw)) + raw + b"".join(streams)
    return body + hashlib.sha256(body).digest()


def reseal(content: bytes, change) -> bytes:
    """The artifact with its header changed by `change(header)` and a digest that fits."""
    header, streams = split(content)
    header = copy.deepcopy(header)
    return seal(change(header) or header, streams)


def repack(content: bytes, index: int, change) -> bytes:
    """The artifact with the raw bytes of one stream changed."""
    header, streams = split(content)
    shapes = [tensor.shape for _, tensor in table_of(index)] if index == 0 else []
    raw = bytearray(decompress(Stream(**header["streams"][index]), streams[index], shapes))
    changed = change(raw)
    streams[index] = zstandard.ZstdCompressor().compress(bytes(raw if changed is None else changed))
    header["streams"][index] |= dict(codec="zstd", bytes=len(streams[index]))
    return seal(header, streams)


def table_of(index: int) -> list[tuple[str, StoredTensor]]:
    """What lies in a stream of the artifact of CONFIG, in order."""
    return list(stored_tensors(describe_stored(CONFIG.stored()), STREAMS[index]))


def offset_of(name: str) -> tuple[int, int]:
    """Stream of a stored tensor, and where in its raw bytes it starts."""
    for index in range(len(STREAMS)):
        start = 0
        for stored_name, tensor in table_of(index):
            if stored_name == name:
                return index, start
            start += tensor.n_bytes
    raise KeyError(name)


def refuse(content: bytes) -> str:
    with pytest.raises(ArtifactError) as error:
        unpack_artifact(content, describe_stored)
    assert str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1500
    return str(error.value)


def test_tensors_come_back_exactly(model, content):
    artifact, found = unpack_artifact(content, describe_stored), plan_formats(CONFIG, model)
    assert artifact.stored == CONFIG.stored() and artifact.tokenizer == TOKENIZER
    assert artifact.size == len(content) and artifact.sha256 == hashlib.sha256(content).hexdigest()
    assert list(artifact.tensors) == [n for n, _ in model.named_parameters()]
    for name, p in model.state_dict().items():
        expected = found[name].dequantize(found[name].quantize(p))
        assert torch.equal(artifact.tensors[name], expected), name
    LoopedGPT(train_gpt.config_from_stored(artifact.stored)).load_state_dict(artifact.tensors)


def test_the_same_weights_give_the_same_bytes(model, content):
    again = pack_weights(CONFIG, model.state_dict(), TOKENIZER)
    assert again == content


def test_layout(model, content):
    header, streams = split(content)
    assert content[:8] == b"LOOPGOLF" and struct.unpack("<I", content[8:12]) == (3,)
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    assert set(header) == {"config", "tokenizer", "streams"} and header["tokenizer"] == TOKENIZER
    sizes = [sum(tensor.n_bytes for _, tensor in table_of(index)) for index in (0, 1)]
    assert sizes == [stream["raw_bytes"] for stream in header["streams"]]
    assert header["streams"][1]["codec"] == "zstd_split"
    split_bytes = zstandard.ZstdDecompressor().decompress(streams[1])
    half = len(split_bytes) // 2
    plain = bytes(byte for pair in zip(split_bytes[:half], split_bytes[half:]) for byte in pair)
    index, start = offset_of("passes.mixes")
    mixes = model.state_dict()["passes.mixes"].half().numpy().tobytes()
    assert index == 1 and plain[start : start + len(mixes)] == mixes
    assert header["config"] == CONFIG.stored() and not {"seed", "run_id", "data_path"} & set(header["config"])


def test_all_codecs_of_numbers_come_back(content):
    """Files of before the split have zstd; of each codec the smaller one is written."""
    found = unpack_artifact(content, describe_stored).raw
    assert repack(content, 1, bytes) != content
    for name, tensor in unpack_artifact(repack(content, 1, bytes), describe_stored).raw.items():
        assert torch.equal(tensor, found[name])


def test_the_header_of_a_small_file_is_small(content):
    assert struct.unpack("<I", content[12:16])[0] <= 1000


def test_the_header_is_in_the_order_of_the_model_whatever_the_order_of_the_weights(model, content):
    shuffled = dict(reversed(model.state_dict().items()))
    assert pack_weights(CONFIG, shuffled, TOKENIZER) == content


@pytest.mark.parametrize("size", [0, 7, 8, 15, 16, 40, 47, 48, 500, -1, -33])
def test_truncated(content, size):
    refuse(content[:size])


@pytest.mark.parametrize("extra", [b"\0", b"LOOPGOLF", b"x" * 1000])
def test_extended(content, extra):
    refuse(content + extra)
    refuse(extra + content)


@given(data=st.data())
def test_any_flipped_bit(content, data):
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[at] ^= 1 << bit
    refuse(bytes(damaged))


@given(data=st.binary(max_size=200))
def test_any_other_file(data):
    refuse(data)
    refuse(seal(data, []))


def test_wrong_version_and_header_length(content):
    for at, value, word in [
        (8, 1, "version"),
        (8, 4, "version"),
        (8, 0, "version"),
        (12, 1 << 31, "header"),
        (12, len(content), "header"),
    ]:
        damaged = content[:at] + struct.pack("<I", value) + content[at + 4 : -32]
        assert word in refuse(damaged + hashlib.sha256(damaged).digest())
    for value in (0, 10):
        damaged = content[:12] + struct.pack("<I", value) + content[16:-32]
        refuse(damaged + hashlib.sha256(damaged).digest())


def edit(path: str, value):
    """A change of one place of the header, like config.plan or tensors.0.bits."""

    def change(header):
        *parents, last = path.split(".")
        for key in parents:
            header = header[int(key) if isinstance(header, list) else key]
        header[int(last) if isinstance(header, list) else last] = value

    return change


HUGE = 10**30


WRONG_VALUES = [
    ("config.model_dim", 64),
    ("config.model_dim", "32"),
    ("config.model_dim", 32.0),
    ("config.model_dim", True),
    ("config.model_dim", None),
    ("config.model_dim", HUGE),
    ("config.model_dim", -32),
    ("config.vocab_size", 65536),
    ("config.plan", "ab"),
    ("config.plan", "a(^b"),
    ("config.plan", "(" * 900),
    ("config.plan", 3),
    ("config.plan", ""),
    ("config.depth", 0),
    ("config.smear", 1),
    ("config.smear", "yes"),
    ("config.smear", False),
    ("config.seed", 1),
    ("config.softcap", "30"),
    ("config.softcap", 0),
    ("config.softcap", HUGE),
    ("config.mlp_mult", 2.5),
    ("config.score_mode", "best"),
    ("config.seq_len", 0),
    ("config.stride", 0),
    ("config.num_heads", 0),
    ("config.num_kv_heads", 3),
    ("config.rope_dims", 3),
    ("config.ttt_freeze", "z"),
    ("config.xsa_passes", "9"),
    ("config.bigram_buckets", 1 << 24),
    ("config.ttt_momentum", -5),
    ("config.ttt_lr", float("nan")),
    ("config.ttt_lr", HUGE),
    ("config.stride", 64),
    ("config", {}),
    ("config", []),
    ("config", None),
    ("config", "x"),
    ("tokenizer", {}),
    ("tokenizer", []),
    ("tokenizer", None),
    ("tokenizer.extra", 1),
    ("streams", []),
    ("streams", {}),
    ("streams", None),
    ("streams.0", 5),
    ("streams.0.codec", "gzip"),
    ("streams.1.codec", "gzip"),
    ("streams.0.codec", None),
    ("streams.0.codec", ["zstd"]),
    ("streams.0.bytes", -1),
    ("streams.0.bytes", 10),
    ("streams.0.bytes", 1.5),
    ("streams.0.bytes", "9"),
    ("streams.0.bytes", None),
    ("streams.0.raw_bytes", 1 << 40),
    ("streams.0.raw_bytes", "9"),
    ("streams.1.raw_bytes", 0),
    ("streams.1.bytes", True),
]


def test_a_header_with_one_wrong_value(content):
    for path, value in WRONG_VALUES:
        assert refuse(reseal(content, edit(path, value))), path


def test_an_unknown_setting_is_refused_by_name_and_a_missing_one_has_its_default(content):
    problem = refuse(reseal(content, edit("config.xsa_pases", "all")))
    assert "xsa_pases" in problem and "did you mean xsa_passes" in problem
    assert "rope_base" not in split(content)[0]["config"]
    assert unpack_artifact(content, describe_stored).stored == CONFIG.stored()
    explicit = unpack_artifact(reseal(content, edit("config.rope_base", 10000.0)), describe_stored)
    assert train_gpt.config_from_stored(explicit.stored) == train_gpt.config_from_stored(CONFIG.stored())


def test_missing_and_extra_parts(content):
    for key in ("config", "tokenizer", "streams"):
        refuse(reseal(content, lambda h, key=key: h.pop(key) and None))
    refuse(reseal(content, lambda h: h["config"].pop("plan") and None))
    header, streams = split(content)
    refuse(seal(header, [*streams, b"more"]))
    refuse(reseal(content, lambda h: h["streams"].append(dict(codec="zstd", bytes=0, raw_bytes=0))))


def test_bits_that_are_not_the_ones_of_the_codes(content):
    assert "blocks" in refuse(reseal(content, edit("config.core_bits", 3)))
    for bits in (0, 1, 9, -6, 10**20):
        assert "core_bits" in refuse(reseal(content, edit("config.core_bits", bits)))


def test_codes_beyond_their_bits(content):
    index, start = offset_of("blocks.b.mlp.down.weight")
    for code in (-32, 32, -128, 127):
        change = lambda raw, code=code: raw.__setitem__(start + 3, code % 256)
        assert "blocks.b.mlp.down.weight" in refuse(repack(content, index, change))


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00])
@pytest.mark.parametrize("name", ["blocks.a.mlp.up.weight.step", "passes.mixes"])
def test_values_that_are_not_finite(content, name, bits):
    index, start = offset_of(name)

    def change(raw):
        raw[start : start + 2] = struct.pack("<H", bits)

    assert name.removesuffix(".step") in refuse(repack(content, index, change))


@pytest.mark.parametrize("index", [0, 1])
def test_streams_that_do_not_decode_to_their_size(content, index):
    refuse(repack(content, index, lambda raw: raw[:-1]))
    refuse(repack(content, index, lambda raw: raw + b"\0"))
    refuse(repack(content, index, lambda raw: bytes(1 << 26)))  # small packed, large unpacked
    header, streams = split(content)
    n_raw, n_packed = header["streams"][index]["raw_bytes"], header["streams"][index]["bytes"]
    for packed in (bytes(n_packed), b"\x28\xb5\x2f\xfd" + bytes(n_packed - 4), streams[index][: n_packed // 2]):
        header["streams"][index]["bytes"] = len(packed)
        refuse(seal(header, [packed if i == index else s for i, s in enumerate(streams)]))
    for lie in (b"\0", bytes(1000)):  # a stream that is longer than its tensors, and a header that agrees with it
        longer = bytes(n_raw) + lie
        packed = zstandard.ZstdCompressor().compress(longer)
        header["streams"][index] |= dict(codec="zstd", bytes=len(packed), raw_bytes=len(longer))
        refuse(seal(header, [packed if i == index else s for i, s in enumerate(streams)]))
    header["streams"][index]["raw_bytes"] = n_raw
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(n_raw))
    header["streams"][index]["bytes"] = len(unsized)
    refuse(seal(header, [unsized if i == index else s for i, s in enumerate(streams)]))


def test_a_bomb_that_lies_about_its_size(content):
    """A frame that promises the right size and holds a thousand times as much."""
    header, streams = split(content)
    n_raw = header["streams"][0]["raw_bytes"]
    honest = zstandard.ZstdCompressor().compress(bytes(n_raw))
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(n_raw << 10))
    head = zstandard.get_frame_parameters(honest)
    assert head.content_size == n_raw
    size = len(honest) and zstandard.frame_header_size(honest)
    forged = honest[:size] + bomb[zstandard.frame_header_size(bomb) :]
    header["streams"][0]["bytes"] = len(forged)
    refuse(seal(header, [forged, streams[1]]))


@pytest.mark.parametrize("raw", [
    b"[" * 100_000, b'{"config":' * 50_000, b"\xff\xfe", b"null", b"3", b"[]", b"", b"{", b'{"config":NaN}',
    b'{"config":' + b"9" * 10_000 + b"}", b'{"a":1}' * 2,
])  # fmt: skip
def test_headers_that_are_not_ours(content, raw):
    refuse(seal(raw, split(content)[1]))


@settings(max_examples=20)
@given(data=st.data())
def test_random_changes_to_the_header_never_crash(content, data):
    """Any value of the header replaced by any small piece of JSON: loads exactly as before or is refused."""
    header = copy.deepcopy(split(content)[0])
    at, key = header, data.draw(st.sampled_from(sorted(header)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    at[key] = data.draw(
        leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.text(max_size=3), leaves, max_size=2)
    )
    try:
        unpack_artifact(seal(header, split(content)[1]), describe_stored)
    except ArtifactError:
        pass


def test_errors_name_the_file(content, tmp_path):
    path = tmp_path / "broken.lg"
    path.write_bytes(content[:100])
    for place in (path, tmp_path / "absent.lg", tmp_path):
        with pytest.raises(ArtifactError, match=str(place)):
            load_artifact(place)
    path.write_bytes(content)
    assert load_artifact(path).size == load_artifact(str(path)).size == len(content)


def test_the_file_is_checked_before_a_model_is_built(content, monkeypatch):
    """A stored config of 100 GB, in a file whose streams are small, is refused without memory for its tensors."""

    def enlarge(header):
        header["config"] |= dict(model_dim=65536, vocab_size=65536)

    real = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: pytest.fail("a tensor was made") or real(*a, **k))
    refuse(reseal(content, enlarge))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "artifact.lg"
    write_atomic(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError):
                write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["artifact.lg"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
