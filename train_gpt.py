"""loopgolf: train a looped language model for a fixed time, put it in a file, prove how well that file predicts text.

A few physical blocks are applied many times in the order that a *loop plan* gives ("abcdabc"). Weights are trained on
the integer grid that they are stored in, compressed into an artifact that has to fit 16,000,000 bytes together with
this code, and the score (bits per byte) is computed from that file, reloaded.

    python train_gpt.py                                          the recipe for this machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py        the same on eight GPUs
    python train_gpt.py --score runs/ID/artifact.lg              score a finished file

This script tells the run from top to bottom: 1 config and recipes, 2 data, 3 schedules, 4 model, 5 optimizers,
6 training, 7 file, 8 score, 9 main. What it stands on is in loopgolf/, a subject per file; heavy operations are in
kernels/. Dimension letters: B batch, T tokens, D width, H heads, K head width, V vocabulary, P passes, R adapter rank,
L tokens that a query can look at.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # before torch is loaded: threads wait awake for a moment only, then other programs get the cores
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.shards import TokenStream, WindowOrder, find_shards
from kernels.attention import attend, build_rotation, rotate
from kernels.head import head_loss_torch, softcap, softcap_logits
from kernels.newton_schulz import COEFFICIENTS, Coefficients, orthogonalize_ref
from loopgolf.artifact import Artifact, Described, Layout, pack_artifact, unpack_artifact
from loopgolf.cache import Cache, Kept, KeysValues
from loopgolf.curvature import Curvature, CurvatureMeter, choose_steps, find_hessian
from loopgolf.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DoesNotFit,
    Interrupted,
    NonFiniteLoss,
    Stop,
    TokenError,
)
from loopgolf.layers import Adapter, Linear, Norms, Table, rms_norm
from loopgolf.options import (
    MOST,
    check_choice,
    check_limits,
    describe_option,
    find_wrong_fields,
    option,
    parse_command_line,
    parse_environment,
)
from loopgolf.params import (
    DeclaringModule,
    collect_specs,
    start_at,
    start_identity,
    start_normal,
    start_orthogonal,
    start_stacked,
    start_weights,
    vector,
)
from loopgolf.plan import ONCE, Depth, Pass, Plan, parse_pass_set, parse_plan
from loopgolf.quantize import Format, Half, RowGrid
from loopgolf.runtime import (
    Clock,
    Log,
    RunContext,
    StopSignals,
    find_compiler_fault,
    keep_freed_memory,
    print_error,
    write_atomic,
)
from loopgolf.scoring import BpbMeter, ByteCounter, Lora, Mask, OnPass, Score, Scoring, WindowScorer, score_tokens
from loopgolf.source import find_counted, hash_files
from loopgolf.state import MasterWeights, TrainState, WeightAverage, load_checkpoint, save_checkpoint
from loopgolf.words import decode_document

# ----------------------------------------------------------------------------------------------------------------------
# 1. Config and recipes
# ----------------------------------------------------------------------------------------------------------------------
# One frozen value holds every setting: recipe, then environment, then command line. What travels in the artifact is
# Stored; the defaults of its fields are what a missing field of a file means, so they never change.


@dataclass(frozen=True)
class Architecture:
    """The model."""

    plan: str = option("abcdabc", "order in which the physical blocks are applied")
    depth: int = option(4, "repetitions of the group marked *r in the plan; their mean when sampled", low=1, high=256)
    max_r: int = option(0, "most repetitions that are sampled and have rows in the tables, if above depth", high=256)
    bptt: int = option(0, "gradients flow through this many last repetitions of the *r group (0 = all)")
    score_depth: int = option(0, "repetitions while scoring (0 = depth)", high=256)
    skips: str = option("unet", "the first half of the passes feeds the second in reverse", choices=("none", "unet"))
    skip_gates: bool = option(False, "with skips: gates per channel blend what the first half left with the stream")
    parallel_passes: str = option("none", "passes whose MLP reads what their attention reads: none, all, last4 or 3,5")
    look_back: int = option(0, "positions before its own that attention reads too, weighed by channel", high=64)
    depth_scale: bool = option(False, "what attention and MLP read shrinks with the root of the pass's number")
    model_dim: int = option(1024, "width of the residual stream", low=2, high=65536)
    inject: str = option("concat", "how ^ mixes the kept stream in: a matrix on both, or", choices=("concat", "add"))
    block_norm: str = option("pre", "norms before attention and MLP, or also after", choices=("pre", "sandwich"))
    norm_weights: bool = option(False, "norms of the stream have a learned weight per channel")
    embed_norm: bool = option(True, "norm the embeddings")
    pass_scales: bool = option(True, "every pass mixes the embedding in and scales what its block adds, per channel")
    adapter_rank: int = option(0, "rank of an adapter that every pass has before its attention (0 = none)", high=65536)
    windows: str = option("", "reach of each block's attention in turn: L the context, S half of it (empty = L)")
    tied: bool = option(True, "the head is the token embedding")
    mlp: str = option("relu2", "squared ReLU, or a projection gates the hidden layer", choices=("relu2", "swiglu"))
    mlp_slope: float = option(0.0, "slope of the squared ReLU below zero, before the square", high=1)
    moe_experts: int = option(0, "SwiGLU experts that tokens are sent to, besides the MLP (0 = none)", high=65536)
    moe_hidden: int = option(1024, "hidden width of an expert", low=1, high=65536)
    moe_top: int = option(2, "experts that each token is sent to", low=1, high=65536)
    num_heads: int = option(32, "query heads", low=1, high=65536)
    num_kv_heads: int = option(8, "key-value heads, shared by equal groups of query heads", low=1, high=65536)
    head_dim: int = option(0, "width of a head (0 = model_dim / num_heads)", high=65536)
    mlp_mult: float = option(2.0, "hidden width of the MLP over model_dim", low=0.01, high=64)
    rope_dims: int = option(16, "dimensions of each head that rotate with position")
    rope_base: float = option(10000.0, "slowest wavelength of the rotation, in tokens over 2 pi", low=1)
    qk_norm: bool = option(True, "norm queries and keys")
    q_gain: float = option(1.5, "initial gain on the queries of a head (0 = no gain)")
    head_gate: int = option(0, "first channels of the stream that decide how open each head is (0 = all are)")
    xsa_passes: str = option("all", "passes with exclusive self attention: none, all, last4 or 3,5,6")
    ve_passes: str = option("last2", "passes whose values get a token's value embedding (same forms)")
    ve_dim: int = option(128, "width of the value embedding table", low=1, high=65536)
    smear: bool = option(True, "mix each embedding with the previous token's, per channel")
    bigram_buckets: int = option(10240, "rows of the hashed bigram table (0 = none)", high=2**24)
    bigram_dim: int = option(128, "width of the bigram table", low=1, high=65536)
    softcap: float = option(30.0, "logits are squashed into plus or minus this (0 = they are not)")
    doc_attention: bool = option(False, "attention stops at document boundaries")


@dataclass(frozen=True)
class Bits:
    """The bits of stored codes."""

    core_bits: int = option(6, "bits of a code in the matrices of blocks that the plan repeats", low=2, high=8)
    edge_bits: int = option(6, "bits of a code in all other matrices", low=2, high=8)
    embed_bits: int = option(8, "bits of a code in the token embedding", low=2, high=8)
    table_bits: int = option(8, "bits of a code in the bigram and value tables", low=2, high=8)


@dataclass(frozen=True)
class Stored(Scoring, Bits, Architecture):
    """What travels in the artifact: the model, its bits, and how the run said that it would be scored."""


@dataclass(frozen=True)
class Size:
    """Quantization and size."""

    core_k: float = option(12.85, "step of a row's grid: k_scale * k * std(row) / largest code", low=0.1)
    edge_k: float = option(12.85, "the same for all other matrices", low=0.1)
    embed_k: float = option(20.0, "the same for the token embedding", low=0.1)
    table_k: float = option(20.0, "the same for the bigram and value tables", low=0.1)
    step_bits: int = option(10, "bits that the mantissa of a row's step keeps: fewer take fewer bytes", high=10)
    row_steps: str = option("spread", "steps in the file: as in training, or by their cost", choices=("spread", "loss"))
    qat_start: float = option(0.0, "fraction of the budget before which weights are not rounded", high=1)
    k_scale: float = option(0.0, "coarseness of all grids (0 = the finest that is useful, or as byte_limit needs)")
    calibration_tokens: int = option(131072, "training tokens that steer the rounding if byte_limit binds (0 = plain)")
    export_reserve: float = option(0.01, "fraction of a time budget kept for that; then time decides", high=0.5)
    byte_limit: int = option(16_000_000, "largest code + artifact in bytes (0 = no limit)")
    code_reserve: int = option(38_000, "bytes that a run sets aside for the code (0 = code does not count)")


@dataclass(frozen=True)
class Training:
    """Training."""

    iterations: int = option(0, "train this many steps instead of for a time (0 = use the time budget)")
    max_wallclock_seconds: float = option(600.0, "training budget in seconds", low=0.1)
    loop_start: float = option(0.0, "fraction of the budget before which every group of the plan runs once", high=1)
    sample_depth: bool = option(False, "draw r for every step: 1 + Poisson(LogNormal of mean depth), at most max_r")
    optimizer: str = option("muon", "of the matrices, with Adam for the rest; or of everything")
    batch_tokens: int = option(524288, "tokens in one optimizer step, over all ranks", low=1)
    contexts: str = option("", "shorter contexts at first, each to a fraction of the budget: 512:0.1,1024:0.3")
    micro_batch: int = option(0, "sequences in one forward pass of a rank; more are accumulated (0 = all)")
    checkpoint_passes: bool = option(False, "keep only the input of every pass and compute it again for the gradient")
    matrix_lr: float = option(0.02, "learning rate of the matrices (Muon)")
    table_lr: float = option(0.02, "learning rate of the embedding tables (Adam)")
    vector_lr: float = option(0.01, "learning rate of gains, scales, mixes, gates and skips (Adam)")
    momentum: float = option(0.99, "Muon: momentum", high=1)
    momentum_start: float = option(0.85, "Muon: momentum at the first step", high=1)
    momentum_warmup: float = option(0.084, "fraction of the budget over which the momentum rises", high=1)
    row_norm: bool = option(False, "Muon: rows of the momentum get one norm before it is orthogonalized")
    newton_schulz: str = option("jordan", "Muon: coefficients of its five iterations")
    weight_decay: float = option(0.04, "decay of matrices and tables, times the learning rate")
    beta1: float = option(0.9, "Adam: memory of the gradient", high=0.9999)
    beta2: float = option(0.95, "Adam: memory of the squared gradient", high=0.9999)
    grad_clip: float = option(0.3, "largest norm of the whole gradient (0 = no clipping)")
    warmdown: float = option(0.59, "last fraction of the budget over which the learning rate falls", high=1)
    final_lr: float = option(0.0, "learning rate at the end, as a fraction of the peak", high=1)
    average: str = option("swa", "weights to export: the last, equal or decaying mean", choices=("none", "swa", "ema"))
    average_start: float = option(0.88, "fraction of the budget after which weights are averaged", high=1)
    average_every: int = option(50, "steps between two weights in the average", low=1)
    ema_decay: float = option(0.9, "what the decaying mean keeps of itself each time", high=1)


@dataclass(frozen=True)
class Run:
    """The run and its machine."""

    recipe: str = option("4b7l", "named set of settings that the others change; golf with a GPU, else pocket, or")
    seed: int = option(1337, "seed of the initial weights", low=-MOST)
    data_path: str = option("data/fineweb_sp1024", "dataset folder: *_train_*.bin, *_val_*.bin, tokenizer.model")
    tokenizer_path: str = option("", "SentencePiece model (empty = tokenizer.model in data_path)")
    run_id: str = option("", "name of the folder under runs/ (empty = date and time)")
    resume: str = option("", "continue the run in this folder from its checkpoint")
    score: str = option("", "score this artifact instead of training, without a time budget")
    also: str = option("trained,averaged,plain", "diagnostics besides the score, of")
    score_documents: int = option(0, "score only the first so many validation documents (0 = all)")
    text_sha256: str = option("", "sha256 of the text to score; a run on another one says so (empty = any)")
    eval_budget: float = option(600.0, "seconds for val_bpb: adaptation stops in time to score the rest without it")
    dry_run: bool = option(False, "print sizes and forecasts, then stop")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "what the passes compute in", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "each block once, or the whole graph", choices=("auto", "none", "block", "full"))
    checkpoint_every_s: float = option(300.0, "seconds between checkpoints (0 = only when interrupted)")
    log_every: int = option(10, "steps between two train lines", low=1)


SECTIONS = {"run": Run, "training": Training, "model": Architecture, "bits": Bits, "size": Size, "scoring": Scoring}


@dataclass(frozen=True)
class Config(Run, Size, Training, Stored):
    """Every setting of a run. The defaults are those of recipe 4b7l."""

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("optimizer", "newton_schulz", "score_mode"):
            check_choice(name, getattr(self, name), list_choices(name))
        for word in self.also.split(","):
            check_choice("also", word, list_choices("also"))
        self.check_shapes()
        self.check_plan()

    def require(self, name: str, is_good: bool, why: str) -> None:
        if not is_good:
            raise ConfigError(f"{name}={getattr(self, name)}: {why}")

    def check_shapes(self) -> None:
        has_even_heads = self.head_dim > 0 or self.model_dim % self.num_heads == 0
        self.require("model_dim", has_even_heads, f"must be divisible by num_heads={self.num_heads}")
        has_even_groups = self.num_heads % self.num_kv_heads == 0
        self.require("num_heads", has_even_groups, f"must be divisible by num_kv_heads={self.num_kv_heads}")
        if self.moe_experts:
            self.require("model_dim", self.model_dim % 8 == 0, "must be divisible by 8")
            self.require("moe_top", self.moe_top <= self.moe_experts, f"must be at most moe_experts={self.moe_experts}")
            self.require("moe_hidden", self.moe_hidden % 8 == 0, "must be divisible by 8")
        for batch_tokens, seq_len in list_shapes(self):
            self.require("contexts", 2 <= seq_len <= self.seq_len, f"must be between 2 and seq_len={self.seq_len}")
            name = "batch_tokens" if seq_len == self.seq_len else "contexts"
            is_whole = batch_tokens % seq_len == 0
            self.require(name, is_whole, f"{batch_tokens} tokens are no whole sequences of seq_len={seq_len}")
        self.require("head_gate", self.head_gate <= self.model_dim, f"must be at most model_dim={self.model_dim}")
        reach = self.band or self.seq_len
        self.require("look_back", self.look_back <= reach, f"must be at most {reach}, what attention sees")
        self.require("mlp_slope", self.mlp == "relu2" or not self.mlp_slope, "needs --mlp relu2")
        self.require("rope_dims", self.rope_dims % 2 == 0, "must be even")
        fits_head = self.rope_dims <= self.head_width
        self.require("rope_dims", fits_head, f"must be at most {self.head_width}, the width of a head")
        for name in ("stride", "band"):
            self.require(name, getattr(self, name) <= self.seq_len, f"must be at most seq_len={self.seq_len}")
        self.require("bos_id", self.bos_id < self.vocab_size, f"must be below vocab_size={self.vocab_size}")
        self.require("windows", set(self.windows) <= set("LS"), "is made of the letters L and S")
        if self.row_steps == "loss":
            self.require(
                "row_steps", self.qat_start == 1, "training rounds to others; add --qat_start 1, or take spread"
            )
            self.require("row_steps", self.calibration_tokens > 0, "needs --calibration_tokens, or take spread")

    def check_plan(self) -> None:
        plan = parse_plan(self.plan)
        has_fixed_skips = self.skips == "none" or not plan.is_variable
        self.require("skips", has_fixed_skips, "needs a plan without *r; use --skips none")
        most = plan.count_passes(max(self.table_repetitions, self.score_depth))
        self.require("plan", most <= 512, f"has {most} passes, at most 512 are built")
        self.require("sample_depth", plan.is_variable or not self.sample_depth, "needs a plan with *r")
        keeps_gradient = self.bptt == 0 or plan.injects_into_variable_group
        self.require("bptt", keeps_gradient, "needs ^ in the *r group, or nothing before the group would learn")
        is_known = set(self.ttt_freeze) <= set(plan.names)
        self.require("ttt_freeze", is_known, f"the plan has only the blocks {plan.names}")
        has_one_norm = self.parallel_passes == "none" or not self.norm_weights
        self.require("parallel_passes", has_one_norm, "needs norms without weights, for both read through one")
        for name in ("xsa_passes", "ve_passes", "parallel_passes"):
            parse_pass_set(name, getattr(self, name), plan.count_passes(self.table_repetitions))

    @property
    def head_width(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def table_repetitions(self) -> int:
        """Repetitions of the *r group that have rows of their own in the per-pass tables."""
        return max(self.depth, self.max_r)

    @property
    def scoring_depth(self) -> Depth:
        return Depth(self.score_depth or self.depth)

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_path) / "tokenizer.model")

    @property
    def diagnostics(self) -> list[str]:
        return self.also.split(",")

    def stored(self) -> dict[str, Any]:
        """What an artifact stores: the settings that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(Stored) if getattr(self, f.name) != f.default}


