"""Submission folders: builds one from finished runs, checks anybody's, compares two.

Examples:
    python -m tools.record build records/track_pocket/2026-05-01_Looped --author "A. Name" --github_id aname \\
        --name Looped --blurb "Four blocks, seven passes" runs/pocket-seed1337 runs/pocket-seed42 runs/pocket-seed2024
    python -m tools.record check records/track_pocket/2026-05-01_Looped
    python -m tools.record check records/track_pocket/2026-05-01_Looped --score --data_path data/local
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
from typing import Any

from loopgolf.errors import ConfigError, DoesNotFit
from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.lib.runlog import RunError, read_result
from tools.pack import ROOT
from tools.submission.entry import read_entry
from tools.submission.rescore import score_again
from tools.submission.rules import RULES, judge
from tools.submission.script import counted_sources, hash_sources, join_sources, pack_sources
from tools.submission.stats import mean, welch
from tools.submission.summary import PER_RUN_SETTINGS, config_of, describe_runs, repeat_command, result_lines
from tools.submission.tracks import TRACKS, Track
from tools.submission.trainlog import TrainLog, read_train_log
from tools.submission.verdicts import BAD, OK, UNKNOWN, Verdict, decide

MARGIN_NATS = 0.005  # by which the challenge asks a new record to be better
LARGEST_P = 0.01  # and how certain that has to be
META = ("author", "github_id", "name", "blurb")
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
each once. {counted}
"""
WITH_CODE = "Bytes are those of the largest artifact and of the packed script."
WITHOUT_CODE = "Bytes are those of the largest artifact; this track does not count the code."


# ----------------------------------------------------------------------------------------------------------------------
# build
# ----------------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> TrainLog:
    """The log of a finished run that made all of its updates at test time."""
    result = read_result(folder)
    log = read_train_log(folder / "log.txt") if (folder / "log.txt").is_file() else None
    if log is None or not log.ours or not log.is_finished:
        raise RunError(f"{folder}: its log.txt does not end with a result line; is it a finished run?")
    if str(log.seed) != result.get("seed") or log.last("result").get("val_bpb") != result.get("val_bpb"):
        raise RunError(f"{folder}: log.txt and result.json are of different runs")
    if log.skipped_updates:
        raise RunError(
            f"{folder}: {log.skipped_updates:,} updates at test time were skipped for lack of time, and a record needs "
            "skipped:0; run it again with a larger --eval_budget or a cheaper --score_mode"
        )
    return log


def require_same(logs: list[TrainLog], folders: list[Path]) -> None:
    """Refuses runs that are not one experiment."""
    for log, folder in zip(logs, folders):
        for name in sorted((logs[0].settings.keys() | log.settings.keys()) - PER_RUN_SETTINGS):
            expected, found = logs[0].settings.get(name), log.settings.get(name)
            if found != expected:
                raise RunError(
                    f"{folder}: {name}={found}, but {folders[0]} has {name}={expected}; only the seed may differ"
                )
        if [other.seed for other in logs].count(log.seed) > 1:
            raise RunError(f"{folder}: a second run of seed {log.seed}")


def sources_of_runs(logs: list[TrainLog], folders: list[Path]) -> dict[str, str]:
    """The files that the runs are made of; refused where they are not those of this repository."""
    try:
        sources = counted_sources(config_of(logs[0]))
    except (ConfigError, KeyError):
        sources = {}
    code_sha256 = hash_sources(sources)
    for log, folder in zip(logs, folders):
        if log.last("run").get("code_sha256") != code_sha256:
            raise RunError(f"{folder}: ran other code than is here now; check out the commit that it was run from")
    return sources


