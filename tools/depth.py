"""What depth buys once the weights are fixed: an artifact whose plan repeats a group r times, scored at several r, and
with tokens that leave early, each as soon as a repetition hardly changes its state.

    python -m tools.depth runs/ID/artifact.lg --data_path data/local --out depth.png
    python -m tools.depth runs/ID/artifact.lg --depths 1 2 3 4 6 8 --exit 0.2 0.1 --score_documents 50 --json

An early exit is measured, not made: its depth is that of the scored tokens, and it has no seconds, since its tokens are
only held still while the others go on. Everything runs uncompiled, so that all seconds compare. Operations are those of
the forward, per token that goes through it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor

import train_gpt
from loopgolf.options import Parser
from loopgolf.plan import parse_plan
from loopgolf.runtime import Log, run_program
from loopgolf.scoring import BpbMeter, ByteCounter, Score, score_tokens
from tools.lib.exits import EarlyExit
from tools.lib.predictor import InputError
from tools.plot import COLORS, GREY, check_picture, import_pyplot, name_points, save_picture


@dataclass(frozen=True)
class Point:
    """One pass over the text; with `exit` each token left once a repetition changed it by less than that."""

    r: int  # repetitions at most
    exit: float | None
    mean_depth: float
    val_bpb: float
    seconds: float | None
    flops_per_token: int


@dataclass(frozen=True)
class Report:
    artifact: str
    artifact_sha256: str
    plan: str
    mode: str
    default_r: int  # what the artifact is scored with if nothing else is said
    trained_r: int  # the deepest that has its own rows in the per-pass tables
    tokens: int
    bytes: int
    points: list[Point]


class ExitMeter(BpbMeter):
    """Also sums the depths of scored tokens. In plain windows a target stands right after its input, and the inputs
    fill rows of seq_len without a gap; what pads the last row is not counted."""

    def __init__(self, counter: ByteCounter, early: EarlyExit, length: int):
        super().__init__(counter)
        self.early, self.length, self.depths = early, length, 0

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        super().add(tokens, positions, log_probs)
        rows, columns = (positions - 1) // self.length, (positions - 1) % self.length
        self.depths += int(self.early.depths.cpu()[rows - rows[0], columns].sum())


class Study:
    """An artifact and the text that it is scored on."""

    def __init__(self, path: Path, options: list[str], mode: str):
        config, _ = train_gpt.parse_config(options, dict(os.environ))
        self.artifact, self.mode = train_gpt.load_artifact(path), mode
        trained = train_gpt.config_from_stored(self.artifact.stored)
        if not parse_plan(trained.plan).is_variable:
            raise InputError(
                f"{path}: its plan {trained.plan} has a fixed depth; train one with a group marked *r, "
                "such as --plan 'ab(^cd)*rgh' --skips none"
            )
        stored = {field.name: getattr(trained, field.name) for field in fields(train_gpt.Stored)}
        self.config = replace(config, **stored, batch_tokens=trained.seq_len, compile="none")
        self.ctx = train_gpt.build_context(self.config, {})
        quiet = replace(self.ctx, log=Log(quiet=True))
        self.val = train_gpt.load_validation(self.config, quiet)
        if self.artifact.tokenizer != self.val.identity:
            raise InputError(f"{self.config.tokenizer_file}: not the tokenizer of {path}; name its run's --data_path")

    def config_at(self, r: int) -> train_gpt.Config:
        return replace(self.config, score_depth=r)

    def score(self, r: int, tau: float | None = None) -> tuple[Point, Score]:
        config, ctx, early = self.config_at(r), self.ctx, None if tau is None else EarlyExit(tau)
        model = train_gpt.load_eval_model(self.artifact, config, ctx)
        scorer = train_gpt.build_scorer(self.mode, model, config, ctx, self.val.mask)
        scorer.warm_up()  # the first forward of a process pays for what is not the model's
        meter = BpbMeter(self.val.counter) if early is None else ExitMeter(self.val.counter, early, config.seq_len)
        scorer.on_pass = early
        ctx.sync()
        started = time.perf_counter()
        score_tokens(scorer, self.val.tokens, meter, f"r={r}" if tau is None else f"exit {tau:g}")
        ctx.sync()
        seconds, found = time.perf_counter() - started, meter.total(ctx)
        depth = meter.depths / found.tokens if isinstance(meter, ExitMeter) else float(r)
        flops = train_gpt.compute_flops(config, depth) // 3  # a third of training is the forward
        return Point(r, tau, depth, found.bpb, None if early else seconds, flops), found


def study_depth(path: Path, depths: list[int], taus: list[float], mode: str, options: list[str]) -> Report:
    for name, values, is_good, wanted in (
        ("depths", depths, [r >= 1 for r in depths], "1 or more"),
        ("exit", taus, [tau >= 0 for tau in taus], "0 or more"),
    ):
        if not all(is_good):
            raise InputError(f"--{name} {values[is_good.index(False)]}: has to be {wanted}")
    if taus and mode != "plain":
        raise InputError(f"--exit with --mode {mode}: exits are measured in plain windows only; leave one of them out")
    study = Study(path, options, mode)
    depths = sorted(set(depths))
    for r in depths:
        study.config_at(r)  # refuses what is too deep before the first is scored
    scored = [study.score(r) for r in depths] + [study.score(depths[-1], tau) for tau in sorted(set(taus))]
    config, total = study.config, scored[0][1]
    return Report(
        artifact=str(path),
        artifact_sha256=study.artifact.sha256,
        plan=config.plan,
        mode=mode,
        default_r=config.scoring_depth.r,
        trained_r=config.table_repetitions,
        tokens=total.tokens,
        bytes=total.bytes,
        points=[point for point, _ in scored],
    )


def format_table(report: Report) -> str:
    lines = [
        f"# {report.plan}, {report.mode}, {report.tokens:,} tokens of {report.bytes:,} bytes; * as by default",
        f"{'':<12}{'mean depth':>12}{'bpb':>10}{'seconds':>10}{'tokens/s':>12}{'MFLOP/token':>13}",
    ]
    for p in report.points:
        name = f"r={p.r}{'*' * (p.r == report.default_r)}" if p.exit is None else f"exit {p.exit:g}"
        times = ("-", "-") if p.seconds is None else (f"{p.seconds:.2f}", f"{report.tokens / p.seconds:,.0f}")
        lines.append(
            f"{name:<12}{p.mean_depth:>12.2f}{p.val_bpb:>10.5f}{times[0]:>10}{times[1]:>12}"
            f"{p.flops_per_token / 1e6:>13.3f}"
        )
    return "\n".join(lines)


def draw(report: Report, out: Path) -> None:
    fixed = [p for p in report.points if p.exit is None]
    exits = sorted((p for p in report.points if p.exit is not None), key=lambda p: p.mean_depth)
    depths, first, last = [p.r for p in fixed], fixed[0], fixed[-1]
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    left.plot(depths, [p.val_bpb for p in fixed], color=COLORS[0], marker="o", linewidth=2, label="r for every token")
    if exits:
        left.plot(
            [p.mean_depth for p in exits],
            [p.val_bpb for p in exits],
            color=COLORS[1],
            marker="D",
            markersize=5,
            linewidth=1,
            linestyle="--",
            label="exit of each token at a change below τ (numbers)",
        )
    left.set_xscale("log", base=2)
    left.set_xticks(depths, depths)
    left.margins(y=0.12)
    left.set_xlabel("mean repetitions per token (log scale)")
    left.set_ylabel("bits per byte of validation text")
    times = [1e6 * p.seconds / report.tokens for p in fixed if p.seconds is not None]
    right.plot(depths, times, color=COLORS[2], marker="o", linewidth=2)
    right.set_xlim(left=0)
    right.set_ylim(0, 1.08 * max(times))
    right.set_xlabel("repetitions of every token")
    right.set_ylabel("time to score a token (µs)")
    if first.r < last.r:  # operations are linear in r: the same axis in other units
        slope = (last.flops_per_token - first.flops_per_token) / (last.r - first.r) / 1e6
        base = first.flops_per_token / 1e6 - slope * first.r
        top = right.secondary_xaxis("top", functions=(lambda r: base + slope * r, lambda flops: (flops - base) / slope))
        top.set_xlabel("million operations per token", color=GREY)
        top.tick_params(colors=GREY)
        top.spines["top"].set_color(GREY)
    default = f"r = {report.default_r}, the default"
    for axes in (left, right):
        axes.axvline(report.default_r, color=GREY, linewidth=1.2, linestyle=":", label=default)
        if last.r > report.trained_r:
            end = axes.get_xlim()[1]
            axes.axvspan(report.trained_r, end, color=GREY, alpha=0.12, linewidth=0, label="deeper than ever trained")
            axes.set_xlim(right=end)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GREY, alpha=0.2)
        axes.set_axisbelow(True)
    left.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{report.plan} ({report.mode}, {report.tokens:,} tokens)", fontsize=11, parse_math=False)
    if exits:
        name_points(
            left,
            [(p.mean_depth, p.val_bpb) for p in exits],
            [f"{p.exit:g}" for p in exits],
            [(p.r, p.val_bpb) for p in fixed],
            is_beside=False,
            color=COLORS[1],
            fontsize=8,
        )
    save_picture(figure, out)


def run(args: argparse.Namespace) -> None:
    options = [f"--score_documents={args.score_documents}"] + [f"--data_path={args.data_path}"] * (
        args.data_path is not None
    )
    taus = args.exit if args.exit is not None else [0.3, 0.2, 0.1, 0.05] if args.mode == "plain" else []
    if args.out:
        check_picture(args.out)
    report = study_depth(args.artifact, args.depths, taus, args.mode, options)
    print(json.dumps(asdict(report), indent=1) if args.json else format_table(report))
    if args.out:
        draw(report, args.out)


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.depth", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data_path", help="dataset folder [of the recipe for this machine]")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="R", help="[1 2 4 8 16]")
    parser.add_argument("--mode", choices=tuple(train_gpt.SCORERS), default="plain", help="[plain]")
    parser.add_argument("--score_documents", type=int, default=184, metavar="N", help="0 for all [184]")
    parser.add_argument(
        "--exit",
        type=float,
        nargs="*",
        metavar="TAU",
        help="relative changes below which a token leaves, in plain windows [0.3 0.2 0.1 0.05]",
    )
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw it as well: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