# What each recipe changes. 4b7l is the entry that this project started from, parameter-golf #927, its slips repaired.
RECIPES: dict[str, dict[str, Any]] = {
    "4b7l": {},
    "pocket": dict(
        # the challenge at 1/100: weights in 160,000 bytes, two minutes of two processor cores
        plan="a(b)*2c", model_dim=64, num_heads=1, num_kv_heads=1, head_dim=64, rope_dims=32, mlp_mult=4.0,
        parallel_passes="all", look_back=2, skip_gates=True, bigram_buckets=0, ve_passes="all", ve_dim=32,
        doc_attention=True, vocab_size=3072, seq_len=256, batch_tokens=2048, max_wallclock_seconds=120.0,
        byte_limit=160_000, code_reserve=0, embed_k=60.0, table_k=60.0, step_bits=3, row_steps="loss",
        qat_start=1.0, matrix_lr=0.02, table_lr=0.025, vector_lr=0.05, weight_decay=0.1, momentum=0.9, beta2=0.98,
        newton_schulz="polar_express", row_norm=True, canonical=True, recall_share=0.15,
        warmdown=0.5, final_lr=0.02, average="none", calibration_tokens=32768,
        score_mode="banded", score_documents=184, score_batch=16, eval_budget=120.0,
        text_sha256="40a1950b90fe8120fddb08831776461ec933e9e88f6265c1c1e1fca8a5058f49",
        data_path="data/local", checkpoint_every_s=30.0,
    ),
    "golf": dict(
        # our entry for the challenge: two blocks, a core of three that runs three times, two blocks, at the width that
        # fills 16 MB. Not trained at this size yet; records/studies/2026-11-30_Golf has what its parts are worth
        plan="ab(cde)*3fg", loop_start=0.35, model_dim=640, num_heads=10, num_kv_heads=5, mlp_mult=4.0, mlp_slope=0.5,
        q_gain=5.0, parallel_passes="all", look_back=3, skip_gates=True, head_gate=12,
        depth_scale=True, ve_passes="none", bigram_buckets=0, doc_attention=True, vocab_size=8192,
        data_path="data/fineweb_sp8192",
        # contexts that grow: parameter-golf #2014; loops from .35 on: #1420
        # rounded by GPTQ after training only, as in parameter-golf #1394 and after
        embed_bits=7, embed_k=15.0, step_bits=3, row_steps="loss", qat_start=1.0,
        seq_len=3072, contexts="1024:0.3", batch_tokens=786432,
        matrix_lr=0.024, momentum=0.97, weight_decay=0.09, beta2=0.99, warmdown=0.8, final_lr=0.1,
        newton_schulz="polar_express", row_norm=True,
        average="ema", average_start=0.5, average_every=1, ema_decay=0.9965,
        canonical=True, recall_share=0.02, score_mode="banded",
    ),
    "frontier": dict(
        # light sharing as in the record holders, parameter-golf #1394 and after: 11 blocks, three of them run 3 times
        plan="abc(def)*3ghijk", loop_start=0.35, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=4.0,
        ve_passes="none", smear=False, bigram_buckets=0,
        vocab_size=8192, batch_tokens=786432, data_path="data/fineweb_sp8192",
    ),
    "baseline9": dict(
        # the challenge's own baseline (github.com/openai/parameter-golf, train_gpt.py): nine blocks in a row
        plan="abcdefghi", model_dim=512, num_heads=8, num_kv_heads=4, rope_dims=64, seq_len=1024,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        matrix_lr=0.04, table_lr=0.05, vector_lr=0.04, momentum=0.95, momentum_warmup=0.036, weight_decay=0.0,
        grad_clip=0.0, warmdown=0.087, average="none", edge_bits=8, score_mode="plain",
    ),
    "recursive_d20": dict(
        # recursive nanochat (github.com/TrelisResearch/nanochat, branch recursive): a core of sampled depth
        plan="ab(^cdef)*rgh", sample_depth=True, max_r=16, bptt=4, skips="none", pass_scales=False,
        model_dim=1280, num_heads=10, num_kv_heads=10, rope_dims=128, mlp_mult=4.0, q_gain=0.0, softcap=15.0,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0, tied=False, vocab_size=65536,
        momentum=0.95, beta1=0.8, grad_clip=1.0, warmdown=0.2, table_lr=0.2, weight_decay=0.0, average="none",
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "looped_s20": dict(
        # looped nanochat (github.com/kschwethelm/LoopedLMs): the same with sandwich norms, a norm after each repetition
        # and attention windows
        plan="ab(^cdef~~)*rgh", sample_depth=True, max_r=16, bptt=4, skips="none", pass_scales=False,
        block_norm="sandwich", norm_weights=True, windows="LLSSSLLL",
        model_dim=1280, num_heads=10, num_kv_heads=10, rope_dims=128, mlp_mult=4.0, q_gain=0.0, softcap=15.0,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0, tied=False, vocab_size=65536,
        momentum=0.95, beta1=0.8, grad_clip=0.0, warmdown=0.5, table_lr=0.3, vector_lr=0.005, weight_decay=0.072,
        average="none", byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "osrt_v3": dict(
        # Nano-OSRT (github.com/CodeHalwell/nano-osrt-100m): all blocks repeated, an adapter for every pass
        plan="(ab~)*6", adapter_rank=16, norm_weights=True, embed_norm=False, qk_norm=False, skips="none",
        pass_scales=False, mlp="swiglu", mlp_mult=2.7, q_gain=0.0, softcap=0.0,
        model_dim=1280, num_heads=20, num_kv_heads=20, rope_dims=64, vocab_size=50304,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        optimizer="lion", matrix_lr=1e-4, table_lr=1e-4, vector_lr=1e-4, beta2=0.99, weight_decay=0.3, grad_clip=1.0,
        warmdown=1.0, final_lr=0.1, batch_tokens=131072, average="none",
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "osrt_v4": dict(
        # its successor: three blocks, each with a mixture of experts beside its MLP
        plan="(abc~)*6", adapter_rank=16, norm_weights=True, embed_norm=False, qk_norm=False, skips="none",
        pass_scales=False, mlp="swiglu", mlp_mult=8 / 3, moe_experts=11, q_gain=0.0, softcap=0.0,
        model_dim=1536, num_heads=24, num_kv_heads=24, rope_dims=64, vocab_size=65536,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        optimizer="lion", matrix_lr=6e-4, table_lr=6e-4, vector_lr=6e-4, beta2=0.99, weight_decay=0.3, grad_clip=1.0,
        warmdown=1.0, final_lr=0.1, batch_tokens=131072, average="none", checkpoint_passes=True,
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
}  # fmt: skip


def list_choices(name: str) -> list[str]:
    """What a setting is chosen from, where that is one of the tables of this script."""
    tables = {
        "recipe": list(RECIPES),
        "optimizer": list(OPTIMIZERS),
        "newton_schulz": list(COEFFICIENTS),
        "score_mode": list(SCORERS),
        "also": ["trained", "averaged", *SCORERS, "none"],
    }
    return tables.get(name, [])


def parse_config(argv: list[str], environ: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """The config and where each value came from. Default < recipe (or the resumed run) < environment < command line."""
    defaults = {f.name: f.default for f in fields(Config)}
    from_env = parse_environment(environ, defaults)
    from_line = parse_command_line(argv, defaults)
    given = {**from_env, **from_line}
    if given.get("resume"):
        folder = Path(given["resume"])
        origin, base = "resume", load_started_config(folder, given)
        given["run_id"] = folder.name
    elif given.get("score"):
        origin, base = "file", settings_of_file(Path(given["score"]), given)
    else:
        recipe = given.get("recipe", "golf" if torch.cuda.is_available() else "pocket")
        origin, base = "recipe", settings_of_recipe(recipe)
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for layer, settings in (("default", defaults), (origin, base), ("env", from_env), ("cli", given)):
        values |= settings
        source |= dict.fromkeys(settings, layer)
    source |= dict.fromkeys(from_env.keys() - from_line.keys(), "env")
    return Config(**values), source


def settings_of_recipe(name: str) -> dict[str, Any]:
    check_choice("recipe", name, list_choices("recipe"))
    return {"recipe": name, **RECIPES[name]}


def load_started_config(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A resumed run keeps the config that it was started with; only what does not change its result may differ."""
    problem = f"resume={folder}: config.json there is missing, damaged or of another version"
    try:
        started = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(problem) from None
    if find_wrong_fields(started, Config) or not {"recipe", "seed", "plan", "data_path"} <= started.keys():
        raise ConfigError(problem)
    started = {**{f.name: f.default for f in fields(Config)}, **started}
    for name, value in given.items():
        if name not in ("resume", "run_id", "checkpoint_every_s", "log_every") and started[name] != value:
            raise ConfigError(f"{name}={value}: the run in {folder} was started with {started[name]}; leave it out")
    return started


def settings_of_file(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a finished file is scored with: its stored settings, and the text of its run where it still lies in the
    folder of that run, so that --score alone repeats the score. The machine decides nothing."""
    stored = asdict(config_from_stored(load_artifact(path).stored))
    base = settings_of_recipe(given["recipe"]) if "recipe" in given else {}
    base |= {f.name: stored[f.name] for f in fields(Stored)}
    base |= dict(batch_tokens=given.get("seq_len", stored["seq_len"]), contexts="")
    started = path.with_name("config.json")
    if started.is_file():
        config = load_started_config(path.parent, {})
        base |= {
            name: config[name] for name in ("data_path", "score_documents", "byte_limit", "code_reserve", "recipe")
        }
    return base


FIRST_OPTIONS = (
    *("recipe", "plan", "model_dim", "iterations", "max_wallclock_seconds", "seed", "data_path", "byte_limit"),
    *("score_mode", "run_id", "resume", "score", "dry_run", "device"),
)


def help_text(section: str = "") -> str:
    """What a newcomer needs; or the options of a section; or all of them."""
    by_name = {f.name: f for f in fields(Config)}
    if not section:
        title = "The options that matter first (--name value, --name=value, or NAME=value in the environment):"
        lines = [__doc__ or "", title]
        lines += [describe_option(by_name[name], list_choices(name)) for name in FIRST_OPTIONS]
        return "\n".join([*lines, "", f"More: --help {', --help '.join(SECTIONS)}; all of them: --help all."])
    check_choice("--help", section, [*SECTIONS, "all"])
    lines = []
    for title, owner in SECTIONS.items():
        if section in (title, "all"):
            lines += [f"{title}: {owner.__doc__ or ''}"]
            lines += [describe_option(f, list_choices(f.name)) for f in fields(owner)]
            lines += [""]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data
# ----------------------------------------------------------------------------------------------------------------------
# Tokens come from memory-mapped shards. The batch of a step is a pure function of the seed and the tokens consumed
# before it, so that a resumed run, a warm-up or another number of ranks never moves the data.


class TrainingText:
    """The training text of a run and the order in which its windows are read. `shapes`: (batch_tokens, seq_len)."""

    def __init__(self, config: Config, shapes: list[tuple[int, int]]):
        self.stream = TokenStream(config.data_path, "train", config.vocab_size)
        lengths = [seq_len for _, seq_len in shapes]
        whole_steps = math.lcm(max(lengths), *(batch_tokens for batch_tokens, _ in shapes))
        round_tokens = whole_steps * (max(lengths) // min(lengths))
        self.order = WindowOrder(self.stream.total, max(lengths), round_tokens, config.seed)

    def read(self, consumed: int, count: int, length: int) -> Tensor:
        """(count, length + 1) tokens, the next ones after those consumed."""
        starts = self.order.starts(consumed, count, length)
        return torch.from_numpy(self.stream.read_windows(starts, length + 1))

    def ends_round(self, consumed: int) -> bool:
        """Whether batch and context may change now."""
        return consumed % self.order.round_tokens == 0


def load_batch(text: TrainingText, consumed: int, settings: Settings, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """This rank's sequences of a step and their targets, (sequences, T) each."""
    share = settings.batch_tokens // ctx.world
    tokens = text.read(consumed + ctx.rank * share, share // settings.seq_len, settings.seq_len)
    return split_tokens(tokens, ctx)


def split_tokens(tokens: Tensor, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """(sequences, T + 1) tokens to inputs and targets on the device."""
    if ctx.device.type == "cuda":
        tokens = tokens.pin_memory().to(ctx.device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Tokenizer(NamedTuple):
    """The tokenizer, and what tells it apart in an artifact."""

    model: sentencepiece.SentencePieceProcessor
    identity: dict[str, Any]


def load_tokenizer(path: Path) -> Tokenizer:
    content = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    return Tokenizer(model, dict(sha256=hashlib.sha256(content).hexdigest(), vocab=model.vocab_size()))


def load_run_tokenizer(config: Config) -> Tokenizer:
    path = config.tokenizer_file
    if not path.is_file():
        find_shards(config.data_path, "val")  # the folder itself may be what is missing
        raise DataError(f"{path}: no tokenizer there; set --tokenizer_path")
    tokenizer = load_tokenizer(path)
    size = tokenizer.model.vocab_size()
    if size != config.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: {path} has {size}; set --vocab_size")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# 3. Schedules
# ----------------------------------------------------------------------------------------------------------------------
# Pure functions of progress, the fraction of the budget that is used once the coming step is done. A slower machine
# follows the same curves.


@dataclass(frozen=True)
class Settings:
    """What may change over a run, for one step."""

    lr_scale: float
    momentum: float
    depth: Depth
    batch_tokens: int
    seq_len: int
    is_rounded: bool = True  # the weights after the step


def settings_at(config: Config, progress: float, step: int) -> Settings:
    left = min(1.0, (1.0 - progress) / config.warmdown) if config.warmdown else 1.0
    risen = min(1.0, progress / config.momentum_warmup) if config.momentum_warmup else 1.0
    return Settings(
        lr_scale=config.final_lr + (1.0 - config.final_lr) * left,
        momentum=config.momentum_start + (config.momentum - config.momentum_start) * risen,
        depth=ONCE if progress < config.loop_start else draw_depth(config, step),
        batch_tokens=config.batch_tokens,
        seq_len=context_at(config, progress),
        is_rounded=progress >= config.qat_start,
    )


def parse_contexts(text: str) -> list[tuple[int, float]]:
    """`512:0.1,1024:0.3`: contexts and the fractions of the budget to which they hold."""
    try:
        stages = [(int(length), float(end)) for length, end in (part.split(":") for part in text.split(",") if text)]
    except ValueError:
        raise ConfigError(f"contexts={text}: has the form 512:0.1,1024:0.3, a context and where it ends") from None
    ends = [end for _, end in stages]
    if ends != sorted(set(ends)) or not all(0 < end < 1 for end in ends):
        raise ConfigError(f"contexts={text}: their ends rise between 0 and 1")
    return stages


def context_at(config: Config, progress: float) -> int:
    return next((length for length, end in parse_contexts(config.contexts) if progress <= end), config.seq_len)


def draw_depth(config: Config, step: int) -> Depth:
    """The same on every rank."""
    if not config.sample_depth:
        return Depth(config.depth)
    key = (config.seed % 2**64, step)
    return Depth(int(draw_repetitions(config, np.random.default_rng(key), 1)[0]))


def draw_repetitions(config: Config, generator: np.random.Generator, count: int) -> np.ndarray:
    """r as Huginn samples it (Geiping et al. 2025, arXiv:2502.05171): its mean is about depth + 1."""
    sigma = 0.5
    rates = generator.lognormal(math.log(config.depth) - sigma**2 / 2, sigma, count)  # of mean depth
    return np.minimum(1 + generator.poisson(rates), config.table_repetitions)


def expect_repetitions(config: Config, most: float = math.inf) -> float:
    """E[min(r, most)], over a million draws."""
    if not config.sample_depth:
        return min(config.depth, most)
    return float(np.minimum(draw_repetitions(config, np.random.default_rng(0), 1 << 20), most).mean())


def list_depths(config: Config, compile_mode: str) -> list[Depth]:
    """Of each kind of forward with loops that is compiled: whole graphs are made for every depth, blocks for one."""
    depths = [Depth(config.depth)]
    if config.sample_depth and compile_mode == "full":
        depths = [Depth(r) for r in range(1, config.table_repetitions + 1)]
    elif config.sample_depth:
        depths = [Depth(1), Depth(config.table_repetitions)]
    return depths


def list_phases(config: Config) -> list[float]:
    """A moment of each part of the budget in which batch, context and loops stay as they are."""
    ends = sorted({0.0, config.loop_start, *(end for _, end in parse_contexts(config.contexts)), 1.0})
    return [*((start + end) / 2 for start, end in itertools.pairwise(ends)), 1.0]


def list_shapes(config: Config) -> list[tuple[int, int]]:
    """Each batch and context (batch_tokens, seq_len) that a run has."""
    over_run = [settings_at(config, progress, 0) for progress in list_phases(config)]
    return list(dict.fromkeys((s.batch_tokens, s.seq_len) for s in over_run))


def list_forwards(config: Config, compile_mode: str) -> list[Settings]:
    """One of each kind of step that a run compiles."""
    forwards: dict[tuple[int, int, Depth], Settings] = {}
    for progress in list_phases(config):
        settings = settings_at(config, progress, 0)
        for depth in [ONCE] if progress < config.loop_start else list_depths(config, compile_mode):
            key = (settings.batch_tokens, settings.seq_len, depth)
            forwards.setdefault(key, replace(settings, depth=depth))
    return list(forwards.values())


class Budget:
    """Decides before each step whether it may start and how far the run will be once it is done."""

    def __init__(self, config: Config, reserve: float = 0.0):
        self.iterations = config.iterations
        self.seconds = (1 - reserve) * config.max_wallclock_seconds
        self.recent: deque[float] = deque(maxlen=8)  # seconds of the latest steps

    @property
    def slowest_s(self) -> float:
        return max(self.recent, default=0.0)

    def add_step(self, seconds: float) -> None:
        self.recent.append(seconds)

    def progress(self, step: int, used_s: float) -> float | None:
        """None when the next step would pass the budget. The last step reaches 1, so that schedules end, unless it or
        the one before was slower than all recent ones."""
        if self.iterations:
            return (step + 1) / self.iterations if step < self.iterations else None
        if used_s + self.slowest_s > self.seconds:
            return None
        if used_s + 2 * self.slowest_s > self.seconds:
            return 1.0
        mean_s = sum(self.recent) / len(self.recent) if self.recent else 0.0
        return min(1.0, (used_s + mean_s) / self.seconds)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model
# ----------------------------------------------------------------------------------------------------------------------
# Blocks own the big matrices; the plan says in which order they are applied; the pass table owns what differs between
# passes. One forward serves training, scoring, test-time training and generation.


class PassRow(NamedTuple):
    """What one pass has of its own; None where it has nothing."""

    mix: Tensor | None = None  # (2, D): of the stream and of the embedding
    scale: Tensor | None = None  # (2, D): of what attention and MLP add
    adapter: Tensor | None = None  # (2, D, R)
    value: Tensor | None = None  # (B, T, kv heads * K): the tokens' value embeddings, added to the values
    value_scale: Tensor | None = None  # (): of what is added
    is_xsa: bool = False
    is_parallel: bool = False  # the MLP reads what attention reads
    depth_scale: Tensor | None = None  # (): of what both read
    loop: Tensor | None = None  # (D,): what a mixture of experts knows of the visit
    back: Tensor | None = None  # (n, D): weights of what was read at the n positions before
    past: Kept | None = None  # of earlier positions
    keeps: bool = False  # all keys and values are returned
    lora: Mapping[str, Adapter] = {}  # by layer


class PassTable(DeclaringModule):
    """What differs between passes: a row for each, at the slot that the plan gives it."""

    mixes: nn.Parameter | None
    scales: nn.Parameter | None
    adapters: nn.Parameter | None
    skips: nn.Parameter | None
    skip_gates: nn.Parameter | None
    backs: nn.Parameter | None
    value_scales: nn.Parameter | None
    depth_scales: Tensor | None

    def __init__(self, config: Config, n_slots: int):
        super().__init__()
        P, D = n_slots, config.model_dim
        self.n_slots = n_slots
        self.xsa = parse_pass_set("xsa_passes", config.xsa_passes, P)
        self.parallel = parse_pass_set("parallel_passes", config.parallel_passes, P)
        self.value_slots = sorted(parse_pass_set("ve_passes", config.ve_passes, P))
        # mix of the embedding and scales per channel: modded-nanogpt's x0 lambdas, in the challenge's baseline
        stream_only = start_stacked(start_at(1.0), start_at(0.0))
        no_op = start_stacked(start_normal(0.01), start_at(0.0))
        self.declare("mixes", (P, 2, D), vector(stream_only), when=config.pass_scales)
        self.declare("scales", (P, 2, D), vector(start_at(1.0)), when=config.pass_scales)
        self.declare("adapters", (P, 2, D, config.adapter_rank), vector(no_op), when=config.adapter_rank > 0)
        has_skips = config.skips == "unet" and P > 1
        self.declare("skips", (P // 2, D), vector(start_at(1.0)), when=has_skips)
        # parameter-golf #1089
        self.declare("skip_gates", (P // 2, D), vector(start_at(0.0)), when=has_skips and config.skip_gates)
        # Canon layers: arXiv:2512.17351
        self.declare("backs", (P, config.look_back, D), vector(start_at(0.0)), when=config.look_back > 0)
        n_values = len(self.value_slots)
        self.declare("value_scales", (n_values,), vector(start_at(1.0)), when=n_values > 0)
        # parameter-golf #315
        depth_scales = torch.arange(1, P + 1).rsqrt() if config.depth_scale else None
        self.register_buffer("depth_scales", depth_scales, persistent=False)

    def rows(self, value: Tensor | None) -> list[PassRow]:
        """The row of every slot. `value`: the value embeddings, which some passes add."""
        value_scales = dict(zip(self.value_slots, list_rows(self.value_scales, len(self.value_slots))))
        columns = [list_rows(table, self.n_slots) for table in (self.mixes, self.scales, self.adapters, self.backs)]
        return [
            PassRow(
                mix=mix,
                scale=scale,
                adapter=adapter,
                back=back,
                value=value if slot in value_scales else None,
                value_scale=value_scales.get(slot),
                is_xsa=slot in self.xsa,
                is_parallel=slot in self.parallel,
                depth_scale=None if self.depth_scales is None else self.depth_scales[slot],
            )
            for slot, (mix, scale, adapter, back) in enumerate(zip(*columns))
        ]

    def joints(self) -> list[tuple[Tensor, Tensor | None]]:
        """How each pass of the first half joins its mirror image: the scale and the gate of what it left."""
        if self.skips is None:
            return []
        return list(zip(self.skips.unbind(), list_rows(self.skip_gates, len(self.skips))))


def list_rows(table: Tensor | None, n: int) -> Sequence[Tensor | None]:
    """All rows at once: their gradients are stacked once, not added up row by row."""
    return [None] * n if table is None else table.unbind()


def join(x: Tensor, left: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
    """The stream and what a pass left for its mirror image in the second half."""
    left = scale.to(x.dtype) * left
    return x + left if gate is None else torch.lerp(left, x, torch.sigmoid(gate).to(x.dtype))


class Stream(NamedTuple):
    """What all passes of a forward share."""

    x0: Tensor  # (B, T, D): the embedding
    cos: Tensor  # (L, 1, half): rotations for all positions in sight
    sin: Tensor
    window: int  # positions that attention reaches
    docs: Tensor | None  # (B, L): numbers of documents, if they matter


def look_back(x: Tensor, weights: Tensor, past: Kept | None, docs: Tensor) -> tuple[Tensor, Tensor]:
    """Each position with the n before it in its document, per channel: a short causal convolution. x (B, T, D); weights
    (n, D); docs (B, L). And what the last n positions have read."""
    n, (B, T, D) = len(weights), x.shape
    earlier = past.read if past is not None else None
    line = torch.cat((x.new_zeros(B, n, D) if earlier is None else earlier, x), 1)
    docs = F.pad(docs, (n, 0), value=-1)[:, -T - n :]  # of no document
    for lag in range(1, n + 1):
        before = slice(n - lag, n - lag + T)  # the positions that are `lag` earlier
        is_same = docs[:, n:] == docs[:, before]
        x = x + weights[lag - 1].to(x.dtype) * torch.where(is_same[..., None], line[:, before], 0)
    return x, line[:, -n:].clone()  # a view would keep the whole line


def smear(x: Tensor, gate: Tensor, is_start: Tensor) -> Tensor:
    """(B, 1 + T, D) to (B, T, D): each embedding is mixed with the one before it, unless it starts a document
    (modded-nanogpt; parameter-golf #65)."""
    gate = torch.sigmoid(gate).to(x.dtype)
    return (1 - gate) * x[:, 1:] + gate * torch.where(is_start[..., None], 0, x[:, :-1])


class Attention(DeclaringModule):
    q_gain: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(self, config: Config, grid: str, dtype: torch.dtype, reach: int):
        super().__init__()
        D, K, heads, kv_heads = config.model_dim, config.head_width, config.num_heads, config.num_kv_heads
        self.head_dim = K
        self.kv_heads = kv_heads
        self.reach = reach  # positions that it looks back at most
        self.qk_norm = config.qk_norm
        self.stays_in_document = config.doc_attention
        parts = (heads * K, kv_heads * K, kv_heads * K)
        # a gain on normed queries: parameter-golf #1125
        self.declare("q_gain", (heads,), vector(start_at(config.q_gain)), when=config.q_gain != 0)
        # parameter-golf #1667, #1787
        self.declare("gate", (heads, config.head_gate), vector(start_at(0.0)), when=config.head_gate > 0)
        self.qkv = Linear(D, parts, dtype, grid, start_orthogonal(parts))
        self.out = Linear(heads * K, (D,), dtype, grid, start_at(0.0))

    def forward(self, x: Tensor, row: PassRow, stream: Stream) -> tuple[Tensor, KeysValues | None]:
        """(B, T, D) to the same, and all keys and values if they are kept."""
        T = x.shape[1]
        q, k, v = self.project(x, row)
        own_value = v[:, -T:]
        kept = (k, v) if row.keeps else None
        q = rotate(q, stream.cos[-T:], stream.sin[-T:])
        k = rotate(k, stream.cos, stream.sin)
        if self.q_gain is not None:
            q = q * self.q_gain.to(q.dtype)[:, None]
        docs = stream.docs if self.stays_in_document else None
        y = attend(q, k, v, min(stream.window, self.reach), docs)
        if row.is_xsa:
            y = self.exclude_own_value(y, own_value)
        if self.gate is not None:
            y = self.open_heads(y, x)
        return self.out(y, row.lora.get("out")), kept

    def project(self, x: Tensor, row: PassRow) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values of all positions in sight, (B, L, kv heads, K) each."""
        q, k, v = self.qkv(x, row.lora.get("qkv")).split(self.qkv.parts, -1)
        if row.value is not None:
            assert row.value_scale is not None
            v = v + row.value_scale.to(v.dtype) * row.value
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if row.past is not None:  # keys are kept unrotated: only distances matter, so a window rotates from 0 each time
            past_keys, past_values = row.past.keys_values
            k, v = torch.cat((past_keys, k), 1), torch.cat((past_values, v), 1)
        return q, k, v

    def exclude_own_value(self, y: Tensor, own_value: Tensor) -> Tensor:
        """Nothing along a position's own value (exclusive self attention, arXiv:2603.09078, parameter-golf #198)."""
        B, T, _ = y.shape
        y = y.view(B, T, self.kv_heads, -1, self.head_dim)
        unit = F.normalize(own_value, dim=-1).unsqueeze(3)
        return (y - (y * unit).sum(-1, keepdim=True) * unit).view(B, T, -1)

    def open_heads(self, y: Tensor, x: Tensor) -> Tensor:
        """Each head as far as the first channels of the stream open it; at the start just as it is."""
        assert self.gate is not None
        opening = 2 * torch.sigmoid(F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
        return (y.unflatten(-1, (-1, self.head_dim)) * opening[..., None]).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: Config, grid: str, dtype: torch.dtype):
        super().__init__()
        self.is_gated = config.mlp == "swiglu"
        self.slope = config.mlp_slope
        parts = (config.mlp_dim, config.mlp_dim) if self.is_gated else (config.mlp_dim,)
        self.up = Linear(config.model_dim, parts, dtype, grid, start_orthogonal(parts))
        self.down = Linear(config.mlp_dim, (config.model_dim,), dtype, grid, start_at(0.0))

    def forward(self, x: Tensor, lora: Mapping[str, Adapter]) -> Tensor:
        y = self.up(x, lora.get("up"))
        if self.is_gated:
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.leaky_relu(y, self.slope).square()  # parameter-golf #493
        return self.down(y, lora.get("down"))


class Block(DeclaringModule):
    """Attention and MLP of one physical block. Matrices that write to the stream start at zero, so that every block
    starts as a no-op. `visits`: rows of the per-pass tables that belong to it."""

    moe: Any  # a mixture of experts besides the MLP, or None

    def __init__(self, config: Config, dtype: torch.dtype, reach: int, visits: int):
        super().__init__()
        grid = "core" if visits > 1 else "edge"
        self.is_sandwich = config.block_norm == "sandwich"
        names = ["attention", "mlp"]
        if self.is_sandwich:
            names += ["attention_out", "mlp_out"]
        if config.moe_experts:
            names += ["moe"]
        self.norms = Norms(names, config.model_dim, config.norm_weights)
        self.attention = Attention(config, grid, dtype, reach)
        self.mlp = MLP(config, grid, dtype)
        self.moe = build_mixture(config, grid, dtype, visits) if config.moe_experts else None

    def forward(self, x: Tensor, row: PassRow, stream: Stream) -> tuple[Tensor, Kept | None, Tensor | None]:
        """The stream (B, T, D) after this pass; what is kept of it; the losses of the mixture."""
        if row.mix is not None:
            mix = row.mix.to(x.dtype)
            x = mix[0] * x + mix[1] * stream.x0
        if row.adapter is not None:
            down, up = row.adapter.to(x.dtype)
            x = x + x @ down @ up.T
        last_seen = None
        seen = self.read(x, "attention", row)
        if row.back is not None and stream.docs is not None:
            seen, last_seen = look_back(seen, row.back, row.past, stream.docs)
        y, keys_values = self.attention(seen, row, stream)
        x = add_scaled(x, y, row.scale, 0)
        if self.is_sandwich:
            x = self.norms(x, "attention_out")
        if not row.is_parallel:  # parameter-golf #1412
            seen = self.read(x, "mlp", row)
        losses = None
        y = self.mlp(seen, row.lora)
        if self.moe is not None:
            seen = seen if row.is_parallel else self.read(x, "moe", row)
            y, losses = self.moe.add_to(y, seen, row.loop)
        x = add_scaled(x, y, row.scale, 1)
        if self.is_sandwich:
            x = self.norms(x, "mlp_out")
        return x, None if keys_values is None else Kept(keys_values, last_seen), losses

    def read(self, x: Tensor, name: str, row: PassRow) -> Tensor:
        """The stream, normed, as attention or MLP reads it."""
        x = self.norms(x, name)
        return x if row.depth_scale is None else row.depth_scale.to(x.dtype) * x

    def loop_row(self, visit: int) -> Tensor | None:
        """What the mixture knows of a visit."""
        return None if self.moe is None else self.moe.loops[visit]

    def linears(self) -> dict[str, Linear]:
        """The layers that an adapter of test-time training can be put on."""
        return dict(qkv=self.attention.qkv, out=self.attention.out, up=self.mlp.up, down=self.mlp.down)

    def active_weights(self) -> int:
        """How many matrix entries a token is multiplied with."""
        routed = 0 if self.moe is None else self.moe.active_weights()
        return sum(linear.weight.numel() for linear in self.linears().values()) + routed


def add_scaled(x: Tensor, y: Tensor, scale: Tensor | None, part: int) -> Tensor:
    """The stream and what attention (part 0) or the MLP (part 1) made of it."""
    return x + (y if scale is None else scale[part].to(x.dtype) * y)


def build_mixture(config: Config, grid: str, dtype: torch.dtype, visits: int) -> Any:
    """Imported and packed only where a recipe has experts."""
    moe = import_when_used("loopgolf.moe", f"moe_experts={config.moe_experts}")
    shape = moe.MoEShape(config.moe_experts, config.moe_hidden, config.moe_top)
    return moe.MoE(config.model_dim, shape, visits, grid, dtype)


class Parts(NamedTuple):
    """What is compiled by itself in mode "block"."""

    block: Callable[..., Any]
    join: Callable[..., Tensor]
    smear: Callable[..., Tensor]


PLAIN_PARTS = Parts(Block.forward, join, smear)


class LoopedGPT(DeclaringModule):
    """Token, bigram and value embeddings, shared blocks applied as the plan says, a head."""

    smear_gate: nn.Parameter | None

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, compile_mode: str = "none"):
        super().__init__()
        self.config = config
        self.plan: Plan = parse_plan(config.plan)
        self.is_compiled = compile_mode != "none"
        D, V, kv_dim = config.model_dim, config.vocab_size, config.num_kv_heads * config.head_width
        owners = self.plan.slot_owners(config.table_repetitions)
        self.declare("smear_gate", (D,), vector(start_at(0.0)), when=config.smear)
        self.passes = PassTable(config, len(owners))
        self.embed = Table(V, D, dtype, "embed", start_normal(0.005 if config.tied else 1.0))
        self.unembed = None if config.tied else Table(V, D, dtype, "embed", start_at(0.0))
        self.blocks = nn.ModuleDict()
        for i, name in enumerate(self.plan.names):
            self.blocks[name] = Block(config, dtype, self.reach_of(i), visits=owners.count(i))
        if config.bigram_buckets:  # parameter-golf #162
            self.bigram = Table(config.bigram_buckets, config.bigram_dim, dtype, "table", start_normal(0.01))
            self.bigram_out = Linear(config.bigram_dim, (D,), dtype, "edge", start_at(0.0))
        if self.passes.value_slots:  # parameter-golf #374
            start = start_orthogonal((kv_dim,), 1 / math.sqrt(2 * len(owners)))
            self.value = Table(V, config.ve_dim, dtype, "table", start_normal(0.01))
            self.value_out = Linear(config.ve_dim, (kv_dim,), dtype, "edge", start)
        self.inject = nn.ModuleDict()
        if config.inject == "concat":
            for group in self.plan.injected:
                self.inject[str(group)] = Linear(2 * D, (D,), dtype, "edge", start_identity)
        names = ["final"]
        if config.embed_norm:
            names += ["embed"]
        if "~" in config.plan:
            names += ["loop"]
        self.norms = Norms(names, D, config.norm_weights)
        # the embeddings stay out of "block": compiled, their gradient is summed by two threads in no fixed order
        self.run_trunk = compile_in(("full",), compile_mode, LoopedGPT.trunk)
        self.parts = Parts(*(compile_in(("block",), compile_mode, part) for part in PLAIN_PARTS))
        self.run_loss = compile_in(("block", "full"), compile_mode, head_loss_torch)

    def reach_of(self, block: int) -> int:
        """Positions that a block looks back at most."""
        kinds = self.config.windows or "L"
        return (self.config.seq_len + 1) // 2 if kinds[block % len(kinds)] == "S" else MOST

    def forward(self, tokens: Tensor, targets: Tensor | None = None, depth: Depth | None = None) -> Tensor:
        """Logits (B, T, V); with targets (B, T) the mean loss."""
        x, routing = self.run(tokens, depth)
        if targets is None:
            return self.logits(x)
        loss = self.run_loss(x, self.head, targets, self.config.softcap)
        if routing and self.training:
            balance, z = torch.stack(routing).mean(0)
            loss = loss + 0.01 * balance + 0.001 * z
        return loss

    def hidden(
        self,
        tokens: Tensor,
        depth: Depth | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> Tensor:
        """(B, T) tokens to normalised states (B, T, D). With a cache the tokens continue its stream. `lora`: adapters
        by block and layer. `on_pass` sees the stream after every pass, before a norm of the plan, and returns the
        stream that goes on; then nothing is compiled."""
        return self.run(tokens, depth, cache, lora, on_pass)[0]

    def logits(self, states: Tensor) -> Tensor:
        return softcap_logits(states, self.head, self.config.softcap)

    @property
    def head_name(self) -> str:
        return "embed.weight" if self.unembed is None else "unembed.weight"

    @property
    def head(self) -> Tensor:
        return (self.embed if self.unembed is None else self.unembed).weight

    def run(
        self,
        tokens: Tensor,
        depth: Depth | None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        trunk = self.run_trunk if on_pass is None else LoopedGPT.trunk
        return trunk(self, tokens, depth or self.config.scoring_depth, cache, lora or {}, on_pass)

    def trunk(
        self, tokens: Tensor, depth: Depth, cache: Cache | None, lora: Lora, on_pass: OnPass | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The final states, and the losses of every pass with a mixture."""
        passes = self.plan.passes(depth, self.config.table_repetitions)
        slots = cache.slots(self.plan, depth) if cache else []
        n_skips = len(passes) // 2 if self.config.skips == "unet" else 0
        parts = self.parts if on_pass is None else PLAIN_PARTS
        stream = self.enter(tokens, cache, parts)
        x = stream.x0.clone()  # one tensor under two names would be a graph of its own to the compiler
        rows = self.passes.rows(self.value_out(self.value(tokens)) if self.passes.value_slots else None)
        joints = self.passes.joints()
        run_block = parts.block
        if self.config.checkpoint_passes:
            run_block = functools.partial(checkpoint, parts.block, use_reentrant=False)
        entered: dict[int, Tensor] = {}  # stream that entered a group with ^
        pushed: list[Tensor] = []  # streams of the first half of the passes that run, popped by the second
        routing: list[Tensor] = []
        for index, p in enumerate(passes):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns(p)):
                for group in p.enter:
                    entered[group] = x
                for group in p.inject:
                    x = self.mix_in(group, entered[group], x)
                if index >= n_skips and pushed:
                    left = pushed.pop()
                    x = parts.join(x, left, *joints[len(pushed)])
                name = self.plan.names[p.block]
                block = self.block(name)
                row = rows[p.slot]._replace(loop=block.loop_row(p.visit), lora=lora.get(name, {}))
                if cache:
                    is_last_of_slot = slots[index] not in slots[index + 1 :]
                    row = row._replace(past=cache.kept.get(slots[index]), keeps=is_last_of_slot)
                x, kept, losses = run_block(block, x, row, stream)
                if losses is not None:
                    routing.append(losses)
                if on_pass:
                    x = on_pass(p, x)
                if p.norm:
                    x = self.norms(x, "loop")
                if index < n_skips:
                    pushed.append(x)
                if cache and kept is not None:
                    cache.keep(slots[index], kept)
        if cache:
            cache.tokens = self.seen_tokens(tokens, cache)[:, -cache.window - 1 :]
        return self.norms(x, "final"), routing

    def learns(self, p: Pass) -> bool:
        """Whether the gradient reaches a pass: it ends some repetitions of the *r group before the last."""
        return self.config.bptt == 0 or p.repetitions_left is None or p.repetitions_left < self.config.bptt

    def mix_in(self, group: int, entered: Tensor, x: Tensor) -> Tensor:
        """The stream with the input of a repeated group mixed in."""
        if str(group) not in self.inject:
            return x + entered
        return self.inject[str(group)](torch.cat((entered, x), -1))

    def seen_tokens(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """The tokens after those that the cache remembers, or after two BOS."""
        if cache is not None and cache.tokens is not None:
            return torch.cat((cache.tokens, tokens), 1)
        return torch.cat((tokens.new_full((len(tokens), 2), self.config.bos_id), tokens), 1)

    def enter(self, tokens: Tensor, cache: Cache | None, parts: Parts) -> Stream:
        T = tokens.shape[1]
        past = cache.length if cache else 0
        seen = self.seen_tokens(tokens, cache)
        docs = None
        if self.config.doc_attention or self.config.look_back:
            docs = (seen[:, -past - T :] == self.config.bos_id).cumsum(1, dtype=torch.int32)
        cos, sin = build_rotation(past + T, self.config.rope_dims, self.config.rope_base, self.embed.weight)
        window = cache.window if cache else self.config.seq_len
        return Stream(self.embed_tokens(seen[:, -T - 2 :], parts), cos, sin, window, docs)

    def embed_tokens(self, tokens: Tensor, parts: Parts = PLAIN_PARTS) -> Tensor:
        """(B, 2 + T) tokens to (B, T, D): two are only looked back on. Nothing passes a BOS from left to right."""
        config = self.config
        is_start = tokens[:, 1:] == config.bos_id
        x = self.embed(tokens[:, 1:])
        if config.bigram_buckets:
            previous = torch.where(is_start, config.bos_id, tokens[:, :-1])
            x = x + self.bigram_out(self.bigram((92821 * previous + tokens[:, 1:]) % config.bigram_buckets))
        if config.embed_norm:
            x = self.norms(x, "embed")
        return x[:, 1:] if self.smear_gate is None else parts.smear(x, self.smear_gate, is_start[:, 1:])

    def linears(self) -> dict[str, dict[str, Linear]]:
        return {name: self.block(name).linears() for name in self.plan.names}

    def block(self, name: str) -> Block:
        block = self.blocks[name]
        assert isinstance(block, Block)
        return block

    def parameters_of_block(self, letter: str) -> list[nn.Parameter]:
        return list(self.block(letter).parameters())


def compile_in(modes: tuple[str, ...], mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if mode in modes else function


def build_model(config: Config, ctx: RunContext) -> LoopedGPT:
    if ctx.compile != "none":
        torch._dynamo.config.recompile_limit = 64  # depths, shapes and grad modes of one run; each is compiled once
    with ctx.device:
        return LoopedGPT(config, ctx.dtype, ctx.compile)


def build_meta_model(config: Config) -> LoopedGPT:
    """Shapes and declarations without weights."""
    with torch.device("meta"):
        return LoopedGPT(config)


def compute_flops(config: Config, mean_r: float, mean_learned_r: float | None = None) -> int:
    """Operations of one trained token, forward and backward, at a mean depth: 6 per weight and pass, 12 K per head,
    key and query; a third of it in repetitions of the *r group that no gradient reaches."""
    model = build_meta_model(config)
    D, T = config.model_dim, config.seq_len
    learned_r = mean_r if mean_learned_r is None else mean_learned_r
    weighed_r = learned_r + (mean_r - learned_r) / 3
    outside = sum(module.weight.numel() for module in model.children() if isinstance(module, Linear))
    total = 6.0 * (outside + model.head.numel())
    for p in model.plan.passes(Depth(1), config.table_repetitions):
        block = model.block(model.plan.names[p.block])
        weights = block.active_weights() + 2 * D * config.adapter_rank
        if config.inject == "concat":
            weights += 2 * D * D * len(p.inject)
        reach = min(T, block.attention.reach)
        keys = reach - reach**2 / (2 * T)  # that a query sees on average
        times = 1.0 if p.repetitions_left is None else weighed_r
        total += times * (6 * weights + 12 * config.num_heads * config.head_width * keys)
    return int(total)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Optimizers
# ----------------------------------------------------------------------------------------------------------------------
# They move float32 master weights (loopgolf/state.py). Every parameter declared its group: Muon takes matrices, Adam
# tables and vectors; or one optimizer takes all.


@dataclass(frozen=True)
class MuonRule:
    """What becomes of the gradients of a matrix."""

    coefficients: Coefficients
    row_norm: bool


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, github.com/KellerJordan/Muon). Matrices of one shape, either way
    up, form a batch, and ranks share the batch. A group has `parts`: for each weight the rows of its projections."""

    def __init__(self, groups: list[dict[str, Any]], rule: MuonRule, ctx: RunContext):
        super().__init__(groups, dict(lr=0.0, momentum=0.0))
        self.rule = rule
        self.ctx = ctx

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            moves = self.advance_momentum(group["params"], group["momentum"])
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for weight, move, parts in zip(group["params"], moves, group["parts"]):
                for target, piece in zip(weight.split(parts), move.split(parts)):
                    if self.rule.row_norm:  # parameter-golf #1217
                        piece = F.normalize(piece, dim=1)
                    gain = max(1, len(piece) / piece.shape[1]) ** 0.5
                    if gain > 1:  # a tall matrix is the same problem as a wide one: larger batches, fewer idle ranks
                        target, piece = target.mT, piece.mT
                    by_shape.setdefault(piece.shape, []).append((target, piece, -group["lr"] * gain))
        for rows in by_shape.values():
            updates = self.orthogonalize_shared(torch.stack([piece for _, piece, _ in rows]))
            for (target, _, factor), update in zip(rows, updates):
                target.add_(update, alpha=factor)

    def advance_momentum(self, weights: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Nesterov's updates."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        means = [self.state[weight]["momentum"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        assert len(grads) == len(weights)
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, grads)
        return torch._foreach_add(grads, means, alpha=momentum)

    def orthogonalize_shared(self, batch: Tensor) -> Tensor:
        ctx, n = self.ctx, len(batch)
        share = math.ceil(n / ctx.world)
        batch = F.pad(batch, (0, 0, 0, 0, 0, share * ctx.world - n))
        mine = orthogonalize_ref(batch[ctx.rank * share : (ctx.rank + 1) * share], ctx.dtype, self.rule.coefficients)
        return torch.cat(ctx.gather(mine))[:n].float()


class Lion(torch.optim.Optimizer):
    """The sign of a gradient mixed with its momentum; every weight moves by the learning rate (arXiv:2302.06675)."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        super().__init__(groups, dict(lr=0.0, betas=betas))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                update = state["momentum"].lerp(weight.grad, 1 - beta1).sign()
                weight.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                state["momentum"].lerp_(weight.grad, 1 - beta2)


Groups = dict[str, list[dict[str, Any]]]  # torch's parameter groups by declared group


def build_muon(groups: Groups, config: Config, ctx: RunContext) -> dict[str, torch.optim.Optimizer]:
    others = [*groups["table"], *groups["vector"]]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    rule = MuonRule(COEFFICIENTS[config.newton_schulz], config.row_norm)
    return {"muon": Muon(groups["matrix"], rule, ctx), "adam": adam}


def build_lion(groups: Groups, config: Config, ctx: RunContext) -> dict[str, torch.optim.Optimizer]:
    everything = [*groups["matrix"], *groups["table"], *groups["vector"]]
    return {"lion": Lion(everything, (config.beta1, config.beta2))}


OPTIMIZERS = {"muon": build_muon, "lion": build_lion}


def build_optimizers(
    model: LoopedGPT, weights: dict[str, Tensor], config: Config, ctx: RunContext
) -> dict[str, torch.optim.Optimizer]:
    """Every master weight in exactly one optimizer, by the group that its parameter declared."""
    specs = collect_specs(model)
    peaks = {"matrix": config.matrix_lr, "table": config.table_lr, "vector": config.vector_lr}
    groups: Groups = {group: [] for group in peaks}
    for group, peak in peaks.items():
        for decays in (True, False):
            names = [n for n in weights if specs[n].group == group and specs[n].decays == decays]
            params, parts = [weights[n] for n in names], [specs[n].parts for n in names]
            decay = config.weight_decay if decays else 0.0
            if names:
                groups[group].append(dict(params=params, parts=parts, peak=peak, weight_decay=decay))
    optimizers = OPTIMIZERS[config.optimizer](groups, config, ctx)
    held = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in weights.values())
    return optimizers


def build_formats(config: Config, model: LoopedGPT, k_scale: float) -> dict[str, Format]:
    """How every parameter is trained and stored, by the grid that it declared."""
    grids = {
        "core": RowGrid(config.core_bits, k_scale * config.core_k, config.step_bits),
        "edge": RowGrid(config.edge_bits, k_scale * config.edge_k, config.step_bits),
        "embed": RowGrid(config.embed_bits, k_scale * config.embed_k, config.step_bits),
        "table": RowGrid(config.table_bits, k_scale * config.table_k, config.step_bits),
    }
    return {name: grids[spec.grid] if spec.grid else Half() for name, spec in collect_specs(model).items()}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Training
# ----------------------------------------------------------------------------------------------------------------------
# The story of a run: warm up off the clock, then steps until the budget is used, with a checkpoint now and then.


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0  # consumed, over all ranks
    used_s: float = 0.0
    # of the latest step: how long the next one may take, and the shape that holds until the end of a round of windows
    step_s: float = 0.0
    batch_tokens: int = 0
    seq_len: int = 0


@dataclass(frozen=True)
class Trained:
    """What training hands on: averaged weights, what steers their rounding, and what it took."""

    averaged: dict[str, Tensor]
    curvatures: dict[str, Curvature]
    k_scale: float
    position: Position


def ignore_part(part: str) -> None:
    """Most callers do not want to know which part of a step has ended."""


def train_step(
    model: LoopedGPT,
    state: TrainState,
    batch: tuple[Tensor, Tensor],
    settings: Settings,
    ctx: RunContext,
    end_part: Callable[[str], None] = ignore_part,
) -> Tensor:
    """One optimizer step on this rank's sequences. Returns its mean loss, or NaN if the gradient is not finite."""
    inputs, targets = batch
    size = model.config.micro_batch or len(inputs)
    total = torch.zeros((), device=ctx.device)
    for x, y in zip(inputs.split(size), targets.split(size)):
        loss = model(x, y, settings.depth)
        end_part("forward")
        loss.backward()
        state.accumulate()
        total += loss.detach()
        end_part("backward")
    n_micro = len(inputs) // size
    norm = state.reduce(ctx.sum, 1 / (n_micro * ctx.world), model.config.grad_clip)
    end_part("communication")
    state.step(settings.lr_scale, settings.momentum, settings.is_rounded)
    end_part("optimizer")
    return torch.where(norm.isfinite(), total / n_micro, torch.nan)


def build_state(config: Config, ctx: RunContext, model: LoopedGPT, k_scale: float) -> TrainState:
    master = MasterWeights(dict(model.named_parameters()), build_formats(config, model, k_scale))
    optimizers = build_optimizers(model, master.weights, config, ctx)
    average = WeightAverage(config.average, config.average_start, config.average_every, config.ema_decay)
    return TrainState(master, optimizers, average, is_rounded=config.qat_start == 0)


def warm_up(model: LoopedGPT, state: TrainState, config: Config, ctx: RunContext) -> None:
    """Compiles every graph of the run on made-up tokens, then puts back weights, optimizer state and random state."""
    started = time.perf_counter()
    before = copy.deepcopy(state.state_dict())
    random_state = torch.get_rng_state()
    for settings in list_forwards(config, ctx.compile):
        shape = (settings.batch_tokens // settings.seq_len // ctx.world, settings.seq_len + 1)
        made_up = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        train_step(model, state, split_tokens(made_up, ctx), settings, ctx)
    state.load_state_dict(before)
    torch.set_rng_state(random_state)
    ctx.sync()
    ctx.log("warmup", compile=ctx.compile, seconds=time.perf_counter() - started)


def train(
    config: Config, ctx: RunContext, model: LoopedGPT, k_scale: float, text: TrainingText, folder: Path
) -> Trained:
    state = build_state(config, ctx, model, k_scale)
    at = resume_position(config, ctx, state, folder)
    warm_up(model, state, config, ctx)
    calibrates = config.calibration_tokens > 0 and is_limit_binding(config, k_scale)
    budget = Budget(config, config.export_reserve if calibrates else 0.0)
    if at.step:
        budget.add_step(at.step_s)
    clock = Clock(ctx, at.used_s)
    saved_at_s = at.used_s
    with StopSignals() as stop, ctx.log.progress_bar(1.0, "training") as bar:
        clock.start()
        while (progress := budget.progress(at.step, at.used_s)) is not None:
            settings = settings_at(config, progress, at.step)
            if not text.ends_round(at.tokens):  # mid-round the shape stays, or a window would be read twice
                settings = replace(settings, batch_tokens=at.batch_tokens, seq_len=at.seq_len)
            batch = load_batch(text, at.tokens, settings, ctx)
            step_loss = train_step(model, state, batch, settings, ctx)
            state.update_average(at.step, progress)
            loss = ctx.mean_loss(step_loss)  # sync: the only one of a step
            seconds, stops = ctx.gather_numbers(clock.read(), stop.seen)
            now_s, must_stop = max(seconds), any(stops)
            at = Position(
                step=at.step + 1,
                tokens=at.tokens + settings.batch_tokens,
                used_s=now_s,
                step_s=now_s - at.used_s,
                batch_tokens=settings.batch_tokens,
                seq_len=settings.seq_len,
            )
            budget.add_step(at.step_s)
            log_step(config, ctx, at, loss, settings, progress)
            if progress < 0.5 and is_power_of_two(at.step):
                log_telemetry(model, at.step, text.stream, ctx)
            bar.update(progress - bar.n)
            bar.set_postfix_str(f"step {at.step} loss {loss:.3f}", refresh=False)
            is_due = config.checkpoint_every_s > 0 and now_s - saved_at_s > config.checkpoint_every_s
            if is_due or must_stop or not math.isfinite(loss):
                write_checkpoint(ctx, state, at, folder)
                at.used_s = clock.read_slowest()  # writing takes time of the budget, but none of the next step's
                saved_at_s = at.used_s
            stop_if_needed(at, loss, must_stop, folder)
    write_checkpoint(ctx, state, at, folder)  # whatever happens from here on, a resumed run finds the trained weights
    averaged = state.averaged_weights()
    curvatures: dict[str, Curvature] = {}
    if calibrates:
        time_left = TimeForBatches(clock, config.max_wallclock_seconds, EAGER_STEPS * budget.slowest_s)
        wants_more = wants_tokens(config) if config.iterations else time_left.fits_another
        curvatures = calibrate(config, ctx, averaged, text, wants_more)
    at.used_s = clock.stop()
    log_telemetry(model, at.step, text.stream, ctx)
    return Trained(averaged, curvatures, k_scale, at)


def log_step(config: Config, ctx: RunContext, at: Position, loss: float, settings: Settings, progress: float) -> None:
    if at.step % config.log_every and at.step != 1 and progress < 1.0:
        return
    rate = round(settings.batch_tokens / at.step_s)
    ctx.log(
        "train",
        step=at.step,
        tokens=at.tokens,
        train_loss=loss,
        lr_scale=settings.lr_scale,
        train_s=at.used_s,
        step_ms=1000 * at.step_s,
        tokens_per_s=rate,
    )


def is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def stop_if_needed(at: Position, loss: float, must_stop: bool, folder: Path) -> None:
    """After the checkpoint: its weights are finite whatever the loss is."""
    if not math.isfinite(loss):
        saved = folder / "checkpoint.pt"
        raise NonFiniteLoss(f"loss {loss} at step {at.step}; lower a learning rate; {saved} has finite weights")
    if must_stop:
        raise Interrupted(f"stopped at step {at.step}; continue with --resume {folder}")


@torch.no_grad()
def log_telemetry(model: LoopedGPT, step: int, stream: TokenStream, ctx: RunContext) -> None:
    """The size of the stream at the end of each repetition, on the same text every time, and how much the adapter of
    each pass is like that of the first. Nothing for plans without groups."""
    if not model.plan.has_groups:
        return
    sizes: list[Tensor] = []

    def measure(p: Pass, x: Tensor) -> Tensor:
        if p.ends:
            sizes.append(x.float().square().mean().sqrt())
        return x

    tokens = torch.from_numpy(stream.read(0, model.config.seq_len)).to(ctx.device)
    model.hidden(tokens[None], on_pass=measure)
    values = {"rms": sizes}
    if model.passes.adapters is not None:
        unit = F.normalize(model.passes.adapters[:, 1].flatten(1), dim=1)
        values["adapter_cosines"] = list(unit[1:] @ unit[0])
    ctx.log("telemetry", step=step, **{name: ",".join(f"{v:.3f}" for v in row) for name, row in values.items()})


def write_checkpoint(ctx: RunContext, state: TrainState, at: Position, folder: Path) -> None:
    if ctx.rank == 0:
        save_checkpoint(folder / "checkpoint.pt", state, asdict(at))


def resume_position(config: Config, ctx: RunContext, state: TrainState, folder: Path) -> Position:
    if not config.resume:
        return Position()
    path = folder / "checkpoint.pt"
    if not path.is_file():
        ctx.log.line(f"# no checkpoint in {folder} yet: starting from the beginning")
        return Position()
    at = Position(**load_checkpoint(path, state, ctx.device))
    ctx.log("resume", step=at.step, used_s=at.used_s)
    return at


CALIBRATED_AT_ONCE = 16_384  # tokens: not compiled, they take more memory than in training
EAGER_STEPS = 5  # compiled steps that a batch may take that is not: 3.3 were measured on a CPU


class TimeForBatches:
    """Whether another batch would end in time, which all ranks answer alike. The first one is taken to need `first_s`,
    all others as much as the slowest before them."""

    def __init__(self, clock: Clock, end_s: float, first_s: float):
        self.clock, self.end_s, self.first_s = clock, end_s, first_s
        self.asked_s: list[float] = []

    def fits_another(self, consumed: int) -> bool:
        self.asked_s.append(self.clock.read_slowest())
        needed_s = max((b - a for a, b in itertools.pairwise(self.asked_s)), default=self.first_s)
        return self.asked_s[-1] + needed_s < self.end_s


def wants_tokens(config: Config) -> Callable[[int], bool]:
    """Whether so many tokens are fewer than the run calibrates on when no clock decides."""
    return lambda consumed: consumed < config.calibration_tokens


def calibrate(
    config: Config,
    ctx: RunContext,
    weights: dict[str, Tensor],
    text: TrainingText,
    wants_more: Callable[[int], bool],
) -> dict[str, Curvature]:
    """How sensitive the loss is to errors in matrices and tables, on training text. `wants_more` is asked before every
    batch, with the tokens read so far."""
    # the gradient reaches every pass; not compiled: hooks do not run in a graph
    model = LoopedGPT(replace(config, bptt=0), ctx.dtype).to(ctx.device)
    model.load_state_dict(weights)
    meter = CurvatureMeter(model)
    settings = settings_at(config, 1.0, 0)
    rows = max(1, CALIBRATED_AT_ONCE // settings.seq_len)
    if config.micro_batch:
        rows = min(rows, config.micro_batch)
    consumed = 0
    while wants_more(consumed):
        inputs, targets = load_batch(text, consumed, settings, ctx)
        for x, y in zip(inputs.split(rows), targets.split(rows)):
            states = model.hidden(x)
            logits = F.linear(states, model.head.detach())
            meter.watch_head(model.head_name, states, logits)
            capped = softcap(logits.float(), config.softcap)
            F.cross_entropy(capped.flatten(0, 1), y.flatten(), reduction="sum").backward()
        ctx.sync()
        consumed += settings.batch_tokens
    ctx.log("calibration", tokens=consumed)
    return meter.totals(ctx.sum)


# ----------------------------------------------------------------------------------------------------------------------
# 7. File
# ----------------------------------------------------------------------------------------------------------------------
# What goes into the artifact, how coarse its grids have to be, and how it comes back. Bits per weight depend on k
# alone, so the coarseness is solved from the byte limit before training, and moved a little at most in the final fit.

FINEST, COARSEST = 0.3, 5.0  # k_scale: below, codes clip before they get finer; above, less than 1.5 bits are left
HEADER_BYTES = 900  # settings that differ from the defaults, digest, compressed tables
FIT_ATTEMPTS = 6


def forecast_bytes(model: LoopedGPT, formats: dict[str, Format], weights: dict[str, Tensor] | None = None) -> int:
    """Size of the artifact without writing it: from the entropy of the weights' codes, or of Gaussian ones."""
    total = float(HEADER_BYTES)
    for name, p in model.named_parameters():
        total += formats[name].expected_bytes(tuple(p.shape), weights[name] if weights else None)
    return int(total)


def solve_k_scale(size_at: Callable[[float], int], room: int, config: Config) -> float:
    """The finest k_scale whose file leaves nothing over `room` bytes."""
    if size_at(FINEST) <= room:
        return FINEST
    least = size_at(COARSEST)
    if least > room:
        why = f"at least {least + config.code_reserve:,} bytes are needed, {config.code_reserve:,} of them for code"
        raise DoesNotFit(f"byte_limit={config.byte_limit:,}: {why}; take a smaller --model_dim or a shorter --plan")
    low, high = FINEST, COARSEST
    while high - low > 1e-4 * high:
        middle = math.sqrt(low * high)
        if size_at(middle) > room:
            low = middle
        else:
            high = middle
    return high


def plan_k_scale(config: Config, model: LoopedGPT) -> float:
    """The coarseness to train at: given, or solved from the byte limit with Gaussian weights."""
    if config.k_scale:
        return config.k_scale
    if not config.byte_limit:
        return FINEST
    room = config.byte_limit - config.code_reserve
    return solve_k_scale(lambda k_scale: forecast_bytes(model, build_formats(config, model, k_scale)), room, config)


def is_limit_binding(config: Config, k_scale: float) -> bool:
    """Whether the byte limit chose the grids."""
    return not config.k_scale and k_scale > FINEST


def fit_artifact(config: Config, model: LoopedGPT, trained: Trained, identity: dict[str, Any]) -> bytes:
    """The file at the coarseness that was trained, unless the byte limit decides: then one of 99.5% to 100% of it, or
    the largest below. Sizes are searched by entropy; what coder and feedback add is learned from each attempt."""
    largest = b""
    room = config.byte_limit - config.code_reserve if config.byte_limit else sys.maxsize
    overhead = 0  # bytes of the latest attempt over its forecast

    def forecast(k_scale: float) -> int:
        return forecast_bytes(model, build_formats(config, model, k_scale), trained.averaged) + overhead

    def encode(k_scale: float, curvatures: dict[str, Curvature]) -> bytes:
        formats = build_formats(config, model, k_scale)
        return encode_artifact(config, model, trained.averaged, formats, curvatures, identity)

    limit_chose_grid = is_limit_binding(config, trained.k_scale)
    if not limit_chose_grid and forecast(trained.k_scale) <= room:
        # on the very grid of training weights may have learned to be rounded plainly: there feedback only loses
        content = encode(trained.k_scale, {})
        if len(content) <= room:
            return content
        overhead += len(content) - forecast(trained.k_scale)
    for _ in range(FIT_ATTEMPTS):
        try:
            k_scale = solve_k_scale(forecast, int(0.998 * room), config)
        except DoesNotFit:
            if largest:
                break  # what the latest attempt was over its forecast was a jump
            raise
        content = encode(k_scale, trained.curvatures if k_scale != trained.k_scale else {})
        if len(content) <= room:
            largest = max(largest, content, key=len)
            if len(content) >= 0.995 * room or k_scale == FINEST:
                return content
        overhead += len(content) - forecast(k_scale)
    if not largest:
        why = f"each of {FIT_ATTEMPTS} files was larger; take a smaller --model_dim"
        raise DoesNotFit(f"byte_limit={config.byte_limit:,}: {why}")
    return largest


def encode_artifact(
    config: Config,
    model: LoopedGPT,
    weights: dict[str, Tensor],
    formats: dict[str, Format],
    curvatures: dict[str, Curvature],
    identity: dict[str, Any],
) -> bytes:
    raw: dict[str, Tensor] = {}
    layout = build_layout(model, formats)
    grids = {name: form for name, form in formats.items() if isinstance(form, RowGrid)}
    steps = choose_steps(weights, grids, curvatures) if config.row_steps == "loss" else {}
    for name, described in layout.items():
        tensors = described.format.quantize(weights[name], find_hessian(curvatures, name), steps.get(name))
        raw |= zip(described.stored(name), tensors)
    return pack_artifact(config.stored(), layout, raw, identity)


def build_layout(model: LoopedGPT, formats: dict[str, Format]) -> Layout:
    return {name: Described(tuple(p.shape), formats[name]) for name, p in model.named_parameters()}


def config_from_stored(stored: dict[str, Any]) -> Config:
    """The config of a stored artifact."""
    problem = find_wrong_fields(stored, Stored)
    if problem:
        raise ArtifactError(f"its config does not work: {problem}")
    seq_len = stored.get("seq_len", Config().seq_len)
    try:
        return Config(**stored, batch_tokens=seq_len)
    except ConfigError as error:
        raise ArtifactError(f"its config does not work: {error}") from None


def describe_stored(stored: dict[str, Any]) -> Layout:
    """The parameters of an artifact that stores these settings."""
    config = config_from_stored(stored)
    model = build_meta_model(config)
    return build_layout(model, build_formats(config, model, k_scale=1.0))


def load_artifact(path: str | Path) -> Artifact:
    try:
        return unpack_artifact(Path(path).read_bytes(), describe_stored)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def export(config: Config, ctx: RunContext, model: LoopedGPT, trained: Trained, val: Validation, path: Path) -> None:
    """Writes the artifact, unless it is over the limit. From here on only that file is used."""
    if ctx.rank == 0:
        try:
            content = fit_artifact(config, model, trained, val.identity)
        except DoesNotFit as error:
            raise DoesNotFit(f"{error}; the checkpoint is kept in {path.parent}") from None
        write_atomic(path, content)
    ctx.wait_for_all()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Score
# ----------------------------------------------------------------------------------------------------------------------
# What is scored, with which model, in which mode; loopgolf/scoring.py and adapting.py are how.


class ScorerEntry(NamedTuple):
    """A score mode: the class is imported when it is used, so that what a recipe does not use is not packed."""

    module: str
    name: str
    help: str


SCORERS = {
    "plain": ScorerEntry("loopgolf.scoring", "PlainScorer", "windows that do not overlap"),
    "sliding": ScorerEntry("loopgolf.scoring", "SlidingScorer", "short strides, many times the work"),
    "banded": ScorerEntry("loopgolf.scoring", "BandedScorer", "long windows with a band of attention"),
    "sgd": ScorerEntry("loopgolf.adapting", "SgdScorer", "banded, and SGD on what is scored"),
    "lora": ScorerEntry("loopgolf.adapting", "LoraScorer", "adapters that learn within each document"),
}


def find_scorer(mode: str) -> Any:
    """The class of a score mode."""
    entry = SCORERS[mode]
    return getattr(import_when_used(entry.module, f"score_mode={mode}"), entry.name)


def build_scorer(
    mode: str, model: LoopedGPT, config: Scoring, ctx: RunContext, mask: Mask | None = None
) -> WindowScorer:
    """`mask`: what build_mask made for the tokenizer of the text."""
    assert config.canonical == (mask is not None)
    scorer: WindowScorer = find_scorer(mode)(model, config, ctx)
    scorer.mask = mask
    if config.recall_share:
        module = import_when_used("loopgolf.recall", f"recall_share={config.recall_share}")
        settings = config.recall_share, config.recall_sharpness, config.bos_id
        scorer.build_memory = functools.partial(module.Recall, *settings)
    return scorer


def build_mask(tokenizer: sentencepiece.SentencePieceProcessor, config: Scoring, ctx: RunContext) -> Mask | None:
    if not config.canonical:
        return None
    module = import_when_used("loopgolf.canonical", "canonical=1")
    mask: Mask = module.CanonicalMask(tokenizer, config.bos_id, ctx.device)
    return mask


def import_when_used(module: str, setting: str) -> Any:
    """A packed script holds the modules of its own recipe only."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"{setting}: this script was packed without {module}; run the repository's") from None


def list_score_modes(config: Config) -> list[str]:
    """The modes that a run is scored in."""
    return [config.score_mode, *(word for word in config.diagnostics if word in SCORERS)]


def used_modules(config: Config) -> list[str]:
    """The modules that a config imports when they are used; all others are imported at the top."""
    modules = [SCORERS[mode].module for mode in list_score_modes(config)]
    if config.moe_experts:
        modules.append("loopgolf.moe")
    if config.canonical:
        modules.append("loopgolf.canonical")
    if config.recall_share:
        modules.append("loopgolf.recall")
    return sorted(set(modules))


def build_eval_model(config: Config, ctx: RunContext) -> LoopedGPT:
    """A model to score with. A CPU takes longer to compile the shapes of scoring than to score without."""
    return build_model(config, replace(ctx, compile="none") if ctx.device.type == "cpu" else ctx)


def load_eval_model(artifact: Artifact, config: Config, ctx: RunContext) -> LoopedGPT:
    """The model of an artifact, ready to be scored."""
    model = build_eval_model(config, ctx)
    model.load_state_dict(artifact.tensors)
    return model.eval()


@dataclass(frozen=True)
class Validation:
    """The tokens that are scored, how their bytes are counted, what tells their tokenizer apart, and what it rules
    out."""

    tokens: Tensor
    counter: ByteCounter
    identity: dict[str, Any]
    mask: Mask | None


def load_validation(config: Config, ctx: RunContext) -> Validation:
    tokenizer = load_run_tokenizer(config)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    tokens = stream.read(0, stream.total)
    facts: dict[str, int | str] = dict(tokens=stream.total)
    if config.score_documents:
        documents = split_documents(tokens, config.bos_id)[: config.score_documents]
        tokens = np.concatenate(documents)
        facts.update(documents=len(documents), text_sha256=hash_text(documents, tokenizer))
    if len(tokens) < config.seq_len + 1:
        count = f"{len(tokens)} validation tokens"
        raise DataError(f"{config.data_path}: {count} are fewer than one window of {config.seq_len}")
    sha256 = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    ctx.log("data", split="val", shards=len(stream.paths), **facts, scored=len(tokens), sha256=sha256)
    if config.text_sha256 and facts.get("text_sha256") != config.text_sha256:
        ctx.log.line(
            f"# warning: the text is not the one that {config.recipe} is scored on: its score compares with no other"
        )
    mask = build_mask(tokenizer.model, config, ctx)
    if mask is not None:
        mask.check_text(torch.from_numpy(tokens))
    return Validation(
        tokens=torch.from_numpy(tokens),
        counter=ByteCounter(tokenizer.model),
        identity=tokenizer.identity,
        mask=mask,
    )


def split_documents(tokens: np.ndarray, bos_id: int) -> list[np.ndarray]:
    """Every document starts with BOS; what comes before the first one belongs to it."""
    starts = np.flatnonzero(tokens == bos_id)
    return np.split(tokens, starts[1:])


def hash_text(documents: list[np.ndarray], tokenizer: Tokenizer) -> str:
    """sha256 of the text, whatever the vocabulary."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(decode_document(tokenizer.model, document.tolist()).encode() + b"\n")
    return digest.hexdigest()


class Evaluated(NamedTuple):
    score: Score
    updates: int  # of adaptation
    skipped: int  # updates that the time did not allow


def evaluate(
    mode: str, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation, name: str = ""
) -> Evaluated:
    """Score one mode and log it. `name` says which weights, where it is not the artifact. A finished file (--score) has
    all the time that it takes: a score belongs to the file, not to the machine."""
    started = time.perf_counter()
    scorer, meter = build_scorer(mode, model, config, ctx, val.mask), BpbMeter(val.counter)
    if model.is_compiled:
        scorer.warm_up()
    deadline = math.inf if config.score else started + config.eval_budget
    score_tokens(scorer, val.tokens, meter, name or mode, deadline)
    score = meter.total(ctx)
    updates, skipped = count_updates(scorer, ctx)
    ctx.log(
        "score", what=name or "artifact", mode=mode, val_loss=f"{score.loss:.8f}", val_bpb=f"{score.bpb:.8f}",
        tokens=score.tokens, bytes=score.bytes, updates=updates, skipped=skipped, eval_s=time.perf_counter() - started,
    )  # fmt: skip
    return Evaluated(score, updates, skipped)


def count_updates(scorer: WindowScorer, ctx: RunContext) -> tuple[int, int]:
    """Updates made and skipped. Ranks share every update, or the documents."""
    per_rank = ctx.gather_numbers(scorer.updates, scorer.skipped)
    total = [sum(counts) if scorer.is_per_document else counts[0] for counts in per_rank]
    return int(total[0]), int(total[1])


def log_scoring_forecast(mode: str, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation) -> None:
    """How long scoring will take, and whether even plain scoring is too much for its budget."""
    seconds = build_scorer(mode, model, config, ctx, val.mask).estimate_seconds(len(val.tokens))
    ctx.log("forecast", what="scoring", mode=mode, seconds=seconds)
    if seconds > config.eval_budget and not config.score:
        budget = f"eval_budget={config.eval_budget}"
        ctx.log.line(f"# warning: {mode} scoring alone is expected to take {seconds:.0f} s, more than {budget}")


def score_artifact(
    artifact: Artifact, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation
) -> dict[str, Any]:
    """The score, from the file, in the mode that the config fixed; and the diagnostics that were asked for."""
    if artifact.tokenizer != val.identity:
        raise ConfigError(f"the artifact was made with another tokenizer than {config.tokenizer_file}")
    model.load_state_dict(artifact.tensors)
    started = time.perf_counter()
    final = evaluate(config.score_mode, model, config, ctx, val)
    eval_s = max(ctx.gather_numbers(time.perf_counter() - started)[0])
    result: dict[str, Any] = dict(val_bpb=final.score.bpb, val_loss=final.score.loss, score_mode=config.score_mode)
    result.update(updates=final.updates, skipped=final.skipped, eval_s=eval_s)
    if not config.score:
        result["eval_fits"] = yes_or_no(eval_s <= config.eval_budget)
    for mode in SCORERS:
        if mode in config.diagnostics:
            found = final if mode == config.score_mode else evaluate(mode, model, config, ctx, val)
            result[f"bpb_{mode}"] = found.score.bpb
    total, limit = artifact.size + ctx.code_bytes, config.byte_limit
    result.update(artifact_bytes=artifact.size, code_bytes=ctx.code_bytes, total_bytes=total, limit=limit)
    result.update(fits=yes_or_no(limit == 0 or total <= limit), artifact_sha256=artifact.sha256)
    return result


def yes_or_no(answer: bool) -> str:
    return "yes" if answer else "no"


def result_order() -> list[str]:
    """The fields of the result line, as far as a run has them."""
    diagnostics = [f"bpb_{word}" for word in list_choices("also") if word != "none"]
    return [
        *("val_bpb", "val_loss", "score_mode", "updates", "skipped", *diagnostics, "steps", "tokens", "train_s"),
        *("eval_s", "eval_fits", "artifact_bytes", "code_bytes", "total_bytes", "limit", "fits", "seed", "recipe"),
        "artifact_sha256",
    ]


def log_result(fields_found: dict[str, Any], ctx: RunContext) -> dict[str, Any]:
    """The last line of a run."""
    result = {name: fields_found[name] for name in result_order() if name in fields_found}
    for name, value in result.items():
        if name.startswith(("val_", "bpb_")):
            result[name] = f"{value:.8f}"
    ctx.log("result", **result)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# 9. Main
# ----------------------------------------------------------------------------------------------------------------------


def build_context(config: Config, environ: dict[str, str], code_bytes: int = 0) -> RunContext:
    """Rank, device, dtype and compile mode, once. Joins the process group that torchrun announces."""
    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    has_gpu = torch.cuda.is_available()
    on_gpu = has_gpu if config.device == "auto" else config.device == "cuda"
    if on_gpu and not has_gpu:
        raise ConfigError("device=cuda: this machine has no usable CUDA device; use --device cpu")
    device = torch.device(f"cuda:{environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    host_group = join_process_group(on_gpu) if world > 1 else None
    log = Log(quiet=rank != 0)
    mode = choose_compile_mode(config, device, log)
    return RunContext(
        rank=rank,
        world=world,
        device=device,
        dtype=choose_dtype(config, on_gpu),
        compile=mode,
        log=log,
        code_bytes=code_bytes,
        host_group=host_group,
    )


def join_process_group(on_gpu: bool) -> dist.ProcessGroup | None:
    """Returns the group over which processors talk, where it is another one than that of the devices."""
    if not dist.is_initialized():
        _ = torch._dynamo  # loads it: beside a process group it would hold the group, and its threads would never end
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return dist.new_group(backend="gloo") if on_gpu else None


def choose_dtype(config: Config, on_gpu: bool) -> torch.dtype:
    """bfloat16 pays where the processor multiplies it in hardware; elsewhere it is emulated and slower than float32."""
    has_bf16 = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    by_itself = "bfloat16" if has_bf16 else "float32"
    return torch.bfloat16 if (by_itself if config.dtype == "auto" else config.dtype) == "bfloat16" else torch.float32


def choose_compile_mode(config: Config, device: torch.device, log: Log) -> str:
    """The whole graph fuses best, but takes a GPU's compiler minutes per depth; block by block it is compiled once."""
    mode = config.compile
    if mode == "auto":
        mode = "full" if device.type == "cuda" and not parse_plan(config.plan).is_variable else "block"
    if mode == "none" or config.dry_run:
        return mode
    if config.score and device.type == "cpu":
        return "none"  # as build_eval_model would
    fault = find_compiler_fault(device)
    if not fault:
        return mode
    if device.type == "cuda":  # too dear to go on at half the speed
        raise ConfigError(f"compile={config.compile}: {fault}; repair that, or --compile none")
    log.line(f"# running uncompiled, about half as fast: {fault}")
    return "none"


def log_head(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """What ran, where, on what: without it a log proves nothing."""
    code_sha256 = hash_counted_code(config)
    ctx.log("run", recipe=config.recipe, seed=config.seed, run_id=config.run_id, code_sha256=code_sha256)
    modules = (torch, np, zstandard, sentencepiece)
    ctx.log("versions", python=platform.python_version(), **{m.__name__: m.__version__ for m in modules})
    name = torch.cuda.get_device_name() if ctx.device.type == "cuda" else platform.processor() or platform.machine()
    threads, dtype = torch.get_num_threads(), str(ctx.dtype).removeprefix("torch.")
    ctx.log("hardware", device=ctx.device.type, name=name, world=ctx.world, threads=threads, dtype=dtype)
    for name, value in asdict(config).items():
        ctx.log("config", name=name, value=repr(value) if isinstance(value, float) else value, source=source[name])


def hash_counted_code(config: Config) -> str:
    """Of this script and what it imports for this config from the repository."""
    return hash_files(find_counted(Path(__file__).parent, used_modules(config)).values())


def log_plan(config: Config, k_scale: float, model: LoopedGPT, ctx: RunContext) -> None:
    """Sizes and forecasts, before anything is trained."""
    counts = dict.fromkeys(("core", "edge", "embed", "table", "vector"), 0)
    specs = collect_specs(model)
    for name, p in model.named_parameters():
        counts[specs[name].role] += p.numel()
    mean_r = expect_repetitions(config)
    sampled = dict(mean_r=mean_r) if model.plan.is_variable else {}
    passes = model.plan.count_passes(config.depth)
    ctx.log("model", params=sum(counts.values()), **counts, passes=passes, blocks=len(model.blocks), **sampled)
    log_size_forecast(config, k_scale, model, ctx)
    flops = compute_flops(config, mean_r, expect_repetitions(config, config.bptt or math.inf))
    # rough on purpose: 40% of an H100's bf16 peak, or what a recent processor's core gives this model
    core = 0.2e12 if ctx.dtype == torch.bfloat16 else 0.06e12
    rate = 400e12 if ctx.device.type == "cuda" else core * torch.get_num_threads()
    step_ms = 1000 * flops * config.batch_tokens / (rate * ctx.world)
    memory_mb = forecast_memory(config, model, ctx) / 1e6
    ctx.log("forecast", flops_per_token=flops, step_ms=step_ms, memory_mb=memory_mb, device=ctx.device.type)


def log_size_forecast(config: Config, k_scale: float, model: LoopedGPT, ctx: RunContext) -> None:
    artifact_bytes = forecast_bytes(model, build_formats(config, model, k_scale))
    total_bytes, limit = artifact_bytes + config.code_reserve, config.byte_limit
    if limit and total_bytes > 1.05 * limit:
        raise DoesNotFit(f"byte_limit={limit:,}: {total_bytes:,} bytes are expected; raise --k_scale or leave it at 0")
    core_bits = RowGrid(config.core_bits, config.core_k * k_scale).gaussian_bits()
    ctx.log("forecast", k_scale=k_scale, core_bits=core_bits, artifact_bytes=artifact_bytes, total_bytes=total_bytes)
    if config.k_scale and limit and total_bytes > 0.97 * limit:
        ctx.log.line(f"# warning: {total_bytes / limit:.1%} of byte_limit expected, the export may coarsen the grid")


def forecast_memory(config: Config, model: LoopedGPT, ctx: RunContext) -> float:
    """Bytes of a training step on one rank, roughly: what waits for its gradient, logits, weights and their state."""
    sequences = config.micro_batch or max(1, config.batch_tokens // config.seq_len // ctx.world)
    kept_passes = model.plan.count_passes(min(config.table_repetitions, config.bptt or config.table_repetitions))
    inside_pass = 10 * config.model_dim + 3 * config.mlp_dim
    values = kept_passes * inside_pass
    if config.checkpoint_passes:
        values = kept_passes * config.model_dim + inside_pass
    params = sum(p.numel() for p in model.parameters())
    return sequences * config.seq_len * (values * ctx.dtype.itemsize + 8 * config.vocab_size) + params * 24


def dry_run(config: Config, ctx: RunContext) -> None:
    check_split(config, ctx)
    model = build_meta_model(config)
    by_part: Counter[str] = Counter()
    for name, p in model.named_parameters():
        words = name.split(".")
        by_part[".".join(words[:2]) if words[0] == "blocks" else words[0]] += p.numel()
    ctx.log.line(f"params:{by_part.total()}")
    for part, count in by_part.items():
        ctx.log("part", name=part, params=count)
    log_plan(config, plan_k_scale(config, model), model, ctx)


def check_split(config: Config, ctx: RunContext) -> None:
    """Whether the sequences of a step split over ranks and micro batches."""
    size = config.micro_batch
    shapes = list_shapes(config)
    longest = max(seq_len for _, seq_len in shapes)
    for tokens, seq_len in shapes:
        sequences = tokens // seq_len
        if tokens % seq_len:
            raise ConfigError(f"batch_tokens={tokens}: must be divisible by seq_len={seq_len}")
        if longest % seq_len:
            raise ConfigError(f"seq_len={seq_len}: must divide {longest}, the longest context of the run")
        if sequences % ctx.world:
            raise ConfigError(f"batch_tokens={tokens}: {sequences} sequences do not split over {ctx.world} ranks")
        if size and sequences // ctx.world % size:
            raise ConfigError(f"micro_batch={size} does not divide the {sequences // ctx.world} sequences of a rank")


def score_only(config: Config, ctx: RunContext) -> None:
    """--score: the model comes from the file, how to score too unless said otherwise."""
    artifact = load_artifact(config.score)
    model = build_eval_model(config, ctx)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != {name: weight.shape for name, weight in artifact.tensors.items()}:
        raise ConfigError(f"score={config.score}: no model of the options given has its shapes; leave the model's out")
    model.load_state_dict(artifact.tensors)
    val = load_validation(config, ctx)
    log_scoring_forecast(config.score_mode, model, config, ctx, val)
    log_result(score_artifact(artifact, model, config, ctx, val), ctx)


def prepare_folder(config: Config, ctx: RunContext, folder: Path) -> None:
    if ctx.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for cut_off in folder.glob(".*.part"):
        cut_off.unlink()  # what a killed process was writing
    ctx.log.open(folder / "log.txt")
    write_atomic(folder / "config.json", json.dumps({**asdict(config), "resume": ""}, indent=1).encode())
    write_atomic(folder / "tokenizer.model", config.tokenizer_file.read_bytes())


def name_run(config: Config, ctx: RunContext) -> Config:
    """Ranks that start in different seconds would look for the artifact in different folders."""
    started = ctx.gather_numbers(time.time())[0][0]
    return replace(config, run_id=config.run_id or time.strftime("%Y%m%d-%H%M%S", time.localtime(started)))


def check_free(config: Config, ctx: RunContext, folder: Path) -> None:
    """All ranks stop, or those that do not would wait for the others."""
    is_taken = not config.resume and (folder / "config.json").exists()
    if any(ctx.gather_numbers(is_taken)[0]):
        raise ConfigError(f"run_id={config.run_id}: {folder} holds a run already; choose another or --resume {folder}")


def run(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """The whole run: data, model, training, artifact, score from the artifact."""
    check_split(config, ctx)
    for mode in list_score_modes(config):
        find_scorer(mode)  # a packed script that lacks one says so before it trains
    config = name_run(config, ctx)
    folder = Path(config.resume or f"runs/{config.run_id}")
    check_free(config, ctx, folder)
    val = load_validation(config, ctx)
    text = TrainingText(config, list_shapes(config))
    model = build_model(config, ctx)
    k_scale = plan_k_scale(config, model)
    start_weights(model, config.seed)
    prepare_folder(config, ctx, folder)
    log_head(config, source, ctx)
    shards, windows = len(text.stream.paths), text.order.n_blocks
    sha256 = text.stream.fingerprint()
    ctx.log("data", split="train", shards=shards, tokens=text.stream.total, windows=windows, sha256=sha256)
    log_plan(config, k_scale, model, ctx)
    eval_model = build_eval_model(config, ctx)
    eval_model.load_state_dict(model.state_dict())
    log_scoring_forecast("plain", eval_model, config, ctx, val)

    trained = train(config, ctx, model, k_scale, text, folder)
    at = trained.position
    found: dict[str, Any] = dict(steps=at.step, tokens=at.tokens, train_s=at.used_s)
    found.update(seed=config.seed, recipe=config.recipe)
    for name, weights in (("trained", model.state_dict()), ("averaged", trained.averaged)):
        if name in config.diagnostics:
            eval_model.load_state_dict(weights)
            found[f"bpb_{name}"] = evaluate("plain", eval_model, config, ctx, val, name).score.bpb

    path = folder / "artifact.lg"
    export(config, ctx, model, trained, val, path)
    found |= score_artifact(load_artifact(path), eval_model, config, ctx, val)
    result = log_result(found, ctx)
    if ctx.rank == 0:
        report = dict(result=result, config=asdict(config), source=source)
        write_atomic(folder / "result.json", json.dumps(report, indent=1).encode())


def wants_help(argv: list[str]) -> bool:
    return "--help" in argv or argv[:1] == ["-h"]


def find_help_section(argv: list[str]) -> str:
    """The word after --help, if it is no option; empty for the first page."""
    after = argv[argv.index("--help") + 1 :] if "--help" in argv else argv[1:]
    return after[0] if after and not after[0].startswith("-") else ""


def count_code(config: Config, packed_bytes: int) -> int:
    """Bytes that count as code: of the packed script; from source the reserve, which it has to fit."""
    if config.code_reserve == 0:
        return 0
    return packed_bytes or config.code_reserve


def main(argv: list[str], environ: dict[str, str], code_bytes: int = 0) -> int:
    """`code_bytes` is the size of the packed script, 0 where the source runs."""
    try:
        if wants_help(argv):
            print(help_text(find_help_section(argv)))
            return 0
        config, source = parse_config(argv, environ)
        ctx = build_context(config, environ, count_code(config, code_bytes))
        if config.dry_run:
            dry_run(config, ctx)
        elif config.score:
            score_only(config, ctx)
        else:
            run(config, source, ctx)
        if ctx.world > 1:
            dist.barrier()  # no rank takes the group from one that still uses it
            dist.destroy_process_group()
        return 0
    except BrokenPipeError:
        return 1  # whoever read the output has seen enough
    except (Stop, OSError) as error:
        if environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, TokenError):  # which one rank alone may read
            print_error(error)
        return getattr(error, "exit_code", 1)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; set --micro_batch to half of the sequences of a rank", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # nccl would wait for ranks that did not fail
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
