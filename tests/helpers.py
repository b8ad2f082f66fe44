"""What the tests share: a tiny config, the command line in a folder of its own, and log lines read back."""

import contextlib
import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from urllib.parse import unquote

import torch

import train_gpt
from loopgolf.plan import ONCE, Depth
from loopgolf.quantize import Format
from loopgolf.runtime import Log, RunContext
from loopgolf.state import MasterWeights, TrainState

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    plan="abab", ttt_freeze="a", model_dim=32, num_heads=2, num_kv_heads=1, head_dim=0, rope_dims=8, seq_len=32,
    vocab_size=384, bigram_buckets=64, bigram_dim=8, ve_dim=8, ve_passes="last2", batch_tokens=128, iterations=4, score_documents=5,
    stride=8, score_batch=4, ttt_chunk=64, ttt_batch=2, ttt_epochs=1, ttt_lr=0.1, average="ema", average_start=0.5,
    average_every=1, byte_limit=0, code_reserve=1000, score_mode="plain", also="none", compile="none", device="cpu",
    dtype="float32", checkpoint_every_s=0.0, log_every=1,
    calibration_tokens=0, lora_rank=2, lora_chunk=16, canonical=False, recall_share=0.0, parallel_passes="none",
    look_back=0, step_bits=10, row_steps="spread", qat_start=0.0, newton_schulz="jordan", row_norm=False, skip_gates=False, contexts="",
)  # fmt: skip

# for artifacts that are loaded often: decoding takes a step in Python for every weight
SMALL = dict(model_dim=8, num_heads=1, rope_dims=4, bigram_buckets=8, bigram_dim=4, ve_dim=4)


def tiny_config(**changes) -> train_gpt.Config:
    return train_gpt.Config(**(TINY | changes))


def tiny_context(rank: int = 0, world: int = 1) -> RunContext:
    return RunContext(rank, world, torch.device("cpu"), torch.float32, "none", Log(quiet=True))


def tiny_model(config: train_gpt.Config, seed: int = 1) -> train_gpt.LoopedGPT:
    """A model in which every parameter matters: fresh weights start many of them at zero."""
    model = train_gpt.LoopedGPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def plan_formats(config: train_gpt.Config, model: train_gpt.LoopedGPT) -> dict[str, Format]:
    return train_gpt.build_formats(config, model, train_gpt.plan_k_scale(config, model))


def plain_state(model: train_gpt.LoopedGPT) -> TrainState:
    """The state of training a model whose weights are not rounded."""
    master = MasterWeights(dict(model.named_parameters()))
    return TrainState(master, train_gpt.build_optimizers(model, master.weights, model.config, tiny_context()))


def tiny_settings(lr_scale: float = 1.0, momentum: float = 0.9, depth: int = 1) -> train_gpt.Settings:
    return train_gpt.Settings(lr_scale, momentum, at(depth), TINY["batch_tokens"], TINY["seq_len"])


def pack_weights(config: train_gpt.Config, weights: dict, tokenizer: dict, curvatures: dict | None = None) -> bytes:
    """An artifact of these weights at the coarseness that the config plans."""
    model = train_gpt.build_meta_model(config)
    return train_gpt.encode_artifact(config, model, weights, plan_formats(config, model), curvatures or {}, tokenizer)


def write_artifact(folder: Path, tokenizer_bytes: bytes, **changes) -> Path:
    """An artifact of few weights with its tokenizer beside it."""
    config, digest = tiny_config(**SMALL | changes), hashlib.sha256(tokenizer_bytes).hexdigest()
    model = tiny_model(config)
    with torch.no_grad():
        model.embed.weight.mul_(2.0)  # predictions that are far from uniform
    weights = {name: p.detach() for name, p in model.named_parameters()}
    content = pack_weights(config, weights, dict(sha256=digest, vocab=config.vocab_size))
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes)
    (folder / "artifact.lg").write_bytes(content)
    return folder / "artifact.lg"


def at(depth: int) -> Depth:
    """r repetitions; 0 stands for every group once, in tests only."""
    return Depth(depth) if depth else ONCE


def options(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def tiny_options(dataset: Path, **changes) -> list[str]:
    return options(**(TINY | dict(recipe="pocket", data_path=dataset) | changes))


def clean_environment(**extra) -> dict[str, str]:
    """No rank, no setting and no thread count of the calling shell gets into a run."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return kept | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1") | {k: str(v) for k, v in extra.items()}


def run_cli(arguments: list[str], cwd: Path, ranks: int = 0, **environ) -> subprocess.CompletedProcess:
    """`python train_gpt.py …` in `cwd`, so that it writes to cwd/runs; with `ranks` under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, *launch, str(ROOT / "train_gpt.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**environ), capture_output=True, text=True, timeout=120
    )


def train(cwd: Path, dataset: Path, **settings) -> Path:
    """A run of a small model in this process, without the seconds that another one takes to start."""
    with contextlib.chdir(cwd):
        assert train_gpt.main(tiny_options(dataset, **(SMALL | settings)), {}) == 0
    return cwd / "runs" / settings["run_id"]


class SameProcess(Executor):
    """Does the work at once: another process takes seconds to start."""

    def submit(self, function: Callable, /, *given: object, **named: object) -> Future:
        future: Future = Future()
        future.set_result(function(*given, **named))
        gc.enable()  # a worker turns it off
        return future


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """`event key:value key:value …` read back; anything else raises."""
    event, *pairs = line.split(" ")
    split = [pair.split(":", 1) for pair in pairs]
    assert event.isidentifier() and all(len(pair) == 2 and pair[0].isidentifier() and pair[1] for pair in split), line
    return event, {key: unquote(value) for key, value in split}


def parse_log(text: str) -> list[tuple[str, dict[str, str]]]:
    return [parse_line(line) for line in text.splitlines() if not line.startswith("#")]


def events(text: str, name: str) -> list[dict[str, str]]:
    return [pairs for event, pairs in parse_log(text) if event == name]
