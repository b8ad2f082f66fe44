"""loopgolf: train a looped language model for a fixed time, put it in a file, prove how well that file predicts text.

A few physical blocks are applied many times in the order that a *loop plan* gives ("abcdabc"). Weights are trained on
the integer grid that they are stored in, compressed into an artifact that has to fit 16,000,000 bytes together with
this code, and the score (bits per byte) is computed from that file, reloaded.

    python train_gpt.py                                          the recipe for this machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py        the same on eight GPUs
    python train_gpt.py --score runs/ID/artifact.lg              score a finished file

Sections: 1 config, 2 run context, 3 data, 4 schedules, 5 quantization, 6 model, 7 optimizers, 8 artifact,
9 evaluation, 10 training, 11 main. What others rely on, such as the plan language, the file format and the rules of the
score, is in loopgolf/; heavy operations are in kernels/. Dimension letters: B batch, T tokens, D width, H heads,
G query heads per key-value head, K head width, V vocabulary, P passes, L tokens that a query can look at.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.shards import TokenStream, find_shards
from kernels.attention import Cache, attend, rotate
from kernels.head import head_loss_ref, softcap_logits
from kernels.newton_schulz import orthogonalize_ref
from loopgolf.artifact import Artifact, Shapes, pack_artifact, quantize_weights, unpack_artifact
from loopgolf.errors import ArtifactError, ConfigError, DataError, DoesNotFit, Interrupted, NonFiniteLoss, Stop
from loopgolf.options import did_you_mean, find_wrong_fields, parse_command_line, parse_environment
from loopgolf.plan import Pass, parse_pass_set, parse_plan
from loopgolf.quantize import Grid, Latents, compute_entropy, quantize_tensor
from loopgolf.runtime import Clock, Log, RunContext, StopSignals, find_compiler_fault, keep_freed_memory, write_atomic
from loopgolf.scoring import BpbMeter, ByteCounter, Score, Scoring, build_scorer, score_tokens

# ----------------------------------------------------------------------------------------------------------------------
# 1. Config
# ----------------------------------------------------------------------------------------------------------------------
# One frozen value holds every setting. A recipe is a named set of overrides; environment and command line come after.


@dataclass(frozen=True)
class Architecture:
    """What the model is."""

    plan: str = "abcdabc"  # order in which the physical blocks are applied
    depth: int = 4  # repetitions of the group marked *r in the plan; their mean when they are sampled
    max_r: int = 0  # most repetitions that are sampled and have rows in the per-pass tables; at least depth
    bptt: int = 0  # gradients flow through this many last repetitions of the *r group (0 = all)
    score_depth: int = 0  # repetitions while scoring (0 = depth)
    skips: str = "unet"  # none, or unet: the first half of the passes feeds the second in reverse
    model_dim: int = 1024  # width of the residual stream
    inject: str = "concat"  # how ^ mixes the kept stream into the present one: concat (a matrix on both) or add
    block_norm: str = "pre"  # norms of a block: pre (before attention and MLP), sandwich (after each sum too)
    norm_weights: bool = False  # norms of the stream have a learned weight per channel
    embed_norm: bool = True  # norm the embeddings
    pass_scales: bool = True  # every pass mixes the embedding in and scales what its block adds, per channel
    adapter_rank: int = 0  # rank of an adapter that every pass has before its attention (0 = none)
    windows: str = ""  # reach of each block's attention in turn: L the context, S half of it (empty = L)
    tied: bool = True  # the head is the token embedding
    mlp: str = "relu2"  # relu2, or swiglu: a second projection gates the hidden layer
    moe_experts: int = 0  # SwiGLU experts that tokens are sent to, beside the MLP of every block (0 = no mixture)
    moe_hidden: int = 1024  # hidden width of an expert
    moe_top: int = 2  # experts that each token is sent to
    num_heads: int = 32  # query heads
    num_kv_heads: int = 8  # key-value heads, shared by equal groups of query heads
    head_dim: int = 0  # width of a head (0 = model_dim / num_heads)
    mlp_mult: float = 2.0  # hidden width of the MLP over model_dim
    rope_dims: int = 16  # dimensions of each head that rotate with position
    rope_base: float = 10000.0  # slowest wavelength of the rotation, in tokens over 2 pi
    qk_norm: bool = True  # norm queries and keys
    q_gain: float = 1.5  # initial gain on the queries of a head (0 = no gain)
    xsa_passes: str = "all"  # passes with exclusive self attention: none, all, last4 or 3,5,6
    ve_passes: str = "last2"  # passes whose values get a token's value embedding (same forms)
    ve_dim: int = 128  # width of the value embedding table
    smear: bool = True  # mix each embedding with the previous token's, per channel
    bigram_buckets: int = 10240  # rows of the hashed bigram table (0 = none)
    bigram_dim: int = 128  # width of the bigram table
    softcap: float = 30.0  # logits are squashed into plus or minus this (0 = they are not)
    doc_attention: bool = False  # attention stops at document boundaries


@dataclass(frozen=True)
class Stored(Scoring, Architecture):  # fields go from the last base to the first
    """What travels in the artifact: the model, and how the run said that it would be scored."""


@dataclass(frozen=True)
class Config(Stored):
    """Every setting of a run. The defaults are those of recipe 4b7l; the comments are what --help prints."""

    recipe: str = "4b7l"  # named set of settings that the other options change
    loop_start: float = 0.0  # fraction of the budget before which every group of the plan runs once
    sample_depth: bool = False  # draw r anew for every step: 1 + Poisson(LogNormal of mean depth), at most max_r
    optimizer: str = "muon"  # of the matrices, with Adam for the rest; or lion for all

    seed: int = 1337  # seed of the initial weights
    iterations: int = 0  # train this many steps instead of for a time (0 = use the time budget)
    max_wallclock_seconds: float = 600.0  # training budget in seconds
    batch_tokens: int = 524288  # tokens in one optimizer step, over all ranks
    micro_batch: int = 0  # sequences in one forward pass of a rank; more are accumulated (0 = all)
    checkpoint_passes: bool = False  # keep only the input of every pass and compute it again for the gradient
    matrix_lr: float = 0.02  # Muon learning rate of the matrices
    table_lr: float = 0.02  # Adam learning rate of the embedding tables
    vector_lr: float = 0.01  # Adam learning rate of gains, scales, mixes, gates and skips
    momentum: float = 0.99  # Muon momentum
    momentum_start: float = 0.85  # Muon momentum at the first step
    momentum_warmup: float = 0.084  # fraction of the budget over which the momentum rises
    weight_decay: float = 0.04  # decay of matrices and tables, times the learning rate
    beta1: float = 0.9  # Adam: memory of the gradient
    beta2: float = 0.95  # Adam: memory of the squared gradient
    grad_clip: float = 0.3  # largest norm of the whole gradient (0 = no clipping)
    warmdown: float = 0.59  # last fraction of the budget over which the learning rate falls
    final_lr: float = 0.0  # learning rate at the end, as a fraction of the peak
    average: str = "swa"  # what is exported: none (last weights), swa (equal mean), ema (decaying mean)
    average_start: float = 0.88  # fraction of the budget after which weights are averaged
    average_every: int = 50  # steps between two weights in the average
    ema_decay: float = 0.9  # what the decaying mean keeps of itself each time

    core_bits: int = 6  # bits of a code in the matrices of blocks that the plan repeats
    edge_bits: int = 6  # bits of a code in all other matrices
    embed_bits: int = 8  # bits of a code in the token embedding
    table_bits: int = 8  # bits of a code in the bigram and value tables
    core_k: float = 12.85  # step of a row's grid: k_scale * k * std(row) / largest code
    edge_k: float = 12.85  # the same for all other matrices
    embed_k: float = 20.0  # the same for the token embedding
    table_k: float = 20.0  # the same for the bigram and value tables
    k_scale: float = 0.0  # coarseness of all grids (0 = the finest that is useful, or as coarse as byte_limit needs)
    calibration_tokens: int = 131072  # training tokens that steer the rounding when byte_limit binds (0 = plain)
    export_reserve: float = 0.01  # fraction of a time budget that is kept for them; then time decides, not tokens
    byte_limit: int = 16_000_000  # largest code + artifact in bytes (0 = no limit)
    code_reserve: int = 24_000  # bytes that a run sets aside for the code

    also: str = "trained,averaged,plain"  # diagnostics besides: trained, averaged, none or a score_mode
    score_tokens: int = 0  # score only this prefix of the validation tokens (0 = all)
    eval_budget: float = 600.0  # seconds for val_bpb: adaptation stops in time for the rest to be scored without it

    data_path: str = "data/fineweb_sp1024"  # dataset folder: *_train_*.bin, *_val_*.bin, tokenizer.model
    tokenizer_path: str = ""  # SentencePiece model (empty = tokenizer.model in data_path)
    run_id: str = ""  # name of the folder under runs/ (empty = date and time)
    resume: str = ""  # continue the run in this folder from its checkpoint
    score: str = ""  # score this artifact instead of training
    dry_run: bool = False  # print sizes and forecasts, then stop
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16: what the forward and backward pass compute in
    compile: str = "auto"  # auto, none, block (each block once) or full (the whole graph)
    checkpoint_every_s: float = 300.0  # seconds between checkpoints (0 = only when interrupted)
    log_every: int = 10  # steps between two train lines

    def __post_init__(self) -> None:
        plan, bounds = parse_plan(self.plan), {name: pair for pair, names in LIMITS.items() for name in names.split()}
        for name, value in asdict(self).items():
            low, high = bounds.get(name, (0, MOST))
            if not isinstance(value, str) and not low <= value <= high:
                raise ConfigError(f"{name}={value}: must lie between {low} and {high}")
        for name, words in CHOICES.items():
            value = getattr(self, name)
            for word in value.split(",") if name == "also" else [value]:
                if word not in words:
                    raise ConfigError(f"{name}={word}: choose from {', '.join(words)}{did_you_mean(word, words)}")
        n_passes, most = (plan.count_passes(depth) for depth in (self.rows, max(self.rows, self.score_depth)))
        uneven = not self.head_dim and self.model_dim % self.num_heads
        for name, is_wrong, why in (
            ("model_dim", uneven, f"must be divisible by num_heads={self.num_heads}"),
            ("num_heads", self.num_heads % self.num_kv_heads, f"must be divisible by num_kv_heads={self.num_kv_heads}"),
            ("model_dim", self.moe_experts and self.model_dim % 8, "must be divisible by 8"),
            ("moe_hidden", self.moe_hidden % 8, "must be divisible by 8"),
            ("moe_top", self.moe_top > self.moe_experts > 0, f"must be at most moe_experts={self.moe_experts}"),
            ("batch_tokens", self.batch_tokens % self.seq_len, f"must be divisible by seq_len={self.seq_len}"),
            ("rope_dims", self.rope_dims % 2, "must be even"),
            ("rope_dims", self.rope_dims > self.head_width, f"must be at most {self.head_width}, the width of a head"),
            ("stride", self.stride > self.seq_len, f"must be at most seq_len={self.seq_len}"),
            ("band", self.band > self.seq_len, f"must be at most seq_len={self.seq_len}"),
            ("bos_id", self.bos_id >= self.vocab_size, f"must be below vocab_size={self.vocab_size}"),
            ("skips", self.skips == "unet" and plan.is_variable, "needs a plan without *r; use --skips none"),
            ("plan", most > 512, f"has {most} passes, at most 512 are built"),
            ("sample_depth", self.sample_depth and not plan.is_variable, "needs a plan with *r"),
            ("windows", set(self.windows) - set("LS"), "is made of the letters L and S"),
            ("ttt_freeze", set(self.ttt_freeze) - set(plan.names), f"the plan has only the blocks {plan.names}"),
        ):
            if is_wrong:
                raise ConfigError(f"{name}={getattr(self, name)}: {why}")
        for name in ("xsa_passes", "ve_passes"):
            parse_pass_set(name, getattr(self, name), n_passes)

    @property
    def head_width(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def rows(self) -> int:
        """Repetitions of the *r group that have rows of their own in the per-pass tables."""
        return max(self.depth, self.max_r)

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_path) / "tokenizer.model")

    def stored(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(Stored)}


# What recipes leave out: the smaller tables; exclusive attention, averages and decay; all but blocks in their order.
LEAN = dict(ve_passes="none", smear=False, bigram_buckets=0)
SIMPLE = LEAN | dict(xsa_passes="none", average="none", score_mode="plain", weight_decay=0.0)
BARE = SIMPLE | dict(skips="none", pass_scales=False, q_gain=0.0, mlp_mult=4.0, byte_limit=0, score_batch=4)
RECURSIVE = BARE | dict(
    plan="ab(^cdef)*rgh", sample_depth=True, max_r=16, bptt=4, vocab_size=65536, tied=False, model_dim=1280,
    num_heads=10, num_kv_heads=10, rope_dims=128, softcap=15.0, momentum=0.95, beta1=0.8, grad_clip=1.0, warmdown=0.2,
    table_lr=0.2,
)  # fmt: skip
OSRT = BARE | dict(
    plan="(ab~)*6", adapter_rank=16, norm_weights=True, embed_norm=False, qk_norm=False, mlp="swiglu", mlp_mult=2.7,
    vocab_size=50304, model_dim=1280, num_heads=20, num_kv_heads=20, rope_dims=64, softcap=0.0, optimizer="lion",
    matrix_lr=1e-4, table_lr=1e-4, vector_lr=1e-4, beta2=0.99, weight_decay=0.3, grad_clip=1.0, warmdown=1.0,
    final_lr=0.1, batch_tokens=131072,
)  # fmt: skip
RECIPES = {
    "4b7l": {},
    "pocket": dict(
        model_dim=256, num_heads=1, num_kv_heads=1, head_dim=128, rope_dims=64, mlp_mult=2.5, seq_len=512,
        bigram_buckets=2048, bigram_dim=64, ve_dim=64, batch_tokens=4096, momentum=0.95, max_wallclock_seconds=120.0,
        warmdown=0.6, final_lr=0.02, average="none", doc_attention=True, score_mode="lora", score_tokens=65536,
        score_batch=16, ttt_chunk=8192, ttt_batch=4, lora_chunk=128, eval_budget=120.0, data_path="data/local",
        checkpoint_every_s=30.0, calibration_tokens=32768,
    ),
    "frontier": LEAN | dict(
        plan="abc(def)*3ghijk", loop_start=0.35, vocab_size=8192, model_dim=512, num_heads=8, num_kv_heads=4,
        mlp_mult=4.0, batch_tokens=786432, data_path="data/fineweb_sp8192",
    ),
    "baseline9": SIMPLE | dict(
        plan="abcdefghi", model_dim=512, num_heads=8, num_kv_heads=4, seq_len=1024, rope_dims=64, matrix_lr=0.04,
        table_lr=0.05, vector_lr=0.04, momentum=0.95, momentum_warmup=0.036, grad_clip=0.0, warmdown=0.087, edge_bits=8,
    ),
    "recursive_d20": RECURSIVE,
    "looped_s20": RECURSIVE | dict(
        plan="ab(^cdef~~)*rgh", block_norm="sandwich", norm_weights=True, windows="LLSSSLLL", warmdown=0.5,
        weight_decay=0.072, grad_clip=0.0, table_lr=0.3, vector_lr=0.005,
    ),
    "osrt_v3": OSRT,
    "osrt_v4": OSRT | dict(
        plan="(abc~)*6", mlp_mult=8 / 3, moe_experts=11, vocab_size=65536, model_dim=1536, num_heads=24,
        num_kv_heads=24, matrix_lr=6e-4, table_lr=6e-4, vector_lr=6e-4, checkpoint_passes=True, code_reserve=25_000,
    ),
}  # fmt: skip

CHOICES = {
    "recipe": RECIPES,
    "skips": ("none", "unet"),
    "inject": ("concat", "add"),
    "block_norm": ("pre", "sandwich"),
    "mlp": ("relu2", "swiglu"),
    "optimizer": ("muon", "lion"),
    "average": ("none", "swa", "ema"),
    "score_mode": ("plain", "sliding", "banded", "sgd", "lora"),
    "also": ("trained", "averaged", "plain", "sliding", "banded", "sgd", "lora", "none"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "none", "block", "full"),
}
MOST = 2**40
LIMITS = {  # what is not listed lies between 0 and MOST; a config can come from a stranger's artifact
    (-MOST, MOST): "seed",
    (0, 0.5): "export_reserve",
    (0, 0.9999): "beta1 beta2",
    (0, 1): "loop_start momentum momentum_start momentum_warmup ttt_momentum warmdown final_lr average_start ema_decay",
    (0, 256): "max_r score_depth",
    (0, 1000): "ttt_epochs",
    (0, 65536): "adapter_rank moe_experts head_dim",
    (0, 2**24): "bigram_buckets",
    (0.01, 64): "mlp_mult",
    (0.1, MOST): "max_wallclock_seconds core_k edge_k embed_k table_k",
    (1, 256): "depth",
    (1, 65536): "num_heads num_kv_heads ve_dim bigram_dim moe_hidden moe_top score_batch ttt_batch lora_rank",
    (1, MOST): "rope_base batch_tokens average_every stride ttt_chunk lora_chunk log_every",
    (2, 8): "core_bits edge_bits embed_bits table_bits",
    (2, 65536): "vocab_size model_dim",
    (2, 2**20): "seq_len",
}


def parse_config(argv: list[str], environ: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """The config and where each value came from. Default < recipe (or the resumed run) < environment < command line."""
    defaults = {f.name: f.default for f in fields(Config)}
    from_env, on_line = parse_environment(environ, defaults), parse_command_line(argv, defaults)
    given = from_env | on_line
    if given.get("resume"):
        folder = Path(given["resume"])
        origin, base = "resume", load_started_config(folder, given)
        given["run_id"] = folder.name
    else:
        origin, recipe = "recipe", given.get("recipe", "4b7l" if torch.cuda.is_available() else "pocket")
        base = {"recipe": recipe} | RECIPES.get(recipe, {})
    layers = {"default": defaults, origin: base, "env": from_env, "cli": on_line}
    source = {name: layer for layer, values in layers.items() for name in values}
    return Config(**(defaults | base | given)), source


def load_started_config(folder: Path, given: dict[str, object]) -> dict:
    """A resumed run keeps the config that it was started with; only what does not change its result may differ."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        if find_wrong_fields(stored, Config):
            raise ValueError("other fields")
    except (OSError, ValueError):
        raise ConfigError(f"resume={folder}: config.json there is missing, damaged or of another version") from None
    for name, value in given.items():
        if name not in ("resume", "run_id", "checkpoint_every_s", "log_every") and stored[name] != value:
            raise ConfigError(f"{name}={value}: the run in {folder} was started with {stored[name]}; leave it out")
    return stored


