"""Runs one configuration with several seeds, one after another, into runs/NAME-seedN, and prints the table of results.
What is finished is skipped, what was interrupted goes on from its checkpoint: after Ctrl-C, type the same line again.

Examples:
    python -m tools.seeds --seeds 1337 42 2024 -- --recipe pocket --iterations 500
    python -m tools.seeds --seeds 1337 42 2024 --nproc 8 --name 4b7l --json seeds.json

Options of train_gpt.py come after --. Exit codes: those of the run that failed; 1 after an interruption.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import train_gpt
from loopgolf.errors import Interrupted, Stop
from loopgolf.options import Parser, split_options
from loopgolf.runtime import run_program, write_atomic
from tools.lib.runlog import RunError, read_result
from tools.submission.stats import mean, sample_std
from tools.submission.summary import PER_RUN_SETTINGS

SCRIPT = Path(train_gpt.__file__).resolve()
# column of the table: the heading, and the decimals to print
COLUMNS = dict(bpb_trained=("trained", 5), bpb_plain=("file, plain", 5), val_bpb=("val_bpb", 5),
               val_loss=("val_loss", 5), steps=("steps", 0), step_ms=("ms/step", 1), train_s=("train s", 1),
               eval_s=("eval s", 1), total_bytes=("bytes", 0))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One seed to be run, and the folder that it is run in."""

    seed: int
    folder: Path
    config: train_gpt.Config
    options: list[str]


def plan_seed(seed: int, name: str, options: list[str], environ: dict[str, str]) -> Plan:
    own = [f"--seed={seed}", f"--run_id={name}-seed{seed}"]
    config, _ = train_gpt.parse_config([*options, *own], environ)
    for reserved in ("resume", "score", "dry_run"):
        if getattr(config, reserved):
            raise RunError(f"--{reserved} is not for a series of seeds; use train_gpt.py itself")
    return Plan(seed, Path("runs") / config.run_id, config, [*options, *own])


def state_of(plan: Plan, code_sha256: str) -> str:
    """new, interrupted or finished; a run with other settings or other code in the folder is refused."""
    path = plan.folder / "config.json"
    if not path.exists():
        return "new"
    try:
        stored = json.loads(path.read_text())
        differ = [name for name, value in asdict(plan.config).items()
                  if name not in PER_RUN_SETTINGS - {"seed"} and stored[name] != value]  # fmt: skip
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not a config of this version; remove the folder or choose another --name") from None
    if differ:
        change = f"{differ[0]}={stored[differ[0]]}, not {getattr(plan.config, differ[0])}"
        raise RunError(f"{plan.folder} holds a run with {change}; choose another --name")
    log = plan.folder / "log.txt"
    text = log.read_text(errors="replace") if log.is_file() else ""
    hashes = set(re.findall(r"^run recipe:.* code_sha256:(\w+)$", text, re.MULTILINE))
    if hashes - {code_sha256}:
        raise RunError(f"{plan.folder} holds a run of other code; choose another --name, or check out that commit")
    return "finished" if hashes and (plan.folder / "result.json").is_file() else "interrupted"


def run_seed(plan: Plan, state: str, nproc: int, environ: dict[str, str]) -> None:
    """Runs or continues one seed; its log lines go to stderr, so that stdout holds the table alone."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    options = ["--resume", str(plan.folder)] if state == "interrupted" else plan.options
    # a seed or a name in the environment would contradict the folder that is continued
    environ = {name: value for name, value in environ.items() if name not in ("SEED", "RUN_ID")}
    print(f"# seed {plan.seed}: {state}, in {plan.folder}", file=sys.stderr, flush=True)
    if code := run_child([sys.executable, *launch, str(SCRIPT), *options], environ):
        raise SeedFailed(f"seed {plan.seed} ended with exit code {code}; see {plan.folder}/log.txt", abs(code))


class SeedFailed(Stop):
    """A run that ended badly; the series ends with its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


