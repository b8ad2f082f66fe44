"""Probes from outside whether the score of an artifact is fair: it runs the real scoring again and again over a short
span of validation text, changes what must not matter, and compares what comes out.

    causal                what stands later changes no distribution before it, bit for bit
    normalized            every distribution sums to one over the whole vocabulary
    score-before-update   weights rest while a chunk is scored, learn from scored tokens only, and are reset exactly
    once                  every target is scored exactly once, whatever the length of the text
    bytes                 counted bytes are the UTF-8 bytes of the decoded text, document by document
    documents             nothing passes a document boundary where the artifact says that nothing does

With a mixture of experts the comparisons leave room for rounding: tokens of one expert are rows of one product, so its
shape depends on all tokens.

A verdict per rule is printed and written to audit.json next to the artifact; exit code 4 when a rule is violated.

Examples:
    python -m tools.audit runs/ID
    python -m tools.audit runs/ID/artifact.lg --mode sgd --probes 50 --out audit_sgd.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from loopgolf.errors import ConfigError, Stop
from loopgolf.options import Parser
from loopgolf.runtime import Log, run_program, write_atomic
from loopgolf.scoring import BpbMeter, ByteCounter, Window, WindowScorer, score_tokens
from loopgolf.words import decode_document
from tools.lib.runlog import RunError

RULES = ("causal", "normalized", "score-before-update", "once", "bytes", "documents")
SUM_TOLERANCE = 1e-4  # float32 log-softmax over some thousand ids
# where documents move to other rows of a batch, or other tokens go to an expert, the same sums are taken in blocks of
# another shape
LAYOUT_TOLERANCE = 1e-4
EMBEDDED = 32  # tokens before and after a document boundary whose embeddings are compared
KEPT_FAULTS = 20  # examples of a violation in the report
TEXT_TOKENS = 1 << 20  # validation tokens whose bytes are compared with the text


class AuditError(Stop):
    """An audit that would prove nothing: one line that says why and how to fix it."""


@dataclass
class Verdict:
    """What the probes of one rule found."""

    rule: str
    probes: int = 0
    what: str = ""  # what one probe is, or why there was none
    violations: int = 0
    examples: list[dict] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "violated" if self.violations else "holds"

    def fault(self, **found) -> None:
        self.violations += 1
        if len(self.examples) < KEPT_FAULTS:
            self.examples.append(found)


# --- watching one pass ------------------------------------------------------------------------------------------------


class Recorder(BpbMeter):
    """The real meter, which also keeps every distribution and how often each position was scored."""

    def __init__(self, counter: ByteCounter, n_tokens: int, vocab_size: int):
        super().__init__(counter)
        self.rows = torch.full((n_tokens, vocab_size), torch.nan)
        self.times = torch.zeros(n_tokens, dtype=torch.long)
        self.outside = 0  # scored positions that are no target of the text
        self.width = vocab_size  # ids that the distributions cover

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        if log_probs.shape[1] != self.rows.shape[1]:
            self.width = log_probs.shape[1]
            log_probs = F.pad(log_probs, (0, self.rows.shape[1] - self.width), value=-torch.inf)
        inside = (positions > 0) & (positions < len(self.rows))
        self.outside += int((~inside).sum())
        positions, log_probs = positions[inside], log_probs.float().cpu()[inside]
        super().add(tokens, positions, log_probs)
        self.times += torch.bincount(positions, minlength=len(self.times))
        self.rows[positions] = log_probs


def fingerprint(scorer: WindowScorer) -> bytes:
    """sha256 of everything that can learn: parameters and buffers of the model, and what else the scorer learns."""
    digest = hashlib.sha256()
    for tensor in [*scorer.model.state_dict().values(), *scorer.learned()]:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


class Watched:
    """A scorer whose weights are compared before and after everything that the scoring loop asks of it."""

    def __init__(self, scorer: WindowScorer, verdict: Verdict):
        self.scorer, self.verdict = scorer, verdict
        self.artifact = self.state = fingerprint(scorer)
        self.compared = self.learnt = 0

    def __getattr__(self, name: str):
        return getattr(self.scorer, name)

    def compare(self, expected: bytes, what: str, windows: list[Window]) -> None:
        self.state, self.compared = fingerprint(self.scorer), self.compared + 1
        if self.state != expected:
            where = dict(first=windows[0].first, last=windows[-1].stop - 1) if windows else {}
            self.verdict.fault(what=what, **where)

    def log_probs(self, tokens: Tensor, windows: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
        self.compare(self.state, "the weights moved before these targets were scored, outside of observe", windows)
        for found in self.scorer.log_probs(tokens, windows):
            self.compare(self.state, "the weights moved while these targets were scored", windows)
            yield found
        self.compare(self.state, "the weights moved while these targets were scored", windows)

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        before = self.state
        self.scorer.observe(tokens, chunk, done, until)
        self.state = fingerprint(self.scorer)
        self.learnt += self.state != before

    def reset(self) -> None:
        self.scorer.reset()
        self.compare(self.artifact, "the weights after a reset are not those of the artifact", [])


# --- probes -----------------------------------------------------------------------------------------------------------


def find_changes(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Which rows differ: in any bit, or by more than the tolerance if there is one."""
    differ = (a - b).abs() > tolerance if tolerance else a.view(torch.int32) != b.view(torch.int32)
    return differ.any(1)


