"""Rules about what the logs say, and whether every number in the folder is theirs and within the limits."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from decimal import Decimal

import train_gpt
from loopgolf.errors import ArtifactError, ConfigError
from tools.submission import entry as layout
from tools.submission.entry import LIMIT_BYTES, PER_RUN_SETTINGS, Entry, agrees
from tools.submission.folder_rules import code_size
from tools.submission.stats import mean, sample_std
from tools.submission.trainlog import TrainLog
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Rule, has_kind, register

RULES: dict[str, Rule] = {}
rule = register(RULES)
# tokens of the challenge's whole validation set, as its scripts count them: cut to windows, so some may be missing
WHOLE = {"caseops": 47_851_520, "sp1024": 62_021_632, "sp4096": 45_508_608, "sp8192": 40_540_160,
         "byte260": 151_130_112}  # fmt: skip
LARGEST_WINDOW = 32768


# ----------------------------------------------------------------------------------------------------------------------
# The logs
# ----------------------------------------------------------------------------------------------------------------------


@rule
def log_end(entry: Entry) -> Found:
    """Every log ends as a finished run does: with a score of the exported model."""
    for log in entry.logs:
        if log.ours and not log.is_finished:
            yield BAD, f"{log.path.name} does not end with a whole result line"
        elif not log.ours and log.scores:
            yield OK, f"the last score is {log.final.label}"
        elif not log.ours:
            yield UNKNOWN, f"{log.path.name}: no score of the exported model in a form that is known here"
        else:
            yield OK, "every log ends with its result line"


@rule
def log_sums(entry: Entry) -> Found:
    """What a log says twice agrees: score, seconds, bytes, seed."""
    for log in entry.logs:
        if log.ours and not log.is_finished:
            yield UNKNOWN, f"{log.path.name} is not whole"
        elif log.ours:
            yield from ((BAD, f"{log.who}: {text}") for text in contradictions(log))
        elif None not in (log.total_bytes, log.artifact_bytes, log.code_bytes):
            if log.total_bytes != log.artifact_bytes + log.code_bytes:
                yield BAD, f"{log.who}: {log.artifact_bytes:,} + {log.code_bytes:,} is not {log.total_bytes:,} bytes"
            else:
                yield OK, "model and code add up to the total"
    if entry.ours:
        yield OK, "result lines agree with the lines above them"


def contradictions(log: TrainLog) -> Iterator[str]:
    result = log.last("result")
    score = log.last("score", what="artifact", mode=result.get("score_mode", ""))
    for name in ("val_bpb", "val_loss"):
        if score.get(name) != result.get(name):
            yield f"{name} {result.get(name)} in the result, {score.get(name)} where it was scored"
    try:
        bpb = float(score["val_loss"]) * int(score["tokens"]) / math.log(2) / int(score["bytes"])
        if abs(bpb - float(score["val_bpb"])) > 1e-7:
            yield f"val_loss, tokens and bytes make {bpb:.8f} bits per byte, not {score['val_bpb']}"
    except (KeyError, ValueError, ZeroDivisionError):
        yield "its score line is not whole"
    stopped = log.last("clock", what="stop").get("used_s")
    if stopped != result.get("train_s"):
        yield f"train_s {result.get('train_s')}, but the clock stopped at {stopped}"
    if log.total_bytes is None or log.total_bytes != (log.artifact_bytes or 0) + (log.code_bytes or 0):
        yield f"{log.artifact_bytes} + {log.code_bytes} is not {log.total_bytes} bytes"
    if not {result.get("seed"), log.settings.get("seed")} <= {str(log.seed)}:
        yield f"seed {log.settings.get('seed')} in the config, {result.get('seed')} in the result"
    trained = [x.values for x in log.lines if x.event == "train"]
    if log.steps and trained and trained[-1].get("step", "").isdigit() and int(trained[-1]["step"]) > log.steps:
        yield f"{log.steps} steps in the result, {trained[-1]['step']} in a train line"


@rule
def same_run(entry: Entry) -> Found:
    """The logs differ in their seed and in nothing else: same settings, same code, same data, same machine."""
    if len(entry.logs) < 2:
        yield OK if entry.logs else UNKNOWN, f"{len(entry.logs)} log"
        return
    first, level = entry.logs[0], BAD if entry.is_settled else UNKNOWN
    for log in entry.logs[1:]:
        names = (first.settings.keys() | log.settings.keys()) - PER_RUN_SETTINGS
        differ = sorted(name for name in names if first.settings.get(name) != log.settings.get(name))
        differ = [name for name in differ if log.ours or not re.search(r"path|dir|file|rank|prefix|^torch$", name)]
        if differ:
            pairs = (f"{name} {first.settings.get(name)} | {log.settings.get(name)}" for name in differ[:3])
            yield level, f"{first.who} and {log.who} differ in {', '.join(pairs)}"
        if log.ours:
            for event, key in (
                ("run", "code_sha256"),
                ("versions", "torch"),
                ("hardware", "name"),
                ("hardware", "world"),
            ):
                if first.last(event).get(key) != log.last(event).get(key):
                    yield BAD, f"{first.who} and {log.who} differ in {event} {key}"
            for split in ("train", "val"):
                if first.last("data", split=split).get("sha256") != log.last("data", split=split).get("sha256"):
                    yield BAD, f"{first.who} and {log.who} have other {split} data"
        elif first.code_bytes and log.code_bytes and first.code_bytes != log.code_bytes:
            yield (
                level,
                f"the script of {first.who} had {first.code_bytes:,} bytes, that of {log.who} {log.code_bytes:,}",
            )
    if not first.settings and not entry.ours:
        yield UNKNOWN, "the logs do not list their settings"
    yield OK, f"{len(entry.logs)} logs of one configuration"


@rule
def seeds(entry: Entry) -> Found:
    """As many different seeds as the track asks for, each with its own log, the same in submission.json."""
    wanted = entry.track.seeds if entry.track else 3 if entry.ours else 1
    have = [log.seed for log in entry.logs]
    if len(set(have)) < wanted:
        yield BAD if entry.ours else UNKNOWN, f"{len(set(have))} different seeds have a log, {wanted} are needed"
    for seed in sorted({seed for seed in have if have.count(seed) > 1 and seed is not None}):
        names = ", ".join(log.path.name for log in entry.logs if log.seed == seed)
        yield BAD if entry.is_settled else UNKNOWN, f"{have.count(seed)} logs are of seed {seed}: {names}"
    for log in entry.logs:
        if log.name_seed is not None and log.seed != log.name_seed:
            yield BAD, f"{log.path.name} is a log of seed {log.seed}"
    if len({log.digest for log in entry.logs}) < len(entry.logs):
        yield BAD, "two logs are the same file"
    stated = entry.get("seeds")
    stated = [int(seed) for seed in stated if str(seed).isdigit()] if isinstance(stated, list | dict) else []
    if stated and sorted(stated) != sorted(seed for seed in have if seed is not None):
        yield BAD, f"submission.json has seeds {sorted(stated)}, the logs {sorted(s for s in have if s is not None)}"
    if entry.ours and sorted(layout.claims(entry.data)) != sorted(set(have)):
        yield BAD, f"seed_results has seeds {sorted(layout.claims(entry.data))}, the logs {sorted(set(have))}"
    yield OK, f"seeds {', '.join(map(str, have))}"


# ----------------------------------------------------------------------------------------------------------------------
# The numbers
# ----------------------------------------------------------------------------------------------------------------------


def is_complete(entry: Entry) -> bool:
    known = ((log.final, log.artifact_bytes, log.steps, log.step_ms, log.eval_s, log.seed) for log in entry.logs)
    return bool(entry.logs) and not any(None in row for row in known)


def compare(entry: Entry, names: tuple[str, ...]) -> Found:
    """Fields of our own submission.json against what the logs make of them."""
    if not is_complete(entry) or not entry.script:
        yield UNKNOWN, "the logs are not whole"
        return
    computed = layout.describe_runs(entry.logs, entry.script.stat().st_size)
    for name in names:
        if not same(entry.get(name), computed[name]):
            yield BAD, f"{name} is {entry.get(name)}, the logs make {computed[name]}"
        else:
            yield OK, f"{name} {entry.get(name)}"


def same(stated, computed) -> bool:
    if isinstance(computed, float):
        return has_kind(stated, float) and abs(float(stated) - computed) < 1e-9
    return stated == computed


@rule
def scores(entry: Entry) -> Found:
    """Every number that submission.json gives for a seed is the one in that seed's log."""
    claimed = layout.claims(entry.data)
    if not claimed:
        yield UNKNOWN, "submission.json has no results per seed"
    for seed, values in claimed.items():
        log = next((log for log in entry.logs if seed in (log.seed, log.name_seed)), None)
        if log is None or not log.final:
            yield UNKNOWN, f"seed {seed}: no log with a score"
        elif entry.ours and not is_complete(entry):
            yield UNKNOWN, "the logs are not whole"
        elif entry.ours:
            row = layout.describe_runs([log], 0)["seed_results"][str(log.seed)]
            for name in row.keys() | values.keys():
                if not same(values.get(name), row.get(name)):
                    yield BAD, f"seed {seed}: {name} is {values.get(name)}, its log says {row.get(name)}"
            yield OK, f"{len(row)} numbers of each of {len(claimed)} seeds"
        else:
            yield from scores_of_strangers(seed, values, log)


