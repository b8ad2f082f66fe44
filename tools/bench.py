"""How fast a configuration trains and scores on this machine, next to the floor that this machine sets.

    python -m tools.bench [--steps 8] [--modes plain,banded] [--json] [-- options of train_gpt.py]
    python -m tools.bench -- --recipe pocket --batch_tokens 8192
    python -m tools.bench --profile -- --recipe pocket
    python -m tools.bench --against '--num_heads 8 --head_dim 32 --rope_dims 32' -- --recipe pocket

A step is split into data, forward, backward, communication and optimizer, with the device idle at every cut, so the
parts add up to a little more than a step that overlaps them. The floor is the step's arithmetic at the speed of this
device's own best matrix product, measured, not that of a datasheet. Tokens and weights are random: no dataset is
needed, and losses mean nothing. `--against` runs a second configuration in turns with the first, A B A B, and prints
how much faster it is, as the median over rounds with the smallest and largest ratio: other work hits both alike.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_gpt
from data.shards import write_shard
from loopgolf.errors import ConfigError
from loopgolf.options import Parser
from loopgolf.params import start_weights
from loopgolf.runtime import RunContext, run_program
from loopgolf.scoring import score_tokens

PARTS = ("data", "forward", "backward", "communication", "optimizer")
WARM_STEPS = 2  # after the one that compiles


class Case:
    """One configuration with everything that a step needs."""

    def __init__(self, options: list[str], folder: Path):
        config, _ = train_gpt.parse_config(options, {})
        data = tempfile.mkdtemp(dir=folder)
        self.config = replace(config, data_path=data, code_reserve=0, canonical=False)  # random tokens have no text
        self.ctx = train_gpt.build_context(self.config, dict(os.environ))
        train_gpt.check_split(self.config, self.ctx)
        tokens = np.random.default_rng(0).integers(2, config.vocab_size, 4 * config.batch_tokens + 1)
        write_shard(Path(data) / "random_train_000000.bin", tokens.astype(np.uint16))
        self.text = train_gpt.TrainingText(self.config, train_gpt.list_shapes(self.config))
        self.model = train_gpt.build_model(self.config, self.ctx)
        start_weights(self.model, config.seed)
        k_scale = train_gpt.plan_k_scale(self.config, self.model)
        self.state = train_gpt.build_state(self.config, self.ctx, self.model, k_scale)
        self.steps: list[dict[str, float]] = []
        started = time.perf_counter()
        self.step()
        self.compile_s = time.perf_counter() - started
        for _ in range(WARM_STEPS):
            self.step()
        self.steps.clear()

    def step(self) -> float:
        """One training step, with a cut after every part."""
        seconds = dict.fromkeys(PARTS, 0.0)
        settings = train_gpt.settings_at(self.config, 0.5, len(self.steps))
        cut = time.perf_counter()

        def end_part(part: str) -> None:
            nonlocal cut
            self.ctx.sync()
            now = time.perf_counter()
            seconds[part] += now - cut
            cut = now

        consumed = len(self.steps) * settings.batch_tokens
        batch = train_gpt.load_batch(self.text, consumed, settings, self.ctx)
        end_part("data")
        train_gpt.train_step(self.model, self.state, batch, settings, self.ctx, end_part)
        self.steps.append(seconds)
        return sum(seconds.values())

    def report(self, peak: float) -> dict:
        parts = {part: 1000 * statistics.median(s[part] for s in self.steps) for part in PARTS}
        step_s = statistics.median(sum(s.values()) for s in self.steps)
        flops = train_gpt.compute_flops(self.config, self.config.depth) * self.config.batch_tokens / self.ctx.world
        is_cuda = self.ctx.device.type == "cuda"
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = torch.cuda.max_memory_allocated() if is_cuda else resident
        return dict(
            params=sum(p.numel() for p in self.model.parameters()),
            batch_tokens=self.config.batch_tokens,
            step_ms=1000 * step_s,
            **{f"{part}_ms": ms for part, ms in parts.items()},
            optimizer_share=parts["optimizer"] / (1000 * step_s),
            tokens_per_s=self.config.batch_tokens / step_s,
            achieved_tflops=flops / step_s / 1e12,
            peak_tflops=peak / 1e12,
            floor_ms=1000 * flops / peak,
            share_of_peak=flops / step_s / peak,
            peak_memory_mb=memory / 1e6,
            compile_s=self.compile_s,
        )

    def score_speed(self, mode: str, n_tokens: int) -> dict:
        """Scored tokens per second, by the model that runs score with; forward tokens per scored one, with padding."""
        tokens = torch.from_numpy(self.text.stream.read(0, n_tokens))
        tokens[:: max(self.config.seq_len, 2)] = self.config.bos_id
        eval_model = train_gpt.build_eval_model(self.config, self.ctx)
        eval_model.load_state_dict(self.model.state_dict())
        scorer = train_gpt.build_scorer(mode, eval_model, self.config, self.ctx)
        scorer.warm_up()
        meter = Positions()
        started = time.perf_counter()
        score_tokens(scorer, tokens, meter)
        self.ctx.sync()
        seconds = time.perf_counter() - started
        return dict(mode=mode, tokens_per_s=meter.count / seconds, forward_per_scored=scorer.forwarded / meter.count)


class Positions:
    """A meter that only counts."""

    count = 0

    def add(self, tokens, positions, log_probs) -> None:
        self.count += len(positions)


def profile(case: Case, steps: int) -> str:
    """Where the time of training steps goes: the operations that take most of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if case.ctx.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            case.step()
    order = "self_cuda_time_total" if case.ctx.device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def measure_peak(ctx: RunContext) -> float:
    """Operations per second of the best large matrix product in the compute dtype."""
    best = 0.0
    for n in (1024, 2048) if ctx.device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=ctx.device, dtype=ctx.dtype) for _ in "ab")
        for _ in range(6):
            ctx.sync()
            started = time.perf_counter()
            a @ b
            ctx.sync()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def compare(a: Case, b: Case, rounds: int) -> dict:
    """Steps in turns; above 1, b is faster."""
    ratios = []
    with a.ctx.log.progress_bar(rounds, "a b a b") as bar:
        for _ in range(rounds):
            per_token = [case.step() / case.config.batch_tokens for case in (a, b)]
            ratios.append(per_token[0] / per_token[1])
            bar.update()
    return dict(ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios), rounds=rounds)