def build(out: Path, folders: list[Path], meta: dict[str, str]) -> list[Verdict]:
    """The folder, complete or not at all: it is made under a temporary name, checked, and renamed."""
    if out.exists():
        raise RunError(f"{out}: exists already; choose another name or remove it")
    track = TRACKS[meta["track"]]
    by_seed = sorted(zip([read_run(folder) for folder in folders], folders), key=lambda pair: pair[0].seed or 0)
    logs, folders = [log for log, _ in by_seed], [folder for _, folder in by_seed]
    require_same(logs, folders)
    if len(logs) < track.seeds:
        wanted = f"{meta['track']} asks for {track.seeds} seeds"
        raise RunError(f"{out}: {len(logs)} runs, and {wanted}; run more with tools.seeds")
    human = join_sources(sources_of_runs(logs, folders))
    code = pack_sources(human, logs[0].settings["recipe"])
    reserve = int(logs[0].settings["code_reserve"])
    if track.counts_code and len(code) > reserve:
        raise DoesNotFit(f"the packed code has {len(code)} bytes, more than code_reserve={reserve} of the runs")
    temporary = out.parent / f".{out.name}.{os.getpid()}.part"
    # the rules look at the names of the folder and of its parent
    inside = temporary / out.resolve().parent.name / out.name
    inside.mkdir(parents=True)
    try:
        write_folder(inside, logs, folders, human, meta)
        entry = read_entry(inside)
        verdicts = judge(entry, static=True)
        if not is_violated(verdicts):  # otherwise the script need not be started
            verdicts.append(decide("runs", list(RULES["runs"](entry))))
        if not is_violated(verdicts):
            os.replace(inside, out)
        return verdicts
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(inside: Path, logs: list[TrainLog], folders: list[Path], human: str, meta: dict[str, str]) -> None:
    """All files of a submission. `human`: the readable source."""
    track, code = TRACKS[meta["track"]], pack_sources(human, logs[0].settings["recipe"])
    (inside / "train_gpt.py").write_bytes(code)
    (inside / "train_gpt_human.py").write_text(human, encoding="utf-8")
    shutil.copyfile(ROOT / "requirements.txt", inside / "requirements.txt")
    for log, folder in zip(logs, folders):
        shutil.copyfile(folder / "log.txt", inside / f"train_seed{log.seed}.log")
        if track.ships_artifacts:
            shutil.copyfile(folder / "artifact.lg", inside / f"artifact_seed{log.seed}.lg")
            shutil.copyfile(folder / "tokenizer.model", inside / "tokenizer.model")
    facts = meta | describe_runs(logs, len(code), track)
    content = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (inside / "submission.json").write_text(content, encoding="utf-8")
    (inside / "README.md").write_text(format_readme(logs, len(code), track, facts), encoding="utf-8")


def format_readme(logs: list[TrainLog], code_bytes: int, track: Track, facts: dict[str, Any]) -> str:
    return README.format(
        **{name: facts[name] for name in (*META, "date", "track", "hardware")},
        torch=facts["pytorch_version"],
        results="\n".join(result_lines(logs, code_bytes, track)),
        command=repeat_command(logs),
        code_bytes=code_bytes,
        mode=logs[0].score_mode,
        tokens=int(logs[0].final_score_line["tokens"]),
        counted=WITH_CODE if track.counts_code else WITHOUT_CODE,
    )


# ----------------------------------------------------------------------------------------------------------------------
# check
# ----------------------------------------------------------------------------------------------------------------------


def check(folder: Path, static: bool, score: bool, data_path: Path | None, device: str) -> list[Verdict]:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    if score and data_path is None:
        raise RunError("--score needs --data_path, the dataset folder with the validation text of the record")
    if data_path is not None and not score:
        raise RunError("--data_path says what to --score; add --score or leave it out")
    entry = read_entry(folder)
    verdicts = judge(entry, static)
    if score and data_path is not None:
        verdicts.append(score_again(entry, data_path, device))
    return verdicts


def is_violated(verdicts: list[Verdict]) -> bool:
    return any(verdict.verdict == BAD for verdict in verdicts)


def show(verdicts: list[Verdict], folder: Path) -> None:
    for verdict in verdicts:
        print(f"{verdict.rule:<16}{verdict.verdict:<12}{verdict.detail}")
    counts = []
    for word in (OK, UNKNOWN, BAD):
        count = sum(verdict.verdict == word for verdict in verdicts)
        counts.append(f"{word.replace(' ', '_')}:{count}")
    print(f"check folder:{folder} {' '.join(counts)}")


# ----------------------------------------------------------------------------------------------------------------------
# compare
# ----------------------------------------------------------------------------------------------------------------------


def read_scored_logs(folder: Path) -> list[TrainLog]:
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    logs = [log for log in read_entry(folder).logs if log.final]
    if len(logs) < 2:
        raise RunError(f"{folder}: {len(logs)} seeds with a score in their logs, and a t-test needs two")
    return logs