def scores_of_strangers(seed: int, values: dict, log: TrainLog) -> Found:
    score = next((x for x in reversed(log.scores) if agrees(values.get("val_bpb"), x.bpb)), None)
    if score is None and "val_bpb" in values:
        yield BAD, f"seed {seed}: val_bpb is {values['val_bpb']}, {log.path.name} ends with {log.final.bpb}"
    elif score is not None and score != log.final:
        last = f"{log.final.label} {log.final.bpb}"
        yield UNKNOWN, f"seed {seed}: {score.bpb} is {score.label}, but the log goes on to {last}"
    seconds = [s for s in (log.eval_s, log.final.eval_s) if s is not None]
    known = dict(
        val_loss=[x.loss for x in log.scores], steps=[log.steps],
        artifact_bytes=[log.artifact_bytes, log.total_bytes], bytes_total=[log.total_bytes],
        train_time_s=[log.train_s], train_time_ms=[log.train_s and 1000 * log.train_s], eval_time_s=seconds,
        eval_time_ms=[1000 * s for s in seconds], ttt_time_ms=[1000 * s for s in seconds], ttt_eval_time_s=seconds,
    )  # fmt: skip
    for name, options in known.items():
        options = [value for value in options if value is not None]
        if name in values and not options:
            yield UNKNOWN, f"seed {seed}: the log does not tell {name}"
        elif name in values and not any(agrees(values[name], value) for value in options):
            yield BAD, f"seed {seed}: {name} is {values[name]}, {log.path.name} says {options[0]:.10g}"
    stated = values.get("step_avg_ms", values.get("ms_per_step"))
    if stated is not None and log.step_ms and abs(float(stated) / log.step_ms - 1) > 0.01:
        yield BAD, f"seed {seed}: {stated} ms per step, {log.train_s} s in {log.steps} steps are {log.step_ms:.2f}"
    yield OK, "as in the logs"


