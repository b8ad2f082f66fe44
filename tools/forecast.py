"""What recipes would do on the challenge's hardware, side by side, before anything is paid for: bytes, work, steps,
evaluation, memory. Arithmetic only: nothing here was measured on a GPU.

    python -m tools.forecast                                      golf, 4b7l, frontier and baseline9 on 8xH100
    python -m tools.forecast golf --options '--plan abc(def)*3gh' --gpus 1 --seconds 600 --peak 989

Steps and evaluation are given for two shares of the peak: the entry that this project starts from reached 25%, good
scripts of the field 40 to 50%. Work is counted over the schedule: loops off and on, contexts that grow. The
evaluation is that of the challenge's validation set, 151 MB of text: passes of the model, without masking and recall.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from dataclasses import asdict, dataclass, replace

import torch

import train_gpt
from data.folder import positive
from loopgolf.options import Parser
from loopgolf.plan import ONCE
from loopgolf.runtime import Log, RunContext, run_program
from tools.lib.runlog import RunError

SHARES = (0.4, 0.5)
VALIDATION_BYTES = 151.07e6
BYTES_PER_TOKEN = {1024: 2.436, 4096: 3.32, 8192: 3.73}  # of the published tokenizers


@dataclass(frozen=True)
class Forecast:
    recipe: str
    params: int
    total_bytes: int
    gflop_once: float  # of a trained token, every group of the plan once
    gflop_looped: float
    steps: list[int]  # within the budget, by share of the peak
    eval_s: list[float]
    memory_gb: float  # of a training step on one GPU


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def plan_once(plan: str) -> str:
    """Every group of a fixed plan once."""
    return re.sub(r"\*\d+", "*1", plan)


def flops_of_token(config: train_gpt.Config, is_once: bool, seq_len: int) -> int:
    settled = replace(
        config,
        plan=plan_once(config.plan) if is_once else config.plan,
        seq_len=seq_len,
        batch_tokens=seq_len,
        contexts="",
        stride=1,
        band=0,
        ve_passes="none" if config.ve_passes == "none" else "all",  # last4, say, may be more than there are now
        xsa_passes="none",
        parallel_passes="none",
    )
    learned_r = train_gpt.expect_repetitions(config, config.bptt or math.inf)
    mean_r = 1.0 if is_once else train_gpt.expect_repetitions(config)
    return train_gpt.compute_flops(settled, mean_r, 1.0 if is_once else learned_r)


def count_steps(config: train_gpt.Config, seconds: float, flops_per_s: float) -> int:
    """Over the schedule, a hundredth of the budget at a time."""
    steps = 0.0
    for hundredth in range(100):
        settings = train_gpt.settings_at(config, (hundredth + 0.5) / 100, 0)
        is_once = settings.depth == ONCE
        work = flops_of_token(config, is_once, settings.seq_len) * settings.batch_tokens
        steps += seconds / 100 * flops_per_s / work
    return int(steps)


def evaluation_flops(config: train_gpt.Config, model: train_gpt.LoopedGPT, ctx: RunContext) -> float:
    """Of the whole validation set: windows overlap, and adaptation trains on what was scored."""
    bare = replace(config, canonical=False, recall_share=0.0)
    scorer = train_gpt.build_scorer(config.score_mode, model, bare, ctx)
    known = min(BYTES_PER_TOKEN, key=lambda vocab: abs(vocab - config.vocab_size))
    tokens = VALIDATION_BYTES / BYTES_PER_TOKEN[known]
    training = flops_of_token(config, False, config.seq_len)
    epochs = {"sgd": config.ttt_epochs, "lora": 1}.get(config.score_mode, 0)
    return tokens * training * (scorer.length / scorer.stride / 3 + epochs)


def forecast(recipe: str, args: argparse.Namespace) -> Forecast:
    config, _ = train_gpt.parse_config(["--recipe", recipe, *args.options], {})
    if config.recipe != recipe:
        raise RunError(f"--options: recipe={config.recipe} would stand in the row of {recipe}; name it instead")
    model = train_gpt.build_meta_model(config)
    ctx = RunContext(0, args.gpus, torch.device("cpu"), torch.bfloat16, "none", Log(quiet=True))
    k_scale = train_gpt.plan_k_scale(config, model)
    artifact_bytes = train_gpt.forecast_bytes(model, train_gpt.build_formats(config, model, k_scale))
    rates = [share * args.peak * 1e12 * args.gpus for share in SHARES]
    work = evaluation_flops(config, train_gpt.build_meta_model(config), ctx)
    return Forecast(
        recipe=recipe,
        params=sum(p.numel() for p in model.parameters()),
        total_bytes=artifact_bytes + config.code_reserve,
        gflop_once=flops_of_token(config, True, config.seq_len) / 1e9,
        gflop_looped=flops_of_token(config, False, config.seq_len) / 1e9,
        steps=[count_steps(config, args.seconds, rate) for rate in rates],
        eval_s=[work / rate for rate in rates],
        memory_gb=train_gpt.forecast_memory(config, model, ctx) / 1e9,
    )


def print_table(rows: list[Forecast]) -> None:
    percents = [f"{share:.0%}" for share in SHARES]
    names = ["recipe", "parameters", "bytes", "GF/token once", "looped"]
    names += [*(f"steps {p}" for p in percents), *(f"eval s {p}" for p in percents), "GB"]
    lines = [names]
    for row in rows:
        words = [
            row.recipe,
            f"{row.params:,}",
            f"{row.total_bytes:,}",
            f"{row.gflop_once:.3f}",
            f"{row.gflop_looped:.3f}",
        ]
        words += [*(f"{n:,}" for n in row.steps), *(f"{s:.0f}" for s in row.eval_s), f"{row.memory_gb:.0f}"]
        lines.append(words)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths)))


def run(args: argparse.Namespace) -> None:
    try:
        args.options = shlex.split(args.options)
    except ValueError as error:
        raise RunError(f"--options: {error}") from None
    rows = [forecast(recipe, args) for recipe in args.recipes]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_table(rows)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tools.forecast", description=__doc__)
    names = ["golf", "4b7l", "frontier", "baseline9"]
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"[{' '.join(names)}]", default=names)
    parser.add_argument("--options", default="", help="of train_gpt.py, for all of them, in quotes")
    parser.add_argument("--gpus", type=positive, default=8, help="[8]")
    parser.add_argument("--seconds", type=above_zero, default=600.0, help="training budget [600]")
    parser.add_argument("--peak", type=above_zero, default=989.0, help="TFLOP/s of one GPU in bf16 [989, an H100's]")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
