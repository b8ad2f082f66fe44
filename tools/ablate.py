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
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import train_gpt
from data.folder import positive
from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.lib.runlog import RunError, read_result
from tools.plot import GREY, check_picture, import_pyplot, save_picture
from tools.seeds import tie_to_parent
from tools.submission.stats import mean, sample_std

ROOT = Path(train_gpt.__file__).resolve().parent
TREES = ROOT / ".cache" / "ablate"
FIRST_SEEDS = 3
TURNS = 3  # of both sides, when speeds are compared
VERDICTS = ("helps", "hurts", "neither")
OURS = ("seed", "iterations", "run_id", "resume", "score", "dry_run")  # settings that a row cannot have


@dataclass(frozen=True)
class Change:
    """A row of the table; the baseline is one that changes nothing."""

    name: str
    options: str = ""
    patch: str = ""
    predict: str = ""
    kind: str = ""
    published_mb: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Table:
    path: Path
    options: list[str]
    iterations: int
    seeds: list[int]
    changes: list[Change]
    data_digest: str

    @property
    def runs_path(self) -> Path:
        return self.path.with_suffix(".runs.jsonl")

    def patch_of(self, change: Change) -> bytes:
        return (self.path.parent / change.patch).read_bytes() if change.patch else b""


def read_table(path: Path) -> Table:
    try:
        content = tomllib.loads(path.read_text())
        baseline, rows = content["baseline"], content.get("row", [])
        options = shlex.split(baseline["options"])
        seeds = [int(seed) for seed in baseline["seeds"]]
        changes = [read_change(row) for row in rows]
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: not a table ({error}); see --help for its form") from None
    config, _ = train_gpt.parse_config(options, {})
    if not config.iterations or len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise RunError(f"{path}: the baseline needs --iterations and at least two seeds, each only once")
    names, same = [change.name for change in changes], [(change.options, change.patch) for change in changes]
    for change in changes:
        if names.count(change.name) > 1 or change.name == "baseline":
            raise RunError(f"{path}: {change.name!r}: every row needs a name of its own")
        if same.count((change.options, change.patch)) > 1:
            raise RunError(f"{path}: {change.name!r}: another row is the same change")
        check_change(path, change, options)
    data = Path(config.data_path).resolve()
    return Table(
        path=path,
        options=[*options, f"--data_path={data}"],  # runs are made elsewhere
        iterations=config.iterations,
        seeds=seeds,
        changes=[replace(change, options=resolve_paths(change.options, options)) for change in changes],
        data_digest=describe_data(data),
    )


def read_change(row: dict[str, Any]) -> Change:
    change = Change(**{"kind" if key == "class" else key: row[key] for key in row})
    words = (change.name, change.options, change.patch, change.predict, change.kind, change.source)
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"row {change.name!r}: a text is needed")
    published = change.published_mb
    return replace(change, published_mb=None if published is None else float(published))


def check_change(path: Path, change: Change, options: list[str]) -> None:
    if bool(change.options) == bool(change.patch):
        raise RunError(f"{path}: {change.name!r} needs either options or a patch")
    if change.patch and not (path.parent / change.patch).is_file():
        raise RunError(f"{path}: {change.name!r}: {path.parent / change.patch} is not there")
    if change.predict and change.predict not in VERDICTS:
        raise RunError(f"{path}: {change.name!r}: predict is one of {', '.join(VERDICTS)}")
    try:
        own = shlex.split(change.options)
    except ValueError as error:
        raise RunError(f"{path}: {change.name!r}: {error}") from None
    config, _ = train_gpt.parse_config([*options, *own], {})
    base, _ = train_gpt.parse_config(options, {})
    given = [name for name in OURS if getattr(config, name) != getattr(base, name)]
    if given:
        raise RunError(f"{path}: {change.name!r}: --{given[0]} is not for a row; the table sets it")


def resolve_paths(text: str, options: list[str]) -> str:
    """The options of a row with the whole path of its data, where that is another one."""
    own = shlex.split(text)
    config, _ = train_gpt.parse_config([*options, *own], {})
    base, _ = train_gpt.parse_config(options, {})
    for name in ("data_path", "tokenizer_path"):
        if getattr(config, name) != getattr(base, name):
            own.append(f"--{name}={Path(getattr(config, name)).resolve()}")
    return shlex.join(own)