def help_text() -> str:
    title = f"{__doc__ or ''}\nOptions: --name value, or NAME=value in the environment. Recipes: {', '.join(RECIPES)}."
    return title


# ----------------------------------------------------------------------------------------------------------------------
# 2. Run context
# ----------------------------------------------------------------------------------------------------------------------
# Finds rank, device, dtype and compile mode, once; loopgolf/context.py says what they mean.


def build_context(config: Config, environ: dict[str, str], code_bytes: int = 0) -> RunContext:
    """Joins the process group that torchrun announces in the environment; alone otherwise."""

    def choose(name: str, by_itself: str) -> str:
        return by_itself if getattr(config, name) == "auto" else getattr(config, name)

    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    has_gpu = torch.cuda.is_available()
    on_gpu = choose("device", "cuda" if has_gpu else "cpu") == "cuda"
    if on_gpu and not has_gpu:
        raise ConfigError("device=cuda: this machine has no usable CUDA device; use --device cpu")
    device = torch.device(f"cuda:{environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        _ = torch._dynamo  # loads it: beside a process group it would hold the group, and its threads would never end
        dist.init_process_group("nccl" if on_gpu else "gloo")
    # bfloat16 pays where the processor multiplies it in hardware; elsewhere it is emulated and slower than float32
    has_bf16 = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = choose("dtype", "bfloat16" if has_bf16 else "float32")
    # the whole graph fuses best, but takes a GPU's compiler minutes per depth; block by block it is compiled once
    mode = choose("compile", "full" if on_gpu and not parse_plan(config.plan).is_variable else "block")
    log = Log(quiet=rank != 0)
    if mode != "none" and not config.dry_run and (fault := find_compiler_fault(device)):
        if on_gpu:  # too dear to go on at half the speed
            raise ConfigError(f"compile={config.compile}: {fault}; mend that, or --compile none")
        log.line(f"# running uncompiled, about half as fast: {fault}")
        mode = "none"
    return RunContext(rank, world, device, getattr(torch, dtype), mode, log, code_bytes)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Data
# ----------------------------------------------------------------------------------------------------------------------
# Tokens come from memory-mapped shards; the batch of a step is a pure function of the step, so that a resumed run, a
# warm-up or another number of ranks never moves the data.


def load_batch(stream: TokenStream, step: int, config: Config, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """This rank's sequences of a step and their targets, (sequences, T) each."""
    share = config.batch_tokens // ctx.world
    span = stream.read(step * config.batch_tokens + ctx.rank * share, share + 1)
    return split_span(torch.from_numpy(span), config, ctx)


def split_span(tokens: Tensor, config: Config, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """Consecutive tokens, one more than whole sequences, to inputs and targets on the device."""
    if ctx.device.type == "cuda":
        tokens = tokens.pin_memory().to(ctx.device, non_blocking=True)
    return tokens[:-1].view(-1, config.seq_len), tokens[1:].view(-1, config.seq_len)


def load_tokenizer(config: Config) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and the sha256 of its file."""
    path = config.tokenizer_file
    if not path.is_file():
        find_shards(config.data_path, "val")  # the folder itself may be what is missing
        raise DataError(f"{path}: no tokenizer there; set --tokenizer_path")
    content = path.read_bytes()
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    if tokenizer.vocab_size() != config.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: {path} has {tokenizer.vocab_size()}; set --vocab_size")
    return tokenizer, hashlib.sha256(content).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Schedules
# ----------------------------------------------------------------------------------------------------------------------
# Pure functions of progress, the fraction of the budget that is used once the coming step is done. A slower machine
# follows the same curves.


@dataclass(frozen=True)
class Settings:
    """What changes over a run, for one step."""

    lr_scale: float
    momentum: float
    depth: int


def draw_depths(config: Config, key, count: int) -> np.ndarray:
    """r as training samples it: its mean is about depth + 1, and the same key draws the same on every rank."""
    generator = np.random.default_rng(key)
    rates = generator.lognormal(math.log(config.depth) - 0.125, 0.5, count)  # of mean depth
    return np.minimum(1 + generator.poisson(rates), config.rows)


def expect_depth(config: Config, most: int = 0) -> float:
    """E[min(r, most)], over a million draws; most = 0: E[r]."""
    draws = draw_depths(config, 0, 1 << 20) if config.sample_depth else np.array([config.depth])
    return float(np.minimum(draws, most or math.inf).mean())


def settings_at(config: Config, progress: float, step: int = 0) -> Settings:
    left = min(1.0, (1.0 - progress) / config.warmdown) if config.warmdown else 1.0
    risen = min(1.0, progress / config.momentum_warmup) if config.momentum_warmup else 1.0
    key = config.seed % 2**64, step
    depth = int(draw_depths(config, key, 1)[0]) if config.sample_depth else config.depth
    return Settings(
        lr_scale=config.final_lr + (1.0 - config.final_lr) * left,
        momentum=config.momentum_start + (config.momentum - config.momentum_start) * risen,
        depth=0 if progress < config.loop_start else depth,
    )


class Budget:
    """Decides before each step whether it may start and how far the run will be once it is done."""

    def __init__(self, config: Config, reserve: float = 0.0):
        self.iterations, self.seconds = config.iterations, (1 - reserve) * config.max_wallclock_seconds
        self.recent = deque(maxlen=8)  # seconds of the latest steps

    def progress(self, step: int, used_s: float) -> float | None:
        """None when the next step would pass the budget. The last step always reaches 1, so that schedules end."""
        if self.iterations:
            return (step + 1) / self.iterations if step < self.iterations else None
        slowest = max(self.recent, default=0.0)
        if used_s + slowest > self.seconds:
            return None
        ends_at = used_s + (sum(self.recent) / len(self.recent) if self.recent else 0.0)
        return 1.0 if used_s + 2 * slowest > self.seconds else min(1.0, ends_at / self.seconds)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Quantization
# ----------------------------------------------------------------------------------------------------------------------
# kernels/quantize.py is the quantizer of training and of export. The step of a row's grid is k standard deviations over
# the largest code, without a floor: then bits per weight depend on k alone, and k is solved from the byte limit here.

FINEST, COARSEST = 0.3, 5.0  # k_scale: below, codes clip before they get finer; above, less than 1.5 bits are left
CODER_SHARE = 0.997  # file bytes over the order-0 entropy of codes: classes of columns bring it below 1


def forecast_bytes(model: LoopedGPT, grids: dict[str, Grid | None], weights: dict[str, Tensor] | None = None) -> int:
    """Size of the artifact without writing it: from the entropy of the weights' codes, or of Gaussian ones."""
    total = 6000.0  # header
    for name, p in model.named_parameters():
        if not (grid := grids[name]):
            total += 1.7 * p.numel()  # fp16, compressed a little
            continue
        bits = grid.gaussian_bits()
        if weights:
            codes, _ = quantize_tensor(weights[name][:: 1 + len(p) // 256], grid)  # some hundred rows are enough
            bits = compute_entropy(codes)
        total += CODER_SHARE * bits * p.numel() / 8 + 2 * len(p)
    return int(total)


def build_grids(config: Config, model: LoopedGPT, k_scale: float) -> dict[str, Grid | None]:
    """The grid of every parameter; None: stored in fp16."""
    roles, given = ("core", "edge", "embed", "table"), asdict(config)
    by_role = {role: Grid(given[f"{role}_bits"], k_scale * given[f"{role}_k"]) for role in roles}
    return {name: by_role.get(model.role(name)) for name, _ in model.named_parameters()}


def solve_k_scale(size_at: Callable[[float], int], room: int, config: Config) -> float:
    """The finest k_scale whose file leaves nothing over `room` bytes."""
    if size_at(FINEST) <= room:
        return FINEST
    if (least := size_at(COARSEST)) > room:
        why = f"at least {least + config.code_reserve:,} bytes are needed, {config.code_reserve:,} of them for code"
        raise DoesNotFit(f"byte_limit={config.byte_limit:,}: {why}; take a smaller --model_dim or a shorter --plan")
    low, high = FINEST, COARSEST
    while high - low > 1e-4 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if size_at(middle) > room else (low, middle)
    return high


def is_limit_binding(config: Config, k_scale: float) -> bool:
    """Whether the byte limit chose the grids."""
    return not config.k_scale and k_scale > FINEST


def plan_k_scale(config: Config, model: LoopedGPT) -> float:
    """The coarseness to train at: given, or solved from the byte limit with Gaussian weights."""
    if config.k_scale or not config.byte_limit:
        return config.k_scale or FINEST
    room = config.byte_limit - config.code_reserve
    return solve_k_scale(lambda scale: forecast_bytes(model, build_grids(config, model, scale)), room, config)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Model
# ----------------------------------------------------------------------------------------------------------------------
# Blocks own the big matrices; the plan says in which order they are applied; what differs between passes is owned per
# pass. One forward serves training, scoring, test-time training and generation.


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps=1e-6)


class Linear(nn.Module):
    """A matrix without bias. `parts` counts the rows of each projection that it fuses."""

    def __init__(self, fan_in: int, parts: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts), fan_in, dtype=dtype))

    def forward(self, x: Tensor, lora: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """lora: for each row of the batch an adapter of its own, (B, fan_in, R) and (B, R, fan_out)."""
        y = F.linear(x, self.weight)
        return y if lora is None else y + x @ lora[0].to(x.dtype) @ lora[1].to(x.dtype)


def vector(*shape: int) -> nn.Parameter | None:
    """float32 whatever the matrices are; None where there is nothing of it."""
    return nn.Parameter(torch.empty(shape)) if all(shape) else None


Watch = Callable[[Pass, Tensor], Tensor]  # sees a pass and the stream after it, returns the stream that goes on


class Reach(NamedTuple):
    """How far a forward looks: rotations for all positions in sight, the attention window, documents if they matter."""

    cos: Tensor  # (L, 1, half)
    sin: Tensor
    window: int
    docs: Tensor | None  # (B, L) numbers of documents


class Block(nn.Module):
    """Attention and MLP of one physical block; everything else that a pass needs comes in as an argument."""

    def __init__(self, config: Config, dtype: torch.dtype, span: int, loops: int):
        super().__init__()
        D, K = config.model_dim, config.head_width
        self.config, self.head_dim, self.span = config, K, span  # span: how far it looks at most
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.qkv = Linear(D, (self.heads * K, self.kv_heads * K, self.kv_heads * K), dtype)
        self.out = Linear(self.heads * K, (D,), dtype)
        self.up = Linear(D, (config.mlp_dim,) * (2 if config.mlp == "swiglu" else 1), dtype)
        self.down = Linear(config.mlp_dim, (D,), dtype)
        self.q_gain = vector(self.heads * bool(config.q_gain))
        has_moe = bool(config.moe_experts)
        self.norms = vector(((4 if config.block_norm == "sandwich" else 2) + has_moe) * config.norm_weights, D)
        self.gates = vector(2 * has_moe)  # of the MLP and of the mixture beside it
        if has_moe:
            try:
                from loopgolf.moe import MoE  # packed only where it is asked for
            except ImportError:
                raise ConfigError(f"moe_experts={config.moe_experts}: pack this script --with loopgolf.moe") from None
            self.moe = MoE(D, config.moe_hidden, config.moe_experts, config.moe_top, loops, Linear, dtype)

    def forward(self, x, x0, mix, scale, adapter, loop, value, is_xsa: bool, reach: Reach, past, keep: bool, lora):
        """x, x0 (B, T, D); mix, scale (2, D), adapter (2, D, R) and loop (D,), or None; value: added to the values, or
        None; past: keys and values of earlier positions, or None; lora: adapters of the linear layers. Returns x; to
        keep, all keys and values; the losses of the mixture, if there is one."""
        if mix is not None:
            mix = mix.to(x.dtype)
            x = mix[0] * x + mix[1] * x0
        if adapter is not None:
            down, up = adapter.to(x.dtype)
            x = x + x @ down @ up.T
        y, kept = self.attention(self.norm(x, 0), value, is_xsa, reach, past, keep, lora.get("qkv"))
        x = self.add(x, self.out(y, lora.get("out")), scale, 0)
        y, losses = self.mlp(x, lora), []
        if loop is not None:
            mixed, *losses = self.moe(self.norm(x, -1), loop)
            gates = self.gates.to(x.dtype)
            y = gates[0] * y + gates[1] * mixed
        return self.add(x, y, scale, 1), kept, losses

    def norm(self, x: Tensor, index: int) -> Tensor:
        return rms_norm(x, None if self.norms is None else self.norms[index])

    def add(self, x: Tensor, y: Tensor, scale: Tensor | None, part: int) -> Tensor:
        """The stream with what attention (part 0) or the MLP (part 1) made of it."""
        x = x + (y if scale is None else scale[part].to(x.dtype) * y)
        return self.norm(x, 2 + part) if self.config.block_norm == "sandwich" else x

    def mlp(self, x: Tensor, lora: dict) -> Tensor:
        """What the MLP makes of the stream; a branch beside it, on a norm of its own, would be added here."""
        y = self.up(self.norm(x, 1), lora.get("up"))
        if self.config.mlp == "swiglu":
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.relu(y).square()
        return self.down(y, lora.get("down"))

    def attention(self, x, value, is_xsa, reach, past, keep, lora):
        B, T, _ = x.shape
        q, k, v = self.qkv(x, lora).split(self.qkv.parts, -1)
        if value is not None:
            v = v + value
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        own = v
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if past is not None:  # keys are kept unrotated: only distances matter, so a window rotates from 0 each time
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        kept = (k, v) if keep else None
        q, k = rotate(q, reach.cos[-T:], reach.sin[-T:]), rotate(k, reach.cos, reach.sin)
        if self.q_gain is not None:
            q = q * self.q_gain.to(q.dtype)[:, None]
        y = attend(q, k, v, min(reach.window, self.span), reach.docs)
        if is_xsa:  # exclusive self attention: nothing along a position's own value
            y = y.view(B, T, self.kv_heads, -1, self.head_dim)
            unit = F.normalize(own, dim=-1).unsqueeze(3)
            y = (y - (y * unit).sum(-1, keepdim=True) * unit).view(B, T, -1)
        return y, kept


class LoopedGPT(nn.Module):
    """Token, bigram and value embeddings, shared blocks applied as the plan says, a head."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, compile_mode: str = "none"):
        super().__init__()
        self.config, self.plan, self.is_compiled = config, parse_plan(config.plan), compile_mode != "none"
        D, kv_dim = config.model_dim, config.num_kv_heads * config.head_width
        self.uses = [p.block for p in self.plan.passes(config.rows, config.rows)]  # block of each row of the tables
        P = len(self.uses)
        self.xsa = parse_pass_set("xsa_passes", config.xsa_passes, P)
        self.value_rows = {p: i for i, p in enumerate(sorted(parse_pass_set("ve_passes", config.ve_passes, P)))}
        self.embed = nn.Embedding(config.vocab_size, D, dtype=dtype)
        if not config.tied:
            self.unembed = nn.Embedding(config.vocab_size, D, dtype=dtype)
        spans = [(config.seq_len + 1) // 2 if kind == "S" else MOST for kind in config.windows or "L"]
        self.blocks = nn.ModuleDict()
        for i, name in enumerate(self.plan.names):
            self.blocks[name] = Block(config, dtype, spans[i % len(spans)], self.uses.count(i))
        self.mixes, self.scales = vector(P * config.pass_scales, 2, D), vector(P * config.pass_scales, 2, D)
        self.adapters = vector(P, 2, D, config.adapter_rank)
        self.skips = vector(P // 2 * (config.skips == "unet"), D)
        self.smear_gate = vector(D * config.smear)
        if config.bigram_buckets:
            self.bigram = nn.Embedding(config.bigram_buckets, config.bigram_dim, dtype=dtype)
            self.bigram_out = Linear(config.bigram_dim, (D,), dtype)
        if self.value_rows:
            self.value = nn.Embedding(config.vocab_size, config.ve_dim, dtype=dtype)
            self.value_out = Linear(config.ve_dim, (kv_dim,), dtype)
        self.value_scales = vector(len(self.value_rows))
        mixed = self.plan.injected if config.inject == "concat" else ()
        self.inject = nn.ModuleDict({str(g): Linear(2 * D, (D,), dtype) for g in mixed})
        normed = ["embed"] * config.embed_norm + ["loop"] * ("~" in config.plan) + ["final"]
        self.norms = nn.ParameterDict({name: vector(D) for name in normed if config.norm_weights})

        def compiled(function, *modes: str):
            return torch.compile(function, dynamic=False) if compile_mode in modes else function

        self.run_states = compiled(LoopedGPT.states, "full")
        # the embeddings stay out of "block": compiled, their gradient is summed by two threads in no fixed order
        self.run_block, self.run_loss = compiled(Block.forward, "block"), compiled(head_loss_ref, "block", "full")

    def role(self, name: str) -> str:
        """core, edge (matrices), embed, table or vector: which grid a parameter gets."""
        owner = self.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            return "embed" if "embed." in name else "table"
        if not isinstance(owner, Linear):
            return "vector"
        part, letter, *_ = name.split(".")
        return "core" if part == "blocks" and self.uses.count(self.plan.names.index(letter)) > 1 else "edge"

    def kind(self, name: str) -> str:
        """matrix, table or vector: which optimizer a parameter gets."""
        return {"core": "matrix", "edge": "matrix", "embed": "table"}.get(self.role(name), self.role(name))

    def init_weights(self, seed: int) -> None:
        """Orthogonal matrices, except those that write to the stream: they start at zero, so every block is a no-op.
        Drawn on the CPU, so that every device and rank starts from the same weights."""
        generator = torch.Generator().manual_seed(seed)
        ones = {"mixes", "scales", "skips", "value_scales"}
        tables = {"embed.weight": 0.005 if self.config.tied else 1.0, "bigram.weight": 0.01, "value.weight": 0.01}
        with torch.no_grad():
            for name, p in self.named_parameters():
                fresh = torch.zeros(p.shape)
                if name in tables:
                    fresh.normal_(std=tables[name], generator=generator)
                elif name in ones or "norms" in name:
                    fresh.fill_(1.0)
                elif name.endswith("gates"):
                    fresh.fill_(0.5)
                elif name.endswith(("router", "loops")):
                    fresh.normal_(std=0.02, generator=generator)
                elif name.endswith("q_gain"):
                    fresh.fill_(self.config.q_gain)
                elif name.startswith("inject"):
                    fresh[:, : p.shape[0]] = torch.eye(p.shape[0])
                elif name.endswith(("qkv.weight", "up.weight", "value_out.weight")):
                    for part in fresh.split(self.get_submodule(name.removesuffix(".weight")).parts):
                        nn.init.orthogonal_(part, generator=generator)
                if name == "mixes":
                    fresh[:, 1] = 0.0
                if name == "adapters":
                    fresh[:, 0].normal_(std=0.01, generator=generator)
                if name == "value_out.weight":
                    fresh /= math.sqrt(2 * len(self.uses))
                p.copy_(fresh)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, 2 + T) tokens to (B, T, D): two are only looked back on. Nothing passes a BOS from left to right."""
        config = self.config
        is_start = tokens[:, 1:] == config.bos_id
        previous = torch.where(is_start, config.bos_id, tokens[:, :-1])
        x = self.embed(tokens[:, 1:])
        if config.bigram_buckets:
            x = x + self.bigram_out(self.bigram((92821 * previous + tokens[:, 1:]) % config.bigram_buckets))
        if config.embed_norm:
            x = rms_norm(x, self.norms.get("embed"))
        if not config.smear:
            return x[:, 1:]
        gate = torch.sigmoid(self.smear_gate).to(x.dtype)
        return (1 - gate) * x[:, 1:] + gate * torch.where(is_start[:, 1:, None], 0, x[:, :-1])

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (length, 1, half); the frequencies cover the whole range whatever part of a head rotates."""
        half = self.config.rope_dims // 2
        speed = self.config.rope_base ** -(torch.arange(half, device=device, dtype=torch.float32) / max(half, 1))
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed)[:, None]
        return angle.cos().to(self.embed.weight.dtype), angle.sin().to(self.embed.weight.dtype)

    def forward(self, tokens: Tensor, depth: int | None = None, cache: Cache | None = None, lora=None, watch=None):
        return self.run(tokens, depth, cache, lora, watch)[0]

    def run(self, tokens: Tensor, depth: int | None, cache: Cache | None = None, lora=None, watch=None):
        depth = self.config.score_depth or self.config.depth if depth is None else depth
        run = LoopedGPT.states if watch else self.run_states
        return run(self, tokens, depth, cache, lora or {}, watch)

    def states(
        self, tokens: Tensor, depth: int, cache: Cache | None, lora: dict[str, dict], watch: Watch | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, T) tokens to normalised states (B, T, D), and the losses of every pass with a mixture. `depth` is the r
        of the plan (0: every group once). With a cache the tokens continue its stream. `lora` holds adapters by block
        and layer. `watch` sees the stream after every pass, before a norm of the plan, and returns the stream that goes
        on; then nothing is compiled."""
        config, T = self.config, tokens.shape[1]
        passes = self.plan.passes(depth, config.rows)
        slots = [p.slot for p in self.plan.passes(depth, cache.repetitions)] if cache else []
        past = cache.length if cache else 0
        start = tokens.new_full((len(tokens), 2), config.bos_id)
        seen = torch.cat((start if cache is None or cache.tokens is None else cache.tokens, tokens), 1)
        docs = (seen[:, -past - T :] == config.bos_id).cumsum(1, dtype=torch.int32) if config.doc_attention else None
        reach = Reach(*self.rotary(past + T, tokens.device), cache.window if cache else config.seq_len, docs)
        x0 = self.embed_tokens(seen[:, -T - 2 :])
        x = x0.clone()  # one tensor under two names would be a graph of its own to the compiler
        value = self.value_out(self.value(tokens)) if self.value_rows else None
        n_skips = len(passes) // 2 if config.skips == "unet" else 0
        run_block = Block.forward if watch else self.run_block
        if config.checkpoint_passes:
            run_block = functools.partial(checkpoint, run_block, use_reentrant=False)
        entered, pushed, routing = {}, [], []
        for index, p in enumerate(passes):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not 0 < config.bptt <= p.left):
                entered |= dict.fromkeys(p.enter, x)
                for group in p.inject:
                    e = entered[group]
                    x = self.inject[str(group)](torch.cat((e, x), -1)) if self.inject else x + e
                if n_skips <= index < 2 * n_skips:
                    x = x + self.skips[len(pushed) - 1].to(x.dtype) * pushed.pop()
                tables = (t if t is None else t[p.slot] for t in (self.mixes, self.scales, self.adapters))
                row = self.value_rows.get(p.slot)
                keeps = cache is not None and slots[index] not in slots[index + 1 :]  # the last pass that shares it
                block = self.blocks[name := self.plan.names[p.block]]
                loop = block.moe.loops[self.uses[: p.slot].count(p.block)] if config.moe_experts else None
                x, kept, losses = run_block(
                    block, x, x0, *tables, loop,
                    None if row is None else self.value_scales[row].to(x.dtype) * value, p.slot in self.xsa, reach,
                    cache.kept.get(slots[index]) if cache else None, keeps, lora.get(name, {}),
                )  # fmt: skip
                routing += losses
                if watch:
                    x = watch(p, x)
                if p.norm:
                    x = rms_norm(x, self.norms.get("loop"))
                if index < n_skips:
                    pushed.append(x)
                if keeps:
                    cache.keep(slots[index], kept)
        if cache:
            cache.tokens = seen[:, -cache.window - 1 :]
        return rms_norm(x, self.norms.get("final")), routing

    @property
    def head(self) -> Tensor:
        return (self.embed if self.config.tied else self.unembed).weight

    def logits(self, x: Tensor) -> Tensor:
        return softcap_logits(x, self.head, self.config.softcap)

    def loss(self, tokens: Tensor, targets: Tensor, depth: int | None = None) -> Tensor:
        x, routing = self.run(tokens, depth)
        loss = self.run_loss(x, self.head, targets, self.config.softcap)
        if routing and self.training:
            balance, z = sum(routing) / len(routing)
            loss = loss + 0.01 * balance + 0.001 * z
        return loss


def build_model(config: Config, ctx: RunContext) -> LoopedGPT:
    if ctx.compile != "none":
        torch._dynamo.config.recompile_limit = 64  # depths, shapes and grad modes of one run; each is compiled once
    with ctx.device:
        return LoopedGPT(config, ctx.dtype, ctx.compile)


def compute_flops(config: Config, depth: float, learned: float | None = None) -> int:
    """Operations of one trained token, forward and backward, at a mean depth: 6 per weight and pass, 12 K per head,
    key and query; a third of it in repetitions of the *r group that no gradient reaches, all but `learned` of them."""
    with torch.device("meta"):
        model = LoopedGPT(config)
    D, T = config.model_dim, config.seq_len
    weighed = depth if learned is None else learned + (depth - learned) / 3
    total = 6.0 * (sum(m.weight.numel() for m in model.children() if isinstance(m, Linear)) + model.head.numel())
    for p in model.plan.passes(1, config.rows):
        block = model.blocks[model.plan.names[p.block]]
        weights = sum(m.weight.numel() if isinstance(m, Linear) else m.active_weights() for m in block.children())
        weights += 2 * D * config.adapter_rank
        weights += 2 * D * D * len(p.inject) * bool(model.inject)
        reach = min(T, block.span)
        heads = config.num_heads * config.head_width
        total += (1 if p.left < 0 else weighed) * (6 * weights + 12 * heads * (reach - reach**2 / (2 * T)))
    return int(total)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Optimizers
# ----------------------------------------------------------------------------------------------------------------------
# The model computes with working weights: on the grid, in the compute dtype. What learns are their float32 latents
# (kernels/quantize.py). A shared weight is quantized once per step, when the latents are published, and gradients pass
# straight through.


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of one shape, either way up, form a batch, and ranks share the batch."""

    def __init__(self, groups: list[dict], parts: list[tuple[int, ...]], ctx: RunContext):
        super().__init__(groups, dict(lr=0.0))
        self.parts, self.ctx = parts, ctx

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = {}
        for weight, parts in zip(group["params"], self.parts):
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].mul_(momentum).add_(weight.grad)
            update = weight.grad.add(state["momentum"], alpha=momentum)
            weight.mul_(1 - lr * group["weight_decay"])
            for target, piece in zip(weight.split(parts), update.split(parts)):
                gain = max(1, len(piece) / piece.shape[1]) ** 0.5
                if gain > 1:  # a tall matrix is the same problem as a wide one: larger batches, fewer idle ranks
                    target, piece = target.mT, piece.mT
                by_shape.setdefault(piece.shape, []).append((target, piece, gain))
        for rows in by_shape.values():
            updates = self.orthogonalize_shared(torch.stack([piece for _, piece, _ in rows]))
            for (target, _, gain), update in zip(rows, updates):
                target.add_(update, alpha=-lr * gain)

    def orthogonalize_shared(self, batch: Tensor) -> Tensor:
        ctx, n = self.ctx, len(batch)
        share = -(-n // ctx.world)
        batch = F.pad(batch, (0, 0, 0, 0, 0, share * ctx.world - n))
        mine = orthogonalize_ref(batch[ctx.rank * share : (ctx.rank + 1) * share], ctx.dtype)
        return torch.cat(ctx.gather(mine))[:n].float()


class Lion(torch.optim.Optimizer):
    """The sign of a gradient mixed with its momentum; every weight moves by the learning rate."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for weight in group["params"]:
                if not (state := self.state[weight]):
                    state["momentum"] = torch.zeros_like(weight)
                update = state["momentum"].lerp(weight.grad, 1 - beta1).sign()
                weight.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                state["momentum"].lerp_(weight.grad, 1 - beta2)


class Optimizers:
    """Muon for matrices and Adam for tables and vectors, or Lion for all. Only matrices and tables decay."""

    def __init__(self, model: LoopedGPT, latents: Latents, config: Config, ctx: RunContext):
        self.latents = latents
        of = {kind: [n for n in latents.weights if model.kind(n) == kind] for kind in ("matrix", "table", "vector")}
        pick = {kind: [latents.weights[n] for n in names] for kind, names in of.items()}
        matrices, *others = (
            dict(params=pick["matrix"], peak=config.matrix_lr, weight_decay=config.weight_decay),
            dict(params=pick["table"], peak=config.table_lr, weight_decay=config.weight_decay),
            dict(params=pick["vector"], peak=config.vector_lr, weight_decay=0.0),
        )
        rest = dict(lr=0.0, betas=(config.beta1, config.beta2))
        if config.optimizer == "lion":
            self.all = {"lion": Lion([matrices, *others], rest)}
        else:
            parts = [model.get_submodule(n.removesuffix(".weight")).parts for n in of["matrix"]]
            self.all = {"muon": Muon([matrices], parts, ctx), "adam": torch.optim.AdamW(others, fused=True, **rest)}

    def step(self, settings: Settings) -> None:
        for optimizer in self.all.values():
            for group in optimizer.param_groups:
                group |= dict(lr=group["peak"] * settings.lr_scale, momentum=settings.momentum)  # Adam has its own
            optimizer.step()
        self.latents.flat_grad.zero_()
        self.latents.publish()

    def state(self) -> dict:
        weights = {n: w.detach() for n, w in self.latents.weights.items()}
        return {"weights": weights} | {name: optimizer.state_dict() for name, optimizer in self.all.items()}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        for name, weight in self.latents.weights.items():
            weight.copy_(state["weights"][name])
        for name, optimizer in self.all.items():
            optimizer.load_state_dict(state[name])
        self.latents.flat_grad.zero_()
        self.latents.publish()


class WeightAverage:
    """Equal (swa) or decaying (ema) mean of the latents over the last part of a run; a run uses one, or none."""

    def __init__(self, config: Config):
        self.config, self.count, self.mean = config, 0, {}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int, progress: float) -> None:
        config = self.config
        if config.average == "none" or progress < config.average_start or step % config.average_every:
            return
        self.count += 1
        share = 1.0 / self.count if config.average == "swa" else 1.0 - config.ema_decay
        for name, weight in weights.items():
            if self.count == 1:
                self.mean[name] = weight.detach().clone()
            else:
                self.mean[name].lerp_(weight, share)

    def result(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.mean or {n: w.detach() for n, w in weights.items()}


# ----------------------------------------------------------------------------------------------------------------------
# 8. Artifact
# ----------------------------------------------------------------------------------------------------------------------
# What goes into the file that is scored; loopgolf/artifact.py is its format.


def fit_artifact(
    config: Config, model: LoopedGPT, weights: dict, hessians: dict, k_scale: float, tokenizer: dict
) -> bytes:
    """The file at the coarseness that was trained, unless the byte limit decides: then the one that ends between 99.5%
    and 100% of it. Sizes are searched by entropy; what coder and feedback add is learned from each encoding."""
    room = config.byte_limit - config.code_reserve if config.byte_limit else sys.maxsize
    trained, extra = k_scale, 0

    def size_at(scale: float) -> int:
        return forecast_bytes(model, build_grids(config, model, scale), weights) + extra

    is_bound = size_at(k_scale) > room or is_limit_binding(config, k_scale)
    for _ in range(6):
        if is_bound:
            k_scale = solve_k_scale(size_at, int(0.998 * room), config)
        grids = build_grids(config, model, k_scale)
        # on the very grid of training the weights have learned to be rounded plainly: there feedback only loses
        tensors = quantize_weights(weights, grids, {} if k_scale == trained else hessians)
        bits = {name: grid.bits for name, grid in grids.items() if grid}
        content = pack_artifact(config.stored(), tensors, bits, tokenizer)
        if len(content) <= room and (not is_bound or len(content) >= 0.995 * room or k_scale == FINEST):
            return content
        is_bound, extra = True, extra + len(content) - size_at(k_scale)
    raise DoesNotFit(f"byte_limit={config.byte_limit:,}: a file of {len(content):,} bytes does not settle just below")


def config_from_stored(stored: dict) -> Config:
    """The config of a stored artifact."""
    if find_wrong_fields(stored, Stored):
        raise ArtifactError("its config does not hold the fields of this version, each of its type")
    try:
        return Config(**stored, batch_tokens=stored["seq_len"])
    except ConfigError as error:
        raise ArtifactError(f"its config does not work: {error}") from None


def stored_shapes(stored: dict) -> Shapes:
    """The tensors that an artifact holds which stores this config."""
    with torch.device("meta"):
        model = LoopedGPT(config_from_stored(stored))
    shapes = {}
    for name, p in model.named_parameters():
        shapes[name] = p.shape
        if model.kind(name) != "vector":
            shapes[f"{name}.step"] = p.shape[:1]
    return shapes


def load_artifact(path: str | Path) -> Artifact:
    try:
        return unpack_artifact(Path(path).read_bytes(), stored_shapes)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation
# ----------------------------------------------------------------------------------------------------------------------
# What is scored, with which model; loopgolf/scoring.py is how.


def build_judge(config: Config, ctx: RunContext) -> LoopedGPT:
    """A model to score with. A CPU takes longer to compile the shapes of scoring than to score without."""
    return build_model(config, replace(ctx, compile="none") if ctx.device.type == "cpu" else ctx)


@dataclass(frozen=True)
class Validation:
    """The tokens that are scored, how their bytes are counted, and what tells their tokenizer apart."""

    tokens: Tensor
    counter: ByteCounter
    identity: dict


def load_validation(config: Config, ctx: RunContext) -> Validation:
    tokenizer, digest = load_tokenizer(config)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    count = min(config.score_tokens or stream.total, stream.total)
    if count < config.seq_len + 1:
        raise DataError(f"{config.data_path}: {count} validation tokens are fewer than one window of {config.seq_len}")
    tokens = stream.read(0, count)
    sha256 = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    ctx.log("data", split="val", shards=len(stream.paths), tokens=stream.total, scored=count, sha256=sha256)
    identity = dict(sha256=digest, vocab=config.vocab_size)
    return Validation(torch.from_numpy(tokens), ByteCounter(tokenizer), identity)


def evaluate(mode: str, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation, name: str = "") -> Score:
    """Score one mode and log it. `name` says which weights, where it is not the artifact."""
    started = time.perf_counter()
    scorer, meter = build_scorer(mode, model, config, ctx), BpbMeter(val.counter)
    if model.is_compiled:
        scorer.warm_up()
    score_tokens(scorer, val.tokens, meter, name or mode, started + config.eval_budget)
    score = meter.total(ctx)
    adapted = dict(updates=scorer.updates, skipped=scorer.skipped) if mode in ("sgd", "lora") else {}
    ctx.log("score", what=name or "artifact", mode=mode, val_loss=f"{score.loss:.8f}", val_bpb=f"{score.bpb:.8f}",
            tokens=score.tokens, bytes=score.bytes, **adapted, eval_s=time.perf_counter() - started)  # fmt: skip
    return score


# ----------------------------------------------------------------------------------------------------------------------
# 10. Training
# ----------------------------------------------------------------------------------------------------------------------
# The story of a run: warm up off the clock, then steps until the budget is used, with a checkpoint now and then.


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    used_s: float = 0.0
    step_s: float = 0.0  # the latest step, so that a resumed run knows how long the next one may take


@dataclass(frozen=True)
class Trained:
    """What training hands on: averaged weights, what steers their rounding, and what it took."""

    averaged: dict[str, Tensor]
    hessians: dict[str, Tensor]
    k_scale: float
    at: Progress


def train_step(
    model: LoopedGPT, optim: Optimizers, batch: tuple[Tensor, Tensor], settings: Settings, ctx: RunContext
) -> Tensor:
    """One optimizer step on this rank's sequences; returns its mean loss."""
    config, (inputs, targets) = model.config, batch
    size = config.micro_batch or len(inputs)
    total = torch.zeros((), device=ctx.device)
    for x, y in zip(inputs.split(size), targets.split(size)):
        loss = model.loss(x, y, settings.depth)
        loss.backward()
        optim.latents.collect()
        total += loss.detach()
    n_micro = len(inputs) // size
    norm = optim.latents.reduce(ctx.sum, 1 / (n_micro * ctx.world), config.grad_clip)
    optim.step(settings)
    return total / n_micro + 0 * norm  # a gradient that is not finite shows in the loss


def warm_up(model: LoopedGPT, optim: Optimizers, config: Config, ctx: RunContext) -> None:
    """Compiles every graph of the run on made-up tokens, then puts back weights, optimizer state and random state."""
    started = time.perf_counter()
    before = copy.deepcopy(optim.state())
    random_state = torch.get_rng_state()
    count = config.batch_tokens // ctx.world + 1
    made_up = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    batch = split_span(made_up, config, ctx)
    depths = {1, config.rows} if config.sample_depth else {config.depth}
    for depth in sorted(depths | ({0} if config.loop_start else set())):
        train_step(model, optim, batch, Settings(1.0, 0.5, depth), ctx)
    optim.load(before)
    torch.set_rng_state(random_state)
    ctx.sync()
    ctx.log("warmup", compile=ctx.compile, seconds=time.perf_counter() - started)


@torch.no_grad()
def log_telemetry(model: LoopedGPT, step: int, stream: TokenStream, ctx: RunContext) -> None:
    """The size of the stream at the end of each repetition, on the same text every time, and how much the adapter of
    each pass is like that of the first."""
    sizes = []

    def watch(p: Pass, x: Tensor) -> Tensor:
        if p.ends:
            sizes.append(x.float().square().mean().sqrt())
        return x

    model(load_batch(stream, 0, model.config, ctx)[0][:1], watch=watch)
    found = {"rms": sizes}
    if model.adapters is not None:
        unit = F.normalize(model.adapters[:, 1].flatten(1), dim=1)
        found["adapter_cosines"] = unit[1:] @ unit[0]
    ctx.log("telemetry", step=step, **{name: ",".join(f"{v:.3f}" for v in values) for name, values in found.items()})


def save_checkpoint(folder: Path, optim: Optimizers, average: WeightAverage, at: Progress, ctx: RunContext) -> None:
    """Everything that the next step depends on; the data position is the step."""
    if ctx.rank:
        return
    state = dict(optim=optim.state(), average=average.mean, average_count=average.count, at=asdict(at),
                 random=torch.get_rng_state())  # fmt: skip
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder: Path, optim: Optimizers, average: WeightAverage, ctx: RunContext) -> Progress:
    path = folder / "checkpoint.pt"
    if not path.is_file():
        ctx.log.line(f"# no checkpoint in {folder} yet: starting from the beginning")
        return Progress()
    try:
        state = torch.load(path, map_location=ctx.device, weights_only=True)
        optim.load(state["optim"])
        average.mean, average.count = state["average"], state["average_count"]
        torch.set_rng_state(state["random"].cpu())
        at = Progress(**state["at"])
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        why = f"not a checkpoint of this run ({error.__class__.__name__})"
        raise DataError(f"{path}: {why}; delete it to start over") from None
    ctx.log("resume", step=at.step, used_s=at.used_s)
    return at


def collect_hessians(
    config: Config,
    ctx: RunContext,
    weights: dict[str, Tensor],
    stream: TokenStream,
    seconds_left: Callable[[], float] | None = None,
) -> dict[str, Tensor]:
    """Sums of x x^T over the inputs of every matrix, all passes together, on training text: calibration_tokens of it,
    or, against a clock, as much as the seconds that are left allow."""
    if not config.calibration_tokens:
        return {}
    model = LoopedGPT(config, ctx.dtype).to(ctx.device)  # not compiled: hooks do not run inside a compiled graph
    model.load_state_dict(weights)
    sums = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            columns = module.weight.shape[1]
            sums[f"{name}.weight"] = total = torch.zeros(columns, columns, device=ctx.device)

            def add(_, inputs, __, total=total):
                x = inputs[0].flatten(0, -2).float()
                total.addmm_(x.T, x)

            module.register_forward_hook(add)
    batch = 0
    while seconds_left() > 0 if seconds_left else batch * config.batch_tokens < config.calibration_tokens:
        with torch.no_grad():
            model(load_batch(stream, batch, config, ctx)[0])
        batch += 1
    return {name: ctx.sum(total) for name, total in sums.items()}


def train(
    config: Config, ctx: RunContext, model: LoopedGPT, k_scale: float, stream: TokenStream, folder: Path
) -> Trained:
    latents = Latents(model, build_grids(config, model, k_scale))
    optim, average = Optimizers(model, latents, config, ctx), WeightAverage(config)
    latents.publish()
    at = load_checkpoint(folder, optim, average, ctx) if config.resume else Progress()
    warm_up(model, optim, config, ctx)
    calibrates = config.calibration_tokens > 0 and is_limit_binding(config, k_scale)
    reserve = config.export_reserve if calibrates else 0.0
    has_loops = "*" in config.plan
    budget, clock, saved_at = Budget(config, reserve), Clock(ctx, at.used_s), at.used_s
    budget.recent.extend([at.step_s] if at.step_s else [])
    with StopSignals() as stop, ctx.log.progress_bar(1.0, "training") as bar:
        clock.start()
        while (progress := budget.progress(at.step, at.used_s)) is not None:
            settings = settings_at(config, progress, at.step)
            step_loss = train_step(model, optim, load_batch(stream, at.step, config, ctx), settings, ctx)
            average.update(latents.weights, at.step, progress)
            loss = ctx.mean_loss(step_loss)
            clocks, stops = ctx.gather_numbers(clock.read(), stop.seen)
            now, is_stopped = max(clocks), any(stops)
            at = Progress(at.step + 1, now, now - at.used_s)
            budget.recent.append(at.step_s)
            if at.step % config.log_every == 0 or at.step == 1 or progress == 1.0:
                ctx.log("train", step=at.step, train_loss=loss, lr_scale=settings.lr_scale, train_s=now,
                        step_ms=1000 * at.step_s, tokens_per_s=round(config.batch_tokens / at.step_s))  # fmt: skip
            if has_loops and progress < 0.5 and at.step & (at.step - 1) == 0:  # steps 1, 2, 4, 8: far from the end
                log_telemetry(model, at.step, stream, ctx)
            bar.update(progress - bar.n)
            bar.set_postfix_str(f"step {at.step} loss {loss:.3f}", refresh=False)
            is_bad = not math.isfinite(loss)
            if is_bad or is_stopped or (config.checkpoint_every_s and now - saved_at > config.checkpoint_every_s):
                save_checkpoint(folder, optim, average, at, ctx)
                saved_at = at.used_s = clock.read_slowest()
            if is_bad:
                saved = folder / "checkpoint.pt"
                raise NonFiniteLoss(f"loss {loss} at step {at.step}; lower a learning rate; {saved} has finite weights")
            if is_stopped:
                raise Interrupted(f"stopped at step {at.step}; continue with --resume {folder}")
        averaged = average.result(latents.weights)
        # a calibration batch is a forward pass, not compiled: one that starts four steps before the end is done in time
        deadline_s = config.max_wallclock_seconds - 4 * max(budget.recent, default=0.0)
        left = None if config.iterations else lambda: deadline_s - clock.read()
        hessians = collect_hessians(config, ctx, averaged, stream, left) if calibrates else {}
        at.used_s = clock.stop()
    if has_loops:
        log_telemetry(model, at.step, stream, ctx)
    save_checkpoint(folder, optim, average, at, ctx)
    return Trained(averaged, hessians, k_scale, at)


# ----------------------------------------------------------------------------------------------------------------------
# 11. Main
# ----------------------------------------------------------------------------------------------------------------------


def log_head(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """What ran, where, on what: without it a log proves nothing."""
    code_sha256 = hash_counted_code(config.moe_experts)
    ctx.log("run", recipe=config.recipe, seed=config.seed, run_id=config.run_id, code_sha256=code_sha256)
    modules = (torch, np, zstandard, sentencepiece)
    ctx.log("versions", python=platform.python_version(), **{m.__name__: m.__version__ for m in modules})
    name = torch.cuda.get_device_name() if ctx.device.type == "cuda" else platform.processor() or platform.machine()
    threads, dtype = torch.get_num_threads(), str(ctx.dtype).removeprefix("torch.")
    ctx.log("hardware", device=ctx.device.type, name=name, world=ctx.world, threads=threads, dtype=dtype)
    for name, value in asdict(config).items():
        ctx.log("config", name=name, value=repr(value) if isinstance(value, float) else value, source=source[name])


def counted_files(moe_experts: int = 0) -> list[Path]:
    """The files that a run is made of: this script and what it imports from the repository. Packed, it is one."""
    rooms = {
        "": "train_gpt",
        "loopgolf": "artifact coder errors options plan quantize runtime scoring" + " moe" * (moe_experts > 0),
        "data": "shards",
        "kernels": "attention head newton_schulz rounding",
    }
    paths = [Path(__file__).parent / room / f"{name}.py" for room, names in rooms.items() for name in names.split()]
    return [path for path in paths if path.is_file()]


def hash_counted_code(moe_experts: int = 0) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in counted_files(moe_experts))).hexdigest()


