"""Rules about the numbers in a folder: submission.json, README.md and artifacts are what the logs make them, and the
bytes are within the limit.
"""

from __future__ import annotations

import hashlib
import math
import re
from decimal import Decimal
from typing import Any

import train_gpt
from loopgolf.errors import ArtifactError
from tools.submission.entry import Entry, agrees, claims_by_seed
from tools.submission.folder_rules import count_code_bytes
from tools.submission.stats import mean, sample_std
from tools.submission.summary import (
    describe_runs,
    describe_seed,
    is_complete,
    repeat_command,
    require_numbers,
    result_lines,
)
from tools.submission.trainlog import Score, TrainLog
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Rule, has_kind, register

RULES: dict[str, Rule] = {}
rule = register(RULES)
# names that submission.json of other people has for a mean, and what of a score it is the mean of
MEANS = {"val_bpb": "bpb", "mean_bpb": "bpb", "mean_val_bpb": "bpb", "val_loss": "loss", "mean_val_loss": "loss"}


def compare_fields(entry: Entry, names: tuple[str, ...]) -> Found:
    """Fields of our own submission.json with what the logs make of them."""
    if not is_complete(entry.logs) or not entry.script:
        yield UNKNOWN, "the logs are incomplete"
        return
    computed = describe_runs(entry.logs, entry.code_bytes, entry.track_or_any)
    for name in names:
        if is_same(entry.get(name), computed[name]):
            yield OK, f"{name} {entry.get(name)}"
        else:
            yield BAD, f"{name} is {entry.get(name)}, the logs make {computed[name]}"


def is_same(stated: Any, computed: Any) -> bool:
    if isinstance(computed, float):
        return has_kind(stated, float) and abs(float(stated) - computed) < 1e-9
    return bool(stated == computed)


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


@rule
def scores(entry: Entry) -> Found:
    """Every number that submission.json gives for a seed is the one in that seed's log."""
    claims = claims_by_seed(entry.data)
    if not claims:
        yield UNKNOWN, "submission.json has no results per seed"
    for seed, values in claims.items():
        log = find_log(entry, seed)
        if log is None or not log.final:
            yield UNKNOWN, f"seed {seed}: no log with a score"
        elif entry.ours and not is_complete(entry.logs):
            yield UNKNOWN, "the logs are incomplete"
        elif entry.ours:
            row = describe_seed(require_numbers(log))
            for name in row.keys() | values.keys():
                if not is_same(values.get(name), row.get(name)):
                    yield BAD, f"seed {seed}: {name} is {values.get(name)}, its log says {row.get(name)}"
            yield OK, f"{len(row)} numbers of each of {len(claims)} seeds"
        else:
            yield from scores_of_others(seed, values, log)


def find_log(entry: Entry, seed: int) -> TrainLog | None:
    return next((log for log in entry.logs if seed in (log.seed, log.name_seed)), None)


def scores_of_others(seed: int, values: dict[str, Any], log: TrainLog) -> Found:
    if log.final is None:
        return
    score = find_stated_score(values, log)
    if score is None and "val_bpb" in values:
        yield BAD, f"seed {seed}: val_bpb is {values['val_bpb']}, {log.path.name} ends with {log.final.bpb}"
    elif score is not None and score != log.final:
        last = f"{log.final.label} {log.final.bpb}"
        yield UNKNOWN, f"seed {seed}: {score.bpb} is {score.label}, but the log goes on to {last}"
    for name, found in numbers_of(log).items():
        known = [value for value in found if value is not None]
        if name in values and not known:
            yield UNKNOWN, f"seed {seed}: the log does not tell {name}"
        elif name in values and not any(agrees(values[name], value) for value in known):
            yield BAD, f"seed {seed}: {name} is {values[name]}, {log.path.name} says {known[0]:.10g}"
    stated: Any = values.get("step_avg_ms", values.get("ms_per_step"))
    if has_kind(stated, float) and log.step_ms and abs(float(stated) / log.step_ms - 1) > 0.01:
        yield BAD, f"seed {seed}: {stated} ms per step, {log.train_s} s in {log.steps} steps are {log.step_ms:.2f}"
    yield OK, "as in the logs"


def numbers_of(log: TrainLog) -> dict[str, list[float | None]]:
    """What each field of a seed may be, by the log of somebody else."""
    seconds = [log.eval_s, log.final.eval_s if log.final else None]
    milliseconds = [value and 1000 * value for value in seconds]
    return {
        "val_loss": [score.loss for score in log.scores],
        "steps": [log.steps],
        "artifact_bytes": [log.artifact_bytes, log.total_bytes],
        "bytes_total": [log.total_bytes],
        "train_time_s": [log.train_s],
        "train_time_ms": [log.train_s and 1000 * log.train_s],
        "eval_time_s": seconds,
        "eval_time_ms": milliseconds,
        "ttt_time_ms": milliseconds,
        "ttt_eval_time_s": seconds,
    }


def find_stated_score(values: dict[str, Any], log: TrainLog) -> Score | None:
    """The last score of a log that is the val_bpb stated for it."""
    return next((score for score in reversed(log.scores) if agrees(values.get("val_bpb"), score.bpb)), None)


