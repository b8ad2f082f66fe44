"""Scores against one forward per token, bytes against the text itself, and the rules of a fair score: every target
once, only from tokens before it, a full distribution, and adaptation only to what is scored already.

float32 on a CPU: pytest tests/test_scoring.py
"""

import functools
import math
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_context, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from data.shards import TokenStream
from loopgolf.adapting import SgdScorer
from loopgolf.cache import Cache
from loopgolf.runtime import RunContext
from loopgolf.scoring import BpbMeter, ByteCounter, Score, Scoring, WindowScorer, score_tokens
from train_gpt import Stored, build_scorer


class LonelyContext(RunContext):
    """A rank whose sums are not added to anyone's."""

    def sum(self, tensor):
        return tensor


def lonely(rank: int, world: int) -> RunContext:
    return LonelyContext(**vars(tiny_context(rank, world)))


@pytest.fixture(scope="module")
def counter(tokenizer) -> ByteCounter:
    return ByteCounter(tokenizer)


@pytest.fixture(scope="module")
def tokens(dataset) -> torch.Tensor:
    return torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 333))


# --- windows ----------------------------------------------------------------------------------------------------------

MODES = ("plain", "sliding", "banded", "sgd", "lora")


def plan_tracks(mode: str, config, tokens) -> tuple[WindowScorer, list]:
    scorer = build_scorer(mode, MODEL, config, tiny_context())
    return scorer, scorer.tracks(tokens)


MODEL = tiny_model(tiny_config(model_dim=4, num_heads=1, rope_dims=0))


@given(st.integers(0, 500), st.integers(2, 40), st.integers(1, 40), st.integers(2, 200), st.integers(1, 40),
       st.sampled_from(MODES))  # fmt: skip
def test_every_target_is_scored_exactly_once(n_tokens, seq_len, stride, chunk, band, mode):
    config = tiny_config(seq_len=seq_len, batch_tokens=seq_len, stride=min(stride, seq_len), ttt_chunk=chunk,
                         band=min(band, seq_len), lora_chunk=min(chunk, seq_len))  # fmt: skip
    tokens = torch.where(torch.arange(n_tokens) % 17 == chunk % 17, 1, 7)
    scorer, tracks = plan_tracks(mode, config, tokens)
    windows = [window for track in tracks for chunk in track for window in chunk]
    if mode != "lora":
        assert [t for w in windows for t in range(w.first, w.stop)] == list(range(1, n_tokens)), "once, left to right"
    assert sorted(t for w in windows for t in range(w.first, w.stop)) == list(range(1, n_tokens))
    for w in windows:
        assert 0 <= w.start < w.first < w.stop <= n_tokens and w.stop - 1 - w.start <= scorer.length
        context = w.first - w.start
        if mode == "lora":
            assert 1 not in tokens[w.start + 1 : w.stop - 1], "one document"
            assert tokens[w.start] == 1 or w.start == 0 or context == 1 + scorer.length - scorer.stride
        elif scorer.stride < scorer.length:
            assert context == min(w.first, 1 + scorer.length - scorer.stride), "a long context"


