"""The audit against honest scorers in every mode, and against cheaters that each break one rule: each is caught, and
the rule that it breaks is named.

float32 on a CPU: pytest tests/test_audit.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import pack_weights, tiny_config, tiny_context, tiny_model

import loopgolf.moe
import train_gpt
from data.shards import TokenStream
from data.tokenizer import encode_document
from kernels.attention import attend
from loopgolf.adapting import LoraScorer, SgdScorer
from loopgolf.scoring import ByteCounter, PlainScorer, SlidingScorer, Window
from tools.audit import RULES, AuditError, Verdict, audit, check_bytes, find_edges, main, move_documents, replace_tokens
from train_gpt import LoopedGPT, build_scorer

PROBES = 6
ADAPT = dict(ttt_chunk=64, ttt_lr=0.5, ttt_clip=5.0, lora_chunk=16, lora_lr=0.3, score_batch=2)


@pytest.fixture(scope="module")
def tokens(dataset) -> torch.Tensor:
    """A short document, and the beginning of one that is longer than a window."""
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 179))
    return torch.cat((tokens[:51], tokens.new_tensor([1]), tokens[51:].where(tokens[51:] != 1, 9)))


@pytest.fixture(scope="module")
def counter(tokenizer) -> ByteCounter:
    return ByteCounter(tokenizer)


@pytest.fixture
def judge(tokens, counter, tokenizer):
    """Audits a scorer and a model, honest unless said otherwise, and tells what the verdicts are."""

    def judge(mode: str, scorer=None, model=LoopedGPT, counter=counter, tokens=tokens, **changes) -> dict:
        config = tiny_config(**ADAPT | changes)
        weights = tiny_model(config).state_dict()

        def build():
            fresh = model(config)
            fresh.load_state_dict(weights)
            return scorer(fresh, config) if scorer else build_scorer(mode, fresh, config, tiny_context())

        return {v.rule: v for v in audit(build, tokens, counter, tokenizer, PROBES)}

    return judge


def broken(verdicts: dict) -> set[str]:
    return {rule for rule, verdict in verdicts.items() if verdict.verdict == "violated"}


# --- honest -----------------------------------------------------------------------------------------------------------

EXPERTS = dict(moe_experts=4, moe_hidden=16)
HONEST = {
    "plain": ("plain", {}), "sliding": ("sliding", {}), "banded": ("banded", dict(band=20)),
    "sliding, documents": ("sliding", dict(doc_attention=True)),
    "banded, documents": ("banded", dict(doc_attention=True)),
    "sgd": ("sgd", {}), "lora": ("lora", {}),
    "no tables": ("plain", dict(smear=False, bigram_buckets=0, ve_passes="none")),
    "sliding, experts": ("sliding", EXPERTS), # a gentle rate: rounding that another batch layout brings would decide who routes where
    "lora, experts": ("lora", EXPERTS | dict(lora_lr=0.03)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_scorer_passes_every_rule(name, judge):
    mode, changes = HONEST[name]
    verdicts = judge(mode, **changes)
    assert list(verdicts) == list(RULES) and not broken(verdicts), verdicts
    assert all(v.probes > 0 and v.what and not v.examples for v in verdicts.values())
    assert verdicts["causal"].probes == PROBES
    passes = ("embeddings and passes" in verdicts["documents"].what) == (mode == "lora" or "documents" in name)
    assert passes and verdicts["documents"].probes >= PROBES
    assert ("observations moved them" in verdicts["score-before-update"].what) == (mode in ("sgd", "lora"))


# --- cheaters: models -------------------------------------------------------------------------------------------------


class Peeking(LoopedGPT):
    """Every state knows a little of the next token."""

    def hidden(self, tokens, *more, **named):
        following = torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)
        return super().hidden(tokens, *more, **named) + 0.01 * self.embed(following)


class Smearing(LoopedGPT):
    """Mixes each embedding with the one before, also where a document starts."""

    def embed_tokens(self, tokens, *parts):
        return super().embed_tokens(tokens, *parts) + 0.1 * self.embed(tokens[:, 1:-1])


class Boundless(LoopedGPT):
    """Attends across documents whatever its config says."""

    def __init__(self, config):
        super().__init__(replace(config, doc_attention=False))


@pytest.mark.parametrize("mode", ["plain", "banded", "sgd"])
def test_a_look_at_the_next_token_is_caught(mode, judge):
    verdicts = judge(mode, model=Peeking)
    assert broken(verdicts) == {"causal"} | ({"score-before-update"} if mode == "sgd" else set())
    assert verdicts["causal"].violations >= PROBES / 2, "the last token of a block sees itself only"
    for found in verdicts["causal"].examples:
        assert found["last"] == found["changed_from"], "the token before the change saw it"


def test_a_mask_that_is_off_by_one_is_caught(judge, monkeypatch):
    def leak(q, k, v, window, docs):
        """The keys and values of the next position in the place of a position's own."""
        return attend(q, *(torch.cat((t[:, 1:], t[:, -1:]), 1) for t in (k, v)), window, docs)

    monkeypatch.setattr(train_gpt, "attend", leak)
    assert broken(judge("sliding")) == {"causal"}