def compare(folder: Path, other: Path) -> dict[str, Any]:
    """A against B: the smaller score is the better one. Losses per token are compared where both count the same tokens;
    where they do not, bits per byte are, expressed in nats per token of B."""
    finals_a = [log.final for log in read_scored_logs(folder) if log.final]
    finals_b = [log.final for log in read_scored_logs(other) if log.final]
    bpb_a = [score.bpb for score in finals_a]
    bpb_b = [score.bpb for score in finals_b]
    # nats per token over bits per byte: the same for two scores of the same tokens
    ratio_a = mean([score.loss / score.bpb for score in finals_a])
    ratio_b = mean([score.loss / score.bpb for score in finals_b])
    has_same_tokens = abs(ratio_a / ratio_b - 1) < 1e-3
    nats_a = [score.loss if has_same_tokens else ratio_b * score.bpb for score in finals_a]
    nats_b = [score.loss if has_same_tokens else ratio_b * score.bpb for score in finals_b]
    any_gain = welch(nats_b, nats_a)
    by_margin = welch(nats_b, nats_a, MARGIN_NATS)
    return dict(
        a=str(folder),
        b=str(other),
        seeds=[len(finals_a), len(finals_b)],
        bpb=[mean(bpb_a), mean(bpb_b)],
        bpb_difference=mean(bpb_b) - mean(bpb_a),
        nats_difference=any_gain.difference,
        same_tokens=has_same_tokens,
        t=any_gain.t,
        freedom=any_gain.freedom,
        p_better=any_gain.p,
        p_by_margin=by_margin.p,
        margin_nats=MARGIN_NATS,
        beats=any_gain.difference >= MARGIN_NATS and by_margin.p < LARGEST_P,
    )


def format_comparison(found: dict[str, Any]) -> str:
    """What `compare` found, in a sentence."""
    names = [f"{found[x]} ({found['bpb'][i]:.5f} bpb, {found['seeds'][i]} seeds)" for i, x in enumerate("ab")]
    units = "nats per token" if found["same_tokens"] else "nats per token of B (their tokenizers differ)"
    gap = f"{abs(found['bpb_difference']):.5f} bpb = {abs(found['nats_difference']):.5f} {units}"
    side = "below" if found["bpb_difference"] > 0 else "above"
    verb = "beats" if found["beats"] else "does not beat"
    any_gain = f"t = {found['t']:.2f} with {found['freedom']:.1f} degrees, p = {found['p_better']:.3g}"
    by_margin = f"Welch, one-sided: p = {found['p_by_margin']:.3g}; for any gain {any_gain}"
    goal = f"by at least {MARGIN_NATS} nats at p < {LARGEST_P}"
    return f"{names[0]} is {gap} {side} {names[1]} and {verb} it {goal} ({by_margin})."


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="a submission folder from finished runs of several seeds")
    command.add_argument("out", type=Path, metavar="OUT_DIR", help="records/TRACK/YYYY-MM-DD_NAME")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders under runs/, one per seed")
    for name in META:
        command.add_argument(f"--{name}", required=True)
    tracks = [name for name, track in TRACKS.items() if track.is_for_records]
    command.add_argument("--track", choices=tracks, help="default: from OUT_DIR")
    command.add_argument("--date", help="YYYY-MM-DD; default: from OUT_DIR, else today")
    command = commands.add_parser("check", help="a verdict per rule; exit code 4 when one is violated")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--static", action="store_true", help="execute nothing, not even our own script (--dry_run)")
    command.add_argument("--score", action="store_true", help="score the artifacts in DIR again, and compare")
    command.add_argument("--data_path", type=Path, metavar="D", help="for --score: the dataset folder")
    command.add_argument("--device", default="auto", help="for --score: auto, cpu or cuda [auto]")
    command.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    command = commands.add_parser("compare", help="whether A beats B by 0.005 nats at p < 0.01")
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def read_meta(args: argparse.Namespace) -> dict[str, str]:
    """The fields of submission.json that a person decides."""
    track = args.track or args.out.resolve().parent.name
    if track not in TRACKS:
        raise RunError(f"{args.out}: {track!r} is not a track; use --track {' | '.join(TRACKS)}")
    named = args.out.name[:10] if args.out.name[:4].isdigit() else ""
    date = args.date or named or datetime.date.today().isoformat()
    return {name: getattr(args, name) for name in META} | dict(date=date, track=track)


def run_compare(args: argparse.Namespace) -> int:
    found = compare(args.a, args.b)
    print(json.dumps(found, indent=1) if args.json else format_comparison(found))
    return 0


def run_build(args: argparse.Namespace) -> int:
    verdicts = build(args.out, args.runs, read_meta(args))
    show(verdicts, args.out)
    if is_violated(verdicts):
        print(f"error: {args.out} was not written: first repair what is violated above", file=sys.stderr)
        return 4
    return 0


def run_check(args: argparse.Namespace) -> int:
    verdicts = check(args.folder, args.static, args.score, args.data_path, args.device)
    if args.json:
        print(json.dumps([vars(verdict) for verdict in verdicts], indent=1))
    else:
        show(verdicts, args.folder)
    return 4 if is_violated(verdicts) else 0


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    commands = dict(build=run_build, check=run_check, compare=run_compare)
    return run_program(commands[args.command], args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
