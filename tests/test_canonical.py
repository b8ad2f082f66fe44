"""Canonical token masking: the table against the tokenizer itself, no text ever forbidden, distributions that sum to 1,
and the score of a file that decodes.

pytest tests/test_canonical.py
"""

import io
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import events, run_cli, tiny_config, tiny_context, tiny_model, tiny_options, write_artifact
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from data.shards import TokenStream
from data.tokenizer import encode_document, train_tokenizer
from loopgolf.canonical import FLOOR, CanonicalMask, find_allowed_pairs, mask_log_probs
from loopgolf.errors import ConfigError
from loopgolf.scoring import ByteCounter
from loopgolf.words import ESCAPE, JOIN, MARKS, TITLE, has_marks, mark_words
from tools import codec
from tools.audit import audit
from tools.lib.predictor import load_predictor

# appended to a model, it says: no normalisation, no space in front, no trimming of blanks
PLAIN_SPELLING = bytes([0x1A, 6, 0x18, 0, 0x20, 0, 0x28, 1])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "marked"])
def own_tokenizer(request, tmp_path_factory, documents) -> sentencepiece.SentencePieceProcessor:
    """One of the project's own, larger than that of other tests."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(documents, path, 900, marked=request.param)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def allowed(own_tokenizer) -> np.ndarray:
    return find_allowed_pairs(own_tokenizer, 1)


@pytest.mark.slow
def test_a_pair_is_allowed_exactly_if_the_tokenizer_spells_it_so(own_tokenizer, allowed):
    proto = own_tokenizer.serialized_model_proto() + PLAIN_SPELLING
    spell = sentencepiece.SentencePieceProcessor(model_proto=proto)
    size = own_tokenizer.vocab_size()
    pieces = [i for i in range(size) if not own_tokenizer.is_byte(i) and not own_tokenizer.is_control(i)]
    pieces.remove(own_tokenizer.unk_id())
    texts = [own_tokenizer.id_to_piece(i).replace("▁", " ") for i in range(size)]
    rows = random.Random(0).sample(pieces, 200)
    for a in rows:
        spelled = spell.encode([texts[a] + texts[b] for b in pieces])
        expected = np.array([found == [a, b] for b, found in zip(pieces, spelled)])
        if has_marks(own_tokenizer):  # they rule out more
            assert not (allowed[a, pieces] & ~expected).any(), texts[a]
        else:
            assert np.array_equal(allowed[a, pieces], expected), texts[a]
    assert 0.02 < 1 - allowed[np.ix_(rows, pieces)].mean() < 0.5, "the table rules something out"


@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(
    ["the", "The", " Of", "THE", "_", "(", "2", "“", "\x01", "\x03\x04", " of", "  ", "\n", "é", "😀", "ing", "tion", "aaa", "ab", "0.5", "▁", "return", "\u0301"]), max_size=30,
).map("".join)))  # fmt: skip
def test_no_text_is_forbidden(own_tokenizer, allowed, text):
    assert_is_allowed(allowed, encode_document(own_tokenizer, text))


def test_no_document_is_forbidden(own_tokenizer, allowed, documents):
    assert_is_allowed(allowed, [token for text in documents for token in encode_document(own_tokenizer, text)])


def assert_is_allowed(allowed: np.ndarray, tokens: list[int]) -> None:
    assert tokens[0] == 1
    wrong = [pair for pair in itertools.pairwise(tokens) if not allowed[pair]]
    assert not wrong


def test_what_stands_after_bos_and_within_a_character(own_tokenizer, allowed):
    byte = [own_tokenizer.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    space, letter = own_tokenizer.piece_to_id("▁"), own_tokenizer.piece_to_id("e")
    assert allowed[1, space] and not allowed[1, letter] and not allowed[1, byte[0xC3]]
    assert allowed[letter, byte[0xC3]] and allowed[byte[0xC3], byte[0xA9]] and allowed[byte[0xA9], letter]
    assert not allowed[letter, byte[0xA9]] and not allowed[byte[0xC3], letter] and not allowed[1, byte[0xA9]]
    assert not allowed[letter, byte[ord("e")]], "it has a piece"
    assert not allowed[:, own_tokenizer.unk_id()].any() and not allowed[:, own_tokenizer.eos_id()].any()
    assert allowed[letter, 1] and allowed[1, 1]


def test_what_stands_around_marks(marked_tokenizer):
    allowed = find_allowed_pairs(marked_tokenizer, 1)
    ids = {name: marked_tokenizer.piece_to_id(name) for name in (TITLE, JOIN, ESCAPE, "▁", "▁the", "e", "0", "(", "4")}
    ids["!"] = marked_tokenizer.encode("!")[-1]

    def follows(a: str, b: str) -> bool:
        return bool(allowed[ids[a], ids[b]])

    assert follows(TITLE, "▁the") and follows(JOIN, "▁the") and follows(JOIN, "▁")
    assert not follows(JOIN, "e") and not follows(TITLE, "e") and not follows(JOIN, TITLE) and not follows(JOIN, "(")
    assert follows(ESCAPE, "!") and not follows(ESCAPE, "4") and not follows(ESCAPE, "▁the")
    assert follows("e", "(") and follows("0", "e") and not follows("(", "e"), "it is joined there"
    assert not follows("e", JOIN) and not follows("▁", JOIN) and follows("e", TITLE)
    assert not allowed[:, marked_tokenizer.piece_to_id("<0x41>")].any(), "there are no capitals"


def test_marks_and_control_tokens_of_any_name(documents):
    """What control tokens are called is no text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(map(mark_words, documents)),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars=MARKS,
        bos_piece="BOS",
        minloglevel=2,
    )
    other = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert has_marks(other)
    tokens = [token for text in documents for token in encode_document(other, text)]
    CanonicalMask(other, 1, torch.device("cpu")).check_text(torch.tensor(tokens))


