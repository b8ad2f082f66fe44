"""What a score means: bits per byte of text that the model has not seen.

    val_bpb = (sum of nats over scored tokens / ln 2) / UTF-8 bytes of these tokens

A scorer gives log-probabilities over the whole vocabulary for tokens that it has not seen, from tokens before them
only, and may adapt to tokens once they are scored. One loop drives every scorer, from left to right, every token
once; BpbMeter alone counts nats, tokens and bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Cache
from loopgolf.quantize import Latents
from loopgolf.runtime import RunContext


@dataclass(frozen=True)
class Scoring:
    """What scoring has to know of a config. An artifact stores it: how it is scored is fixed before it is trained."""

    vocab_size: int = 1024  # size of the tokenizer's vocabulary
    bos_id: int = 1  # token that starts every document
    seq_len: int = 2048  # tokens in a training sequence and in a scoring window
    score_mode: str = "sgd"  # how val_bpb is computed: plain, sliding, banded, sgd or lora
    score_batch: int = 32  # windows in one forward pass of a rank while scoring
    stride: int = 64  # tokens that a sliding window scores
    band: int = 0  # banded and lora: positions that a position attends to (0 = seq_len)
    ttt_chunk: int = 32768  # sgd: tokens that are scored before the weights adapt to them
    ttt_lr: float = 0.002  # sgd: learning rate at the first chunk, falling to 0 as a cosine
    ttt_momentum: float = 0.9  # sgd: momentum
    ttt_epochs: int = 3  # sgd: passes over each chunk
    ttt_batch: int = 16  # sgd: sequences of a chunk in one update, over all ranks
    ttt_clip: float = 1.0  # sgd: largest gradient norm
    ttt_freeze: str = "a"  # sgd: letters of the blocks that stay as they are
    lora_rank: int = 8  # lora: rank of the adapters that each document gets
    lora_chunk: int = 256  # lora: tokens of a document that are scored before its adapters learn from them
    lora_lr: float = 0.01  # lora: learning rate of the adapters (Adam)


class ByteCounter:
    """UTF-8 bytes that tokens stand for: a piece's own bytes, plus one for its leading space unless the previous token
    is a boundary (a control, unknown or unused id)."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        ids = range(tokenizer.vocab_size())
        is_special = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        own = [1 if tokenizer.is_byte(i) else len(pieces[i].removeprefix("▁").encode()) for i in ids]
        self.own_bytes, self.is_boundary = np.where(is_special, 0, own), np.array(is_special)
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_boundary

    def count(self, previous: np.ndarray, targets: np.ndarray) -> int:
        spaces = self.has_space[targets] & ~self.is_boundary[previous]
        return int(self.own_bytes[targets].sum() + spaces.sum())


