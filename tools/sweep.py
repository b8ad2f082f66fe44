"""The same budget for several loop plans: each is trained, then bytes, bits per byte and speed stand side by side.

    python -m tools.sweep abcd abcdabc '(ab)*4' --out plans.png -- --recipe pocket --iterations 400
    python -m tools.sweep abcdabc 'ab(^cd)*rgh --skips none --sample_depth' --seeds 1337 42 -- --recipe pocket

A plan may bring its own options of train_gpt.py, in the same quotes; those of all plans come after --. Where other
work disturbs the clock, equal time is better given as steps (--iterations in the quotes, from tools.bench --against).
What is finished is skipped and what was interrupted goes on: after Ctrl-C, type the same line again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import train_gpt
from loopgolf.errors import Stop
from loopgolf.options import Parser, split_options
from loopgolf.runtime import run_program
from tools import seeds
from tools.lib.runlog import RunError, read_result
from tools.plot import GREY, check_picture, import_pyplot, name_points, save_picture
from tools.submission.stats import mean, sample_std

SHARED = ("data_path", "score_documents", "score_mode")  # or nothing compares


@dataclass(frozen=True)
class Row:
    """What the runs of one plan came to, as means over seeds; `flops_per_token` of training."""

    plan: str
    options: str
    runs: list[str]
    code_sha256: str
    params: int
    flops_per_token: int
    artifact_bytes: float
    val_bpb: float
    val_bpb_std: float | None
    val_bpb_runs: list[float]
    steps: float
    train_s: float
    tokens_per_s: float


def plan_runs(text: str, numbers: list[int], name: str, options: list[str], environ: dict) -> list[seeds.Plan]:
    """The runs of one PLAN of the command line; its folders are named by its letters and a digest of all of it."""
    try:
        plan, *own = shlex.split(text)
        letters, digest = re.sub(r"[^a-zA-Z0-9]+", "", plan)[:40], hashlib.sha256(text.encode()).hexdigest()[:6]
        given = [*options, f"--plan={plan}", *own]
        return [seeds.plan_seed(seed, f"{name}-{letters}-{digest}", given, environ) for seed in numbers]
    except (ValueError, Stop) as error:  # a ValueError: nothing in it, or an open quote
        raise RunError(f"{text!r}: {error}") from None


def check_alike(plans: dict[str, list[seeds.Plan]]) -> None:
    (first, (a, *_)), *others = plans.items()
    for text, (b, *_) in others:
        for name in SHARED:
            ours, theirs = getattr(a.config, name), getattr(b.config, name)
            if ours != theirs:
                raise RunError(f"{text!r} has {name}={theirs}, {first!r} has {ours}; all plans need the same")


def summarize(text: str, plans: list[seeds.Plan]) -> Row:
    found = [read_result(plan.folder) for plan in plans]
    config, (plan, *own) = plans[0].config, shlex.split(text)
    names = ("artifact_bytes", "val_bpb", "steps", "train_s", "tokens")
    columns = {name: [float(result[name]) for result in found] for name in names}
    scores = columns["val_bpb"]
    params, flops = count_work(config)
    return Row(
        plan=plan,
        options=shlex.join(own),
        runs=[str(plan.folder) for plan in plans],
        code_sha256=train_gpt.hash_counted_code(config),
        params=params,
        flops_per_token=flops,
        artifact_bytes=mean(columns["artifact_bytes"]),
        val_bpb=mean(scores),
        val_bpb_std=sample_std(scores) if len(scores) > 1 else None,
        val_bpb_runs=scores,
        steps=mean(columns["steps"]),
        train_s=mean(columns["train_s"]),
        tokens_per_s=sum(columns["tokens"]) / sum(columns["train_s"]),
    )


def count_work(config: train_gpt.Config) -> tuple[int, int]:
    """Parameters, and operations of a trained token at the mean depth."""
    model = train_gpt.build_meta_model(config)
    learned_r = train_gpt.expect_repetitions(config, config.bptt or math.inf)
    flops = train_gpt.compute_flops(config, train_gpt.expect_repetitions(config), learned_r)
    return sum(p.numel() for p in model.parameters()), flops


def format_table(rows: list[Row]) -> str:
    width = max(24, *(len(f"{row.plan} {row.options}") + 2 for row in rows))
    lines = [
        f"{'plan':<{width}}{'params':>12}{'bytes':>12}{'val_bpb':>10}{'std':>9}{'tokens/s':>11}{'steps':>8}"
        f"{'train s':>9}{'MFLOP/token':>13}"
    ]
    for row in rows:
        std = "-" if row.val_bpb_std is None else f"{row.val_bpb_std:.5f}"
        lines.append(
            f"{f'{row.plan} {row.options}':<{width}}{row.params:>12,}{row.artifact_bytes:>12,.0f}"
            f"{row.val_bpb:>10.5f}{std:>9}{row.tokens_per_s:>11,.0f}{row.steps:>8,.0f}{row.train_s:>9.1f}"
            f"{row.flops_per_token / 1e6:>13.2f}"
        )
    return "\n".join(lines)


def draw(rows: list[Row], out: Path) -> None:
    """Lower is better, further left is smaller, or less work where all files have one size; brighter is faster."""
    figure, axes = import_pyplot().subplots(figsize=(7.5, 5), layout="constrained")
    sizes = [row.artifact_bytes / 1000 for row in rows]
    has_one_size = len(rows) > 1 and max(sizes) < 1.01 * min(sizes)
    places = [row.flops_per_token / 1e6 for row in rows] if has_one_size else sizes
    for place, row in zip(places, rows):
        if len(row.runs) > 1:
            axes.vlines(place, min(row.val_bpb_runs), max(row.val_bpb_runs), color=GREY, linewidth=1, zorder=2)
            axes.scatter(
                [place] * len(row.runs), row.val_bpb_runs, marker="_", color=GREY, s=60, linewidths=1, zorder=2
            )
    speeds = [row.tokens_per_s for row in rows]
    marks = axes.scatter(
        places,
        [row.val_bpb for row in rows],
        c=speeds,
        cmap="cividis",
        s=110,
        edgecolors="black",
        linewidths=0.8,
        zorder=3,
    )
    figure.colorbar(marks, label="training speed (tokens/s)", format="{x:,.0f}")
    axes.margins(0.18)
    axes.xaxis.set_major_formatter("{x:,g}")
    of_one_size = f"million operations of a trained token; every file has about {mean(sizes):,.0f} thousand bytes"
    axes.set_xlabel(of_one_size if has_one_size else "thousand bytes of the artifact")
    several = len(rows[0].runs) > 1
    axes.set_ylabel("bits per byte of validation text" + ", mean and each seed" * several)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.2)
    axes.set_axisbelow(True)
    seeds_at = [(place, score) for place, row in zip(places, rows) for score in row.val_bpb_runs if several]
    points = [(place, row.val_bpb) for place, row in zip(places, rows)]
    name_points(axes, points, name_rows(rows), seeds_at, fontsize=9)
    save_picture(figure, out, dpi=150)


def name_rows(rows: list[Row]) -> list[str]:
    """The plan, with those of its options that tell it from others of the same plan."""
    names = []
    for row in rows:
        own = find_options(row)
        others = [find_options(r) for r in rows if r.plan == row.plan and r is not row]
        extra = sorted(option for option in own if not all(option in theirs for theirs in others))
        names.append("\n".join([row.plan, *extra]))
    # equal time is given as steps, which need no name unless nothing else tells two rows apart
    short = [re.sub(r"\n--iterations \S+", "", name) for name in names]
    return short if len(set(short)) == len(rows) else names


def find_options(row: Row) -> set[str]:
    """The options of a plan, each with its value."""
    return set(re.findall(r"--.+?(?=\s--|$)", row.options))


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.sweep", description=__doc__)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="a loop plan, followed by its own options")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], metavar="N", help="seeds of every plan [1337]")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes per run, by torchrun [1]")
    parser.add_argument("--name", default="sweep", help="runs are called NAME-LETTERS-DIGEST-seedN [sweep]")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw it as well: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


def run(args: argparse.Namespace, options: list[str]) -> None:
    environ = dict(os.environ)
    for name, values in (("PLAN", args.plans), ("--seeds", args.seeds)):
        if len(set(values)) < len(values):
            raise RunError(f"{name}: each only once")
    if any(word.split("=")[0] == "--plan" for word in options):
        raise RunError("--plan after --: plans are named before it")
    if args.out:
        check_picture(args.out)
    plans = {text: plan_runs(text, args.seeds, args.name, options, environ) for text in args.plans}
    check_alike(plans)
    seeds.run_missing([run for runs in plans.values() for run in runs], args.nproc, environ)
    rows = [summarize(text, runs) for text, runs in plans.items()]
    report = dict(name=args.name, seeds=args.seeds, options=options, plans=[asdict(row) for row in rows])
    print(json.dumps(report, indent=1) if args.json else format_table(rows))
    if args.out:
        draw(rows, args.out)


def main(argv: list[str]) -> int:
    return run_program(run, *split_options(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