def test_tokenizers_of_another_kind_are_refused(documents, tmp_path):
    """By the text that they write; a BOS of another number by itself."""
    common = dict(
        sentence_iterator=iter(documents), vocab_size=400, byte_fallback=True, minloglevel=2, num_threads=1,
        model_prefix=str(tmp_path / "other"),
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(**common, model_type="unigram", hard_vocab_limit=False)
    other = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "other.model"))
    mask = CanonicalMask(other, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match="pairs of the text are none that its tokenizer should write"):
        mask.check_text(torch.tensor([1, *other.encode(documents[0])]))
    with pytest.raises(ConfigError, match="bos_id=2: the tokenizer's is 1"):
        CanonicalMask(other, 2, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_distributions_sum_to_one(dtype):
    generator = torch.Generator().manual_seed(0)
    log_probs = (5 * torch.randn(6, 50, generator=generator, dtype=dtype)).log_softmax(-1)
    allowed = torch.rand(6, 50, generator=generator) < 0.8
    allowed[0], allowed[1], allowed[2, 1:] = True, False, False
    found = mask_log_probs(log_probs, allowed)
    assert torch.allclose(found.exp().sum(-1), torch.ones(6, dtype=dtype))
    assert torch.equal(found[:2], log_probs[:2]), "nothing to choose from"
    for row, is_allowed in zip(found[2:].exp(), allowed[2:]):
        assert row[~is_allowed].sum().item() == pytest.approx(FLOOR) and len(set(row[~is_allowed].tolist())) == 1
    gained = found[3:] - log_probs[3:]
    for row, is_allowed in zip(gained, allowed[3:]):
        assert row[is_allowed].min() > 0 and torch.allclose(row[is_allowed], row[is_allowed][0], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["banded", "lora"])
def test_the_audit_holds(mode, tokenizer, dataset):
    config = tiny_config(canonical=True, score_mode=mode, lora_lr=0.3, score_batch=2)
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 170))
    weights, mask = tiny_model(config).state_dict(), CanonicalMask(tokenizer, 1, torch.device("cpu"))

    def build():
        model = train_gpt.LoopedGPT(config)
        model.load_state_dict(weights)
        return train_gpt.build_scorer(mode, model, config, tiny_context(), mask)

    verdicts = audit(build, tokens, ByteCounter(tokenizer), tokenizer, 6)
    assert not [v.rule for v in verdicts if v.violations]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["The methods of the class\n", "an é and 😀", "▁ \x00 <s>"])
def test_the_score_decodes(tmp_path, tokenizer_bytes, text):
    """Also where the text is not what a tokenizer writes: bytes of a character with a piece, say."""
    path = write_artifact(tmp_path, tokenizer_bytes, canonical=True)
    source, coded, same = tmp_path / "text.txt", tmp_path / "text.lgz", tmp_path / "same.txt"
    source.write_bytes(text.encode() + b"\xff")
    assert codec.main(["encode", str(path), str(source), "--out", str(coded), "--mode", "plain"]) == 0
    assert codec.main(["decode", str(path), str(coded), "--out", str(same)]) == 0
    assert same.read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_a_coded_text_is_as_long_as_its_score_says(tmp_path, tokenizer_bytes, documents, capsys):
    path = write_artifact(tmp_path, tokenizer_bytes, canonical=True)
    (tmp_path / "text.txt").write_text(documents[0][:900])
    command = ["encode", str(path), str(tmp_path / "text.txt"), "--out", str(tmp_path / "text.lgz")]
    assert codec.main([*command, "--mode", "plain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    excess = (found["coded_bpb"] - found["claimed_bpb"]) * found["bytes"]
    assert 0 < excess < 80, "bits: the coder's last state has 64"


def test_it_travels_in_the_artifact_and_gains(tmp_path, tokenizer, tokenizer_bytes, dataset):
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 300))
    nats = []
    for canonical in (False, True):
        folder = tmp_path / str(canonical)
        folder.mkdir()
        predictor = load_predictor(write_artifact(folder, tokenizer_bytes, canonical=canonical))
        predictor = replace(predictor, ctx=tiny_context(), model=predictor.model.float())
        assert predictor.config.canonical is canonical and (predictor.mask is not None) is canonical
        scorer = predictor.build_scorer()
        found = torch.zeros(())
        for chunk in scorer.tracks(tokens)[0]:
            for positions, log_probs in scorer.log_probs(tokens, chunk):
                found -= log_probs.gather(1, tokens[positions, None]).sum()
        nats.append(found.item())
    plain, masked = nats
    assert masked < plain - 1 and not math.isinf(masked)


@pytest.mark.slow
def test_a_run_scores_with_it(dataset, tmp_path: Path):
    done = run_cli([*tiny_options(dataset, canonical=1, run_id="c")], tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = events(done.stdout, "result")
    again = run_cli(["--score", "runs/c/artifact.lg", "--device", "cpu", "--dtype", "float32"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert events(again.stdout, "result")[0]["val_bpb"] == result["val_bpb"]
