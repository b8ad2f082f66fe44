"""What a score means: bits per byte of text that the model has not seen.

    val_bpb = (sum of nats over scored tokens / ln 2) / UTF-8 bytes of these tokens

A scorer gives log-probabilities over the whole vocabulary for tokens that it has not seen, from tokens before them
only, and may adapt to tokens once they are scored. One loop drives every scorer, from left to right, every token
once; BpbMeter alone counts nats, tokens and bytes. Scorers that adapt are in adapting.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

from loopgolf.cache import Cache
from loopgolf.layers import Adapter, Linear
from loopgolf.options import option
from loopgolf.plan import Depth, Pass
from loopgolf.runtime import RunContext
from loopgolf.words import JOIN, drop_marks, has_marks

OnPass = Callable[[Pass, Tensor], Tensor]  # sees a pass and the stream after it, returns the stream that goes on
Lora = Mapping[str, Mapping[str, Adapter]]  # adapters by block and layer
Track = list[list["Window"]]  # chunks of windows


@dataclass(frozen=True)
class Scoring:
    """How a model is scored. An artifact stores it: it is fixed before the model is trained."""

    vocab_size: int = option(1024, "size of the tokenizer's vocabulary", low=2, high=65536)
    bos_id: int = option(1, "token that starts every document")
    seq_len: int = option(2048, "tokens in a training sequence and in a scoring window", low=2, high=2**20)
    score_mode: str = option("sgd", "how val_bpb is computed")
    score_batch: int = option(32, "windows in one forward pass of a rank while scoring", low=1, high=65536)
    canonical: bool = option(False, "what the tokenizer could never write next gets almost no probability")
    recall_share: float = option(0.0, "part of a prediction that repeats what followed similar states", high=0.9)
    recall_sharpness: float = option(16.0, "how similar those have to be, by the cosine of two states")
    stride: int = option(64, "sliding: tokens that a window scores", low=1)
    band: int = option(0, "banded and lora: positions that a position attends to (0 = seq_len)")
    ttt_chunk: int = option(32768, "sgd: tokens that are scored before the weights adapt to them", low=1)
    ttt_lr: float = option(0.002, "sgd: learning rate at the first chunk, falling to 0 as a cosine")
    ttt_momentum: float = option(0.9, "sgd: momentum", high=1)
    ttt_epochs: int = option(3, "sgd: passes over each chunk", high=1000)
    ttt_batch: int = option(16, "sgd: sequences of a chunk in one update, over all ranks", low=1, high=65536)
    ttt_clip: float = option(1.0, "sgd: largest gradient norm")
    ttt_freeze: str = option("a", "sgd: letters of the blocks that stay as they are")
    lora_rank: int = option(8, "lora: rank of the adapters that each document gets", low=1, high=65536)
    lora_chunk: int = option(256, "lora: tokens of a document that are scored before its adapters learn", low=1)
    lora_lr: float = option(0.01, "lora: learning rate of the adapters (Adam)")


class Model(Protocol):
    """What a scorer asks of a model. Called with tokens and targets it gives the loss."""

    is_compiled: bool

    def hidden(
        self,
        tokens: Tensor,
        depth: Depth | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> Tensor:
        """(B, T) tokens to normalised states (B, T, D). With a cache the tokens continue its stream."""

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) to (..., V)."""

    def linears(self) -> dict[str, dict[str, Linear]]:
        """By block and layer, the linear layers that an adapter can be put on."""

    def parameters_of_block(self, letter: str) -> list[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def __call__(self, tokens: Tensor, targets: Tensor) -> Any: ...


class Mask(Protocol):
    """What a tokenizer rules out."""

    def __call__(self, previous: Tensor, log_probs: Tensor) -> Tensor:
        """Log-probabilities (n, V) after tokens `previous` (n,), without what can never come next."""

    def check_text(self, tokens: Tensor) -> None:
        """Refuses a text in which something stands that the mask rules out."""


class Memory(Protocol):
    """What stands above in a batch of windows, and what it says of the next tokens."""

    def add(self, inputs: Tensor, states: Tensor) -> None:
        """The next positions of the windows: inputs (rows, T) and their states (rows, T, D)."""

    def mix(self, log_probs: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        """log_probs (n, V), with what the windows `owners` (n,) hold before and at their positions `places` (n,)."""


class Meter(Protocol):
    """What is told every distribution."""

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        """log_probs (n, V): what was predicted for tokens[positions]."""


class ByteCounter:
    """UTF-8 bytes that tokens stand for: a piece's own bytes, plus one for its leading space unless the previous token
    is a boundary (a control, unknown or unused id). Marks of words count nothing, nor does a space behind JOIN."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        ids = range(tokenizer.vocab_size())
        is_special = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        is_marked = has_marks(tokenizer)
        contents = [drop_marks(piece) if is_marked else piece for piece in pieces]
        own = [1 if tokenizer.is_byte(i) else len(contents[i].removeprefix("▁").encode()) for i in ids]
        self.own_bytes = np.where(is_special, 0, own)
        self.is_boundary = np.array(is_special)
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_boundary
        self.joins_next = np.array([is_marked and piece.endswith(JOIN) for piece in pieces])

    def count(self, previous: np.ndarray, targets: np.ndarray) -> int:
        spaces = self.has_space[targets] & ~self.is_boundary[previous] & ~self.joins_next[previous]
        return int(self.own_bytes[targets].sum() + spaces.sum())


class Window(NamedTuple):
    """Targets tokens[first:stop] are scored from inputs that begin at tokens[start]."""

    start: int
    first: int
    stop: int


class Scored(NamedTuple):
    """States that predict targets."""

    positions: Tensor  # (n,): of the targets in the text
    states: Tensor  # (n, D)
    owners: Tensor  # (n,): the window of each, by its place in the batch
    places: Tensor  # (n,): of each state in its window
    memory: Memory | None


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
        self.counter = counter
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        targets, previous = tokens[positions], tokens[positions - 1]
        nats = -log_probs.gather(1, targets.to(log_probs.device)[:, None]).double().sum().item()  # sync
        n_bytes = self.counter.count(previous.numpy(), targets.numpy())
        self.sums += torch.tensor([nats, len(targets), n_bytes], dtype=torch.float64)

    def total(self, ctx: RunContext) -> Score:
        nats, tokens, n_bytes = ctx.sum(self.sums.clone().to(ctx.device)).tolist()
        return Score(nats, round(tokens), round(n_bytes))


class WindowShape(NamedTuple):
    """Windows of `length` inputs that score their last `stride` targets, the first window all its targets; a position
    attends to the last `band` ones."""

    length: int
    stride: int
    band: int


def banded_shape(config: Scoring, stretch: int) -> WindowShape:
    """Windows `stretch` times as long as in training, in which a position attends to the last `band` ones only; they
    stream through a cache."""
    length, band = stretch * config.seq_len, config.band or config.seq_len
    return WindowShape(length, length - band, band)


class MadeUpTimes(NamedTuple):
    """What a made-up text took."""

    scoring_s: float
    observing_s: float
    observed: int  # targets of the chunk


class WindowScorer:
    """Scores windows, and never adapts.

    A pass over the tokens consists of tracks that do not know of each other, a track of chunks: the windows of a chunk
    are scored, then the scorer may observe them and adapt before the next chunk. Ranks share the windows of a chunk,
    or, with is_per_document, the tracks."""

    is_per_document = False
    adapts = False

    def __init__(self, model: Model, config: Scoring, ctx: RunContext, shape: WindowShape):
        self.model = model
        self.config = config
        self.ctx = ctx
        self.length, self.stride, self.band = shape
        self.rows = config.score_batch  # windows in a forward pass
        self.lora: dict[str, dict[str, Adapter]] = {}
        self.on_pass: OnPass | None = None
        self.mask: Mask | None = None
        self.build_memory: Callable[[], Memory] | None = None
        self.updates = 0  # adaptation: updates made
        self.skipped = 0  # and updates that the time did not allow
        self.update_s = 0.0  # seconds of the slowest update
        self.forwarded = 0  # tokens that went through the model, padding included
        model.eval()

    @staticmethod
    def small_settings(config: Scoring) -> dict[str, int]:
        """Settings with which a short text, as an audit scores it, has many batches and chunks."""
        return dict(score_batch=2)

    def windows(self, n_tokens: int) -> list[Window]:
        firsts = [1, *range(1 + self.length, n_tokens, self.stride)] if n_tokens > 1 else []
        stops = [*firsts[1:], n_tokens]
        lead = self.length - self.stride
        return [Window(max(0, first - 1 - lead), first, stop) for first, stop in zip(firsts, stops)]

    def tracks(self, tokens: Tensor) -> list[Track]:
        return [[self.windows(len(tokens))]]

    def scored_states(self, tokens: Tensor, windows: list[Window]) -> Iterator[Scored]:
        """The states that predict the targets of the windows, in blocks of seq_len inputs. The windows, at most `rows`
        of them, are padded to one shape if that saves compilation: what stands after a token, or in another row, cannot
        change its states."""
        block = self.config.seq_len
        rows = self.rows if self.model.is_compiled else len(windows)
        inputs = torch.full((rows, self.length), self.config.bos_id)
        for row, w in zip(inputs, windows):
            row[: w.stop - 1 - w.start] = tokens[w.start : w.stop - 1]
        inputs = inputs.to(self.ctx.device)
        lora = self.first_rows_of_lora(rows)
        has_past = self.length > block or self.band < block
        cache = Cache(self.band) if has_past else None
        memory = self.start_memory()
        for at in range(0, max(w.stop - 1 - w.start for w in windows), block):
            piece = inputs[:, at : at + block]
            self.forwarded += piece.numel()
            states = self.model.hidden(piece, cache=cache, lora=lora, on_pass=self.on_pass)
            if memory:
                memory.add(piece, states)
            positions: list[int] = []
            scored: list[Tensor] = []
            owners: list[int] = []
            places: list[int] = []
            for row, (w, row_states) in enumerate(zip(windows, states)):
                begin = w.start + at
                first, stop = max(w.first - 1, begin), min(w.stop - 1, begin + block)  # inputs that predict a target
                if first < stop:
                    positions += range(first + 1, stop + 1)
                    scored.append(row_states[first - begin : stop - begin])
                    owners += [row] * (stop - first)
                    places += range(first - w.start, stop - w.start)
            if positions:
                device = self.ctx.device
                yield Scored(
                    positions=torch.tensor(positions),
                    states=torch.cat(scored),
                    owners=torch.tensor(owners).to(device),
                    places=torch.tensor(places).to(device),
                    memory=memory,
                )

    def start_memory(self) -> Memory | None:
        """Of a batch of windows, with nothing in it yet."""
        return self.build_memory() if self.build_memory else None

    def first_rows_of_lora(self, rows: int) -> Lora:
        return {
            block: {layer: (down[:rows], up[:rows]) for layer, (down, up) in layers.items()}
            for block, layers in self.lora.items()
        }

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, windows: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every target of the windows once: positions (n,), and log-probabilities (n, V) over the whole vocabulary."""
        for scored in self.scored_states(tokens, windows):
            yield scored.positions, self.distribution(tokens[scored.positions - 1], scored)

    def distribution(self, previous: Tensor, scored: Scored) -> Tensor:
        """Log-probabilities (n, V) of what comes after `previous` (n,), as they are scored and coded."""
        log_probs = self.predict(scored.states, scored.owners)
        if scored.memory:
            log_probs = scored.memory.mix(log_probs, scored.owners, scored.places)
        return self.mask(previous, log_probs) if self.mask else log_probs

    def predict(self, states: Tensor, owners: Tensor) -> Tensor:
        """States (n, D) to log-probabilities (n, V). `owners`: the window of each, by its place in the batch."""
        return self.model.logits(states).log_softmax(-1)

    def learned(self) -> list[Tensor]:
        """What observations change, besides the weights of the model."""
        return [t for layers in self.lora.values() for adapter in layers.values() for t in adapter]

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        """Adapts to a chunk, now that all of it is scored, but not beyond the time `until`. `done`: share of the
        track that is scored."""

    def reset(self) -> None:
        """Forgets what was observed: the model is as it was."""

    def warm_up(self) -> None:
        """Compiles on made-up tokens what a pass needs, and leaves no trace."""
        self.score_made_up(self.rows)

    def estimate_seconds(self, n_tokens: int) -> float:
        """How long a pass over so many tokens takes, from a batch of made-up ones."""
        n_windows = self.rows if self.model.is_compiled else min(self.rows, 8)  # compiled, all rows cost the same
        self.score_made_up(n_windows)  # the first forward pays for what later ones find done
        took = self.score_made_up(n_windows)
        scoring_s = took.scoring_s / n_windows * n_tokens / self.stride / self.ctx.world
        observing_s = took.observing_s / took.observed * n_tokens
        if self.is_per_document:
            observing_s /= self.ctx.world
        return scoring_s + observing_s

    def made_up_length(self, n_windows: int) -> int:
        """Tokens of a text that has so many windows and a whole chunk."""
        return n_windows * self.length

    def score_made_up(self, n_windows: int) -> MadeUpTimes:
        """Scores so many windows and observes a chunk, of which nothing is left afterwards."""
        generator = torch.Generator().manual_seed(0)
        other_id = 0 if self.config.bos_id else 1
        tokens = torch.randint(self.config.vocab_size, (1 + self.made_up_length(n_windows),), generator=generator)
        tokens[tokens == self.config.bos_id] = other_id
        tokens[:: self.length] = self.config.bos_id
        chunk = self.tracks(tokens)[0][0]
        started = time.perf_counter()
        for _ in self.log_probs(tokens, chunk[:n_windows]):
            pass
        self.ctx.sync()
        scored = time.perf_counter()
        self.observe(tokens, chunk, 0.0, math.inf)
        self.ctx.sync()
        observed = time.perf_counter()
        self.reset()
        self.updates = self.skipped = self.forwarded = 0
        self.update_s = 0.0
        return MadeUpTimes(scored - started, observed - scored, sum(w.stop - w.first for w in chunk))

    def is_late(self, until: float) -> bool:
        """Whether an update would end after `until` on any rank; counts it as made or skipped."""
        late = torch.tensor(float(time.perf_counter() + 1.5 * self.update_s > until), device=self.ctx.device)
        if not self.is_per_document:
            late = self.ctx.sum(late)
        is_late = late.item() > 0  # sync
        if is_late:
            self.skipped += 1
        else:
            self.updates += 1
        return is_late


class PlainScorer(WindowScorer):
    """Windows that do not overlap."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, WindowShape(config.seq_len, config.seq_len, config.seq_len))


class SlidingScorer(WindowScorer):
    """Short strides, so that every target sees a long context, at many times the work."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, WindowShape(config.seq_len, config.stride, config.seq_len))


class BandedScorer(WindowScorer):
    """Every target sees a long context at about the price of plain."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, banded_shape(config, stretch=5))


def score_tokens(
    scorer: WindowScorer, tokens: Tensor, meter: Meter, name: str = "", deadline: float = math.inf
) -> None:
    """One pass from left to right: score a chunk, shared over ranks, then let the scorer see it. Adaptation stops when
    the rest, scored without it, would just be done by the deadline."""
    ctx = scorer.ctx
    tracks = scorer.tracks(tokens)
    share = slice(ctx.rank, None, ctx.world)
    if scorer.is_per_document:
        tracks = tracks[share]
        share = slice(None)
    left = sum(len(chunk[share]) for track in tracks for chunk in track)  # windows
    done, spent_s = 0, 0.0
    with ctx.log.progress_bar(left, f"scoring {name}") as bar:
        for track in tracks:
            for index, chunk in enumerate(track):
                mine = chunk[share]
                for at in range(0, len(mine), scorer.rows):
                    batch = mine[at : at + scorer.rows]
                    started = time.perf_counter()
                    for positions, log_probs in scorer.log_probs(tokens, batch):
                        meter.add(tokens, positions, log_probs)
                    spent_s += time.perf_counter() - started
                    done += len(batch)
                    left -= len(batch)
                    bar.update(len(batch))
                if index + 1 < len(track):
                    rest_s = 1.2 * left * spent_s / max(done, 1)
                    scorer.observe(tokens, chunk, index / len(track), deadline - rest_s)
            scorer.reset()