def run_child(command: list[str], environ: dict[str, str]) -> int:
    """The child's exit code. It has a session of its own, so that a Ctrl-C reaches it once, through here: the first
    signal lets it save a checkpoint, a second one kills it."""
    seen, children = [], []

    def pass_on(number, _) -> None:
        seen.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        tied = tie_to_parent if sys.platform == "linux" else None
        children.append(
            subprocess.Popen(command, env=environ, stdout=sys.stderr, start_new_session=True, preexec_fn=tied)
        )
        if seen:  # before there was a child to pass it on to
            children[0].send_signal(signal.SIGTERM)
        code = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:
        raise Interrupted("interrupted; the same command goes on where it stopped")
    return code


def tie_to_parent() -> None:
    """Makes Linux end the child when this process dies, even by kill -9: no run goes on that nobody waits for."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run_missing(plans: list[Plan], nproc: int, environ: dict[str, str]) -> None:
    """Runs what is not finished, one after another; what must not go on is refused before the first hour is spent."""
    states = [state_of(plan, train_gpt.hash_counted_code(plan.config)) for plan in plans]
    for plan, state in zip(plans, states):
        if state == "finished":
            print(f"# seed {plan.seed}: finished, in {plan.folder}", file=sys.stderr)
        else:
            run_seed(plan, state, nproc, environ)


def collect(plans: list[Plan]) -> list[dict]:
    """One row of numbers per seed."""
    rows = []
    for plan in plans:
        found = read_result(plan.folder)
        found["step_ms"] = 1000 * float(found["train_s"]) / max(1, int(found["steps"]))
        numbers = {name: float(found[name]) for name in COLUMNS if name in found}
        rows.append(dict(seed=plan.seed, run=str(plan.folder)) | numbers)
    return rows


def summarize(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of every column that all seeds have."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS if all(name in row for row in rows)}
    return {name: dict(mean=mean(values), std=sample_std(values)) for name, values in columns.items()}


def format_table(rows: list[dict], summary: dict[str, dict[str, float]]) -> str:
    lines = [f"{'seed':<6}" + "".join(f"{heading:>13}" for heading, _ in COLUMNS.values())]
    cells = [(str(row["seed"]), row) for row in rows]
    cells += [(which, {name: values[which] for name, values in summary.items()}) for which in ("mean", "std")]
    for first, values in cells:
        extra = 1 if first in ("mean", "std") else 0  # a mean of whole numbers is none
        texts = [f"{values[name]:,.{max(digits, extra)}f}" if name in values and not math.isnan(values[name]) else "-"
                 for name, (_, digits) in COLUMNS.items()]  # fmt: skip
        lines.append(f"{first:<6}" + "".join(f"{text:>13}" for text in texts))
    return "\n".join(lines)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes per run, by torchrun [1]")
    parser.add_argument("--name", help="runs are called NAME-seedN [the recipe]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON as well (-: JSON on stdout instead)")
    return parser


def run(args: argparse.Namespace, options: list[str]) -> None:
    environ = dict(os.environ)
    if len(set(args.seeds)) < len(args.seeds):
        raise RunError("--seeds: each seed only once")
    config, _ = train_gpt.parse_config(options, environ)
    name = args.name or config.recipe
    plans = [plan_seed(seed, name, options, environ) for seed in args.seeds]
    run_missing(plans, args.nproc, environ)
    rows = collect(plans)
    summary = summarize(rows)
    if args.json:
        code_sha256 = train_gpt.hash_counted_code(config)
        report = dict(name=name, code_sha256=code_sha256, options=options, runs=rows) | {
            which: {column: values[which] if math.isfinite(values[which]) else None
                    for column, values in summary.items()} for which in ("mean", "std")
        }  # fmt: skip
        text = json.dumps(report, indent=1) + "\n"
        if str(args.json) == "-":
            print(text, end="")
            return
        write_atomic(args.json, text.encode())
    print(format_table(rows, summary))


def main(argv: list[str]) -> int:
    return run_program(run, *split_options(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