def describe_data(folder: Path) -> str:
    """A digest that changes with the data set."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no data set there; python -m data.localtext --held_out builds data/heldout")
    sizes = [(file.name, file.stat().st_size) for file in sorted(folder.glob("*.bin"))]
    tokenizer = folder / "tokenizer.model"
    content = tokenizer.read_bytes() if tokenizer.is_file() else b""
    return hashlib.sha256(repr(sizes).encode() + content).hexdigest()


# --- what has been run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run."""

    row: str
    digest: str  # of what was run, without seed and steps
    commit: str
    cpu: str
    seed: int
    iterations: int
    val_bpb: float
    artifact_bytes: int
    train_s: float


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the baseline a step of a change is: the median over turns, and each."""

    row: str
    digest: str
    commit: str
    cpu: str
    ratio: float
    turns: list[float] = field(default_factory=list)


def describe_cpu() -> str:
    info = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    family = " ".join(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{facts.get('model name') or platform.machine()} ({family or platform.system()}, {instructions})"


class Ledger:
    """The lines of TABLE.runs.jsonl that this commit and this CPU wrote."""

    def __init__(self, table: Table, commit: str, cpu: str):
        self.table, self.commit, self.cpu = table, commit, cpu
        self.runs: list[Run] = []
        self.speeds: list[Speed] = []
        if table.runs_path.is_file():
            for number, line in enumerate(table.runs_path.read_text().splitlines(), 1):
                try:
                    content = json.loads(line)
                    self.remember(Speed(**content) if "ratio" in content else Run(**content))
                except (ValueError, TypeError):
                    raise RunError(f"{table.runs_path}, line {number}: not a run; remove that line") from None

    def remember(self, found: Run | Speed) -> None:
        if (found.commit, found.cpu) == (self.commit, self.cpu):
            (self.runs if isinstance(found, Run) else self.speeds).append(found)  # type: ignore[arg-type]

    def add(self, found: Run | Speed) -> None:
        with self.table.runs_path.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        self.remember(found)

    def digest(self, change: Change) -> str:
        facts = [
            self.table.options,
            change.options,
            self.table.data_digest,
            platform.python_version(),
            torch.__version__,
        ]
        text = json.dumps(facts).encode() + self.table.patch_of(change)
        return hashlib.sha256(text).hexdigest()[:12]

    def find(self, change: Change, seed: int, iterations: int) -> Run | None:
        digest = self.digest(change)
        same = [r for r in self.runs if (r.digest, r.seed, r.iterations) == (digest, seed, iterations)]
        return same[-1] if same else None

    def find_speed(self, change: Change) -> Speed | None:
        same = [speed for speed in self.speeds if speed.digest == self.digest(change)]
        return same[-1] if same else None


# --- running ----------------------------------------------------------------------------------------------------------


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
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, preexec_fn=first_call,
        check=False,
    )  # fmt: skip
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
    threads = max(1, (os.cpu_count() or 1) // jobs)
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


def note(text: str) -> None:
    """Progress; stdout holds the table alone."""
    print(f"# {text}", file=sys.stderr, flush=True)


def compare_speeds(ledger: Ledger, change: Change, steps: int, threads: int) -> Speed:
    """In turns; each turn is a process, for a patch is other code."""
    sides = [Change("baseline"), change]
    ratios = []
    for _ in range(TURNS):
        step_ms = []
        for side in sides:
            folder = prepare_tree(ledger.table, side, ledger.commit)
            options = [*ledger.table.options, *shlex.split(side.options)]
            text = call(folder, ["-m", "tools.bench", f"--steps={steps}", "--json", "--", *options], threads)
            step_ms.append(json.loads(text)["step"]["step_ms"])
        ratios.append(step_ms[0] / step_ms[1])
    ratio = statistics.median(ratios)
    note(f"{change.name}: {ratio:.3f} times as fast as the baseline")
    return Speed(change.name, ledger.digest(change), ledger.commit, ledger.cpu, ratio, ratios)


def has_one_speed(table: Table, change: Change) -> bool:
    """Whether a step takes the same time from the first to the last."""
    config, _ = train_gpt.parse_config([*table.options, *shlex.split(change.options)], {})
    return config.loop_start == 0 and not config.sample_depth


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """Mean paired difference to the baseline in thousandths of a bit per byte, and its standard error."""

    mb: float
    error: float
    seeds: int

    @property
    def is_resolved(self) -> bool:
        return abs(self.mb) > 2 * self.error

    @property
    def verdict(self) -> str:
        if not self.is_resolved:
            return "not resolved"
        return "helps" if self.mb < 0 else "hurts"

    def __str__(self) -> str:
        return f"{self.mb:+.1f} ± {self.error:.1f} ({self.seeds})"


def measure_effect(ledger: Ledger, change: Change, iterations: int, seeds: list[int]) -> Effect | None:
    pairs = [
        (ledger.find(change, seed, iterations), ledger.find(Change("baseline"), seed, ledger.table.iterations))
        for seed in seeds
    ]
    differences = [1000 * (a.val_bpb - b.val_bpb) for a, b in pairs if a and b]
    if len(differences) < 2:
        return None
    return Effect(mean(differences), sample_std(differences) / math.sqrt(len(differences)), len(differences))


def resolve(ledger: Ledger, steps: dict[str, int], jobs: int) -> None:
    """Runs every change of `steps` with more and more seeds, until its effect is resolved or no seed is left."""
    table = ledger.table
    open_changes = [change for change in table.changes if change.name in steps]
    for count in range(min(FIRST_SEEDS, len(table.seeds)), len(table.seeds) + 1):
        seeds = table.seeds[:count]
        wanted = [(Change("baseline"), seed, table.iterations) for seed in seeds if open_changes]
        wanted += [(change, seed, steps[change.name]) for change in open_changes for seed in seeds]
        run_missing(ledger, wanted, jobs)
        effects = {c.name: measure_effect(ledger, c, steps[c.name], seeds) for c in open_changes}
        open_changes = [c for c in open_changes if not (effect := effects[c.name]) or not effect.is_resolved]


@dataclass(frozen=True)
class Row:
    """What is known of a change."""

    change: Change
    at_steps: Effect | None
    speed: Speed | None
    at_time: Effect | None


def equal_time_steps(table: Table, speed: Speed) -> int:
    return round(table.iterations * speed.ratio)


def read_rows(ledger: Ledger, changes: list[Change]) -> list[Row]:
    table, rows = ledger.table, []
    for change in changes:
        speed = ledger.find_speed(change)
        at_time = measure_effect(ledger, change, equal_time_steps(table, speed), table.seeds) if speed else None
        rows.append(Row(change, measure_effect(ledger, change, table.iterations, table.seeds), speed, at_time))
    return rows


def format_noise(ledger: Ledger) -> str:
    scores = [run.val_bpb for seed in ledger.table.seeds if (run := find_baseline(ledger, seed))]
    spread = f"{1000 * sample_std(scores):.1f}" if len(scores) > 1 else "unknown"
    return (
        f"baseline {mean(scores):.5f} over {len(scores)} seeds, standard deviation {spread} mb; {ledger.commit[:7]}; "
        f"{ledger.cpu}"
    )


def find_baseline(ledger: Ledger, seed: int) -> Run | None:
    return ledger.find(Change("baseline"), seed, ledger.table.iterations)


def format_table(rows: list[Row]) -> str:
    headings = ("change", "predicted", "published", "equal steps, mb", "verdict", "speed", "equal time, mb", "verdict")
    lines = [headings]
    for row in rows:
        published = "-" if row.change.published_mb is None else f"{row.change.published_mb:+.1f}"
        speed = f"{row.speed.ratio:.3f}" if row.speed else "-"
        steps, time = row.at_steps, row.at_time
        lines.append(
            (
                row.change.name, row.change.predict or "-", published, str(steps or "-"),
                steps.verdict if steps else "-", speed, str(time or "-"), time.verdict if time else "-",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def format_signs(rows: list[Row]) -> list[str]:
    """How often the sign of the published effect came out, of the resolved rows that have one, by class."""
    known = [
        (row.change.kind or "all", row.change.published_mb < 0, row.at_steps.mb < 0)
        for row in rows
        if row.change.published_mb and row.at_steps and row.at_steps.is_resolved
    ]
    lines = []
    for kind in dict.fromkeys(["all", *(kind for kind, _, _ in known)]):
        ours = [(wanted, found) for own, wanted, found in known if kind in ("all", own)]
        shares = []
        for sign in (True, False):
            hits = [found == wanted for wanted, found in ours if wanted is sign]
            shares += [sum(hits) / len(hits)] if hits else []
        if shares:
            lines.append(
                f"signs, {kind}: balanced accuracy {mean(shares):.2f} over {len(ours)} rows (always one: 0.50)"
            )
    return lines


def draw(rows: list[Row], out: Path) -> None:
    """Left is better; a bar is two standard errors, a ring what was published at full scale."""
    rows = [row for row in rows if row.at_steps]
    figure, axes = import_pyplot().subplots(figsize=(8, 1.2 + 0.34 * len(rows)), layout="constrained")
    named: set[str] = set()

    def name_once(label: str) -> str | None:
        is_new = label not in named
        named.add(label)
        return label if is_new else None

    for at, row in enumerate(rows):
        for effect, shift, color, label in (
            (row.at_steps, -0.12, "#1f4e8c", "equal steps"),
            (row.at_time, 0.12, "#d1861d", "equal time"),
        ):
            if effect:
                axes.errorbar(effect.mb, at + shift, xerr=2 * effect.error, fmt="o", color=color, markersize=4,
                              capsize=2, label=name_once(label))  # fmt: skip
        if row.change.published_mb is not None:
            axes.plot(row.change.published_mb, at, "o", markersize=9, markerfacecolor="none", color=GREY,
                      label=name_once("published"))  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.change.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("thousandths of a bit per byte against the baseline; left is better")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, out, dpi=150)


# --- command line -----------------------------------------------------------------------------------------------------


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
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        for change in [] if args.steps_only else changes:
            if has_one_speed(table, change) and ledger.find_speed(change) is None:
                ledger.add(compare_speeds(ledger, change, args.bench_steps, threads))
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
    parser.add_argument("--bench_steps", type=positive, default=20, metavar="N", help="steps in a turn of a speed [20]")
    parser.add_argument("--show", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw it as well: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