@dataclass(frozen=True)
class Window:
    """Targets tokens[first:stop] are scored from inputs that begin at tokens[start]."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


class BpbMeter:
    """Sums of this rank; total() adds the ranks up."""

    def __init__(self, counter: ByteCounter):
        self.counter, self.sums = counter, torch.zeros(3, dtype=torch.float64)

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        """log_probs (n, V): what was predicted for tokens[positions]."""
        targets, previous = tokens[positions], tokens[positions - 1]
        nats = -log_probs.gather(1, targets.to(log_probs.device)[:, None]).double().sum().item()  # sync
        n_bytes = self.counter.count(previous.numpy(), targets.numpy())
        self.sums += torch.tensor([nats, len(targets), n_bytes], dtype=torch.float64)

    def total(self, ctx: RunContext) -> Score:
        nats, tokens, n_bytes = ctx.sum(self.sums.to(ctx.device)).tolist()
        return Score(nats, round(tokens), round(n_bytes))


class WindowScorer:
    """Windows of `length` inputs that score their last `stride` targets, the first window all of its own. `plain`: the
    windows do not overlap. `sliding`: short strides, so that every target sees a long context, many times the work.
    `banded`: windows several times as long, in which a position attends to the last `band` ones only; they stream
    through a cache, and every target sees a long context at about the price of plain.

    A pass over the tokens consists of tracks that do not know of each other, a track of chunks: the windows of a chunk
    are scored, then the scorer may observe them and adapt before the next chunk. Ranks share the windows of a chunk,
    or, with is_per_document, the tracks.

    A model is what gives states for model(tokens, cache=, lora=) and has logits(states), loss(tokens, targets) and
    is_compiled; for adapters its blocks have the linear layers qkv, out, up and down."""

    is_per_document = False
    stretch = 5  # length of a banded window over seq_len: all but `band` of it is scored

    def __init__(self, model: nn.Module, config: Scoring, ctx: RunContext, layout: str):
        self.model, self.config, self.ctx = model.eval(), config, ctx
        L = config.seq_len
        self.band = (config.band or L) if layout == "banded" else L
        self.length, self.stride = (self.stretch * L,) * 2 if layout == "banded" else (L, L)
        self.stride = {"plain": L, "sliding": config.stride, "banded": self.length - self.band}[layout]
        self.rows = config.score_batch  # windows in a forward pass
        self.lora: dict[str, dict] = {}
        self.updates = self.skipped = 0  # adaptation: updates made, and updates that the time did not allow
        self.update_s = 0.0  # seconds of the slowest update

    def windows(self, n_tokens: int) -> list[Window]:
        firsts = [1, *range(1 + self.length, n_tokens, self.stride)] if n_tokens > 1 else []
        stops = [*firsts[1:], n_tokens]
        return [Window(max(0, a - 1 - self.length + self.stride), a, b) for a, b in zip(firsts, stops)]

    def tracks(self, tokens: Tensor) -> list[list[list[Window]]]:
        return [[self.windows(len(tokens))]]

    def scored_states(self, tokens: Tensor, windows: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of targets and the states that predict them, in blocks of seq_len inputs. The windows, at most
        `rows` of them, are padded to one shape if that saves compilation: what stands behind a token, or in
        another row, cannot change its states."""
        L, rows = self.config.seq_len, self.rows if self.model.is_compiled else len(windows)
        inputs = torch.full((rows, self.length), self.config.bos_id)
        for row, w in zip(inputs, windows):
            row[: w.stop - 1 - w.start] = tokens[w.start : w.stop - 1]
        inputs = inputs.to(self.ctx.device)
        lora = {b: {n: (a[:rows], z[:rows]) for n, (a, z) in layers.items()} for b, layers in self.lora.items()}
        cache = Cache(self.band) if self.length > L or self.band < L else None
        for at in range(0, max(w.stop - 1 - w.start for w in windows), L):
            states = self.model(inputs[:, at : at + L], cache=cache, lora=lora)
            begins = [w.start + at for w in windows]
            spans = [range(max(w.first - 1, b), min(w.stop - 1, b + L)) for w, b in zip(windows, begins)]
            if any(spans):
                scored = [x[s.start - b :][: len(s)] for x, s, b in zip(states, spans, begins)]
                yield torch.tensor([i + 1 for s in spans for i in s]), torch.cat(scored)

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, windows: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every target of the windows once: positions (n,), and log-probabilities (n, V) over the whole vocabulary."""
        for positions, states in self.scored_states(tokens, windows):
            yield positions, self.model.logits(states).log_softmax(-1)

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        """Adapts to a chunk, now that all of it is scored, but not beyond the time `until`. `done`: share of the
        track that is scored."""

    def reset(self) -> None:
        """Forgets what was observed: the model is as it was."""

    def warm_up(self) -> None:
        """Compiles on made-up tokens what a pass needs, and leaves no trace."""
        generator = torch.Generator().manual_seed(0)
        count = 1 + max(self.length, self.config.ttt_batch * self.config.seq_len)
        tokens = torch.randint(self.config.vocab_size, (count,), generator=generator)
        tokens[tokens == self.config.bos_id] = 0 if self.config.bos_id else 1
        chunk = self.tracks(tokens)[0][0]
        for _ in self.log_probs(tokens, chunk[: self.rows]):
            pass
        self.observe(tokens, chunk, 0.0, math.inf)
        self.reset()
        self.updates, self.update_s = 0, 0.0

    def is_late(self, until: float) -> bool:
        late = torch.tensor(float(time.perf_counter() + 1.5 * self.update_s > until), device=self.ctx.device)
        is_late = bool((late if self.is_per_document else self.ctx.sum(late)).item())  # sync
        self.updates, self.skipped = self.updates + (not is_late), self.skipped + is_late
        return is_late


class SgdScorer(WindowScorer):
    """After each chunk a few epochs of SGD on it. Every rank takes part in every update."""

    stretch = 2  # shorter windows, so that a chunk has some for every rank

    def __init__(self, model: nn.Module, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, "banded")
        self.rows = min(self.rows, -(-config.ttt_chunk // self.stride // ctx.world))  # a rank's share of a chunk
        self.base = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.frozen = tuple(f"blocks.{name}." for name in config.ttt_freeze)
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(self.frozen))
        self.reset()

    def tracks(self, tokens: Tensor) -> list[list[list[Window]]]:
        chunks: dict[int, list[Window]] = {}
        for window in self.windows(len(tokens)):
            chunks.setdefault((window.first - 1) // self.config.ttt_chunk, []).append(window)
        return [list(chunks.values())]

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        config, ctx = self.config, self.ctx
        seen = tokens[chunk[0].first - 1 : chunk[-1].stop]
        rows, L = (len(seen) - 1) // config.seq_len, config.seq_len
        inputs, targets = (seen[i : i + rows * L].view(rows, L).to(ctx.device) for i in (0, 1))
        self.sgd.param_groups[0]["lr"] = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * done))
        for at in [*range(0, rows, config.ttt_batch)] * config.ttt_epochs:
            if self.is_late(until):
                continue
            started = time.perf_counter()
            batch = slice(at, min(at + config.ttt_batch, rows))
            mine = slice(at + ctx.rank, batch.stop, ctx.world)
            if len(inputs[mine]):
                (self.model.loss(inputs[mine], targets[mine]) * len(inputs[mine])).backward()
                self.latents.collect()
            self.latents.reduce(ctx.sum, 1 / len(inputs[batch]), config.ttt_clip)
            self.sgd.step()
            self.latents.flat_grad.zero_()
            self.latents.publish()
            self.update_s = max(self.update_s, time.perf_counter() - started)

    def reset(self) -> None:
        self.model.load_state_dict(self.base)
        self.latents = Latents(self.model, frozen=self.frozen)
        self.sgd = torch.optim.SGD(self.latents.weights.values(), lr=0.0, momentum=self.config.ttt_momentum)


class LoraScorer(WindowScorer):
    """Every document starts with fresh low-rank adapters on the linear layers of each block, and sees nothing of other
    documents; after each chunk of it they take one step of Adam. Documents of similar length form a batch, in which
    every row has adapters of its own. A mixture of experts stays as it is."""

    is_per_document = True

    def __init__(self, model: nn.Module, config: Scoring, ctx: RunContext):
        super().__init__(model.requires_grad_(False), config, ctx, "plain")
        self.band, self.stride = config.band or config.seq_len, min(config.lora_chunk, config.seq_len)
        self.reset()

    def tracks(self, tokens: Tensor) -> list[list[list[Window]]]:
        starts = sorted({0, *(tokens[:-1] == self.config.bos_id).nonzero().flatten().tolist()})
        documents = []
        for start, stop in zip(starts, [*(start + 1 for start in starts[1:]), len(tokens)]):
            firsts = range(start + 1, stop, self.stride)
            lead = self.length - self.stride
            documents.append([Window(max(start, a - 1 - lead), a, min(a + self.stride, stop)) for a in firsts])
        documents.sort(key=len, reverse=True)
        size = self.config.score_batch
        batches = [documents[i : i + size] for i in range(0, len(documents), size)]
        # the longest first, so row i of every chunk belongs to the same document
        return [[[d[i] for d in batch if i < len(d)] for i in range(len(batch[0]))] for batch in batches]

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        if self.is_late(until):
            return
        started = time.perf_counter()
        positions, states = next(self.scored_states(tokens, chunk))
        targets = tokens[positions].to(self.ctx.device)
        # a sum over documents: the gradient of one does not depend on its neighbours
        loss = F.cross_entropy(self.model.logits(states), targets, reduction="sum") / self.stride
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        self.update_s = max(self.update_s, time.perf_counter() - started)

    def reset(self) -> None:
        rows, rank = self.config.score_batch, self.config.lora_rank
        generator = torch.Generator().manual_seed(0)
        for name, block in self.model.blocks.items():
            self.lora[name] = {}
            for layer in ("qkv", "out", "up", "down"):
                fan_out, fan_in = getattr(block, layer).weight.shape
                down = torch.randn(fan_in, rank, generator=generator).repeat(rows, 1, 1) / fan_in**0.5
                up = torch.zeros(rows, rank, fan_out)
                self.lora[name][layer] = tuple(t.to(self.ctx.device).requires_grad_() for t in (down, up))
        weights = [t for layers in self.lora.values() for pair in layers.values() for t in pair]
        self.adam = torch.optim.Adam(weights, lr=self.config.lora_lr, betas=(0.9, 0.95))


def build_scorer(mode: str, model: nn.Module, config: Scoring, ctx: RunContext) -> WindowScorer:
    adaptive = {"sgd": SgdScorer, "lora": LoraScorer}
    return adaptive[mode](model, config, ctx) if mode in adaptive else WindowScorer(model, config, ctx, mode)


def score_tokens(scorer: WindowScorer, tokens: Tensor, meter, name: str = "", deadline: float = math.inf) -> None:
    """One pass from left to right: score a chunk, shared over ranks, then let the scorer see it. Adaptation stops when
    the rest, scored without it, would just be done by the deadline."""
    ctx, size = scorer.ctx, scorer.rows
    tracks = scorer.tracks(tokens)
    if scorer.is_per_document:
        tracks = tracks[ctx.rank :: ctx.world]
    share = slice(None) if scorer.is_per_document else slice(ctx.rank, None, ctx.world)
    left = sum(len(chunk[share]) for track in tracks for chunk in track)  # windows
    done, spent = 0, 0.0
    with ctx.log.progress_bar(left, f"scoring {name}") as bar:
        for track in tracks:
            for index, chunk in enumerate(track):
                mine = chunk[share]
                for batch in (mine[i : i + size] for i in range(0, len(mine), size)):
                    started = time.perf_counter()
                    for positions, log_probs in scorer.log_probs(tokens, batch):
                        meter.add(tokens, positions, log_probs)
                    done, left, spent = done + len(batch), left - len(batch), spent + time.perf_counter() - started
                    bar.update(len(batch))
                if index + 1 < len(track):
                    scorer.observe(tokens, chunk, index / len(track), deadline - 1.2 * left * spent / max(done, 1))
            scorer.reset()
