"""Scores against one forward per token, bytes against the text itself, and the rules of a fair score: every target
once, only from tokens before it, a full distribution, and adaptation only to what is scored already.

float32 on a CPU: pytest tests/test_scoring.py
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_context, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    BpbMeter,
    ByteCounter,
    RunContext,
    Score,
    SgdScorer,
    TokenStream,
    Window,
    WindowScorer,
    build_scorer,
    score_tokens,
)


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


def plan_windows(kind: type, config, stride: int) -> WindowScorer:
    scorer = object.__new__(kind)
    scorer.config, scorer.stride = config, stride
    return scorer


@given(st.integers(0, 500), st.integers(2, 40), st.integers(1, 40), st.integers(2, 200), st.integers(1, 5),
       st.sampled_from([WindowScorer, SgdScorer]))  # fmt: skip
def test_every_target_is_scored_exactly_once(n_tokens, seq_len, stride, chunk, world, kind):
    stride = min(stride, seq_len)
    config = tiny_config(seq_len=seq_len, batch_tokens=seq_len, stride=stride, ttt_chunk=chunk)
    chunks = plan_windows(kind, config, stride).chunks(n_tokens)
    windows = [window for chunk in chunks for window in chunk]
    assert [t for w in windows for t in range(w.first, w.stop)] == list(range(1, n_tokens)), "once, left to right"
    for w in windows:
        assert 0 <= w.start < w.first < w.stop <= n_tokens and w.stop - 1 - w.start <= seq_len
        if stride < seq_len:
            assert w.first - w.start >= min(w.first, seq_len - stride + 1) or w.start == 0, "a long context"
    shared = [sorted(w for rank in range(world) for w in chunk[rank::world]) for chunk in map(as_tuples, chunks)]
    assert shared == [as_tuples(chunk) for chunk in chunks]


def as_tuples(windows: list[Window]) -> list[tuple[int, int, int]]:
    return [(w.start, w.first, w.stop) for w in windows]


@given(st.integers(2, 500), st.integers(2, 120))
def test_chunks_follow_each_other_and_have_their_size(n_tokens, size):
    chunks = plan_windows(SgdScorer, tiny_config(ttt_chunk=size), 8).chunks(n_tokens)
    for before, after in pairwise(chunks):
        assert before[-1].stop == after[0].first
    assert all((w.first - 1) // size == (chunk[0].first - 1) // size for chunk in chunks for w in chunk)


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_one_by_one(model, tokens: torch.Tensor, seq_len: int, stride: int) -> list[float]:
    """Nats per target, each from a forward of its own over the inputs that the rule gives it: the first seq_len targets
    from the beginning, then blocks of `stride` targets whose last one sees seq_len tokens."""
    nats = []
    for t in range(1, len(tokens)):
        if stride == seq_len:
            start = (t - 1) // seq_len * seq_len
        elif t <= seq_len:
            start = 0
        else:
            block = (t - 1 - seq_len) // stride
            start = min(seq_len + (block + 1) * stride, len(tokens) - 1) - seq_len
        logits = model.logits(model(tokens[None, start:t])[:, -1])
        nats.append(-logits[0].double().log_softmax(-1)[tokens[t]].item())
    return nats


@pytest.mark.parametrize("mode, stride", [("plain", 32), ("sliding", 8), ("sliding", 5)])
@pytest.mark.parametrize("length", [33, 97, 110])
def test_scores_are_those_of_one_forward_per_token(mode, stride, length, tokens, counter):
    config = tiny_config(stride=stride)
    model, part = tiny_model(config), tokens[:length]
    found = score_tokens(build_scorer(mode, model, config, tiny_context()), part, counter, tiny_context(), mode)
    nats = score_one_by_one(model, part, 32, stride)
    assert found.tokens == len(nats) == length - 1
    assert found.nats == pytest.approx(sum(nats), rel=1e-6)
    assert found.bytes == counter.count(part[:-1].numpy(), part[1:].numpy())


@pytest.mark.parametrize("mode", ["plain", "sliding"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_the_ranks_add_up(mode, world, tokens, counter):
    config = tiny_config()
    model = tiny_model(config)

    def score(ctx: RunContext) -> Score:
        return score_tokens(build_scorer(mode, model, config, ctx), tokens, counter, ctx, mode)

    whole, parts = score(tiny_context()), [score(lonely(rank, world)) for rank in range(world)]
    assert sum(p.tokens for p in parts) == whole.tokens == len(tokens) - 1
    assert sum(p.bytes for p in parts) == whole.bytes
    assert sum(p.nats for p in parts) == pytest.approx(whole.nats, rel=1e-7)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_of_windows_does_not_matter(batch, tokens, counter):
    model = tiny_model(tiny_config())
    found = []
    for size in (4, batch):
        scorer = build_scorer("sliding", model, tiny_config(score_batch=size), tiny_context())
        found.append(score_tokens(scorer, tokens[:120], counter, tiny_context(), "x").nats)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_sum_to_one(dtype, tokens):
    config = tiny_config()
    scorer = build_scorer("sliding", tiny_model(config).to(dtype), config, tiny_context())
    windows = scorer.windows(100)[:4]
    log_probs = scorer.log_probs(tokens[:100], windows)
    assert log_probs.shape == (windows[3].stop - 1, config.vocab_size)
    torch.testing.assert_close(log_probs.double().exp().sum(-1), torch.ones(len(log_probs)).double(), rtol=0, atol=1e-5)


def test_bits_per_byte():
    score = Score(nats=8 * math.log(2), tokens=4, bytes=16)
    assert (score.loss, score.bpb) == (pytest.approx(2 * math.log(2)), pytest.approx(0.5))


def test_the_meter_counts_what_it_is_given(counter, tokens):
    meter, part = BpbMeter(counter, tiny_context()), tokens[:50]
    for windows in ([Window(0, 1, 20), Window(5, 20, 30)], [Window(10, 30, 50)]):
        meter.add(part, windows, torch.full((sum(w.stop - w.first for w in windows), 384), -math.log(384)))
    found = meter.total()
    assert found.tokens == 49 and found.loss == pytest.approx(math.log(384))
    assert found.bytes == counter.count(part[:-1].numpy(), part[1:].numpy())


# --- bytes ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "plain words", " leading", "  two leading", "trailing ", "a  b   c", "tab\tand\nnew lines\n\n  indented", " ", "   ",
    "Straße, naïve, żółć", "Привет, мир", "你好，世界", "こんにちは", "مرحبا", "नमस्ते", "😀 👩‍👩‍👧‍👦 🇩🇪", "e\u0301 and é",
    "<s> </s> <unk> <0x41>", "\u00a0no\u3000break", "x" * 300, "line\r\nline", "\ufeffmark", "a\u200bb",
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


def record(config, tokens: torch.Tensor, counter, seed: int = 1):
    """Scores with adaptation; log-probabilities of every target in order, and what happened when."""
    scorer = build_scorer("sgd", tiny_model(config, seed), config, tiny_context())
    rows, story = [], []
    log_probs, observe = scorer.log_probs, scorer.observe

    def score(tokens, windows):
        rows.append(log_probs(tokens, windows))
        story.append(("scored", windows[-1].stop))
        return rows[-1]

    def adapt(seen, done):
        story.append(("adapted", seen.clone(), done))
        observe(seen, done)

    scorer.log_probs, scorer.observe = score, adapt
    found = score_tokens(scorer, tokens, counter, tiny_context(), "sgd")
    return found, torch.cat(rows), story, scorer


ADAPT = dict(ttt_chunk=64, ttt_epochs=2, ttt_lr=0.5, ttt_clip=5.0)


@pytest.mark.parametrize("at", [3, 100, 129, 200, 300])
def test_later_tokens_cannot_change_earlier_scores(at, tokens, counter):
    changed = tokens.clone()
    changed[at:] = changed[at:].flip(0)
    changed[at] = (tokens[at] + 7) % 384
    _, before, _, _ = record(tiny_config(**ADAPT), tokens, counter)
    _, after, _, _ = record(tiny_config(**ADAPT), changed, counter)
    assert len(before) == len(tokens) - 1
    assert torch.equal(before[:at], after[:at]), "the distributions of targets 1 to `at`"
    assert not torch.equal(before[at:], after[at:])


def test_adaptation_changes_later_scores_only(tokens, counter):
    still, frozen_rows, _, _ = record(tiny_config(**ADAPT | dict(ttt_lr=0.0)), tokens, counter)
    moved, rows, _, _ = record(tiny_config(**ADAPT), tokens, counter)
    config = tiny_config()
    scorer = build_scorer("sliding", tiny_model(config), config, tiny_context())
    assert score_tokens(scorer, tokens, counter, tiny_context(), "x").nats == pytest.approx(still.nats, rel=1e-7)
    same = (rows == frozen_rows).all(1)
    assert same[:64].all() and not same[80:].any()
    assert (moved.tokens, moved.bytes) == (still.tokens, still.bytes)


def test_a_chunk_is_scored_before_it_is_learnt_and_the_last_one_never_is(tokens, counter):
    _, _, story, scorer = record(tiny_config(**ADAPT), tokens, counter)
    scored = position = 0
    for kind, *what in story:
        if kind == "scored":
            scored = what[0]
            continue
        seen, done = what
        assert torch.equal(seen, tokens[position : position + len(seen)]), "chunk after chunk, without a gap"
        position += len(seen) - 1
        assert position + 1 <= scored and 0.0 <= done < 1.0
    n_chunks = len(scorer.chunks(len(tokens)))
    assert n_chunks > 4 and sum(kind == "adapted" for kind, *_ in story) == n_chunks - 1
    assert story[-1][0] == "scored" and story[-1][1] == len(tokens)


def test_the_weights_come_back_bit_by_bit(tokens, counter):
    config = tiny_config(**ADAPT)
    before = tiny_model(config).state_dict()
    first, _, _, scorer = record(config, tokens, counter)
    assert all(torch.equal(p, before[n]) for n, p in scorer.model.state_dict().items())
    again = score_tokens(build_scorer("sgd", scorer.model, config, tiny_context()), tokens, counter, tiny_context(), "x")
    assert again == first


def test_frozen_blocks_stay_and_the_others_adapt(tokens):
    config = replace(tiny_config(**ADAPT), ttt_freeze="a")
    model = tiny_model(config)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    scorer = SgdScorer(model, config, tiny_context())
    scorer.observe(tokens[:65], done=0.0)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved and not any(n.startswith("blocks.a.") for n in moved)
    assert {"blocks.b.up.weight", "embed.weight", "mixes"} <= moved
    assert all(p.grad is None for p in model.parameters())
    scorer.restore()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_the_learning_rate_of_adaptation_falls_as_a_cosine(tokens, counter):
    config = tiny_config(**ADAPT)
    scorer = SgdScorer(tiny_model(config), config, tiny_context())
    for done, share in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        scorer.observe(tokens[:65], done)
        assert scorer.sgd.param_groups[0]["lr"] == pytest.approx(0.5 * share, abs=1e-9)