def scores_that_count(entry: Entry) -> list[Score]:
    """For each log of other people the score that submission.json rests on: the one it states, or else the last."""
    found = []
    claims = claims_by_seed(entry.data)
    for log in entry.logs:
        seed = log.seed if log.name_seed is None else log.name_seed
        values = claims.get(seed, {}) if seed is not None else {}
        score = find_stated_score(values, log) or log.final
        if score:
            found.append(score)
    return found


@rule
def means(entry: Entry) -> Found:
    """The headline numbers are the means over the seeds."""
    if entry.ours:
        yield from compare_fields(entry, ("val_bpb", "val_loss"))
        return
    finals = scores_that_count(entry)
    for name, attribute in MEANS.items():
        stated = entry.get(name)
        if stated is None or not finals:
            continue
        center = mean([getattr(score, attribute) for score in finals])
        if agrees(stated, center):
            yield OK, f"{name} {stated} is the mean of {len(finals)} logs"
        elif any(agrees(stated, getattr(score, attribute)) for log in entry.logs for score in log.scores):
            yield UNKNOWN, f"{name} {stated} is that of one run, or of another scoring; the mean is {center:.6f}"
        else:
            yield BAD, f"{name} is {stated}, the mean of {len(finals)} logs is {center:.6f}"


@rule
def deviations(entry: Entry) -> Found:
    """The stated deviations are those of the seeds."""
    if entry.ours:
        yield from compare_fields(entry, ("val_bpb_std", "val_loss_std"))
        return
    finals = scores_that_count(entry)
    for name, attribute in (("val_bpb_std", "bpb"), ("val_loss_std", "loss")):
        stated = entry.get(name)
        if stated is None:
            continue
        if len(finals) < 2:
            yield UNKNOWN, f"{name} {stated} of {len(finals)} log"
            continue
        of_sample = sample_std([getattr(score, attribute) for score in finals])
        of_population = of_sample * math.sqrt(1 - 1 / len(finals))
        if agrees(stated, of_sample):
            yield OK, f"{name} {stated}"
        elif agrees(stated, of_population):
            yield OK, f"{name} {stated}, divided by n instead of n - 1"
        else:
            yield BAD, f"{name} is {stated}, the logs make {of_sample:.6f}"


# ----------------------------------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------------------------------


@rule
def sizes(entry: Entry) -> Found:
    """The stated bytes are those of the script in the folder and of the artifacts in the logs."""
    if not entry.ours:
        yield from sizes_of_others(entry)
        return
    yield from compare_fields(entry, ("bytes_total", "bytes_code"))
    for log in entry.logs:
        expected = {entry.code_bytes, int(log.settings.get("code_reserve") or 0)}
        if not entry.track_or_any.counts_code:
            expected.add(0)
        if log.code_bytes is not None and log.code_bytes not in expected:
            yield BAD, f"{log.who}: code_bytes {log.code_bytes} is neither the script's size nor the reserve"


def sizes_of_others(entry: Entry) -> Found:
    here = entry.code_bytes
    codes = [log.code_bytes for log in entry.logs if log.code_bytes] + ([here] if here else [])
    logged = [log.total_bytes for log in entry.logs if log.total_bytes]
    with_script = [log.artifact_bytes + here for log in entry.logs if log.artifact_bytes and here]
    totals = [*logged, *with_script, *(mean(part) for part in (logged, with_script) if part)]
    for name, known in (("bytes_total", totals), ("bytes_code", codes), ("code_bytes", codes)):
        stated = entry.get(name)
        if stated is None:
            continue
        if not known:
            yield UNKNOWN, f"{name} {stated}: no log tells"
        elif any(agrees(stated, value) for value in known):
            yield OK, f"{name} {stated:,}"
        else:
            yield BAD, f"{name} is {stated}, the logs say {' '.join(f'{value:,.0f}' for value in known[:3])}"


@rule
def limit(entry: Entry) -> Found:
    """What the track counts, the artifact and in most tracks the code, is within its byte limit for every seed."""
    track = entry.track_or_any
    code_here = count_code_bytes(entry)
    level = BAD if entry.is_settled else UNKNOWN
    largest = 0
    for log in entry.logs:
        if log.artifact_bytes is None:
            yield UNKNOWN, f"{log.who}: the log does not tell the size of the artifact"
            continue
        here = track.count_bytes(log.artifact_bytes, code_here)
        logged = log.total_bytes or here
        if log.ours and log.code_bytes is not None:
            logged = track.count_bytes(log.artifact_bytes, log.code_bytes)
        if here > track.byte_limit and (log.ours or logged > track.byte_limit):
            least = min(here, logged) if logged > track.byte_limit else here
            yield level, f"{log.who}: {least:,} bytes are {least - track.byte_limit:,} over the limit"
        elif here > track.byte_limit:
            yield UNKNOWN, f"{log.who}: {logged:,} bytes in the log, but {here:,} with the script in the folder"
        elif logged > track.byte_limit:
            sizes_found = f"{logged:,} bytes when it ran, {here:,} with the script in the folder"
            yield BAD if log.ours else UNKNOWN, f"{log.who}: {sizes_found}"
        largest = max(largest, logged)
        if log.ours and log.last("result").get("limit") != str(track.byte_limit):
            yield BAD, f"{log.who}: ran with byte_limit {log.last('result').get('limit')}, not {track.byte_limit}"
    if largest:
        yield OK, f"at most {largest:,} of {track.byte_limit:,} bytes"


