"""One change at a time against a baseline, paired by seed, at equal steps and at equal time.

    python -m tools.ablate TABLE.toml [--rows NAME …] [--jobs 2] [--out effects.png] [--json]

TABLE.toml has the baseline, its seeds in the order in which they are used, and a row per change:

    [baseline]
    options = "--recipe pocket --plan abcd --data_path data/heldout --text_sha256= --iterations 540"
    seeds = [1337, 42, 2024, 7, 8, 9]

    [[row]]
    name = "softcap 20"
    options = "--softcap 20"          # or patch = "sin2.patch", a file beside the table, for what shall not stay
    predict = "hurts"                 # helps, hurts or neither, written down before the run
    class = "loss"                    # optional: accuracy is told by class
    published_mb = 5.4                # optional: thousandths of a bit per byte at full scale, and who says so
    source = "parameter-golf #877"

Every run is made of the commit that is checked out, in a tree of its own, and adds a line to TABLE.runs.jsonl with
commit and CPU; runs of other commits or CPUs are never paired. Seeds are added, three at first, until the mean effect
is beyond two standard errors or none is left. Equal time is the baseline's steps times the ratio of step times,
measured in turns (A B A B); a change whose speed is another one during the run (--loop_start, --sample_depth) has none.
Three seeds are few: a change that does nothing passes two standard errors in one case of five, and in one of three when
seeds are added ten times; what matters is run again with other seeds. After Ctrl-C, type the same line again: what is
there is not run twice. An effect below 0 is an improvement. The trees are in .cache/ablate and may be deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path

import train_gpt
from data.folder import positive
from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.ablation.effects import (
    draw,
    equal_time_steps,
    find_baseline,
    format_noise,
    format_signs,
    format_table,
    measure_effect,
    read_rows,
)
from tools.ablation.ledger import Ledger, Run, Speed, describe_cpu
from tools.ablation.table import BASELINE, Change, Table, read_table
from tools.lib.runlog import RunError, read_result
from tools.plot import check_picture
from tools.seeds import tie_to_parent

ROOT = Path(train_gpt.__file__).resolve().parent
TREES = ROOT / ".cache" / "ablate"
FIRST_SEEDS = 3
TURNS, TURN_STEPS = 3, 20  # of both sides, when speeds are compared


def git(*arguments: str, cwd: Path = ROOT, given: bytes = b"") -> str:
    done = subprocess.run(["git", *arguments], cwd=cwd, input=given, capture_output=True, check=False)
    if done.returncode:
        raise RunError(f"git {arguments[0]}: {done.stderr.decode().strip().splitlines()[-1]}")
    return done.stdout.decode().strip()


def find_commit() -> str:
    changed = [line for line in git("status", "--porcelain", "--", "*.py").splitlines() if line]
    if changed:
        raise RunError(f"{changed[0].split()[-1]} is not committed, so runs could not be repeated; commit first")
    return git("rev-parse", "HEAD")


def prepare_tree(table: Table, change: Change, commit: str) -> Path:
    """The commit, with the patch of a row, in a folder of its own."""
    patch = table.patch_of(change)
    name = commit[:12] + (f"-{hashlib.sha256(patch).hexdigest()[:8]}" if patch else "")
    folder = TREES / name
    if (folder / ".ready").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    git("worktree", "prune")
    git("worktree", "add", "--detach", "--force", str(folder), commit)
    if patch:
        try:
            git("apply", "-", cwd=folder, given=patch)
        except RunError as error:
            raise RunError(f"{change.name!r}: {change.patch} does not apply to {commit[:7]} ({error})") from None
    (folder / ".ready").touch()
    return folder


def call(folder: Path, arguments: list[str], threads: int) -> str:
    """The output of a program of that tree."""
    settings = {f.name.upper() for f in fields(train_gpt.Config)}  # those of the shell would get into every run
    environ = {name: value for name, value in os.environ.items() if name not in settings}
    environ |= dict(OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_CACHE_DIR=str(TREES / "inductor"))
    first_call = tie_to_parent if sys.platform == "linux" else None
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        preexec_fn=first_call,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()
        raise RunError(f"{shlex.join(arguments)}: exit code {done.returncode}: {lines[-1]}")
    return done.stdout


def run_one(ledger: Ledger, change: Change, seed: int, iterations: int, threads: int) -> Run:
    table = ledger.table
    folder = prepare_tree(table, change, ledger.commit)
    name = f"{ledger.digest(change)}-{seed}-{iterations}"
    own = [f"--seed={seed}", f"--iterations={iterations}", f"--run_id={name}", "--checkpoint_every_s=0"]
    run_folder = folder / "runs" / name
    shutil.rmtree(run_folder, ignore_errors=True)
    call(folder, ["train_gpt.py", *table.options, *shlex.split(change.options), *own], threads)
    result = read_result(run_folder)
    shutil.rmtree(run_folder)
    return Run(
        row=change.name,
        digest=ledger.digest(change),
        commit=ledger.commit,
        cpu=ledger.cpu,
        seed=seed,
        iterations=iterations,
        val_bpb=float(result["val_bpb"]),
        artifact_bytes=int(result["artifact_bytes"]),
        train_s=float(result["train_s"]),
    )


def run_missing(ledger: Ledger, wanted: Iterable[tuple[Change, int, int]], jobs: int) -> None:
    missing = [key for key in dict.fromkeys(wanted) if ledger.find(*key) is None]
    for change, _, _ in missing:
        prepare_tree(ledger.table, change, ledger.commit)  # one at a time: git locks
    threads = count_threads(jobs)
    failures: list[RunError] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_one, ledger, *key, threads) for key in missing]
        try:
            for future in as_completed(futures):
                try:
                    found = future.result()
                except RunError as error:
                    failures.append(error)
                    note(str(error))
                    continue
                ledger.add(found)
                note(f"{found.row}, seed {found.seed}, {found.iterations} steps: {found.val_bpb:.5f}")
        finally:
            for future in futures:
                future.cancel()
    if failures:
        raise failures[0]


def count_threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


def note(text: str) -> None:
    """Progress; stdout holds the table alone."""
    print(f"# {text}", file=sys.stderr, flush=True)


def compare_speeds(ledger: Ledger, change: Change, threads: int) -> Speed:
    """In turns; each turn is a process, for a patch is other code."""
    sides = [BASELINE, change]
    ratios = []
    for _ in range(TURNS):
        step_ms = []
        for side in sides:
            folder = prepare_tree(ledger.table, side, ledger.commit)
            options = [*ledger.table.options, *shlex.split(side.options)]
            text = call(folder, ["-m", "tools.bench", f"--steps={TURN_STEPS}", "--json", "--", *options], threads)
            step_ms.append(json.loads(text)["step"]["step_ms"])
        ratios.append(step_ms[0] / step_ms[1])
    ratio = statistics.median(ratios)
    note(f"{change.name}: {ratio:.3f} times as fast as the baseline")
    return Speed(change.name, ledger.digest(change), ledger.commit, ledger.cpu, ratio, ratios)


def has_one_speed(table: Table, change: Change) -> bool:
    """Whether a step takes the same time from the first to the last."""
    config, _ = train_gpt.parse_config([*table.options, *shlex.split(change.options)], {})
    return config.loop_start == 0 and not config.sample_depth


def resolve(ledger: Ledger, steps: dict[str, int], jobs: int) -> None:
    """Runs every change of `steps` with more and more seeds, until its effect is resolved or no seed is left."""
    table = ledger.table
    open_changes = [change for change in table.changes if change.name in steps]
    for count in range(min(FIRST_SEEDS, len(table.seeds)), len(table.seeds) + 1):
        seeds = table.seeds[:count]
        wanted = [(Change("baseline"), seed, table.iterations) for seed in seeds if open_changes]
        wanted += [(change, seed, steps[change.name]) for change in open_changes for seed in seeds]
        run_missing(ledger, wanted, jobs)
        effects = [measure_effect(ledger, change, steps[change.name], seeds) for change in open_changes]
        open_changes = [
            change for change, effect in zip(open_changes, effects) if effect is None or not effect.is_resolved
        ]


def run(args: argparse.Namespace) -> None:
    table = read_table(args.table)
    known = [change.name for change in table.changes]
    if unknown := set(args.rows) - set(known):
        raise RunError(f"--rows {min(unknown)}: the table has {', '.join(known)}")
    if args.out:
        check_picture(args.out)
    changes = [change for change in table.changes if not args.rows or change.name in args.rows]
    ledger = Ledger(table, find_commit(), describe_cpu())
    if not args.show:
        timed = [] if args.steps_only else [change for change in changes if has_one_speed(table, change)]
        for change in timed:
            if ledger.find_speed(change) is None:
                ledger.add(compare_speeds(ledger, change, count_threads(args.jobs)))
        resolve(ledger, {change.name: table.iterations for change in changes}, args.jobs)
        speeds = {change.name: ledger.find_speed(change) for change in changes}
        resolve(ledger, {name: equal_time_steps(table, speed) for name, speed in speeds.items() if speed}, args.jobs)
    if not find_baseline(ledger, table.seeds[0]):
        raise RunError(f"{table.runs_path}: no run of this commit on this CPU; leave --show out")
    rows = read_rows(ledger, changes)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("\n".join([format_noise(ledger), "", format_table(rows), *format_signs(rows)]))
    if args.out:
        draw(rows, args.out)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tools.ablate", description=__doc__)
    parser.add_argument("table", type=Path, metavar="TABLE", help="a .toml file in the form above")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these rows [all]")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at a time, which share the cores [1]"
    )
    parser.add_argument("--steps_only", action="store_true", help="equal steps only, and no speeds")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw it as well: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