def replace_tokens(tokens: Tensor, bos_id: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Another token at every place, except that documents start where they did."""
    shift = torch.randint(1, vocab_size, tokens.shape, generator=generator)
    fresh, (one, other) = (tokens + shift) % vocab_size, ((bos_id + 1) % vocab_size, (bos_id + 2) % vocab_size)
    fresh = torch.where(fresh == bos_id, torch.where(tokens == one, other, one), fresh)
    return torch.where(tokens == bos_id, bos_id, fresh)


def move_documents(tokens: Tensor, bos_id: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Another token at every place, and documents that start elsewhere."""
    fresh = replace_tokens(tokens.where(tokens != bos_id, (bos_id + 1) % vocab_size), bos_id, vocab_size, generator)
    starts = torch.rand(tokens.shape, generator=generator) < 0.02
    return torch.where(starts & (tokens != bos_id), bos_id, fresh)


def find_edges(tracks: list[list[list[Window]]], seq_len: int, n_tokens: int) -> list[int]:
    """Positions at and next to the ends of windows, and of the blocks in which they are computed."""
    edges = set()
    for w in (window for track in tracks for chunk in track for window in chunk):
        edges |= {w.first, w.stop, *range(w.start, w.stop, seq_len), *range(w.start, w.stop, min(128, seq_len))}
    return sorted({edge + by for edge in edges for by in (-1, 0, 1)} & set(range(1, n_tokens)))


class Auditor:
    """Runs the scoring and keeps the books of the rules; what holds in every pass is checked in every pass."""

    def __init__(self, build: Callable[[], WindowScorer], counter: ByteCounter, seed: int, bar):
        self.build, self.counter, self.bar = build, counter, bar
        self.verdicts = {rule: Verdict(rule) for rule in RULES}
        self.choice, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        scorer = build()
        config: Any = scorer.config  # a train_gpt.Config: the audit asks for more than scoring does
        self.config = config
        self.is_per_document = scorer.is_per_document
        self.length, self.stride = scorer.length, scorer.stride
        self.artifact = fingerprint(scorer)
        self.adapts = scorer.adapts
        self.learnt = 0  # observations that moved a weight
        self.tolerance = LAYOUT_TOLERANCE if self.config.moe_experts else 0.0

    def score(self, tokens: Tensor, watch: bool = False) -> Recorder:
        """One pass of a fresh scorer over the tokens."""
        vocab_size, update = self.config.vocab_size, self.verdicts["score-before-update"]
        scorer, meter = self.build(), Recorder(self.counter, len(tokens), vocab_size)
        if watch or self.adapts:
            watched: Any = Watched(scorer, update)
            score_tokens(watched, tokens, meter)
            update.probes += watched.compared
            self.learnt += watched.learnt
        else:
            score_tokens(scorer, tokens, meter)
        update.probes += 1
        if fingerprint(scorer) != self.artifact:
            update.fault(what="the weights after a pass are not those of the artifact")
        self.check_normalized(meter)
        self.check_once(meter)
        self.bar.update()
        return meter

    def check_normalized(self, meter: Recorder) -> None:
        verdict, scored = self.verdicts["normalized"], meter.times.nonzero().flatten()
        verdict.probes += len(scored)
        if meter.width != meter.rows.shape[1]:
            verdict.fault(what="not over the whole vocabulary", ids=meter.width, vocabulary=meter.rows.shape[1])
        sums = meter.rows[scored].double().exp().sum(1)
        for i in (~((sums - 1).abs() <= SUM_TOLERANCE)).nonzero().flatten():  # so that NaN is a fault
            verdict.fault(position=int(scored[i]), sum=float(sums[i]))

    def check_once(self, meter: Recorder) -> None:
        verdict, n_tokens = self.verdicts["once"], len(meter.times)
        verdict.probes += 1
        for position in (meter.times[1:] != 1).nonzero().flatten() + 1:
            verdict.fault(tokens=n_tokens, position=int(position), scored=int(meter.times[position]))
        if meter.outside:
            verdict.fault(tokens=n_tokens, what="targets beyond the text were scored", targets=meter.outside)

    def probe_causality(self, tokens: Tensor, reference: Recorder, probes: int) -> None:
        causal, update = self.verdicts["causal"], self.verdicts["score-before-update"]
        edges, compared = find_edges(self.build().tracks(tokens), self.config.seq_len, len(tokens)), 0
        for probe in range(probes):
            at = self.choice.choice(edges) if probe % 2 else self.choice.randrange(1, len(tokens))
            moves = probe % 4 == 0 or int(tokens[at]) == self.config.bos_id
            change = move_documents if moves else replace_tokens
            later = change(tokens[at:], self.config.bos_id, self.config.vocab_size, self.generator)
            meter = self.score(torch.cat((tokens[:at], later)))
            tolerance = LAYOUT_TOLERANCE if moves and self.is_per_document else self.tolerance
            seen = slice(1, at + 1)  # the distribution of target `at` itself included
            changed = find_changes(reference.rows[seen], meter.rows[seen], tolerance).nonzero().flatten() + 1
            compared += at
            for verdict in (causal, update) if self.adapts else (causal,):
                verdict.probes += 1
                if len(changed):
                    verdict.fault(
                        what="scores depend on later tokens",
                        changed_from=at,
                        first=int(changed[0]),
                        last=int(changed[-1]),
                        scores=len(changed),
                    )
        causal.what = f"passes with other tokens from some position on; {compared:,} earlier distributions compared"

    def probe_lengths(self, tokens: Tensor) -> None:
        L, window = self.config.seq_len, self.length
        lengths = {1, 2, 3, L, L + 1, L + 2, window + 1, window + 2, window + self.stride + 1, len(tokens) - 1}
        for length in sorted(length for length in lengths if 0 < length < len(tokens)):
            self.score(tokens[:length])
        self.verdicts["once"].what = "passes in which every target was counted, over texts of many lengths"

    def probe_embeddings(self, tokens: Tensor, probes: int) -> None:
        """What a document's first tokens look like to the model, after other tokens."""
        verdict, config, reach = self.verdicts["documents"], self.config, EMBEDDED
        model: Any = self.build().model
        starts = torch.randint(len(tokens) - 2 * reach, (probes, 1), generator=self.generator)
        rows = tokens[starts + torch.arange(2 * reach)]
        rows[:, reach] = config.bos_id
        others = rows.clone()
        others[:, :reach] = replace_tokens(rows[:, :reach], config.bos_id, config.vocab_size, self.generator)
        with torch.no_grad():
            a, b = (model.embed_tokens(x.to(model.embed.weight.device))[:, reach - 2 :].float() for x in (rows, others))
        verdict.probes += probes
        for changed in (a != b).any(2):
            if changed.any():
                behind = int(changed.nonzero()[0])
                verdict.fault(what="an embedding depends on tokens before its document", tokens_behind_bos=behind)

    def probe_documents(self, tokens: Tensor, probes: int) -> None:
        verdict, config = self.verdicts["documents"], self.config
        self.probe_embeddings(tokens, probes)
        if self.adapts and not self.is_per_document:
            verdict.what = "embeddings behind another document; scores may depend on it, as the weights adapt"
            return
        if not self.is_per_document and not config.doc_attention:
            verdict.what = "embeddings behind another document; scores may depend on it, as attention sees it"
            return
        tokens = tokens.clone()  # with more documents, short ones too
        tokens[torch.rand(tokens.shape, generator=self.generator) < 0.005] = config.bos_id
        tokens[len(tokens) // 2] = config.bos_id
        starts = (tokens[1:-1] == config.bos_id).nonzero().flatten() + 1
        reference, compared = self.score(tokens), 0
        for _ in range(count_document_probes(probes)):
            start = int(self.choice.choice(starts))
            earlier = replace_tokens(tokens[:start], config.bos_id, config.vocab_size, self.generator)
            meter = self.score(torch.cat((earlier, tokens[start:])))
            ours, theirs = reference.rows[start + 1 :], meter.rows[start + 1 :]
            changed = find_changes(ours, theirs, self.tolerance).nonzero().flatten()
            verdict.probes, compared = verdict.probes + 1, compared + len(tokens) - start - 1
            if len(changed):
                verdict.fault(
                    what="scores depend on earlier documents",
                    document_at=start,
                    first=start + 1 + int(changed[0]),
                    scores=len(changed),
                )
        verdict.what = f"embeddings and passes behind other documents; {compared:,} distributions behind them compared"


def count_document_probes(probes: int) -> int:
    """Passes for the document rule: a change reaches all later documents, so fewer are needed."""
    return 1 + probes // 4


def check_bytes(verdict: Verdict, text: Tensor, bos_id: int, counter: ByteCounter, tokenizer) -> None:
    """Counted bytes against the decoded text of every document."""
    tokens = text.numpy()
    starts = sorted({0, *(text == bos_id).nonzero().flatten().tolist()})
    stops = [*starts[1:], len(tokens)]
    while stops[-1] > starts[-1] + 1 and tokenizer.is_byte(int(tokens[stops[-1] - 1])):
        stops[-1] -= 1  # the text may be cut inside of a letter
    total = 0
    for start, stop in zip(starts, stops):
        begin = max(1, start)  # nothing predicts the first token of the text
        ids = tokens[start:stop].tolist()
        counted = counter.count(tokens[begin - 1 : stop - 1], tokens[begin:stop])
        actual = count_utf8(tokenizer, ids) - count_utf8(tokenizer, ids[: begin - start])
        verdict.probes, total = verdict.probes + 1, total + actual
        if counted != actual:
            before = verdict.violations
            if before < KEPT_FAULTS:  # decoding a document piece by piece takes its time
                explain_bytes(verdict, tokens, start, stop, counter, tokenizer)
            if verdict.violations == before:
                verdict.fault(document_at=start, counted=counted, actual=actual)
    verdict.what = f"documents decoded, {total:,} bytes"


def count_utf8(tokenizer, ids: list[int]) -> int:
    return len(decode_document(tokenizer, ids).encode())


def explain_bytes(verdict: Verdict, tokens, start: int, stop: int, counter: ByteCounter, tokenizer) -> None:
    """Which pieces of a document are counted wrongly. Byte pieces in a row are letters only together."""
    ids = tokens[start:stop].tolist()
    is_byte = [tokenizer.is_byte(i) for i in ids]
    ends = [k for k in range(1, len(ids) + 1) if k == len(ids) or not (is_byte[k - 1] and is_byte[k])]
    before = 0
    for k, end in zip([0, *ends], ends):
        after = count_utf8(tokenizer, ids[:end])
        begin, actual, before = start + k, after - before, after
        if begin == 0:
            continue
        counted = counter.count(tokens[begin - 1 : start + end - 1], tokens[begin : start + end])
        if counted != actual:
            piece = "".join(tokenizer.id_to_piece(i) for i in ids[k:end])
            verdict.fault(position=begin, piece=piece, counted=counted, actual=actual)
        if verdict.violations >= KEPT_FAULTS:
            return


def audit(
    build: Callable[[], WindowScorer],
    tokens: Tensor,
    counter: ByteCounter,
    tokenizer: sentencepiece.SentencePieceProcessor,
    probes: int,
    seed: int = 0,
    text: Tensor | None = None,
) -> list[Verdict]:
    """The verdicts over passes of `build()`, a fresh scorer each, through the real scoring loop. `tokens` is the span
    that is scored; the bytes of `text`, by default of the span, are compared with what it decodes to."""
    passes = 12 + probes + count_document_probes(probes)
    with Log().progress_bar(passes, "auditing") as bar:
        auditor = Auditor(build, counter, seed, bar)
        verdicts, config = auditor.verdicts, auditor.config
        if len(tokens) < (least := max(auditor.length, 2 * EMBEDDED) + 2):
            raise AuditError(f"span={len(tokens)}: at least {least} tokens are needed, so that there are two windows")
        reference = auditor.score(tokens, watch=True)
        again = auditor.score(tokens)
        if len(changed := find_changes(reference.rows, again.rows, 0.0).nonzero()):
            raise AuditError(
                f"two passes over the same tokens differ from position {int(changed[0])} on, so nothing "
                "can be compared bit for bit; audit on a device that repeats itself"
            )
        if auditor.adapts and not auditor.learnt:
            raise AuditError(f"span={len(tokens)}: no weight was ever adapted in it; raise --span")
        auditor.probe_causality(tokens, reference, probes)
        auditor.probe_lengths(tokens)
        auditor.probe_documents(tokens, probes)
        check_bytes(verdicts["bytes"], tokens if text is None else text, config.bos_id, counter, tokenizer)
    whole = counter.count(tokens[:-1].numpy(), tokens[1:].numpy())
    if int(reference.sums[2]) != whole and not verdicts["once"].violations:
        verdicts["bytes"].fault(
            what="the meter does not count what its tokens count", meter=int(reference.sums[2]), counted=whole
        )
    verdicts["normalized"].what = "distributions summed"
    adapted = f"passes and comparisons of weights; {auditor.learnt} observations moved them"
    verdicts["score-before-update"].what = adapted if auditor.adapts else "comparisons of weights: nothing adapts"
    return list(verdicts.values())


# --- command line -----------------------------------------------------------------------------------------------------


def choose_span(scorer: WindowScorer) -> int:
    """Tokens that make some windows, a cut last one, and where weights adapt some chunks too."""
    L = scorer.config.seq_len
    return 1 + scorer.length + (4 if scorer.adapts else 1) * L + L // 3


def audit_artifact(path: Path, args: argparse.Namespace) -> dict:
    started = time.perf_counter()
    artifact = train_gpt.load_artifact(path)
    own_tokenizer = path.with_name("tokenizer.model")
    config = train_gpt.config_from_stored(artifact.stored)
    mode = args.mode or config.score_mode
    scorer_class = train_gpt.find_scorer(mode)
    small = scorer_class.small_settings(config)
    config = replace(config, score_mode=mode, **small)
    # in float32 a leak cannot hide in rounding, nor rounding look like a leak
    config = replace(
        config,
        data_path=args.data_path,
        tokenizer_path=str(own_tokenizer) if own_tokenizer.is_file() else "",
        compile="none",
        dtype="float32",
    )
    ctx = replace(train_gpt.build_context(config, {}), log=Log(quiet=True))
    val = train_gpt.load_validation(config, ctx)
    text = val.tokens[: max(TEXT_TOKENS, args.span)]
    if artifact.tokenizer != val.identity:
        raise ConfigError(f"the artifact was made with another tokenizer than {config.tokenizer_file}")
    model = train_gpt.build_eval_model(config, ctx)

    def build() -> WindowScorer:
        model.load_state_dict(artifact.tensors)
        return train_gpt.build_scorer(mode, model, config, ctx, val.mask)

    probes = args.probes or (20 if scorer_class.adapts else 200)
    span = text[: args.span or choose_span(build())]
    tokenizer = train_gpt.load_tokenizer(config.tokenizer_file).model
    verdicts = audit(build, span, val.counter, tokenizer, probes, args.seed, text)
    return dict(
        verdict="violated" if any(v.violations for v in verdicts) else "holds",
        artifact=str(path),
        artifact_sha256=artifact.sha256,
        mode=mode,
        span=len(span),
        text=len(text),
        seed=args.seed,
        doc_attention=config.doc_attention,
        settings=small,
        device=str(ctx.device),
        dtype=config.dtype,
        torch=torch.__version__,
        seconds=round(time.perf_counter() - started, 1),
        rules=[dict(rule=v.rule, verdict=v.verdict) | asdict(v) for v in verdicts],
    )


def show(report: dict) -> None:
    print(
        f"audit mode:{report['mode']} span:{report['span']} seconds:{report['seconds']} "
        f"artifact_sha256:{report['artifact_sha256']}"
    )
    for rule in report["rules"]:
        print(f"{rule['rule']:<21}{rule['verdict']:<10}{rule['probes']:>9,} {rule['what']}")
        for found in rule["examples"]:
            print(" " * 21 + ", ".join(f"{name} {value}" for name, value in found.items()))
        if rule["violations"] > len(rule["examples"]):
            print(" " * 21 + f"and {rule['violations'] - len(rule['examples']):,} more")
    print(f"verdict {report['verdict']}")


def run(args: argparse.Namespace) -> int:
    path = args.artifact / "artifact.lg" if args.artifact.is_dir() else args.artifact
    if not path.is_file():
        raise RunError(f"{path}: no such file; name an artifact, or the folder of a finished run")
    report = audit_artifact(path, args)
    content = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomic(args.out or path.with_name("audit.json"), content.encode() + b"\n")
    print(content) if args.json else show(report)
    return 4 if report["verdict"] == "violated" else 0


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="artifact, or the folder of a finished run")
    parser.add_argument("--mode", choices=tuple(train_gpt.SCORERS), help="default: the artifact's own")
    parser.add_argument("--data_path", default=train_gpt.RECIPES["pocket"]["data_path"], help="dataset folder")
    parser.add_argument("--probes", type=int, default=0, help="passes for causality (0: 200, or 20 where it adapts)")
    parser.add_argument("--span", type=int, default=0, help="validation tokens in a pass (0: a few windows)")
    parser.add_argument("--seed", type=int, default=0, help="seed of positions and replaced tokens")
    parser.add_argument("--out", type=Path, help="where the report goes (default: audit.json next to the artifact)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.probes < 0 or args.span < 0:
        parser.error("--probes and --span count from 0")
    return run_program(run, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