def log_plan(config: Config, k_scale: float, model: LoopedGPT, ctx: RunContext) -> None:
    """Sizes and forecasts, before anything is trained."""
    counts = dict.fromkeys(("core", "edge", "embed", "table", "vector"), 0)
    for name, p in model.named_parameters():
        counts[model.role(name)] += p.numel()
    params, plan, limit = sum(counts.values()), model.plan, config.byte_limit
    artifact_bytes = forecast_bytes(model, build_grids(config, model, k_scale))
    total_bytes = artifact_bytes + config.code_reserve
    if limit and total_bytes > 1.05 * limit:
        raise DoesNotFit(f"byte_limit={limit:,}: {total_bytes:,} bytes are expected; raise --k_scale or leave it at 0")
    mean_r, learned = expect_depth(config), expect_depth(config, config.bptt)
    flops = compute_flops(config, mean_r, learned)
    rows = (config.micro_batch or max(1, config.batch_tokens // config.seq_len // ctx.world)) * config.seq_len
    n_kept = plan.count_passes(min(config.rows, config.bptt or config.rows))  # passes that wait for their gradient
    inside = 10 * config.model_dim + 3 * config.mlp_dim
    values = n_kept * config.model_dim + inside if config.checkpoint_passes else n_kept * inside
    memory = rows * (values * ctx.dtype.itemsize + 8 * config.vocab_size) + params * 24
    # rough on purpose: 40% of an H100's bf16 peak, or what a recent processor's core gives this model
    core = 0.2e12 if ctx.dtype == torch.bfloat16 else 0.06e12
    rate = 400e12 if ctx.device.type == "cuda" else core * torch.get_num_threads()
    core_bits = Grid(config.core_bits, config.core_k * k_scale).gaussian_bits()
    ctx.log("model", params=params, **counts, passes=plan.count_passes(config.depth), blocks=len(model.blocks),
            **(dict(mean_r=mean_r) if plan.is_variable else {}))  # fmt: skip
    ctx.log("forecast", k_scale=k_scale, core_bits=core_bits, artifact_bytes=artifact_bytes, total_bytes=total_bytes)
    step_ms = 1000 * flops * config.batch_tokens / (rate * ctx.world)
    ctx.log("forecast", flops_per_token=flops, step_ms=step_ms, memory_mb=memory / 1e6, device=ctx.device.type)
    if config.k_scale and limit and total_bytes > 0.97 * limit:
        ctx.log.line(f"# warning: {total_bytes / limit:.1%} of byte_limit expected, the export may coarsen the grid")


def dry_run(config: Config, ctx: RunContext) -> None:
    with torch.device("meta"):
        model = LoopedGPT(config)
    by_part = Counter()
    for name, p in model.named_parameters():
        by_part[re.match(r"blocks\.\w|\w+", name)[0]] += p.numel()
    ctx.log.line(f"params:{by_part.total()}")
    for part, count in by_part.items():
        ctx.log("part", name=part, params=count)
    log_plan(config, plan_k_scale(config, model), model, ctx)


def check_split(config: Config, ctx: RunContext) -> None:
    tokens, size, whole = config.batch_tokens, config.micro_batch, config.batch_tokens // config.seq_len
    if whole % ctx.world:
        raise ConfigError(f"batch_tokens={tokens}: {whole} sequences do not split over {ctx.world} ranks")
    if size and whole // ctx.world % size:
        raise ConfigError(f"micro_batch={size} does not divide the {whole // ctx.world} sequences of a rank")


def export(config: Config, ctx: RunContext, model: LoopedGPT, trained: Trained, tokenizer: dict, path: Path) -> None:
    """Writes the artifact, unless it is over the limit. From here on only that file is used."""
    if ctx.rank == 0:
        try:
            content = fit_artifact(config, model, trained.averaged, trained.hessians, trained.k_scale, tokenizer)
        except DoesNotFit as error:
            raise DoesNotFit(f"{error}; the checkpoint is kept in {path.parent}") from None
        write_atomic(path, content)
    if ctx.world > 1:
        dist.barrier()


def score_artifact(artifact: Artifact, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation) -> dict:
    """The score, from the file, in the mode that the config fixed; and the diagnostics that were asked for."""
    if artifact.tokenizer != val.identity:
        raise ConfigError(f"the artifact was made with another tokenizer than {config.tokenizer_file}")
    model.load_state_dict(artifact.tensors)
    started = time.perf_counter()
    final = evaluate(config.score_mode, model, config, ctx, val)
    found = dict(val_bpb=final.bpb, val_loss=final.loss, score_mode=config.score_mode)
    found["eval_s"] = time.perf_counter() - started
    for mode in CHOICES["score_mode"]:
        if mode in config.also.split(","):
            score = final if mode == config.score_mode else evaluate(mode, model, config, ctx, val)
            found[f"bpb_{mode}"] = score.bpb
    total, limit = artifact.size + ctx.code_bytes, config.byte_limit
    found |= dict(artifact_bytes=artifact.size, code_bytes=ctx.code_bytes, total_bytes=total, limit=limit)
    return found | dict(fits="no" if 0 < limit < total else "yes", artifact_sha256=artifact.sha256)


def log_result(found: dict, ctx: RunContext) -> dict:
    """The last line of a run: its fields in their order, as far as they were found."""
    order = """val_bpb val_loss score_mode bpb_trained bpb_averaged bpb_plain bpb_sliding bpb_banded bpb_sgd
        bpb_lora steps tokens train_s eval_s artifact_bytes code_bytes total_bytes limit fits seed recipe
        artifact_sha256"""
    result = {name: found[name] for name in order.split() if name in found}
    result |= {name: f"{value:.8f}" for name, value in result.items() if name.startswith(("val_", "bpb_"))}
    ctx.log("result", **result)
    return result


def score_only(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """--score: the model comes from the file, how to score too unless said otherwise."""
    artifact = load_artifact(config.score)
    stored = {name: value for name, value in artifact.stored.items() if source[name] not in ("cli", "env")}
    config = replace(config, **stored, batch_tokens=stored.get("seq_len", config.seq_len))
    model = build_judge(config, ctx)
    if {n: p.shape for n, p in model.named_parameters()} != {n: w.shape for n, w in artifact.tensors.items()}:
        raise ConfigError(f"score={config.score}: no model of the options given has its shapes; leave the model's out")
    log_result(score_artifact(artifact, model, config, ctx, load_validation(config, ctx)), ctx)


def run(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """The whole run: data, model, training, artifact, score from the artifact."""
    check_split(config, ctx)
    # ranks that start in different seconds would look for the artifact in different folders
    started = ctx.gather(torch.tensor([time.time()], dtype=torch.float64, device=ctx.device))[0].item()
    config = replace(config, run_id=config.run_id or time.strftime("%Y%m%d-%H%M%S", time.localtime(started)))
    folder = Path(config.resume or f"runs/{config.run_id}")
    is_taken = torch.tensor([float(not config.resume and (folder / "config.json").exists())], device=ctx.device)
    if any(ctx.gather(is_taken)):  # all ranks stop, or those that do not would wait for the others
        raise ConfigError(f"run_id={config.run_id}: {folder} holds a run already; choose another or --resume {folder}")
    val = load_validation(config, ctx)
    stream = TokenStream(config.data_path, "train", config.vocab_size)
    model = build_model(config, ctx)
    k_scale = plan_k_scale(config, model)
    model.init_weights(config.seed)
    if ctx.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for cut_off in folder.glob(".*.part"):
            cut_off.unlink()  # what a killed process was writing
        ctx.log.open(folder / "log.txt")
        write_atomic(folder / "config.json", json.dumps(asdict(config) | {"resume": ""}, indent=1).encode())
        write_atomic(folder / "tokenizer.model", config.tokenizer_file.read_bytes())
    log_head(config, source, ctx)
    ctx.log("data", split="train", shards=len(stream.paths), tokens=stream.total, sha256=stream.fingerprint())
    log_plan(config, k_scale, model, ctx)
    trained = train(config, ctx, model, k_scale, stream, folder)
    found = dict(steps=trained.at.step, tokens=trained.at.step * config.batch_tokens, train_s=trained.at.used_s)
    path, judge = folder / "artifact.lg", build_judge(config, ctx)
    for name, weights in (("trained", model.state_dict()), ("averaged", trained.averaged)):
        if name in config.also.split(","):
            judge.load_state_dict(weights)
            found[f"bpb_{name}"] = evaluate("plain", judge, config, ctx, val, name).bpb
    export(config, ctx, model, trained, val.identity, path)
    found |= score_artifact(load_artifact(path), judge, config, ctx, val)
    result = log_result(found | dict(seed=config.seed, recipe=config.recipe), ctx)
    if ctx.rank == 0:
        report = dict(result=result, config=asdict(config), source=source)
        write_atomic(folder / "result.json", json.dumps(report, indent=1).encode())


def main(argv: list[str], environ: dict[str, str], code_bytes: int = 0) -> int:
    """`code_bytes` is the size of the packed script; from source the reserve counts instead."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        config, source = parse_config(argv, environ)
        ctx = build_context(config, environ, code_bytes or config.code_reserve)
        if config.dry_run:
            dry_run(config, ctx)
        elif config.score:
            score_only(config, source, ctx)
        else:
            run(config, source, ctx)
        if ctx.world > 1:
            dist.barrier()  # no rank takes the group from one that still uses it
            dist.destroy_process_group()
        return 0
    except BrokenPipeError:
        return 1  # whoever read the output has seen enough
    except (Stop, DataError, OSError) as error:
        if environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; set --micro_batch to half of the sequences of a rank", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # nccl would wait for ranks that did not fail
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
