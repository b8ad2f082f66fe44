"""A file comes back byte for byte, in every mode and with adaptation, and takes the bits that the score claims; anything
else than the same artifact and the same numbers is refused in one line.

On a CPU: pytest tests/test_codec.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_context, write_artifact
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from data.tokenizer import LETTERS_OF_NOBODY, encode_document, train_tokenizer
from loopgolf.scoring import BpbMeter, ByteCounter
from tools import codec
from tools.lib.predictor import Predictor, Speller, load_predictor
from train_gpt import build_scorer

MODES = ("plain", "sliding", "banded", "sgd", "lora")
ADAPT = dict(ttt_chunk=64, ttt_lr=0.5, lora_lr=0.3, band=24)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer_bytes) -> Path:
    return write_artifact(tmp_path_factory.mktemp("run"), tokenizer_bytes, **ADAPT)


@pytest.fixture(scope="module", params=["tokenizer", "marked_tokenizer"])
def speller(request) -> Speller:
    return Speller(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def predictor(artifact) -> Predictor:
    """In float32, where one token at a time and whole windows give nearly the same."""
    found = load_predictor(artifact)
    return replace(found, ctx=tiny_context(), model=found.model.float())


# --- bytes and tokens -------------------------------------------------------------------------------------------------


def assert_comes_back(speller: Speller, content: bytes) -> list[int]:
    tokens = speller.to_tokens(content)
    row = np.array([1, *tokens])
    assert speller.to_bytes(tokens) == content and min(row[1:], default=4) >= 4, "no control token"
    assert ByteCounter(speller.tokenizer).count(row[:-1], row[1:]) == len(content), "bytes by the rule of the score"
    return tokens


fragments = st.sampled_from([b" ", b"the", b"The", b"THE", b"\x01", b"\x03\x04", b" of", b"\n", b"\xff", b"\xe2\x96", "\u2581".encode(), b"\0", b"<s>", "é".encode(),
                             "\ue000".encode(), "😀".encode(), b"\xed\xa0\x80", b"<0x41>"])  # fmt: skip


@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace")),
                 st.lists(fragments, max_size=12).map(b"".join)))  # fmt: skip
def test_any_bytes_come_back(speller, content):
    assert_comes_back(speller, content)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_text_gets_the_tokens_of_a_document(speller, text):
    assert speller.to_tokens(text.encode()) == encode_document(speller.tokenizer, text)[1:]


def test_a_stray_byte_leaves_the_text_around_it(speller, documents):
    text = documents[0].encode()
    whole, half = speller.to_tokens(text), len(text) // 2
    broken = assert_comes_back(speller, text[:half] + b"\xff" + text[half:])
    assert len(broken) <= len(whole) + 8


def test_text_that_holds_every_private_letter(speller):
    assert_comes_back(speller, "".join(map(chr, LETTERS_OF_NOBODY)).encode() + "a \u2581".encode())


def test_what_a_tokenizer_would_change_goes_by_bytes(speller, monkeypatch):
    """A tokenizer that is not byte-exact: it squeezes blanks, as those with SentencePiece's own defaults do."""
    plain = encode_document

    def squeezing(tokenizer, text):
        return plain(tokenizer, " ".join(text.split()))

    monkeypatch.setattr("tools.lib.predictor.encode_document", squeezing)
    for content in (b"the list  of the", b" the", b"the\n of ", b"   ", "é\tx".encode()):
        assert_comes_back(speller, content)


# --- coder ------------------------------------------------------------------------------------------------------------

log_probs = npst.arrays(
    np.float32, st.integers(2, 40), elements=st.sampled_from([0.0, -1e-7, -0.5, -3, -20, -88, -np.inf])
)


