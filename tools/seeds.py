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
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import train_gpt
from loopgolf.errors import Interrupted, Stop
from loopgolf.options import Parser, split_options
from loopgolf.runtime import run_program, write_atomic
from tools.lib.runlog import RunError, read_result
from tools.submission.stats import mean, sample_std
from tools.submission.summary import PER_RUN_SETTINGS

SCRIPT = Path(train_gpt.__file__).resolve()


class Column(NamedTuple):
    """A column of the table."""

    heading: str
    decimals: int


COLUMNS = {
    "bpb_trained": Column("trained", 5),
    "bpb_plain": Column("file, plain", 5),
    "val_bpb": Column("val_bpb", 5),
    "val_loss": Column("val_loss", 5),
    "steps": Column("steps", 0),
    "step_ms": Column("ms/step", 1),
    "train_s": Column("train s", 1),
    "eval_s": Column("eval s", 1),
    "skipped": Column("skipped", 0),
    "total_bytes": Column("bytes", 0),
}
Numbers = dict[str, float]  # by column, as far as they are known


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
        must_agree = [f.name for f in fields(plan.config) if f.name not in PER_RUN_SETTINGS - {"seed"}]
        differ = [name for name in must_agree if stored[name] != getattr(plan.config, name)]
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
    """The child's exit code. It has its own session, so that a Ctrl-C reaches it once, through here: the first
    signal lets it save a checkpoint, a second one kills it."""
    seen: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        first_call = tie_to_parent if sys.platform == "linux" else None
        child = subprocess.Popen(command, env=environ, stdout=sys.stderr, start_new_session=True, preexec_fn=first_call)
        children.append(child)
        if seen:  # before there was a child to pass it on to
            child.send_signal(signal.SIGTERM)
        code = child.wait()
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


@dataclass(frozen=True)
class Row:
    """What one seed's run found."""

    seed: int
    run: str
    numbers: Numbers


def read_rows(plans: list[Plan]) -> list[Row]:
    rows = []
    for plan in plans:
        result = read_result(plan.folder)
        numbers = {name: float(result[name]) for name in COLUMNS if name in result}
        numbers["step_ms"] = 1000 * numbers["train_s"] / max(1.0, numbers["steps"])
        rows.append(Row(plan.seed, str(plan.folder), numbers))
    return rows


def summarize(rows: list[Row]) -> dict[str, Numbers]:
    """Mean and sample deviation of every column that all seeds have. A single seed has no deviation."""
    columns = {}
    for name in COLUMNS:
        values = [row.numbers[name] for row in rows if name in row.numbers]
        if len(values) == len(rows):
            columns[name] = values
    std = {name: sample_std(values) for name, values in columns.items() if len(values) > 1}
    return dict(mean={name: mean(values) for name, values in columns.items()}, std=std)


def format_table(rows: list[Row], summary: dict[str, Numbers]) -> str:
    lines = [format_line("seed", [column.heading for column in COLUMNS.values()])]
    lines += [format_line(str(row.seed), format_cells(row.numbers, 0)) for row in rows]
    # the mean of whole numbers is not a whole number
    lines += [format_line(name, format_cells(numbers, 1)) for name, numbers in summary.items()]
    return "\n".join(lines)


def format_cells(numbers: Numbers, least_decimals: int) -> list[str]:
    cells = []
    for name, column in COLUMNS.items():
        decimals = max(column.decimals, least_decimals)
        cells.append(f"{numbers[name]:,.{decimals}f}" if name in numbers else "-")
    return cells


def format_line(name: str, cells: list[str]) -> str:
    return f"{name:<6}" + "".join(f"{cell:>13}" for cell in cells)


def format_json(rows: list[Row], summary: dict[str, Numbers], about: dict[str, Any]) -> str:
    """The table as JSON; null where there is no number."""
    runs = [dict(seed=row.seed, run=row.run) | row.numbers for row in rows]
    columns = {which: {name: numbers.get(name) for name in summary["mean"]} for which, numbers in summary.items()}
    return json.dumps(about | dict(runs=runs) | columns, indent=1) + "\n"


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
    rows = read_rows(plans)
    summary = summarize(rows)
    if args.json:
        about = dict(name=name, code_sha256=train_gpt.hash_counted_code(config), options=options)
        text = format_json(rows, summary, about)
        if str(args.json) == "-":
            print(text, end="")
            return
        write_atomic(args.json, text.encode())
    print(format_table(rows, summary))


def main(argv: list[str]) -> int:
    return run_program(run, *split_options(build_parser(), argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
