"""Recall: weights against the formula in plain loops, the same in blocks as at once, nothing of the future, audited and
decoded.

pytest tests/test_recall.py
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import events, run_cli, tiny_config, tiny_context, tiny_model, train, write_artifact
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from data.shards import TokenStream
from loopgolf.recall import Recall
from loopgolf.scoring import ByteCounter
from tools import codec
from tools.audit import audit

SHARE, SHARPNESS = 0.2, 5.0


def draw(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(7, (rows, length), generator=generator)
    states = torch.randn(rows, length, 4, generator=generator)
    return inputs, states, torch.randn(rows * length, 7, generator=generator).log_softmax(-1)


@pytest.mark.parametrize("sharpness", [0.0, 16.0, 1000.0])
def test_distributions_sum_to_one_however_sharp(sharpness):
    inputs, states, log_probs = draw(1, 12)
    recall = Recall(SHARE, sharpness, bos_id=3)
    recall.add(inputs, states)
    mixed = recall.mix(log_probs, torch.zeros(12, dtype=torch.int64), torch.arange(12))
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(12))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 99), st.integers(1, 9))
def test_it_is_its_formula_in_blocks_as_at_once(rows, length, seed, block):
    inputs, states, log_probs = draw(rows, length, seed)
    recall = Recall(SHARE, SHARPNESS, bos_id=0)
    found = []
    for at in range(0, length, block):
        piece, seen = inputs[:, at : at + block], states[:, at : at + block]
        recall.add(piece, seen)
        owners = torch.arange(rows).repeat_interleave(piece.shape[1])
        places = torch.arange(at, at + piece.shape[1]).repeat(rows)
        found += zip(owners.tolist(), places.tolist(), recall.mix(log_probs[owners * length + places], owners, places))
    for row, place, mixed in found:
        probs = log_probs[row * length + place].exp()
        start = max((j for j in range(place + 1) if inputs[row, j] == 0), default=0)  # of the document
        here = states[row, place]
        weights = {j: math.exp(SHARPNESS * F.cosine_similarity(here, states[row, j], 0)) for j in range(start, place)}
        if weights:
            probs = (1 - SHARE) * probs
            for j, weight in weights.items():
                probs[inputs[row, j + 1]] += SHARE * weight / sum(weights.values())
        torch.testing.assert_close(mixed.exp(), probs, atol=1e-5, rtol=1e-4)
        assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_what_comes_later_changes_nothing():
    inputs, states, log_probs = draw(1, 12)
    owners, places = torch.zeros(12, dtype=torch.int64), torch.arange(12)
    found = []
    for changed in (False, True):
        if changed:
            inputs[0, 8:], states[0, 8:] = 0, -states[0, 8:]
        recall = Recall(SHARE, SHARPNESS, bos_id=99)
        recall.add(inputs, states)
        found.append(recall.mix(log_probs, owners, places))
    assert torch.equal(found[0][:8], found[1][:8]) and not torch.equal(found[0][9], found[1][9])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["banded", "sgd", "lora"])
def test_the_audit_holds(mode, tokenizer, dataset):
    config = tiny_config(recall_share=0.3, recall_sharpness=5.0, score_mode=mode, lora_lr=0.3, score_batch=2)
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 170))
    weights = tiny_model(config).state_dict()

    def build():
        model = train_gpt.LoopedGPT(config)
        model.load_state_dict(weights)
        return train_gpt.build_scorer(mode, model, config, tiny_context())

    verdicts = audit(build, tokens, ByteCounter(tokenizer), tokenizer, 6)
    assert not [v.rule for v in verdicts if v.violations]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "banded"])
def test_a_score_decodes_and_the_code_is_as_long_as_it_says(mode, tmp_path, tokenizer_bytes, documents, capsys):
    path = write_artifact(tmp_path, tokenizer_bytes, recall_share=0.3, canonical=True)
    source, coded, same = tmp_path / "text.txt", tmp_path / "text.lgz", tmp_path / "same.txt"
    source.write_text(documents[0][:600])
    assert codec.main(["encode", str(path), str(source), "--out", str(coded), "--mode", mode, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < (found["coded_bpb"] - found["claimed_bpb"]) * found["bytes"] < 80, "bits: the coder's last state has 64"
    assert codec.main(["decode", str(path), str(coded), "--out", str(same)]) == 0
    assert same.read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_one_rank_and_two_score_alike(dataset, tmp_path, monkeypatch, capsys):
    folder = train(tmp_path, dataset, recall_share=0.3, run_id="one", score_mode="banded")
    settings = ["--score", "runs/one/artifact.lg", "--device", "cpu", "--dtype", "float32", "--compile", "none"]
    again = run_cli(settings, tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main([*settings, "--recall_share", "0"], {}) == 0
    texts = [(folder / "log.txt").read_text(), again.stdout, capsys.readouterr().out]
    one, two, without = (float(events(text, "result")[-1]["val_bpb"]) for text in texts)
    assert one == pytest.approx(two, abs=1e-5)
    assert abs(without - one) > 1e-3