@rule
def means(entry: Entry) -> Found:
    """The headline numbers are the means over the seeds."""
    if entry.ours:
        yield from compare(entry, ("val_bpb", "val_loss"))
        return
    finals = [score for log in entry.logs if (score := chosen(entry, log))]
    for name, attribute in (("val_bpb", "bpb"), ("mean_bpb", "bpb"), ("mean_val_bpb", "bpb"), ("val_loss", "loss"),
                            ("mean_val_loss", "loss")):  # fmt: skip
        stated = entry.get(name)
        values = [getattr(score, attribute) for score in finals]
        if stated is None or not values:
            continue
        if agrees(stated, mean(values)):
            yield OK, f"{name} {stated} is the mean of {len(values)} logs"
        elif any(agrees(stated, getattr(score, attribute)) for log in entry.logs for score in log.scores):
            yield UNKNOWN, f"{name} {stated} is that of one run, or of another scoring; the mean is {mean(values):.6f}"
        else:
            yield BAD, f"{name} is {stated}, the mean of {len(values)} logs is {mean(values):.6f}"


def chosen(entry: Entry, log: TrainLog):
    """The score of a stranger's log that submission.json rests on: the one it states, else the last."""
    values = layout.claims(entry.data).get(log.seed if log.name_seed is None else log.name_seed, {})
    return next((x for x in reversed(log.scores) if agrees(values.get("val_bpb"), x.bpb)), log.final)