def test_experts_that_choose_their_tokens_are_caught(judge, monkeypatch):
    """Whether an expert takes a token then depends on the tokens behind it."""
    chosen_by_token = loopgolf.moe.choose

    def choose(logits, top):
        taken = logits.topk(len(logits) * top // logits.shape[1], 0).indices
        return chosen_by_token(logits + torch.zeros_like(logits).scatter(0, taken, 100.0), top)

    monkeypatch.setattr(loopgolf.moe, "choose", choose)
    assert broken(judge("plain", **EXPERTS)) == {"causal"}


@pytest.mark.parametrize("mode", ["plain", "sgd", "lora"])
def test_embeddings_that_smear_across_documents_are_caught(mode, judge):
    verdicts = judge(mode, model=Smearing)
    assert broken(verdicts) == {"documents"}
    assert verdicts["documents"].examples[0]["tokens_behind_bos"] == 0


@pytest.mark.parametrize("mode", ["sliding", "banded"])
def test_attention_across_documents_is_caught_where_the_config_forbids_it(mode, judge):
    verdicts = judge(mode, model=Boundless, doc_attention=True)
    assert broken(verdicts) == {"documents"}
    assert all(found["first"] > found["document_at"] for found in verdicts["documents"].examples)


# --- cheaters: scorers ------------------------------------------------------------------------------------------------


def cheat(base: type):
    """Builds a cheater as build_scorer would."""
    return lambda model, config: base(model, config, tiny_context())


class Overfull(PlainScorer):
    def log_probs(self, tokens, windows):
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, log_probs + 0.001


class Undefined(PlainScorer):
    def log_probs(self, tokens, windows):
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, log_probs.masked_fill(positions[:, None] == 40, math.nan)


class Partial(PlainScorer):
    """Normalized over the first ids only."""

    def log_probs(self, tokens, windows):
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, log_probs[:, :380].log_softmax(-1)


class TargetAware(PlainScorer):
    """Raises the probability of what comes, and pays for it with the rest."""

    def log_probs(self, tokens, windows):
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, (log_probs + torch.nn.functional.one_hot(tokens[positions], 384)).log_softmax(-1)


class KnowsDocuments(PlainScorer):
    """Is the surer the more documents the text has."""

    def log_probs(self, tokens, windows):
        sharpness = 1 + 0.01 * int((tokens == self.config.bos_id).sum())
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, (sharpness * log_probs).log_softmax(-1)


NO_DISTRIBUTION = {
    Overfull: "normalized", Undefined: "normalized", Partial: "normalized",
    TargetAware: "causal", KnowsDocuments: "causal",
}  # fmt: skip


@pytest.mark.parametrize("scorer, rule", NO_DISTRIBUTION.items())
def test_what_is_no_distribution_fixed_beforehand_is_caught(scorer, rule, judge):
    verdicts = judge("plain", cheat(scorer))
    assert broken(verdicts) == {rule}
    if scorer is Undefined:
        assert {found["position"] for found in verdicts[rule].examples} == {40}
    if scorer is Partial:
        assert verdicts[rule].examples[0]["ids"] == 380


class Tail(SlidingScorer):
    """The last window once more."""

    def windows(self, n_tokens):
        windows = super().windows(n_tokens)
        return windows + windows[-1:] if n_tokens > 100 else windows


class Forgetful(SlidingScorer):
    """Leaves out the last target when it would need a window of its own."""

    def windows(self, n_tokens):
        windows = super().windows(n_tokens)
        return windows[:-1] if windows and windows[-1].stop - windows[-1].first == 1 and n_tokens > 2 else windows


@pytest.mark.parametrize("scorer, times", [(Tail, 2), (Forgetful, 0)])
def test_targets_that_are_scored_twice_or_never_are_caught(scorer, times, judge):
    verdicts = judge("sliding", cheat(scorer))
    assert broken(verdicts) == {"once"}
    assert {found["scored"] for found in verdicts["once"].examples} == {times}


class TrainsFirst(SgdScorer):
    def log_probs(self, tokens, windows):
        if windows[-1].stop - windows[0].first >= self.config.seq_len:
            self.observe(tokens, windows, 0.0, math.inf)
        return super().log_probs(tokens, windows)


class TrainsFirstInSecret(SgdScorer):
    """Like the one before, but the weights are back before anyone can look."""

    def log_probs(self, tokens, windows):
        before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        if windows[-1].stop - windows[0].first >= self.config.seq_len:
            self.observe(tokens, windows, 0.0, math.inf)
        found = list(super().log_probs(tokens, windows))
        self.model.load_state_dict(before)
        return iter(found)


class TrainsAhead(SgdScorer):
    """Learns from the chunk that was scored and from the next."""

    def observe(self, tokens, chunk, done, until):
        stop = min(chunk[-1].stop + self.config.ttt_chunk, len(tokens))
        super().observe(tokens, [*chunk[:-1], chunk[-1]._replace(stop=stop)], done, until)


class TrainsOnAll(SgdScorer):
    """Learns all of the text when it is asked how to divide it."""

    def tracks(self, tokens):
        tracks = super().tracks(tokens)
        if len(tokens) > self.config.seq_len:
            self.observe(tokens, [Window(0, 1, len(tokens))], 0.0, math.inf)
        return tracks


class KeepsWeights(SgdScorer):
    """Does not restore the weights."""

    def reset(self):
        if not hasattr(self, "state"):
            super().reset()


UNFAIR = {
    TrainsFirst: ({"causal"}, "the weights moved while these targets were scored"),
    TrainsFirstInSecret: ({"causal"}, "scores depend on later tokens"),
    TrainsAhead: ({"causal"}, "scores depend on later tokens"),
    TrainsOnAll: ({"causal"}, "the weights moved before these targets were scored, outside of observe"),
    KeepsWeights: (set(), "the weights after a reset are not those of the artifact"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scorer", UNFAIR)
def test_updates_before_the_score_are_caught(scorer, judge):
    others, what = UNFAIR[scorer]
    verdicts = judge("sgd", cheat(scorer))
    assert broken(verdicts) == {"score-before-update"} | others
    assert what in {found["what"] for found in verdicts["score-before-update"].examples}


class SharesAdapters(LoraScorer):
    """Every document of a batch gets what all of them learnt."""

    def observe(self, tokens, chunk, done, until):
        super().observe(tokens, chunk, done, until)
        with torch.no_grad():
            for adapter in (t for layers in self.lora.values() for pair in layers.values() for t in pair):
                adapter.copy_(adapter.mean(0, keepdim=True).expand_as(adapter))


class KeepsAdapters(LoraScorer):
    """The next batch of documents starts with the adapters of the one before."""

    def reset(self):
        if not self.lora:
            super().reset()


@pytest.mark.slow
@pytest.mark.parametrize("scorer", [SharesAdapters, KeepsAdapters])
def test_adapters_that_see_other_documents_are_caught(scorer, judge):
    verdicts = judge("lora", cheat(scorer))
    assert "documents" in broken(verdicts) and not broken(verdicts) & {"once", "bytes", "normalized"}
    assert "scores depend on earlier documents" in {found["what"] for found in verdicts["documents"].examples}
    assert ("score-before-update" in broken(verdicts)) >= (scorer is KeepsAdapters)


# --- cheaters: bytes --------------------------------------------------------------------------------------------------


class CountsNames(ByteCounter):
    """Counts a byte piece by its name, <0x0A>, as the ready-made length of pieces would."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        names = [tokenizer.is_byte(i) for i in range(tokenizer.vocab_size())]
        self.own_bytes = np.where(names, 6, self.own_bytes)


class CountsEverySpace(ByteCounter):
    """Counts a leading space at the start of a document, where the text has none."""

    def count(self, previous, targets):
        return int(self.own_bytes[targets].sum() + self.has_space[targets].sum())


class CountsJoinedSpaces(ByteCounter):
    """Counts the space of a word that is joined to what stands before it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.joins_next = np.zeros_like(self.joins_next)


@pytest.mark.parametrize("counter", [CountsNames, CountsEverySpace])
def test_wrong_bytes_are_caught_and_explained(counter, judge, tokenizer, tokens):
    text = [1, *tokenizer.encode("naïve 😀 words"), 1, *tokenizer.encode("more\nlines of é")]
    row = torch.cat((torch.tensor(text), tokens))
    verdicts = judge("plain", counter=counter(tokenizer), tokens=row)
    assert broken(verdicts) == {"bytes"}
    found = verdicts["bytes"].examples
    for example in found:
        at = example["position"]
        assert example["counted"] > example["actual"]
        assert example["piece"].startswith(tokenizer.id_to_piece(int(row[at])))
        assert (counter is CountsNames) or row[at - 1] == 1
    if counter is CountsNames:
        assert dict(piece="<0xF0><0x9F><0x98><0x80>", counted=24, actual=4).items() <= found[1].items()


def test_bytes_of_marked_words_are_explained(marked_tokenizer):
    text = torch.tensor([*encode_document(marked_tokenizer, "A DataFrame"), *encode_document(marked_tokenizer, "(the")])
    for counter, faults in ((ByteCounter(marked_tokenizer), 0), (CountsJoinedSpaces(marked_tokenizer), 3)):
        verdict = Verdict("bytes")
        check_bytes(verdict, text, 1, counter, marked_tokenizer)
        assert verdict.violations == faults
        assert all(found["counted"] == found["actual"] + 1 for found in verdict.examples)


def test_a_text_that_is_cut_inside_of_a_letter_is_no_fault(judge, tokenizer, tokens):
    cut = torch.tensor([1, *tokenizer.encode("the end 😀")[:-1]])
    assert not broken(judge("plain", tokens=torch.cat((tokens, cut))))


# --- what the probes are made of --------------------------------------------------------------------------------------


def test_every_token_is_replaced():
    generator, tokens = torch.Generator().manual_seed(0), torch.arange(2000) % 5
    for vocab_size in (5, 384):
        kept = replace_tokens(tokens, 1, vocab_size, generator)
        assert torch.equal(kept == 1, tokens == 1) and (kept != tokens)[tokens != 1].all()
        moved = move_documents(tokens, 1, vocab_size, generator)
        assert (moved != tokens).all() and (moved == 1).any()
        assert min(kept.min(), moved.min()) >= 0 and max(kept.max(), moved.max()) < vocab_size


def test_edges_surround_the_ends_of_windows():
    assert find_edges([[[Window(0, 1, 5)], [Window(8, 20, 30)]]], 16, 31) == [
        1, 2, 4, 5, 6, 7, 8, 9, 19, 20, 21, 23, 24, 25, 29, 30,
    ]  # fmt: skip


class Dice(PlainScorer):
    def log_probs(self, tokens, windows):
        for positions, log_probs in super().log_probs(tokens, windows):
            yield positions, (log_probs + 1e-6 * torch.randn_like(log_probs)).log_softmax(-1)


def test_an_audit_that_proves_nothing_is_refused(judge, tokens):
    with pytest.raises(AuditError, match="two passes over the same tokens differ from position 1 on"):
        judge("plain", cheat(Dice))
    with pytest.raises(AuditError, match="span=66: at least 162 tokens are needed, so that there are two windows"):
        judge("banded", tokens=tokens[:66])
    with pytest.raises(AuditError, match="span=180: no weight was ever adapted in it; raise --span"):
        judge("sgd", ttt_chunk=1000)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(dataset) -> bytes:
    config = tiny_config(data_path=str(dataset), score_mode="sliding", model_dim=16, bigram_buckets=0)
    model = tiny_model(config)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return pack_weights(config, weights, train_gpt.load_run_tokenizer(config).identity)


@pytest.fixture
def artifact(tmp_path, dataset, packed):
    """A run folder with an artifact and its tokenizer."""
    (tmp_path / "artifact.lg").write_bytes(packed)
    (tmp_path / "tokenizer.model").write_bytes((dataset / "tokenizer.model").read_bytes())
    return tmp_path / "artifact.lg"


@pytest.mark.slow
def test_the_report_of_a_sound_artifact(artifact, dataset, capsys):
    assert main([str(artifact.parent), "--data_path", str(dataset), "--probes", "6"]) == 0
    shown = capsys.readouterr()
    report = json.loads((artifact.parent / "audit.json").read_text())
    assert shown.out.splitlines()[-1] == "verdict holds" and not shown.err
    assert report["verdict"] == "holds" and report["mode"] == "sliding" and report["span"] == 75
    assert report["artifact_sha256"] == train_gpt.load_artifact(artifact).sha256
    assert [(rule["rule"], rule["verdict"]) for rule in report["rules"]] == [(rule, "holds") for rule in RULES]
    for line, rule in zip(shown.out.splitlines()[1:], report["rules"]):
        assert line.split()[:3] == [rule["rule"], "holds", f"{rule['probes']:,}"] and line.endswith(rule["what"])


@pytest.mark.slow
def test_the_report_of_a_cheater_names_what_was_found(artifact, dataset, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "ByteCounter", CountsEverySpace)
    out = artifact.parent / "elsewhere.json"
    options = ["--data_path", str(dataset), "--probes", "2", "--out", str(out)]
    assert main([str(artifact), *options, "--mode", "lora", "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text()) and not (artifact.parent / "audit.json").exists()
    (rule,) = (rule for rule in report["rules"] if rule["verdict"] == "violated")
    assert report["verdict"] == "violated" and report["mode"] == "lora" and rule["rule"] == "bytes"
    assert rule["violations"] >= len(rule["examples"]) > 0
    assert main([str(artifact), *options]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict violated" and any("counted" in line and "actual" in line for line in lines)


@pytest.mark.slow
def test_bad_input_is_refused_in_one_line(artifact, dataset, tmp_path, capsys):
    data = ["--data_path", str(dataset)]
    damaged, folder = tmp_path / "damaged.lg", tmp_path / "empty"
    damaged.write_bytes(artifact.read_bytes()[:-1])
    folder.mkdir()
    cases = [
        ([str(folder), *data], 2, "no such file; name an artifact, or the folder of a finished run"),
        ([str(damaged), *data], 4, "truncated or changed"),
        ([str(artifact), "--data_path", str(folder)], 2, "no shard *_val_*.bin"),
        ([str(artifact), *data, "--span", "20"], 2, "span=20: at least 66 tokens are needed"),
    ]
    for argv, code, expected in cases:
        assert main(argv) == code
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and expected in shown.err and shown.err.count("\n") == 1
    content = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content + b"\x0a\x00")  # one more, empty piece
    assert main([str(artifact), *data]) == 2
    assert not (tmp_path / "audit.json").exists()
    for argv in (["--probes", "-1"], ["--mode", "best"]):
        with pytest.raises(SystemExit) as stopped:
            main([str(artifact), *argv])
        assert stopped.value.code == 2
