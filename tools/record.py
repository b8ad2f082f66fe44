"""Submission folders: builds one from finished runs, checks anybody's, compares two.

Examples:
    python -m tools.record build records/track_pocket/2026-05-01_Looped --author "A. Name" --github_id aname \\
        --name Looped --blurb "Four blocks, seven passes" runs/pocket-seed1337 runs/pocket-seed42 runs/pocket-seed2024
    python -m tools.record check records/track_pocket/2026-05-01_Looped
    python -m tools.record compare records/track_pocket/2026-05-01_Looped records/track_pocket/2026-04-01_Flat

Exit codes: 0 good, 2 bad input, 3 code over its reserve, 4 a rule is violated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
from pathlib import Path

from loopgolf.errors import DoesNotFit
from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.lib.runlog import RunError, read_result
from tools.pack import ROOT
from tools.submission import entry as layout
from tools.submission.entry import PER_RUN_SETTINGS, TRACKS, Entry, read_entry
from tools.submission.rules import RULES, judge
from tools.submission.script import counted_sources, hash_sources, join_sources, pack_sources
from tools.submission.stats import mean, welch
from tools.submission.trainlog import TrainLog, read_train_log
from tools.submission.verdicts import BAD, Verdict, decide

MARGIN_NATS, LARGEST_P = 0.005, 0.01  # what the challenge asks of a new record
README = """# {name}

{blurb}

{results}