@rule
def deviations(entry: Entry) -> Found:
    """The stated deviations are those of the seeds."""
    if entry.ours:
        yield from compare(entry, ("val_bpb_std", "val_loss_std"))
        return
    finals = [score for log in entry.logs if (score := chosen(entry, log))]
    for name, attribute in (("val_bpb_std", "bpb"), ("val_loss_std", "loss")):
        stated, values = entry.get(name), [getattr(score, attribute) for score in finals]
        if stated is None:
            continue
        if len(values) < 2:
            yield UNKNOWN, f"{name} {stated} of {len(values)} log"
            continue
        sample = sample_std(values)
        whole = sample * math.sqrt(1 - 1 / len(values))
        if agrees(stated, sample):
            yield OK, f"{name} {stated}"
        elif agrees(stated, whole):
            yield OK, f"{name} {stated}, with n and not n - 1 below the line"
        else:
            yield BAD, f"{name} is {stated}, the logs make {sample:.6f}"


@rule
def sizes(entry: Entry) -> Found:
    """The stated bytes are those of the script that is here and of the artifacts in the logs."""
    if entry.ours:
        yield from compare(entry, ("bytes_total", "bytes_code"))
        packed = entry.script.stat().st_size if entry.script else None
        for log in entry.logs:
            if log.code_bytes is not None and log.code_bytes not in (
                packed,
                int(log.settings.get("code_reserve") or 0),
            ):
                yield BAD, f"{log.who}: code_bytes {log.code_bytes} is neither the script's size nor the reserve"
        return
    disk = entry.script.stat().st_size if entry.script else None
    codes = [log.code_bytes for log in entry.logs if log.code_bytes] + ([disk] if disk else [])
    totals = [log.total_bytes for log in entry.logs if log.total_bytes]
    totals += [log.artifact_bytes + disk for log in entry.logs if log.artifact_bytes and disk]
    totals += [mean(part) for part in (totals[: len(entry.logs)], totals[len(entry.logs) :]) if part]
    for name, options in (("bytes_total", totals), ("bytes_code", codes), ("code_bytes", codes)):
        stated = entry.get(name)
        if stated is None:
            continue
        if not options:
            yield UNKNOWN, f"{name} {stated:,}: no log tells"
        elif any(agrees(stated, value) for value in options):
            yield OK, f"{name} {stated:,}"
        else:
            yield BAD, f"{name} is {stated}, the logs say {' '.join(f'{value:,.0f}' for value in options[:3])}"


@rule
def limit(entry: Entry) -> Found:
    """Code and artifact together have at most 16,000,000 bytes, for every seed."""
    disk = code_size(entry)
    level = BAD if entry.is_settled else UNKNOWN
    for log in entry.logs:
        if log.artifact_bytes is None:
            yield UNKNOWN, f"{log.who}: the log does not tell the size of the artifact"
            continue
        here = log.artifact_bytes + disk
        logged = log.total_bytes or here
        if here > LIMIT_BYTES and (log.ours or logged > LIMIT_BYTES):
            yield (
                level,
                f"{log.who}: {min(here, logged):,} bytes are {min(here, logged) - LIMIT_BYTES:,} over the limit",
            )
        elif here > LIMIT_BYTES:
            yield UNKNOWN, f"{log.who}: {logged:,} bytes in the log, but {here:,} with the script that is here"
        elif logged > LIMIT_BYTES:
            yield BAD if log.ours else UNKNOWN, f"{log.who}: {logged:,} bytes as it ran, {here:,} with the script here"
        else:
            yield OK, f"at most {max(x.total_bytes or 0 for x in entry.logs):,} bytes"
        if log.ours and log.last("result").get("limit") != str(LIMIT_BYTES):
            yield BAD, f"{log.who}: ran with byte_limit {log.last('result').get('limit')}, not {LIMIT_BYTES}"


