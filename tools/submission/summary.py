"""What submission.json and README.md of our own folders must say, computed from the logs alone. tools.record writes it,
the rules compare it.
"""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

import train_gpt
from tools.lib.runlog import RunError
from tools.submission.stats import mean, sample_std
from tools.submission.tracks import Track
from tools.submission.trainlog import TrainLog

SEED_FIELDS = ("val_loss", "val_bpb", "artifact_bytes", "steps", "step_avg_ms", "eval_time_s")
PER_RUN_SETTINGS = {"seed", "run_id", "resume", "checkpoint_every_s", "log_every"}  # may differ between seeds
HEADINGS = (
    "seed",
    "val_bpb",
    "val_loss",
    "trained",
    "file, plain",
    "steps",
    "ms/step",
    "train s",
    "eval s",
    "artifact",
)


class Numbers(NamedTuple):
    """What a summary needs of a finished run."""

    seed: int
    loss: float
    bpb: float
    artifact_bytes: int
    steps: int
    step_ms: float
    train_s: float
    eval_s: float


def read_numbers(log: TrainLog) -> Numbers | None:
    """None where the log lacks one of them."""
    if log.final is None:
        return None
    score = (log.final.loss, log.final.bpb)
    row = (log.seed, *score, log.artifact_bytes, log.steps, log.step_ms, log.train_s, log.eval_s)
    return None if None in row else Numbers(*row)  # type: ignore[arg-type]


def require_numbers(log: TrainLog) -> Numbers:
    numbers = read_numbers(log)
    if numbers is None:
        raise RunError(f"{log.path}: its result line is incomplete")
    return numbers


def is_complete(logs: list[TrainLog]) -> bool:
    """Whether every log holds what a summary needs."""
    return bool(logs) and all(read_numbers(log) for log in logs)


def describe_hardware(log: TrainLog) -> str:
    hardware = log.last("hardware")
    world = int(hardware.get("world", 1))
    name = hardware.get("name", "?")
    if hardware.get("device") != "cuda":
        name = f"CPU {name}, {hardware.get('threads')} threads"
    if world > 1:
        name = f"{world}x {name}"
    return f"{name}, {hardware.get('dtype')}, Python {log.last('versions').get('python')}"


def describe_seed(run: Numbers) -> dict[str, Any]:
    """The row of a seed in seed_results."""
    row = (run.loss, run.bpb, run.artifact_bytes, run.steps, round(run.step_ms, 3), run.eval_s)
    return dict(zip(SEED_FIELDS, row))


def describe_runs(logs: list[TrainLog], code_bytes: int, track: Track) -> dict[str, Any]:
    """The fields of submission.json that follow from the logs."""
    runs = [require_numbers(log) for log in logs]
    losses = [run.loss for run in runs]
    scores = [run.bpb for run in runs]
    largest = max(run.artifact_bytes for run in runs)
    return dict(
        val_loss=round(mean(losses), 8),
        val_bpb=round(mean(scores), 8),
        val_loss_std=round(sample_std(losses), 8),
        val_bpb_std=round(sample_std(scores), 8),
        seeds=[run.seed for run in runs],
        seed_results={str(run.seed): describe_seed(run) for run in runs},
        bytes_total=track.count_bytes(largest, code_bytes),
        bytes_code=code_bytes,
        hardware=describe_hardware(logs[0]),
        pytorch_version=logs[0].last("versions").get("torch"),
    )


def result_lines(logs: list[TrainLog], code_bytes: int, track: Track) -> list[str]:
    """The lines of README.md that hold numbers."""
    facts = describe_runs(logs, code_bytes, track)
    bpb = f"{facts['val_bpb']:.5f} ± {facts['val_bpb_std']:.5f}"
    loss = f"{facts['val_loss']:.5f} ± {facts['val_loss_std']:.5f}"
    return [
        f"**val_bpb {bpb}** (mean and sample deviation of {len(logs)} seeds; val_loss {loss} nats per token), "
        f"{facts['bytes_total']:,} bytes.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|" + "---|" * len(HEADINGS),
        *(f"| {' | '.join(seed_cells(log))} |" for log in logs),
    ]


def seed_cells(log: TrainLog) -> list[str]:
    run = require_numbers(log)
    result = log.last("result")
    diagnostics = [result.get(name) for name in ("bpb_trained", "bpb_plain")]
    return [
        str(run.seed),
        f"{run.bpb:.5f}",
        f"{run.loss:.5f}",
        *("-" if text is None else f"{float(text):.5f}" for text in diagnostics),
        str(run.steps),
        f"{run.step_ms:.1f}",
        f"{run.train_s:.1f}",
        f"{run.eval_s:.1f}",
        f"{run.artifact_bytes:,}",
    ]


def options_of(log: TrainLog) -> list[str]:
    """The command-line options that make a run like this one, apart from its seed: those that its log says it got."""
    options = [f"--recipe={log.settings['recipe']}"]
    left_out = PER_RUN_SETTINGS | {"recipe", "score", "dry_run"}
    for name, text in log.settings.items():
        if log.sources.get(name) in ("cli", "env") and name not in left_out:
            options.append(f"--{name}={'' if text == '-' else text}")
    return options


def config_of(log: TrainLog) -> train_gpt.Config:
    """The config of a run. ConfigError or KeyError where this version of the code cannot run it."""
    config, _ = train_gpt.parse_config(options_of(log), {})
    return config


def repeat_command(logs: list[TrainLog]) -> str:
    """The line of README.md that repeats the runs."""
    world = int(logs[0].last("hardware").get("world", 1))
    launch = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    seeds = " ".join(str(log.seed) for log in logs)
    return f"for SEED in {seeds}; do {launch} train_gpt.py {shlex.join(options_of(logs[0]))} --seed=$SEED; done"