@given(st.integers(2, 500), st.integers(2, 120))
def test_chunks_follow_each_other_and_have_their_size(n_tokens, size):
    (chunks,) = plan_tracks("sgd", tiny_config(ttt_chunk=size), torch.zeros(n_tokens))[1]
    for before, after in pairwise(chunks):
        assert before[-1].stop == after[0].first
    assert all((w.first - 1) // size == (chunk[0].first - 1) // size for chunk in chunks for w in chunk)


def test_documents_of_a_batch_keep_their_rows():
    tokens = torch.full((400,), 7)
    tokens[[0, 10, 130, 200, 270]] = 1
    tracks = plan_tracks("lora", tiny_config(lora_chunk=16, score_batch=4), tokens)[1]
    assert [len(track[0]) for track in tracks] == [4, 1]
    for track in tracks:
        for earlier, later in pairwise(track):
            assert [a.stop for a in earlier[: len(later)]] == [b.first for b in later]


# --- scores -----------------------------------------------------------------------------------------------------------


def score(mode: str, model, config, ctx: RunContext, tokens: torch.Tensor, counter) -> Score:
    meter = BpbMeter(counter)
    score_tokens(build_scorer(mode, model, config, ctx), tokens, meter)
    return meter.total(ctx)


@torch.no_grad()
def score_one_by_one(model, tokens: torch.Tensor, length: int, stride: int, band: int) -> list[float]:
    """Nats per target, each from a forward of its own over the inputs that the rule gives it: the first `length` targets
    from the beginning, then blocks of `stride` targets whose last one sees `length` tokens, `band` of them at a time."""
    nats = []
    for t in range(1, len(tokens)):
        start = 0 if t <= length else (1 + (t - 1 - length) // stride) * stride
        logits = model.logits(model.hidden(tokens[None, start:t], cache=Cache(band))[:, -1])
        nats.append(-logits[0].double().log_softmax(-1)[tokens[t]].item())
    return nats


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_pass_has_no_more_rows_than_a_rank_can_fill(mode, world, tokens):
    """Its shapes are fixed, so what a short batch lacks is padded: a chunk's share of a rank may be two windows."""
    config = tiny_config(score_batch=16, ttt_chunk=512, stride=2)
    scorer = build_scorer(mode, MODEL, config, tiny_context(0, world))
    text = torch.cat([tokens] * 8)
    chunks = [chunk for track in scorer.tracks(text) for chunk in track]
    share = max(map(len, chunks)) if scorer.is_per_document else -(-max(map(len, chunks)) // world)
    assert scorer.rows == min(config.score_batch, share) if mode == "sgd" else scorer.rows == config.score_batch


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_what_an_artifact_stores_is_all_that_scoring_needs(mode, tokens, counter):
    """Rows of a batch share products, so even how many there are is a part of the score."""
    config = tiny_config(score_mode=mode, moe_experts=2, moe_hidden=8)
    known = {f.name: getattr(config, f.name) for f in fields(Stored)}
    stored = Scoring(**{field.name: known[field.name] for field in fields(Scoring)})
    assert known.keys() >= {field.name for field in fields(Scoring)} >= {"score_batch", "seq_len", "score_mode"}
    ctx = tiny_context()
    nats = [score(mode, tiny_model(config), how, ctx, tokens, counter).nats for how in (config, stored)]
    assert nats[0] == nats[1]


CASES = [
    ("plain", {}, (32, 32, 32)), ("sliding", dict(stride=8), (32, 8, 32)), ("sliding", dict(stride=5), (32, 5, 32)),
    ("banded", {}, (160, 128, 32)), ("banded", dict(band=20), (160, 140, 20)),
    ("sliding", dict(stride=8, doc_attention=True), (32, 8, 32)),
    ("banded", dict(band=20, doc_attention=True), (160, 140, 20)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode, changes, rule", CASES)
@pytest.mark.parametrize("length", [33, 97, 333])
def test_scores_are_those_of_one_forward_per_token(mode, changes, rule, length, tokens, counter):
    config = tiny_config(**changes)
    model, part = tiny_model(config), tokens[:length]
    found = score(mode, model, config, tiny_context(), part, counter)
    nats = score_one_by_one(model, part, *rule)
    assert found.tokens == len(nats) == length - 1
    assert found.nats == pytest.approx(sum(nats), rel=1e-6)
    assert found.bytes == counter.count(part[:-1].numpy(), part[1:].numpy())


@torch.no_grad()
def score_with_all_logits(scorer: WindowScorer, tokens: torch.Tensor) -> float:
    """Nats of windows of seq_len with the logits of every position computed, scored or not: what a scorer must beat."""
    nats, windows = 0.0, scorer.windows(len(tokens))
    for at in range(0, len(windows), scorer.config.score_batch):
        batch = windows[at : at + scorer.config.score_batch]
        rows = torch.full((len(batch), scorer.length), scorer.config.bos_id)
        for row, w in zip(rows, batch):
            row[: w.stop - 1 - w.start] = tokens[w.start : w.stop - 1]
        log_probs = scorer.model.logits(scorer.model.hidden(rows)).log_softmax(-1)
        for row, w in zip(log_probs, batch):
            picked = row[w.first - 1 - w.start : w.stop - 1 - w.start].gather(1, tokens[w.first : w.stop, None])
            nats -= picked.double().sum().item()
    return nats


def test_scores_are_those_of_all_logits(tokens, counter):
    config = tiny_config(stride=8)
    model = tiny_model(config)
    scorer = build_scorer("sliding", model, config, tiny_context())
    found = score("sliding", model, config, tiny_context(), tokens, counter).nats
    assert found == pytest.approx(score_with_all_logits(scorer, tokens), rel=1e-6)


@pytest.mark.parametrize("mode", ["plain", "sliding", "banded", "lora"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_the_ranks_add_up(mode, world, tokens, counter):
    config = tiny_config()
    model = tiny_model(config)
    whole = score(mode, model, config, tiny_context(), tokens, counter)
    parts = [score(mode, model, config, lonely(rank, world), tokens, counter) for rank in range(world)]
    assert sum(p.tokens for p in parts) == whole.tokens == len(tokens) - 1
    assert sum(p.bytes for p in parts) == whole.bytes
    assert sum(p.nats for p in parts) == pytest.approx(whole.nats, rel=1e-7 if mode != "lora" else 1e-5)


@pytest.mark.parametrize("mode", ["sliding", "banded", "lora"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_of_windows_does_not_matter(mode, batch, tokens, counter):
    model = tiny_model(tiny_config())
    found = [score(mode, model, tiny_config(score_batch=size), tiny_context(), tokens[:200], counter).nats
             for size in (4, batch)]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-6 if mode != "lora" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sliding", "banded"])
def test_probabilities_sum_to_one(dtype, mode, tokens):
    config = tiny_config()
    scorer = build_scorer(mode, tiny_model(config).to(dtype), config, tiny_context())
    windows = scorer.windows(len(tokens))[:4]
    seen = []
    for positions, log_probs in scorer.log_probs(tokens, windows):
        assert log_probs.shape == (len(positions), config.vocab_size)
        sums = log_probs.double().exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones(len(positions)).double(), rtol=0, atol=1e-5)
        seen += positions.tolist()
    assert sorted(seen) == list(range(1, windows[-1].stop))


def test_bits_per_byte():
    score = Score(nats=8 * math.log(2), tokens=4, bytes=16)
    assert (score.loss, score.bpb) == (pytest.approx(2 * math.log(2)), pytest.approx(0.5))


def test_the_meter_counts_what_it_is_given(counter, tokens):
    meter, part = BpbMeter(counter), tokens[:50]
    for positions in (torch.arange(1, 30), torch.arange(30, 50).flip(0)):
        meter.add(part, positions, torch.full((len(positions), 384), -math.log(384)))
    found = meter.total(tiny_context())
    assert found.tokens == 49 and found.loss == pytest.approx(math.log(384))
    assert found.bytes == counter.count(part[:-1].numpy(), part[1:].numpy())


# --- bytes ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "plain words",
    " leading",
    "  two leading",
    "trailing ",
    "a  b   c",
    "tab\tand\nnew lines\n\n  indented",
    " ",
    "   ",
    "Straße, naïve, żółć",
    "Привет, мир",
    "你好，世界",
    "こんにちは",
    "مرحبا",
    "नमस्ते",
    "😀 👩‍👩‍👧‍👦 🇩🇪",
    "e\u0301 and é",
    "<s> </s> <unk> <0x41>",
    "\u00a0no\u3000break",
    "x" * 300,
    "line\r\nline",
    "\ufeffmark",
    "a\u200bb",
]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=40))
def test_bytes_of_tokens_are_bytes_of_any_text(tokenizer, counter, text):
    row = np.array([1, *tokenizer.encode(text)])
    assert counter.count(row[:-1], row[1:]) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_bytes_of_the_text(tokenizer, counter, text):
    row = np.array([1, *tokenizer.encode(text)])
    assert counter.count(row[:-1], row[1:]) == len(text.encode())


def test_bytes_of_many_documents_add_up(tokenizer, counter, documents):
    rows = [[1, *tokenizer.encode(text)] for text in [*documents[:40], *TEXTS]]
    stream = np.array([token for row in rows for token in row])
    expected = sum(len(text.encode()) for text in [*documents[:40], *TEXTS])
    assert counter.count(stream[:-1], stream[1:]) == expected
    with_first = counter.count(np.array([1, *stream[:-1]]), stream)
    assert with_first == expected, "a document start has no bytes"


def test_control_tokens_have_no_bytes(counter):
    special = np.array([0, 1, 2, 3])
    assert counter.count(np.array([1, 1, 1, 1]), special) == 0
    assert counter.own_bytes[:4].tolist() == [0, 0, 0, 0] and (counter.own_bytes[4:260] == 1).all()


# --- test-time training -----------------------------------------------------------------------------------------------

ADAPT = dict(ttt_chunk=64, ttt_epochs=2, ttt_lr=0.5, ttt_clip=5.0, lora_chunk=16, lora_lr=0.3)
KINDS = {
    "sgd": ("sgd", {}), "sgd, band": ("sgd", dict(band=12)),
    "lora": ("lora", {}), "lora, band": ("lora", dict(band=12)),
}  # fmt: skip


class Recorder:
    """A meter that keeps every distribution, and in which order positions were scored."""

    def __init__(self, n_tokens: int):
        self.rows, self.order = torch.full((n_tokens, 384), math.nan), []

    def add(self, tokens, positions, log_probs) -> None:
        assert self.rows[positions].isnan().all(), "once"
        self.rows[positions] = log_probs
        self.order += positions.tolist()


def record(kind: str, tokens: torch.Tensor, deadline: float = math.inf, **changes):
    """The distribution of every target under adaptation, and what happened when."""
    mode, settings = KINDS[kind]
    config = tiny_config(**ADAPT | settings | changes)
    scorer, meter, story = build_scorer(mode, tiny_model(config), config, tiny_context()), Recorder(len(tokens)), []
    observe = scorer.observe

    def adapt(tokens, chunk, done, until):
        assert all(w.stop - 1 in meter.order and w.first in meter.order for w in chunk), "scored before it is learnt"
        story.append((chunk, done))
        observe(tokens, chunk, done, until)

    scorer.observe = adapt
    score_tokens(scorer, tokens, meter, deadline=deadline)
    assert not meter.rows[1:].isnan().any()
    return meter.rows, story, scorer


@pytest.fixture(scope="module")
def unchanged(tokens):
    """The distributions of the text as it is, once for each kind."""
    return functools.cache(lambda kind: record(kind, tokens)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 100, 129, 200, 300])
def test_later_tokens_cannot_change_earlier_scores(kind, at, tokens, unchanged):
    changed = tokens.clone()
    changed[at:] = changed[at:].flip(0)
    changed[at] = (tokens[at] + 7) % 384
    before, after = unchanged(kind), record(kind, changed)[0]
    assert torch.equal(before[1 : at + 1], after[1 : at + 1]), "the distributions of targets 1 to `at`"
    assert not torch.equal(before[at + 1 :], after[at + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_changes_later_scores_only(kind, tokens):
    tokens = tokens.where(tokens != 1, 9)  # one document
    still, moved = record(kind, tokens, ttt_lr=0.0, lora_lr=0.0)[0], record(kind, tokens)[0]
    same = (still == moved).all(1)
    first = 64 if "sgd" in kind else 16
    assert same[1 : first + 1].all() and not same[first + 33 :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_but_the_last_is_learnt(kind, tokens):
    _, story, scorer = record(kind, tokens)
    tracks = scorer.tracks(tokens)
    assert [chunk for chunk, _ in story] == [chunk for track in tracks for chunk in track[:-1]] and len(story) > 2
    assert all(0.0 <= done < 1.0 for _, done in story) and scorer.updates > 2 and not scorer.skipped


def test_documents_know_nothing_of_each_other(tokens):
    at = 120
    tokens = tokens.where(torch.arange(len(tokens)) != at, 1)
    changed = torch.cat((tokens[:at].flip(0), tokens[at:]))
    before, after = record("lora", tokens, score_batch=64)[0], record("lora", changed, score_batch=64)[0]
    torch.testing.assert_close(before[at + 1 :], after[at + 1 :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_come_back_bit_by_bit(kind, tokens):
    rows, _, scorer = record(kind, tokens)
    before = tiny_model(scorer.config).state_dict()
    assert all(torch.equal(p, before[n]) for n, p in scorer.model.state_dict().items())
    again = Recorder(len(tokens))
    scorer.warm_up()
    score_tokens(scorer, tokens, again)
    assert torch.equal(again.rows[1:], rows[1:]), "a warm-up and an earlier pass leave no trace"


@pytest.mark.parametrize("kind", KINDS)
def test_without_time_everything_is_scored_and_nothing_learnt(kind, tokens):
    rows, story, scorer = record(kind, tokens, deadline=-math.inf)
    assert scorer.updates == 0 and scorer.skipped >= len(story) > 2
    assert torch.equal(rows[1:], record(kind, tokens, ttt_lr=0.0, lora_lr=0.0)[0][1:])


def test_frozen_blocks_stay_and_the_others_adapt(tokens):
    config = tiny_config(**ADAPT, ttt_freeze="a")
    model = tiny_model(config)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    scorer = SgdScorer(model, config, tiny_context())
    scorer.observe(tokens, scorer.tracks(tokens)[0][0], 0.0, math.inf)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved and not any(n.startswith("blocks.a.") for n in moved)
    assert {"blocks.b.mlp.up.weight", "embed.weight", "passes.mixes"} <= moved
    assert all(p.grad is None for p in model.parameters())
    scorer.reset()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_learning_rate_of_adaptation_falls_as_a_cosine(tokens):
    config = tiny_config(**ADAPT)
    scorer = SgdScorer(tiny_model(config), config, tiny_context())
    for done, share in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        scorer.observe(tokens, scorer.tracks(tokens)[0][0], done, math.inf)
        assert scorer.state.optimizers["sgd"].param_groups[0]["lr"] == pytest.approx(0.5 * share, abs=1e-9)


def test_warming_up_sees_a_whole_chunk_of_adaptation(dataset):
    """Batches as the updates of a run have them, so that none is compiled on its clock."""
    config = tiny_config(data_path=str(dataset), ttt_chunk=300)
    scorer = build_scorer("sgd", tiny_model(config), config, tiny_context())
    assert scorer.rows * scorer.length < 300 <= scorer.score_made_up(scorer.rows).observed
    assert scorer.updates == 0