@rule
def train_time(entry: Entry) -> Found:
    """Training stays within the seconds of the track."""
    yield from timed(entry, "train_s", "training")
    if entry.track and entry.track.fixed_tokens:
        tokens = {log.last("result").get("tokens") for log in entry.logs}
        if len(tokens) > 1 or any(log.settings.get("iterations") in (None, "0") for log in entry.logs):
            yield BAD, f"the track has a fixed token budget (--iterations), the logs have {' '.join(map(str, tokens))}"


@rule
def eval_time(entry: Entry) -> Found:
    """Scoring stays within the seconds of the track."""
    yield from timed(entry, "eval_s", "scoring")


def timed(entry: Entry, name: str, what: str) -> Found:
    allowed = entry.track.seconds if entry.track else None
    if entry.track and allowed is None:
        yield OK, f"{entry.track_name} has no clock"
        return
    for log in entry.logs:
        used = getattr(log, name)
        if used is None:
            yield UNKNOWN, f"{log.who}: the log does not tell the seconds of {what}"
        elif allowed is None:
            yield UNKNOWN, f"{used:.1f} s, and no track that limits them"
        elif used > allowed:
            within_step = not log.ours and name == "train_s" and used - allowed <= 2 * (log.step_ms or 0) / 1000
            why = ", by the step that was running, as in the challenge's own baseline" if within_step else ""
            level = BAD if entry.is_settled and not within_step else UNKNOWN
            yield level, f"{log.who}: {what} took {used:.3f} s of {allowed:.0f} s{why}"
        else:
            yield OK, f"at most {max(getattr(x, name) or 0 for x in entry.logs):.1f} s of {allowed:.0f} s"


@rule
def validation(entry: Entry) -> Found:
    """Where the track asks for it, every token of the validation set is scored."""
    for log in entry.logs:
        if not log.ours:
            yield from whole_set(log, log.dataset)
            continue
        score = log.last("score", what="artifact", mode=log.last("result").get("score_mode", ""))
        data = log.last("data", split="val")
        try:
            total, scored, counted = int(data["tokens"]), int(data["scored"]), int(score["tokens"])
        except (KeyError, ValueError):
            yield UNKNOWN, f"{log.who}: the log does not tell how many tokens were scored"
            continue
        if counted != scored - 1:  # the first token has nothing before it
            yield BAD, f"{log.who}: {counted:,} tokens in the score, {scored - 1:,} were to be scored"
        elif entry.track and not entry.track.whole_validation:
            yield OK, f"{counted:,} tokens, a prefix as the track allows"
        elif scored != total:
            yield BAD, f"{log.who}: {scored:,} of {total:,} validation tokens were scored"
        else:
            yield from whole_set(log, f"sp{log.settings.get('vocab_size')}")


def whole_set(log: TrainLog, dataset: str) -> Found:
    key = next((key for key in WHOLE if key in dataset), None)
    if log.val_tokens is None or key is None:
        yield (
            UNKNOWN,
            f"{log.who}: {log.val_tokens or '?'} tokens of {dataset or 'some set'}, whose size is not known here",
        )
    elif log.val_tokens < WHOLE[key] - LARGEST_WINDOW:
        yield BAD, f"{log.who}: {log.val_tokens:,} validation tokens, the whole set has {WHOLE[key]:,}"
    elif log.val_tokens > WHOLE[key] + LARGEST_WINDOW:
        yield UNKNOWN, f"{log.who}: {log.val_tokens:,} validation tokens, more than the {WHOLE[key]:,} of {key}"
    else:
        yield OK, f"{log.val_tokens:,} tokens, the whole set of {key}"


