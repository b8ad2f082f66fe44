"""Scorers that adapt to tokens once they are scored: score-first test-time training."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from loopgolf.runtime import RunContext
from loopgolf.scoring import Model, Scoring, Track, Window, WindowScorer, WindowShape, banded_shape
from loopgolf.state import MasterWeights, TrainState


class SgdScorer(WindowScorer):
    """After each chunk a few epochs of SGD on it. Every rank takes part in every update."""

    adapts = True

    @staticmethod
    def small_settings(config: Scoring) -> dict[str, int]:
        chunk = min(config.ttt_chunk, 2 * config.seq_len)
        return dict(score_batch=2, ttt_chunk=chunk, ttt_batch=min(config.ttt_batch, 2))

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        # shorter windows than banded scoring alone has, so that a chunk has some for every rank
        super().__init__(model, config, ctx, banded_shape(config, stretch=2))
        windows_of_rank = math.ceil(config.ttt_chunk / self.stride / ctx.world)
        self.rows = min(self.rows, windows_of_rank)
        self.base = {name: p.detach().clone() for name, p in model.named_parameters()}
        frozen = {id(p) for letter in config.ttt_freeze for p in model.parameters_of_block(letter)}
        for _, p in model.named_parameters():
            p.requires_grad_(id(p) not in frozen)
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.reset()

    def tracks(self, tokens: Tensor) -> list[Track]:
        chunks: dict[int, list[Window]] = {}
        for window in self.windows(len(tokens)):
            chunks.setdefault((window.first - 1) // self.config.ttt_chunk, []).append(window)
        return [list(chunks.values())]

    def made_up_length(self, n_windows: int) -> int:
        return max(super().made_up_length(n_windows), self.config.ttt_chunk)

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        config = self.config
        seen = tokens[chunk[0].first - 1 : chunk[-1].stop]
        rows = (len(seen) - 1) // config.seq_len
        inputs = seen[: rows * config.seq_len].view(rows, config.seq_len).to(self.ctx.device)
        targets = seen[1 : 1 + rows * config.seq_len].view(rows, config.seq_len).to(self.ctx.device)
        lr_scale = 0.5 * (1 + math.cos(math.pi * done))
        for _ in range(config.ttt_epochs):
            for at in range(0, rows, config.ttt_batch):
                if not self.is_late(until):
                    batch = slice(at, at + config.ttt_batch)
                    self.update(inputs[batch], targets[batch], lr_scale)

    def update(self, inputs: Tensor, targets: Tensor, lr_scale: float) -> None:
        started = time.perf_counter()
        ctx, config = self.ctx, self.config
        mine = slice(ctx.rank, None, ctx.world)
        n_mine = len(inputs[mine])
        if n_mine:
            loss = self.model(inputs[mine], targets[mine]) * n_mine
            loss.backward()
            self.state.accumulate()
        self.state.reduce(ctx.sum, 1 / len(inputs), config.ttt_clip)
        self.state.step(lr_scale, config.ttt_momentum)
        ctx.sync()
        self.update_s = max(self.update_s, time.perf_counter() - started)

    def reset(self) -> None:
        self.model.load_state_dict(self.base)
        master = MasterWeights(self.learning)
        group = dict(params=list(master.weights.values()), peak=self.config.ttt_lr)
        self.state = TrainState(master, {"sgd": torch.optim.SGD([group], lr=0.0, momentum=self.config.ttt_momentum)})


class LoraScorer(WindowScorer):
    """Every document starts with fresh low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear layers of
    each block, and sees nothing of other documents; after each chunk of it they take one step of Adam. Documents of
    similar length form a batch, in which every row has its own adapters. A mixture of experts stays as it is."""

    is_per_document = True
    adapts = True

    @staticmethod
    def small_settings(config: Scoring) -> dict[str, int]:
        return dict(score_batch=4, lora_chunk=min(config.lora_chunk, max(1, config.seq_len // 4)))

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        model.requires_grad_(False)
        stride = min(config.lora_chunk, config.seq_len)
        super().__init__(model, config, ctx, WindowShape(config.seq_len, stride, config.band or config.seq_len))
        self.reset()

    def tracks(self, tokens: Tensor) -> list[Track]:
        documents = self.split_documents(tokens)
        documents.sort(key=len, reverse=True)
        size = self.config.score_batch
        batches = [documents[i : i + size] for i in range(0, len(documents), size)]
        # the longest first, so row i of every chunk belongs to the same document
        return [[[d[i] for d in batch if i < len(d)] for i in range(len(batch[0]))] for batch in batches]

    def split_documents(self, tokens: Tensor) -> list[list[Window]]:
        """The windows of each document."""
        starts = sorted({0, *(tokens[:-1] == self.config.bos_id).nonzero().flatten().tolist()})
        stops = [*(start + 1 for start in starts[1:]), len(tokens)]
        lead = self.length - self.stride
        documents = []
        for start, stop in zip(starts, stops):
            firsts = range(start + 1, stop, self.stride)
            windows = [Window(max(start, first - 1 - lead), first, min(first + self.stride, stop)) for first in firsts]
            documents.append(windows)
        return documents

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        if self.is_late(until):
            return
        started = time.perf_counter()
        scored = next(self.scored_states(tokens, chunk))
        targets = tokens[scored.positions].to(self.ctx.device)
        # a sum over documents: the gradient of one does not depend on its neighbours
        loss = F.cross_entropy(self.model.logits(scored.states), targets, reduction="sum") / self.stride
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        self.ctx.sync()
        self.update_s = max(self.update_s, time.perf_counter() - started)

    def reset(self) -> None:
        rows, rank = self.config.score_batch, self.config.lora_rank
        generator = torch.Generator().manual_seed(0)
        for block, layers in self.model.linears().items():
            self.lora[block] = {}
            for name, linear in layers.items():
                fan_out, fan_in = linear.weight.shape
                down = torch.randn(fan_in, rank, generator=generator).repeat(rows, 1, 1) / fan_in**0.5
                up = torch.zeros(rows, rank, fan_out)
                adapter = (down.to(self.ctx.device).requires_grad_(), up.to(self.ctx.device).requires_grad_())
                self.lora[block][name] = adapter
        self.adam = torch.optim.Adam(self.learned(), lr=self.config.lora_lr, betas=(0.9, 0.95))