@given(log_probs.filter(lambda x: np.isfinite(x).any()))
def test_frequencies_are_whole_and_leave_nothing_out(values):
    freqs = codec.compute_frequencies(values)
    assert freqs.sum() == 1 << codec.FREQ_BITS and freqs.min() >= 1
    shares = np.exp(values.astype(float)) / np.exp(values.astype(float)).sum()
    np.testing.assert_allclose(freqs / freqs.sum(), shares, rtol=0, atol=2 * len(values) / (1 << codec.FREQ_BITS))


@pytest.mark.parametrize("size", [2, 1024, 65536])
def test_frequencies_of_large_vocabularies(size):
    for values in (
        np.random.default_rng(size).normal(0, 8, size),
        np.zeros(size),
        np.where(np.arange(size) == 1, 0.0, -np.inf),
    ):
        freqs = codec.compute_frequencies(values)
        assert freqs.sum() == 1 << codec.FREQ_BITS and freqs.min() >= 1


def test_what_is_no_probability_is_refused():
    with pytest.raises(codec.DamagedFile, match="not a probability"):
        codec.compute_frequencies(np.array([0.0, math.nan]))


@given(st.lists(st.tuples(log_probs.filter(lambda x: np.isfinite(x).any()), st.integers(0, 10**6)), max_size=60))
def test_symbols_come_back_from_the_coder(steps):
    tables = [codec.compute_frequencies(values) for values, _ in steps]
    symbols = [pick % len(table) for table, (_, pick) in zip(tables, steps)]
    payload = codec.encode_intervals([(int(t[:s].sum()), int(t[s])) for t, s in zip(tables, symbols)])
    decoder = codec.IntervalDecoder(payload)
    assert [decoder.next_symbol(table) for table in tables] == symbols
    decoder.check_end()
    bits = sum(codec.FREQ_BITS - math.log2(t[s]) for t, s in zip(tables, symbols))
    # no lower bound: the state begins at 0, so a row of first symbols at the end of the text is free
    assert 8 * len(payload) <= bits + 65 + len(steps) * 0.001


@pytest.mark.parametrize("rare", [1, 3, 1 << 12, 1 << 23])
def test_many_symbols_come_back_from_the_coder(rare):
    tables = {0: (0, (1 << codec.FREQ_BITS) - rare), 1: ((1 << codec.FREQ_BITS) - rare, rare)}
    symbols = np.random.default_rng(rare).integers(0, 2, 3000).tolist()
    decoder = codec.IntervalDecoder(codec.encode_intervals([tables[symbol] for symbol in symbols]))
    freqs = np.array([tables[0][1], rare])
    assert [decoder.next_symbol(freqs) for _ in symbols] == symbols
    decoder.check_end()


def test_the_coder_notices_that_symbols_are_left():
    decoder = codec.IntervalDecoder(codec.encode_intervals([(1 << 23, 1 << 23)] * 3))
    for left in (True, True, False):
        decoder.next_symbol(np.array([1 << 23, 1 << 23]))
        if left:
            with pytest.raises(codec.DamagedFile, match="does not end with the last token"):
                decoder.check_end()
    decoder.check_end()


# --- files ------------------------------------------------------------------------------------------------------------


def call(capsys, command: str, artifact: Path, file: Path, out: Path, *extra: str) -> tuple[int, str, str]:
    code = codec.main([command, str(artifact), str(file), "--out", str(out), *extra])
    found = capsys.readouterr()
    return code, found.out, found.err


def go_round(capsys, artifact: Path, folder: Path, content: bytes, *extra: str) -> dict:
    (folder / "a").write_bytes(content)
    code, out, _ = call(capsys, "encode", artifact, folder / "a", folder / "b", "--json", *extra)
    assert code == 0
    assert call(capsys, "decode", artifact, folder / "b", folder / "c")[0] == 0
    assert (folder / "c").read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "c"], "no partial file is left"
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_file_comes_back_in_every_mode(mode, artifact, documents, tmp_path, capsys):
    content = "\n".join(documents)[:400].encode()
    report = go_round(capsys, artifact, tmp_path, content, "--mode", mode)
    assert report["mode"] == mode and report["bytes"] == len(content)
    assert report["coded_bpb"] == 8 * report["payload_bytes"] / len(content)
    assert report["coded_bpb"] == pytest.approx(report["claimed_bpb"], rel=0.02), "bfloat16, and a state of 8 bytes"
    assert report["overhead_percent"] == pytest.approx(100 * (report["coded_bpb"] / report["claimed_bpb"] - 1))