Track `{track}`, {date}, by {author} ([{github_id}](https://github.com/{github_id})). {hardware}, PyTorch {torch}.

## Repeat it

In this folder, after `pip install -r requirements.txt`, with the dataset at its `data_path`:

```
{command}
```

`train_gpt.py` is a zip application of {code_bytes:,} bytes, packed from `train_gpt_human.py`. `val_bpb` is computed
from the artifact on disk, in the mode `{mode}` that was fixed before the run; {tokens:,} validation tokens are scored,
each once. Bytes are those of the largest artifact and of the packed script.
"""


# ----------------------------------------------------------------------------------------------------------------------
# build
# ----------------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> TrainLog:
    """The log of a finished run."""
    result = read_result(folder)
    log = read_train_log(folder / "log.txt") if (folder / "log.txt").is_file() else None
    if log is None or not log.ours or not log.is_finished:
        raise RunError(f"{folder}: its log.txt does not end with a result line; is it a finished run?")
    if str(log.seed) != result.get("seed") or log.last("result").get("val_bpb") != result.get("val_bpb"):
        raise RunError(f"{folder}: log.txt and result.json are of different runs")
    return log


def require_same(logs: list[TrainLog], folders: list[Path], code_sha256: str) -> None:
    """Refuses runs that are not one experiment, and those that this repository's code did not make."""
    for log, folder in zip(logs, folders):
        if log.last("run").get("code_sha256") != code_sha256:
            raise RunError(f"{folder}: ran other code than is here now; check out the commit that it was run from")
        for name in sorted((logs[0].settings.keys() | log.settings.keys()) - PER_RUN_SETTINGS):
            a, b = logs[0].settings.get(name), log.settings.get(name)
            if a != b:
                raise RunError(f"{folder}: {name}={b}, but {folders[0]} has {name}={a}; only the seed may differ")
        if [other.seed for other in logs].count(log.seed) > 1:
            raise RunError(f"{folder}: a second run of seed {log.seed}")


def build(out: Path, folders: list[Path], meta: dict[str, str]) -> list[Verdict]:
    """The folder, complete or not at all: it is made beside, checked, and renamed."""
    if out.exists():
        raise RunError(f"{out}: exists already; choose another name or remove it")
    logs = [read_run(folder) for folder in folders]
    sources = counted_sources(logs[0].moe_experts)
    require_same(logs, folders, hash_sources(sources))
    if len(logs) < (wanted := TRACKS[meta["track"]].seeds):
        raise RunError(
            f"{out}: {len(logs)} runs, and {meta['track']} asks for {wanted} seeds; run more with tools.seeds"
        )
    order = sorted(range(len(logs)), key=lambda i: logs[i].seed)
    logs, folders = [logs[i] for i in order], [folders[i] for i in order]
    code = pack_sources(join_sources(sources))
    reserve = int(logs[0].settings["code_reserve"])
    if len(code) > reserve:
        over = f"{len(code)} bytes, more than code_reserve={reserve} of the runs"
        raise DoesNotFit(f"the packed code has {over}")
    beside = out.parent / f".{out.name}.{os.getpid()}.part"
    # the checks see the name that the folder will have
    inside = beside / out.resolve().parent.name / out.name
    inside.mkdir(parents=True)
    try:
        write_folder(inside, logs, folders, code, meta)
        verdicts = judge(entry := read_entry(inside), static=True)
        if all(v.verdict != BAD for v in verdicts):  # what is wrong already need not be started
            verdicts.append(decide("runs", list(RULES["runs"](entry))))
        if all(v.verdict != BAD for v in verdicts):
            os.replace(inside, out)
        return verdicts
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_folder(inside: Path, logs: list[TrainLog], folders: list[Path], code: bytes, meta: dict[str, str]) -> None:
    facts = layout.describe_runs(logs, len(code))
    mode, sources = logs[0].last("result")["score_mode"], counted_sources(logs[0].moe_experts)
    (inside / "train_gpt.py").write_bytes(code)
    (inside / "train_gpt_human.py").write_text(join_sources(sources), encoding="utf-8")
    shutil.copyfile(ROOT / "requirements.txt", inside / "requirements.txt")
    for log, folder in zip(logs, folders):
        shutil.copyfile(folder / "log.txt", inside / f"train_seed{log.seed}.log")
        if TRACKS[meta["track"]].ships_artifacts:
            shutil.copyfile(folder / "artifact.lg", inside / f"artifact_seed{log.seed}.lg")
            shutil.copyfile(folder / "tokenizer.model", inside / "tokenizer.model")
    (inside / "submission.json").write_text(json.dumps(meta | facts, indent=2, ensure_ascii=False) + "\n")
    text = README.format(
        **meta, results="\n".join(layout.result_lines(logs, len(code))), hardware=facts["hardware"],
        torch=facts["pytorch_version"], command=layout.repeat_command(logs), code_bytes=len(code), mode=mode,
        tokens=int(logs[0].last("score", what="artifact", mode=mode)["tokens"]),
    )  # fmt: skip
    (inside / "README.md").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# check and compare
# ----------------------------------------------------------------------------------------------------------------------


def show(verdicts: list[Verdict], folder: Path) -> None:
    for v in verdicts:
        print(f"{v.rule:<16}{v.verdict:<12}{v.detail}")
    counts = {word: sum(v.verdict == word for v in verdicts) for word in ("ok", "cannot tell", BAD)}
    print(f"check folder:{folder} " + " ".join(f"{word.replace(' ', '_')}:{n}" for word, n in counts.items()))


def seed_scores(folder: Path) -> Entry:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    entry = read_entry(folder)
    entry.logs = [log for log in entry.logs if log.final]
    if len(entry.logs) < 2:
        raise RunError(f"{folder}: {len(entry.logs)} seeds with a score in their logs, and a t-test needs two")
    return entry


def compare(folder: Path, other: Path) -> dict:
    """A against B: the smaller score is the better one. Losses per token are compared as such only where both count
    the same tokens; else bits per byte are, in nats per token of B."""
    a, b = seed_scores(folder).logs, seed_scores(other).logs
    ratio_a, ratio_b = (mean([log.final.loss / log.final.bpb for log in logs]) for logs in (a, b))
    same_tokens = abs(ratio_a / ratio_b - 1) < 1e-3
    bpb_a, bpb_b = [log.final.bpb for log in a], [log.final.bpb for log in b]
    nats_a = [log.final.loss for log in a] if same_tokens else [ratio_b * bpb for bpb in bpb_a]
    nats_b = [log.final.loss for log in b] if same_tokens else [ratio_b * bpb for bpb in bpb_b]
    any_gain, gain = welch(nats_b, nats_a), welch(nats_b, nats_a, MARGIN_NATS)
    return dict(
        a=str(folder), b=str(other), seeds=[len(a), len(b)], bpb=[mean(bpb_a), mean(bpb_b)],
        bpb_difference=mean(bpb_b) - mean(bpb_a), nats_difference=gain.difference, same_tokens=same_tokens,
        t=any_gain.t, freedom=any_gain.freedom, p_better=any_gain.p, p_by_margin=gain.p, margin_nats=MARGIN_NATS,
        beats=gain.difference >= MARGIN_NATS and gain.p < LARGEST_P,
    )  # fmt: skip


def sentence(found: dict) -> str:
    side = "below" if found["bpb_difference"] > 0 else "above"
    units = "nats per token" if found["same_tokens"] else "nats per token of B (their tokenizers differ)"
    verb = "beats" if found["beats"] else "does not beat"
    a, b = (f"{found[x]} ({found['bpb'][i]:.5f} bpb, {found['seeds'][i]} seeds)" for i, x in enumerate("ab"))
    gap = f"{abs(found['bpb_difference']):.5f} bpb = {abs(found['nats_difference']):.5f} {units}"
    any_gain = f"t = {found['t']:.2f} with {found['freedom']:.1f} degrees, p = {found['p_better']:.3g}"
    return (f"{a} lies {gap} {side} {b} and {verb} it by at least {MARGIN_NATS} nats at p < {LARGEST_P} "
            f"(Welch, one-sided: p = {found['p_by_margin']:.3g}; for any gain {any_gain}).")  # fmt: skip


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="a submission folder from finished runs of several seeds")
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="records/TRACK/YYYY-MM-DD_NAME")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders under runs/, one per seed")
    for name in ("author", "github_id", "name", "blurb"):
        command.add_argument(f"--{name}", required=True)
    command.add_argument("--track", choices=[t for t in TRACKS if "non_record" not in t], help="default: from OUT_DIR")
    command.add_argument("--date", help="YYYY-MM-DD; default: from OUT_DIR, else today")
    command = commands.add_parser("check", help="a verdict per rule; exit code 4 when one is violated")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--static", action="store_true", help="run nothing, not even our own script with --dry_run")
    command.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    command = commands.add_parser("compare", help="whether A beats B by 0.005 nats at p < 0.01")
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def describe(args: argparse.Namespace) -> dict[str, str]:
    """The fields of submission.json that a person decides."""
    track = args.track or args.out.resolve().parent.name
    if track not in TRACKS:
        raise RunError(f"{args.out}: {track!r} is not a track; use --track {' | '.join(TRACKS)}")
    date = args.date or (args.out.name[:10] if args.out.name[:4].isdigit() else datetime.date.today().isoformat())
    return {name: getattr(args, name) for name in ("author", "github_id", "name", "blurb")} | dict(
        date=date, track=track
    )


def run(args: argparse.Namespace) -> int:
    if args.command == "compare":
        found = compare(args.a, args.b)
        print(json.dumps(found, indent=1) if args.json else sentence(found))
        return 0
    if args.command == "build":
        verdicts = build(args.out, args.runs, describe(args))
        show(verdicts, args.out)
    elif not args.folder.is_dir():
        raise RunError(f"{args.folder}: no such folder")
    else:
        verdicts = judge(read_entry(args.folder), args.static)
        print(json.dumps([vars(v) for v in verdicts], indent=1)) if args.json else show(verdicts, args.folder)
    if all(v.verdict != BAD for v in verdicts):
        return 0
    if args.command == "build":
        print(f"error: {args.out} was not written: mend what is violated above", file=sys.stderr)
    return 4


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