def run(args: argparse.Namespace) -> None:
    if args.steps < 1 or args.score_tokens < 2:
        raise ConfigError("--steps and --score_tokens must be positive")
    known, modes = list(train_gpt.SCORERS), [mode for mode in args.modes.split(",") if mode]
    if wrong := set(modes) - set(known):
        raise ConfigError(f"--modes {min(wrong)}: choose from {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.options, Path(folder))
        if args.profile:
            print(profile(case, args.steps))
            return
        found: dict = {}
        if args.against is not None:
            other = Case(args.options + args.against, Path(folder))
            found["against"] = compare(case, other, args.steps)
        while len(case.steps) < args.steps:
            case.step()
        peak = measure_peak(case.ctx)
        found = dict(step=case.report(peak)) | found
        if args.against is not None:
            found["other"] = other.report(peak)
        found["score"] = [case.score_speed(mode, args.score_tokens) for mode in modes]
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for event in ("step", "other", "against"):
        if event in found:
            case.ctx.log(event, **found[event])
    for row in found["score"]:
        case.ctx.log("score", **row)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, or rounds with --against [8]")
    parser.add_argument("--against", type=shlex.split, metavar="OPTIONS", help="a second one: changes to the first")
    parser.add_argument("--modes", default="", help=f"also score: {','.join(train_gpt.SCORERS)}")
    parser.add_argument("--score_tokens", type=int, default=16384, help="tokens to score in each mode [16384]")
    parser.add_argument("--profile", action="store_true", help="the operations that take the time of so many steps")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("options", nargs="*", help="options of train_gpt.py, after --")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