ODD = {"empty": b"", "blank": b" ", "random": bytes(np.random.default_rng(0).integers(0, 256, 60, np.uint8)),
       "emoji": "👩‍👩‍👧 🇩🇪 ▁ é".encode(), "marks": b"<s></s><unk> <0x41>\0"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("mode", ["plain", "sgd", "lora"])
def test_odd_files_come_back(name, mode, artifact, tmp_path, capsys):
    go_round(capsys, artifact, tmp_path, ODD[name], "--mode", mode)


class Recorder:
    def __init__(self):
        self.rows = {}

    def add(self, tokens, positions, log_probs):
        self.rows |= zip(positions.tolist(), log_probs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_coder_uses_the_probabilities_of_the_score(mode, predictor, documents):
    """One token at a time, and ignorant of what comes, it gets what score_tokens gets from whole windows."""
    predictor = replace(predictor, mode=mode)
    tokens = predictor.speller.to_tokens("\n".join(documents).encode())[:230]
    meter, found = Recorder(), []

    def choose(log_probs):
        found.append(log_probs)
        return tokens[len(found) - 1]

    assert codec.walk(predictor, len(tokens), choose, "") == tokens
    predictor.score(predictor.row(tokens), meter)
    expected = torch.stack([meter.rows[position] for position in range(1, 1 + len(tokens))])
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=2e-3)
    if mode in ("sgd", "lora"):
        still = build_scorer("banded" if mode == "sgd" else "plain", predictor.model, predictor.config, predictor.ctx)
        other = Recorder()
        for chunk in still.tracks(predictor.row(tokens))[0]:
            for positions, log_probs in still.log_probs(predictor.row(tokens), chunk[:4]):
                other.add(tokens, positions, log_probs)
        assert (torch.stack(found)[-1] - other.rows.get(len(tokens), found[0])).abs().max() > 0.1, "it did adapt"


def test_the_claim_is_that_of_the_meter(predictor, documents):
    tokens, meter = predictor.speller.to_tokens(documents[1].encode()), BpbMeter(predictor.counter)
    predictor = replace(predictor, mode="banded")
    predictor.score(predictor.row(tokens), meter)
    payload = codec.encode_tokens(predictor, tokens)
    assert 8 * len(payload) == pytest.approx(meter.total(predictor.ctx).nats / math.log(2), abs=65)


@pytest.fixture(scope="module")
def coded(artifact, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    (folder / "a.txt").write_bytes(b"what the list of values holds")
    assert codec.main(["encode", str(artifact), str(folder / "a.txt"), "--out", str(folder / "a.lgz")]) == 0
    return folder / "a.lgz"


def refuse(capsys, artifact: Path, file: Path, folder: Path, *extra: str) -> tuple[int, str]:
    before = sorted(folder.iterdir())
    code, _, error = call(capsys, "decode", artifact, file, folder / "out", *extra)
    assert sorted(folder.iterdir()) == before and error.startswith("error: ") and error.count("\n") == 1
    return code, error


OTHER = dict(artifact="0" * 64, mode="lora", torch="1.0", numpy="1.0", device="cuda Y", instructions="none", dtype="float8",
             threads=7)  # fmt: skip


def test_other_numbers_are_refused(artifact, coded, tmp_path, capsys):
    assert OTHER.keys() == codec.SAME.keys()
    header, payload = codec.unpack_file(coded.read_bytes())
    for name, value in OTHER.items():
        (tmp_path / "x").write_bytes(codec.pack_file(header | {name: value}, payload))
        mode = ["--mode", header["mode"]]
        code, error = refuse(capsys, artifact, tmp_path / "x", tmp_path, *mode)
        assert code == 2 and f"coded with {name} {value}, here it is {header[name]}" in error
    code, error = refuse(capsys, artifact, coded, tmp_path, "--mode", "sliding")
    assert code == 2 and "coded with mode plain, here it is sliding" in error


def test_damaged_files_are_refused(artifact, coded, tmp_path, capsys):
    content = coded.read_bytes()
    changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 53)]
    for damaged in [*changed, b"", content[:47], content[:-1], content + b"\0", b"plain text" * 9]:
        (tmp_path / "x").write_bytes(damaged)
        code, error = refuse(capsys, artifact, tmp_path / "x", tmp_path)
        assert code == 4 and str(tmp_path / "x") in error, error