# ----------------------------------------------------------------------------------------------------------------------
# What else is in the folder
# ----------------------------------------------------------------------------------------------------------------------


@rule
def environment(entry: Entry) -> Found:
    """Hardware and versions in submission.json are those in the logs."""
    if entry.ours:
        yield from compare_fields(entry, ("hardware", "pytorch_version"))
        return
    stated = entry.get("pytorch_version")
    for log in entry.logs:
        logged = log.settings.get("torch")
        if logged and stated and logged != stated:
            yield BAD, f"pytorch_version is {stated}, the log of {log.who} says {logged}"
        elif logged and stated:
            yield OK, f"PyTorch {logged}"


@rule
def artifacts(entry: Entry) -> Found:
    """The artifacts in the folder can be loaded, and are the very files that the logs scored."""
    paths = sorted(entry.folder.glob("*.lg"))
    if not paths:
        yield BAD if entry.track_or_any.ships_artifacts else OK, "there is none"
        return
    tokenizer = entry.folder / "tokenizer.model"
    tokenizer_sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    for path in paths:
        log = next((log for log in entry.logs if path.name == f"artifact_seed{log.seed}.lg"), None)
        if log is None:
            yield BAD, f"{path.name} belongs to no log"
            continue
        try:
            artifact = train_gpt.load_artifact(path)
        except ArtifactError as error:
            yield BAD, str(error).replace(f"{entry.folder}/", "")
            continue
        if artifact.sha256 != log.last("result").get("artifact_sha256"):
            yield BAD, f"{path.name} is not the artifact that {log.path.name} scored (sha256)"
        if artifact.size != log.artifact_bytes:
            yield BAD, f"{path.name} has {artifact.size:,} bytes, its log says {log.artifact_bytes}"
        if tokenizer_sha256 and artifact.tokenizer.get("sha256") != tokenizer_sha256:
            yield BAD, f"{path.name} was made with another tokenizer than tokenizer.model"
    yield OK, f"{len(paths)} artifacts can be loaded and have the digests in the logs"


@rule
def readme(entry: Entry) -> Found:
    """The numbers in README.md are those of the logs."""
    if not entry.readme:
        yield BAD, "README.md is missing or empty"
        return
    if not entry.ours:
        yield from readme_of_others(entry)
        return
    if not is_complete(entry.logs) or not entry.script:
        yield UNKNOWN, "the logs are incomplete"
        return
    lines = result_lines(entry.logs, entry.code_bytes, entry.track_or_any)
    try:
        lines.append(repeat_command(entry.logs))
    except (KeyError, ValueError):
        yield BAD, "the log lacks the settings that the command repeats"
    present = set(entry.readme.splitlines())
    for line in lines:
        if line and line not in present:
            yield BAD, f"README.md does not have the line {line!r}"
    yield OK, "headline, table and command are what the logs make them"


def readme_of_others(entry: Entry) -> Found:
    """Rows of tables that start with a seed: what looks like a score must be in that seed's log."""
    n_rows = 0
    for row in re.findall(r"^\|(.+)\|\s*$", entry.readme or "", re.MULTILINE):
        cells = [re.sub(r"[*`~ ]", "", cell) for cell in row.split("|")]
        named = re.fullmatch(r"(?:seed)?(\d+)", cells[0], re.IGNORECASE)
        log = find_log(entry, int(named[1])) if named else None
        stated = [Decimal(cell) for cell in cells[1:] if re.fullmatch(r"[1-4]\.\d{4,}", cell)]
        if log and stated:
            n_rows += 1
            yield from scores_in_row(entry, log, cells[0], stated)
    headline = entry.get("val_bpb")
    if n_rows:
        yield OK, f"{n_rows} rows agree with the logs"
    elif has_kind(headline, float) and f"{float(headline):.4f}" in (entry.readme or ""):
        yield OK, "has the headline number; no table of seeds"
    else:
        yield UNKNOWN, "no table of seeds that could be compared"


def scores_in_row(entry: Entry, log: TrainLog, name: str, stated: list[Decimal]) -> Found:
    known = [float(text) for other in [log, *entry.others] for text in other.numbers]
    for value in stated:
        if not any(agrees(value, number) for number in known):
            yield UNKNOWN, f"row of seed {name}: {value} is not in its log"
    of_seed = [log, *(other for other in entry.others if log.seed in (other.seed, other.name_seed))]
    finals = [score.bpb for other in of_seed for score in other.scores]
    if log.final and not any(agrees(value, bpb) for value in stated for bpb in finals):
        yield BAD, f"row of seed {name} has {stated[0]}, its log ends with {log.final.bpb}"
