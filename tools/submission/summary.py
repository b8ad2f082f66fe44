"""What submission.json and README.md of our own folders must say, computed from the logs alone. tools.record writes it,
the rules compare it.
"""

from __future__ import annotations

import shlex
from typing import Any

import train_gpt
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


def is_complete(logs: list[TrainLog]) -> bool:
    """Whether every log holds the numbers that a summary needs."""
    needed = [(log.final, log.artifact_bytes, log.steps, log.step_ms, log.eval_s, log.seed) for log in logs]
    return bool(logs) and not any(None in row for row in needed)


def describe_hardware(log: TrainLog) -> str:
    hardware = log.last("hardware")
    world = int(hardware.get("world", 1))
    name = hardware.get("name", "?")
    if hardware.get("device") != "cuda":
        name = f"CPU {name}, {hardware.get('threads')} threads"
    if world > 1:
        name = f"{world}x {name}"
    return f"{name}, {hardware.get('dtype')}, Python {log.last('versions').get('python')}"


def describe_seed(log: TrainLog) -> dict[str, Any]:
    """The row of a seed in seed_results."""
    step_ms = round(log.step_ms, 3)
    row = (log.final.loss, log.final.bpb, log.artifact_bytes, log.steps, step_ms, log.eval_s)
    return dict(zip(SEED_FIELDS, row))


def describe_runs(logs: list[TrainLog], code_bytes: int, track: Track) -> dict[str, Any]:
    """The fields of submission.json that follow from the logs."""
    losses = [log.final.loss for log in logs]
    scores = [log.final.bpb for log in logs]
    largest = max(log.artifact_bytes for log in logs)
    return dict(
        val_loss=round(mean(losses), 8),
        val_bpb=round(mean(scores), 8),
        val_loss_std=round(sample_std(losses), 8),
        val_bpb_std=round(sample_std(scores), 8),
        seeds=[log.seed for log in logs],
        seed_results={str(log.seed): describe_seed(log) for log in logs},
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
    result = log.last("result")
    diagnostics = [result.get(name) for name in ("bpb_trained", "bpb_plain")]
    return [
        str(log.seed),
        f"{log.final.bpb:.5f}",
        f"{log.final.loss:.5f}",
        *("-" if text is None else f"{float(text):.5f}" for text in diagnostics),
        str(log.steps),
        f"{log.step_ms:.1f}",
        f"{log.train_s:.1f}",
        f"{log.eval_s:.1f}",
        f"{log.artifact_bytes:,}",
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
