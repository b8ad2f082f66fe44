"""What is drawn follows the model's own distribution, a token at a time or all at once; what is measured is the score.

On a CPU: pytest tests/test_sample.py
"""

import bz2
import io
import json
import lzma
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from helpers import tiny_context, write_artifact
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from loopgolf.cache import Cache
from loopgolf.scoring import BpbMeter
from tools import sample, surprise
from tools.lib.predictor import Predictor, load_predictor


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer_bytes) -> Path:
    return write_artifact(tmp_path_factory.mktemp("run"), tokenizer_bytes, seq_len=24, batch_tokens=24, band=16)


@pytest.fixture(scope="module")
def predictor(artifact) -> Predictor:
    found = load_predictor(artifact)
    return replace(found, ctx=tiny_context(), model=found.model.float())


# --- sample -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_logits_are_those_without_a_cache(predictor):
    """Up to a window against a plain forward; behind it against one forward over all that came before."""
    row, cache = predictor.row(torch.randint(4, 384, (60,)).tolist()), Cache(predictor.config.seq_len)
    for at in range(len(row)):
        found = sample.stream_logits(predictor, cache, row[at : at + 1])
        past = row[None, : at + 1]
        again = predictor.model.hidden(past, cache=Cache(cache.window) if at >= cache.window else None)
        torch.testing.assert_close(found, predictor.model.logits(again[:, -1])[0], rtol=0, atol=1e-4)
    assert len(cache.kept) == predictor.model.plan.count_passes(1) > len(predictor.model.blocks), "a slot per pass"
    assert cache.length == cache.window, "the stream outgrew the window"


def test_a_long_prompt_can_come_in_pieces(predictor):
    row = predictor.row(torch.randint(4, 384, (70,)).tolist())
    whole, parts = Cache(16), Cache(16)
    expected = sample.stream_logits(predictor, whole, row)
    for piece in row.split([3, 1, 40, len(row) - 44]):
        found = sample.stream_logits(predictor, parts, piece)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


shares = npst.arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([0.0, 1e-9, 0.1, 0.1, 0.5, 3.0, 40.0]))


@given(shares.filter(lambda x: x.sum() > 0), st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]))
def test_the_fewest_tokens_that_reach_top_p(weights, top_p):
    probs = torch.from_numpy(weights / weights.sum())
    kept = sample.keep_top(probs, top_p)
    chosen = kept > 0
    assert kept.sum().item() == pytest.approx(1.0) and chosen.any()
    assert probs[chosen].sum() >= top_p - 1e-9
    assert probs[chosen].sum() - probs[chosen].min() < top_p + 1e-9, "one less would not reach it"
    assert probs[chosen].min() >= probs[~chosen].max() if (~chosen).any() else True
    torch.testing.assert_close(kept[chosen], probs[chosen] / probs[chosen].sum())


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_draws_follow_the_distribution(temperature, top_p):
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]), torch.Generator().manual_seed(5)
    counts = np.bincount([sample.draw(logits, temperature, top_p, generator) for _ in range(4000)], minlength=5)
    weights = np.exp(logits.numpy() / temperature)
    if top_p == 0.8:
        weights[3:] = 0  # 0.47, 0.28 and 0.17 reach it
    np.testing.assert_allclose(counts / 4000, weights / weights.sum(), atol=0.03)
    assert not counts[weights == 0].any()


def test_temperature_zero_takes_the_likeliest():
    assert sample.draw(torch.tensor([0.0, 3.0, 2.9]), 0.0, 0.1, torch.Generator()) == 1


def write(capsys, artifact: Path, *options: str) -> tuple[int, str, str]:
    code = sample.main([str(artifact), *options])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_the_seed_decides_what_is_drawn(artifact, capsys):
    texts = [write(capsys, artifact, "--prompt", "the list", "--tokens", "30", "--seed", seed)[1] for seed in "778"]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the list") and len(text) > 20 for text in texts)


def draw_these(monkeypatch, tokens: list[int]) -> None:
    left = iter(tokens)
    monkeypatch.setattr(sample, "draw", lambda *_: next(left))


def test_characters_come_out_whole_and_at_once(predictor, artifact, monkeypatch, capsys):
    text, writes = "a é😀\nb", []
    tokens = predictor.speller.spell_bytes(text)
    draw_these(monkeypatch, tokens)
    monkeypatch.setattr(
        sample, "print", lambda *words, end="\n", **_: writes.append("".join(words) + end), raising=False
    )
    assert sample.main([str(artifact), "--prompt", "x", "--tokens", str(len(tokens))]) == 0
    assert writes[: 1 + len(tokens)] == ["x", "a", " ", "", "é", "", "", "", "😀", "\n", "b"]


def test_a_document_starts_without_the_space_of_its_first_piece(predictor, artifact, monkeypatch, capsys):
    tokens = predictor.speller.to_tokens(b"the list")
    for prompt, expected in (("", "the list\n"), ("x", "x the list\n")):
        draw_these(monkeypatch, tokens)
        assert write(capsys, artifact, "--prompt", prompt, "--tokens", str(len(tokens)))[1] == expected


def test_the_model_can_end_a_document(predictor, artifact, monkeypatch, capsys):
    tokens = predictor.speller.to_tokens(b"the end")
    draw_these(monkeypatch, [*tokens, predictor.config.bos_id, *tokens])
    code, out, error = write(capsys, artifact, "--tokens", "50")
    assert (code, out) == (0, "the end\n") and error.startswith(f"# {len(tokens)} tokens in ") and "per second" in error