@rule
def environment(entry: Entry) -> Found:
    """Hardware and versions in submission.json are those in the logs."""
    if entry.ours:
        yield from compare(entry, ("hardware", "pytorch_version"))
        return
    for log in entry.logs:
        found, stated = log.settings.get("torch"), entry.get("pytorch_version")
        if found and stated and found != stated:
            yield BAD, f"pytorch_version is {stated}, the log of {log.who} says {found}"
        elif found and stated:
            yield OK, f"PyTorch {found}"


@rule
def artifacts(entry: Entry) -> Found:
    """Artifacts that are shipped load, and are the very files that the logs scored."""
    shipped = sorted(entry.folder.glob("*.lg"))
    if not shipped:
        yield OK if not (entry.track and entry.track.ships_artifacts) else BAD, "none is shipped"
        return
    tokenizer = entry.folder / "tokenizer.model"
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None
    for path in shipped:
        log = next((log for log in entry.logs if path.name == f"artifact_seed{log.seed}.lg"), None)
        if log is None:
            yield BAD, f"{path.name} belongs to no log"
            continue
        try:
            artifact = train_gpt.load_artifact(path)
        except ArtifactError as error:
            yield BAD, str(error).replace(str(entry.folder), "").lstrip("/")
            continue
        if artifact.sha256 != log.last("result").get("artifact_sha256"):
            yield BAD, f"{path.name} is not the artifact that {log.path.name} scored (sha256)"
        if artifact.size != log.artifact_bytes:
            yield BAD, f"{path.name} has {artifact.size:,} bytes, its log says {log.artifact_bytes}"
        if digest is not None and artifact.tokenizer.get("sha256") != digest:
            yield BAD, f"{path.name} was made with another tokenizer than tokenizer.model"
    yield OK, f"{len(shipped)} artifacts load and have the digests in the logs"


@rule
def readme(entry: Entry) -> Found:
    """The numbers in README.md are those of the logs."""
    if not entry.readme:
        yield BAD, "there is no README.md, or it is empty"
        return
    if not entry.ours:
        yield from readme_of_strangers(entry)
        return
    if not is_complete(entry) or not entry.script:
        yield UNKNOWN, "the logs are not whole"
        return
    have = set(entry.readme.splitlines())
    try:
        command = layout.repeat_command(entry.logs)
    except (KeyError, ValueError, ConfigError):
        command = ""
    for line in [*layout.result_lines(entry.logs, entry.script.stat().st_size), command]:
        if line and line not in have:
            yield BAD, f"README.md lacks, or changes, the line {line!r}"
    yield OK, "headline, table and command are what the logs make them"


def readme_of_strangers(entry: Entry) -> Found:
    """Rows of tables that open with a seed: what looks like a score must stand in that seed's log."""
    rows = 0
    for row in re.findall(r"^\|(.+)\|\s*$", entry.readme, re.MULTILINE):
        cells = [re.sub(r"[*`~ ]", "", cell) for cell in row.split("|")]
        seed = re.fullmatch(r"(?:seed)?(\d+)", cells[0], re.IGNORECASE)
        log = next((x for x in entry.logs if seed and int(seed[1]) in (x.seed, x.name_seed)), None)
        stated = [Decimal(cell) for cell in cells[1:] if re.fullmatch(r"[1-4]\.\d{4,}", cell)]
        if not log or not stated:
            continue
        rows += 1
        known = [float(text) for other in [log, *entry.others] for text in other.numbers]
        for value in stated:
            if not any(agrees(value, number) for number in known):
                yield UNKNOWN, f"row of seed {seed[1]}: {value} is not in its log"
        mine = [log, *(x for x in entry.others if log.seed in (x.seed, x.name_seed))]
        if log.final and not any(agrees(value, score.bpb) for value in stated for x in mine for score in x.scores):
            yield BAD, f"row of seed {seed[1]} has {stated[0]}, its log ends with {log.final.bpb}"
    if not rows:
        stated = entry.get("val_bpb")
        if stated is not None and f"{float(stated):.4f}" in entry.readme:
            yield OK, "has the headline number; no table of seeds"
        else:
            yield UNKNOWN, "no table of seeds that could be compared"
    else:
        yield OK, f"{rows} rows agree with the logs"
