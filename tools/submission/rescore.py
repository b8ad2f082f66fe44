"""Scores the artifacts of a submission folder again with this repository's train_gpt.py, without a time budget, and
compares. A score belongs to the file: it is the same on every machine but for rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import train_gpt
from loopgolf.errors import ArtifactError
from tools.lib.runlog import RunError, parse_line
from tools.submission.entry import Entry
from tools.submission.trainlog import TrainLog, parse_float
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Verdict, decide

SCRIPT = Path(train_gpt.__file__).resolve()
TOLERANCE = 0.001  # bits per byte


def score_again(entry: Entry, data_path: Path, device: str = "auto") -> Verdict:
    """The verdict of a separate rule, which needs the validation text."""
    found: list[tuple[str, str]] = []
    pairs = [(entry.folder / f"artifact_seed{log.seed}.lg", log) for log in entry.logs if log.ours]
    pairs = [(path, log) for path, log in pairs if path.is_file()]
    if not pairs:
        raise RunError(f"{entry.folder}: it has no artifacts with logs of this repository, so nothing to score")
    for number, (path, log) in enumerate(pairs, 1):
        print(f"# scoring {path.name} ({number} of {len(pairs)})", file=sys.stderr, flush=True)
        try:
            train_gpt.load_artifact(path)
        except ArtifactError as error:
            found.append((BAD, str(error).replace(f"{entry.folder}/", "")))
            continue
        found += compare_score(log, score_artifact(path, log, data_path, device))
    return decide("score_again", found)


def compare_score(log: TrainLog, result: dict[str, str]) -> Found:
    """The result of scoring a file again, with what its log says."""
    logged, again = log.last("result").get("val_bpb", ""), result["val_bpb"]
    logged_bpb = parse_float(logged)
    if result["skipped"] != "0":
        yield BAD, f"{log.who}: {result['skipped']} updates were skipped when it was scored again"
    if logged_bpb is None:
        yield UNKNOWN, f"{log.who}: the file scores {again}, its log is incomplete"
    elif not abs(float(again) - logged_bpb) <= TOLERANCE:
        yield BAD, f"{log.who}: the file scores {again}, its log says {logged}"
    else:
        yield OK, f"{log.who}: {again} (log {logged})"


def score_artifact(path: Path, log: TrainLog, data_path: Path, device: str) -> dict[str, str]:
    """The result line of `train_gpt.py --score`. Stops as soon as the validation text turns out to be another one."""
    command = [sys.executable, str(SCRIPT), "--score", str(path), "--data_path", str(data_path), "--also", "none"]
    command += ["--tokenizer_path", str(path.parent / "tokenizer.model"), "--device", device]
    if "score_tokens" in log.settings:
        raise RunError(f"{log.who}: it was scored on so many tokens; this version counts documents (--score_documents)")
    # how much of the validation text is scored does not travel in the artifact
    command += ["--score_documents", log.settings.get("score_documents", "0")]
    expected = log.last("data", split="val").get("sha256")
    result: dict[str, str] = {}
    with subprocess.Popen(command, env=without_settings(), stdout=subprocess.PIPE, text=True) as child:
        for row in child.stdout or []:
            line = parse_line(row)
            if line and line.event == "data" and line.values.get("sha256") != expected:
                child.terminate()
                digests = f"sha256 {line.values.get('sha256', '')[:16]} instead of {(expected or 'unknown')[:16]}"
                raise RunError(f"{data_path}: not the validation text that the record was scored on ({digests})")
            if line and line.event == "forecast":
                print(f"# expected to take {line.values.get('seconds')} s", file=sys.stderr, flush=True)
            if line and line.event == "result":
                result = line.values
    if child.returncode or not result:
        raise RunError(f"{path.name}: scoring it again ended with exit code {child.returncode}")
    return result


def without_settings() -> dict[str, str]:
    """The environment without settings of train_gpt.py, which would change how the file is scored."""
    names = {field.name.upper() for field in fields(train_gpt.Config)}
    return {name: value for name, value in os.environ.items() if name not in names}