def test_every_line_of_the_input_is_a_prompt(artifact, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the list\n\n\xff not text")))
    code, _, error = write(capsys, artifact, "--interactive", "--tokens", "3")
    assert code == 0 and error.count(" tokens per second") == 3
    assert error.startswith("# 3 tokens in ")


@pytest.mark.parametrize("option, value", [("temperature", "-1"), ("temperature", "nan"), ("temperature", "inf"),
                                           ("top_p", "0"), ("top_p", "1.1"), ("tokens", "-1"), ("seed", str(2**63))])  # fmt: skip
def test_settings_that_cannot_work_are_refused(option, value, artifact, capsys):
    code, out, error = write(capsys, artifact, f"--{option}", value)
    assert code == 2 and not out and error.startswith(f"error: --{option} ") and error.count("\n") == 1


def test_no_artifact_is_one_line(tmp_path, capsys):
    code, _, error = write(capsys, tmp_path / "no.lg")
    assert code == 4 and error.count("\n") == 1 and "no.lg: cannot be read" in error


# --- surprise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "sliding", "banded", "sgd", "lora"])
def test_the_number_is_that_of_the_score(mode, predictor, documents, tmp_path):
    content = "\n".join(documents)[:500].encode()
    (tmp_path / "a.txt").write_bytes(content)
    predictor, meter = replace(predictor, mode=mode), BpbMeter(predictor.counter)
    report = surprise.measure(predictor, tmp_path / "a.txt")
    predictor.score(predictor.row(predictor.speller.to_tokens(content)), meter)
    assert report.bpb["artifact"] == pytest.approx(meter.total(predictor.ctx).bpb, rel=1e-6)
    assert (report.mode, report.bytes, report.tokens) == (mode, 500, meter.total(predictor.ctx).tokens)
    by_compressors = [
        zstandard.compress(content, 22),
        lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
        bz2.compress(content),
    ]
    assert [report.bpb[name] for name in ("zstd-22", "xz", "bz2")] == [
        8 * len(packed) / 500 for packed in by_compressors
    ]
    spans = sorted(report.spans, key=lambda span: span.start)
    assert len(spans) > 4 and "".join(span.text for span in spans).encode() == content
    sizes = np.diff([*(span.start for span in spans), 500])
    assert sizes @ [span.bpb for span in spans] == pytest.approx(500 * report.bpb["artifact"])
    assert [span.bpb for span in report.spans] == sorted((span.bpb for span in spans), reverse=True)


@given(st.lists(st.tuples(st.binary(max_size=5), st.floats(0, 20)), min_size=1, max_size=60))
def test_spans_cover_everything_once(pieces):
    spans = list(surprise.cut_spans([piece for piece, _ in pieces], np.array([bits for _, bits in pieces])))
    content = b"".join(piece for piece, _ in pieces)
    assert "".join(span.text for span in spans) == content.decode(errors="replace")
    assert spans[0].start == 0 and all(a.start < b.start for a, b in pairwise(spans))


def test_the_bits_of_marks_are_shown_with_their_word():
    pieces, bits = [b"a", b"", b" then", b"", b"\xc3", b"\xa9"], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    (span,) = surprise.cut_spans(pieces, np.array(bits))
    assert span.parts == [("a", 1.0), (" then", 6 / 5), ("é", 56 / 2)] and span.bpb == 63 / 8


def test_a_terminal_gets_colours_but_no_control_characters():
    span = surprise.Span(0, 1.0, [("a\x1b[2J", 0.0), ("\n\x07é", 99.0)])
    assert surprise.paint(span, False) == "a·[2J⏎·é"
    painted = surprise.paint(span, True)
    assert painted.startswith("\x1b[38;5;40ma·") and "\x1b[38;5;196m⏎·é\x1b[0m" in painted


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_only_on_a_terminal_that_wants_them(artifact, documents, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(documents[0][:300], encoding="utf-8")
    arguments = [str(artifact), str(tmp_path / "a.txt"), "--mode", "plain"]
    assert surprise.main(arguments) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "most surprising" in out and "least surprising" in out and "zstd-22" in out
    for no_color, is_colored in (("", True), ("1", False)):
        monkeypatch.setattr("sys.stdout", terminal := Terminal())
        monkeypatch.setenv("NO_COLOR", no_color)
        assert surprise.main(arguments) == 0
        assert ("\x1b[38;5;" in terminal.getvalue()) == is_colored


def test_a_report_as_json(artifact, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"the list of \xff values " * 9)
    assert surprise.main([str(artifact), str(tmp_path / "a"), str(tmp_path / "a"), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one == two and one["bytes"] == 189 and list(one["bpb"]) == ["artifact", "zstd-22", "xz", "bz2"]
    assert math.isfinite(one["bpb"]["artifact"]) and set(one["spans"][0]) == {"start", "bpb", "text"}


def test_files_that_cannot_be_measured(artifact, tmp_path, capsys):
    (tmp_path / "empty").touch()
    for name, fault in (("empty", "empty, so there is nothing"), ("absent", "cannot be read")):
        assert surprise.main([str(artifact), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and fault in error and error.count("\n") == 1