@pytest.mark.parametrize(
    "change", [dict(tokens=-1), dict(tokens=10**9), dict(bytes="1"), dict(mode="best"), dict(extra=1)]
)
def test_headers_that_make_no_sense_are_refused(change, artifact, coded, tmp_path, capsys):
    header, payload = codec.unpack_file(coded.read_bytes())
    (tmp_path / "x").write_bytes(codec.pack_file(header | change, payload))
    assert refuse(capsys, artifact, tmp_path / "x", tmp_path)[0] == 4
    (tmp_path / "x").write_bytes(codec.pack_file([1], payload))
    assert refuse(capsys, artifact, tmp_path / "x", tmp_path)[0] == 4


@pytest.mark.slow
def test_bytes_that_are_not_the_promised_ones_are_not_written(artifact, coded, tmp_path, capsys):
    header, payload = codec.unpack_file(coded.read_bytes())
    wrong = bytes([*payload[:-2], payload[-2] ^ 8, payload[-1]])
    cases = [(header, wrong), (header, payload[:-4]), (header, payload[:-1]), (header, b""), (header, payload + bytes(4)),
             (header | dict(tokens=header["tokens"] - 1), payload), (header | dict(sha256="0" * 64, code="x"), payload)]  # fmt: skip
    for case in cases:
        (tmp_path / "x").write_bytes(codec.pack_file(*case))
        code, error = refuse(capsys, artifact, tmp_path / "x", tmp_path)
        assert code == 4 and ("it was coded with code x" in error) == (case is cases[-1])


def test_wrong_input_is_one_line(artifact, coded, tmp_path, capsys):
    (tmp_path / "other.model").write_bytes(b"noise")
    (tmp_path / "artifact.lg").write_bytes(artifact.read_bytes())
    (tmp_path / "bad.lg").write_bytes(artifact.read_bytes()[:-1])
    text = coded.with_name("a.txt")
    for command, args, expected, fault in [
        ("encode", (artifact, tmp_path / "absent", tmp_path / "out"), 2, "cannot be read"),
        ("encode", (artifact, text, tmp_path / "no" / "out"), 2, "folder that exists"),
        ("encode", (artifact, text, tmp_path), 2, "no file can be written there"),
        (
            "encode",
            (artifact, text, tmp_path / "out", "--tokenizer", str(tmp_path / "other.model")),
            2,
            "not a Sentence",
        ),
        ("encode", (tmp_path / "artifact.lg", text, tmp_path / "out"), 2, "--tokenizer"),
        ("encode", (tmp_path / "bad.lg", text, tmp_path / "out"), 4, "digest"),
        ("decode", (artifact, text, tmp_path / "out"), 4, "not written by"),
    ]:
        code, _, error = call(capsys, command, *args)
        assert code == expected and fault in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(artifact, tmp_path, documents, capsys):
    train_tokenizer(documents[:2], tmp_path / "other.model", 320)
    arguments = (artifact, artifact, tmp_path / "out", "--tokenizer", str(tmp_path / "other.model"))
    code, _, error = call(capsys, "encode", *arguments)
    assert code == 2 and "not the tokenizer of this artifact" in error
