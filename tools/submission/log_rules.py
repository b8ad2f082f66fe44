"""Rules about the training logs: each is complete and agrees with itself, together they are one experiment, and they
stay within what the track allows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import train_gpt
from tools.submission.entry import Entry, claims_by_seed
from tools.submission.summary import PER_RUN_SETTINGS
from tools.submission.trainlog import TrainLog, parse_int
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Rule, register

RULES: dict[str, Rule] = {}
rule = register(RULES)
# tokens of the challenge's whole validation set, as its scripts count them: cut to windows, so some may be missing
WHOLE = {
    "caseops": 47_851_520,
    "sp1024": 62_021_632,
    "sp4096": 45_508_608,
    "sp8192": 40_540_160,
    "byte260": 151_130_112,
}
LARGEST_WINDOW = 32768
SAME_IN_ALL_LOGS = (("run", "code_sha256"), ("versions", "torch"), ("hardware", "name"), ("hardware", "world"))
FREE_SETTINGS = re.compile(r"path|dir|file|rank|prefix|^torch$")  # of other people's logs


@rule
def log_end(entry: Entry) -> Found:
    """Every log ends as a finished run does: with a score of the exported model."""
    for log in entry.logs:
        if log.ours and not log.is_finished:
            yield BAD, f"{log.path.name} does not end with a complete result line"
        elif log.ours:
            yield OK, "every log ends with its result line"
        elif log.final:
            yield OK, f"the last score is {log.final.label}"
        else:
            yield UNKNOWN, f"{log.path.name}: no score of the exported model in a known format"


@rule
def log_sums(entry: Entry) -> Found:
    """What a log says twice agrees: score, updates, seconds, bytes, seed."""
    for log in entry.logs:
        if log.ours and not log.is_finished:
            yield UNKNOWN, f"{log.path.name} is incomplete"
        elif log.ours:
            for text in contradictions(log):
                yield BAD, f"{log.who}: {text}"
            yield OK, "result lines agree with the lines above them"
        elif log.total_bytes is not None and log.artifact_bytes is not None and log.code_bytes is not None:
            if log.total_bytes != log.artifact_bytes + log.code_bytes:
                yield BAD, f"{log.who}: {log.artifact_bytes:,} + {log.code_bytes:,} is not {log.total_bytes:,} bytes"
            else:
                yield OK, "model and code add up to the total"


def contradictions(log: TrainLog) -> Iterator[str]:
    """Lines of a finished log of ours that do not agree."""
    result, score = log.last("result"), log.final_score_line
    for name in ("val_bpb", "val_loss"):
        if score.get(name) != result.get(name):
            yield f"{name} is {result.get(name)} in the result, {score.get(name)} where it was scored"
    for name in ("updates", "skipped"):
        if name in result and score.get(name) != result[name]:
            yield f"{name} is {result[name]} in the result, {score.get(name)} where it was scored"
    try:
        bpb = float(score["val_loss"]) * int(score["tokens"]) / math.log(2) / int(score["bytes"])
        if abs(bpb - float(score["val_bpb"])) > 1e-7:
            yield f"val_loss, tokens and bytes make {bpb:.8f} bits per byte, not {score['val_bpb']}"
    except (KeyError, ValueError, ZeroDivisionError):
        yield "its score line is incomplete"
    stopped = log.last("clock", what="stop").get("used_s")
    if stopped != result.get("train_s"):
        yield f"train_s is {result.get('train_s')}, but the clock stopped at {stopped}"
    if log.total_bytes is None or log.total_bytes != (log.artifact_bytes or 0) + (log.code_bytes or 0):
        yield f"{log.artifact_bytes} + {log.code_bytes} is not {log.total_bytes} bytes"
    in_config, in_result = log.settings.get("seed"), result.get("seed")
    if str(log.seed) != in_config or str(log.seed) != in_result:
        yield f"seed {in_config} in the config, {in_result} in the result"
    steps = [line.values.get("step", "") for line in log.lines if line.event == "train"]
    if log.steps and steps and steps[-1].isdigit() and int(steps[-1]) > log.steps:
        yield f"{log.steps} steps in the result, {steps[-1]} in a train line"
    tokens = parse_int(log.last("train").get("tokens"))  # older logs lack it
    if log.tokens is not None and tokens is not None and tokens > log.tokens:
        yield f"{log.tokens} tokens in the result, {tokens} in a train line"


@rule
def same_run(entry: Entry) -> Found:
    """The logs differ in their seed and in nothing else: same settings, same code, same data, same machine."""
    if len(entry.logs) < 2:
        yield OK if entry.logs else UNKNOWN, f"{len(entry.logs)} log"
        return
    first = entry.logs[0]
    level = BAD if entry.is_settled else UNKNOWN
    for log in entry.logs[1:]:
        differing = differing_settings(first, log)
        if differing:
            pairs = (f"{name} {first.settings.get(name)} | {log.settings.get(name)}" for name in differing[:3])
            yield level, f"{first.who} and {log.who} differ in {', '.join(pairs)}"
        if log.ours:
            yield from differing_facts(first, log)
        elif first.code_bytes and log.code_bytes and first.code_bytes != log.code_bytes:
            sizes = f"{first.code_bytes:,} and {log.code_bytes:,} bytes"
            yield level, f"the scripts of {first.who} and {log.who} had {sizes}"
    if not first.settings and not entry.ours:
        yield UNKNOWN, "the logs do not list their settings"
    yield OK, f"{len(entry.logs)} logs of one configuration"


def differing_settings(first: TrainLog, log: TrainLog) -> list[str]:
    names = sorted((first.settings.keys() | log.settings.keys()) - PER_RUN_SETTINGS)
    differing = [name for name in names if first.settings.get(name) != log.settings.get(name)]
    return [name for name in differing if log.ours or not FREE_SETTINGS.search(name)]


def differing_facts(first: TrainLog, log: TrainLog) -> Found:
    for event, name in SAME_IN_ALL_LOGS:
        if first.last(event).get(name) != log.last(event).get(name):
            yield BAD, f"{first.who} and {log.who} differ in {event} {name}"
    for split in ("train", "val"):
        if first.last("data", split=split).get("sha256") != log.last("data", split=split).get("sha256"):
            yield BAD, f"{first.who} and {log.who} have different {split} data"


@rule
def seeds(entry: Entry) -> Found:
    """As many different seeds as the track asks for, each with its own log, the same as in submission.json."""
    wanted = 3 if entry.ours and not entry.track else entry.track_or_any.seeds
    logged = [log.seed for log in entry.logs]
    known = sorted(seed for seed in logged if seed is not None)
    if len(set(logged)) < wanted:
        yield BAD if entry.ours else UNKNOWN, f"{len(set(logged))} different seeds have a log, {wanted} are needed"
    for seed in sorted(set(known)):
        names = [log.path.name for log in entry.logs if log.seed == seed]
        if len(names) > 1:
            yield BAD if entry.is_settled else UNKNOWN, f"{len(names)} logs are of seed {seed}: {', '.join(names)}"
    for log in entry.logs:
        if log.name_seed is not None and log.seed != log.name_seed:
            yield BAD, f"{log.path.name} is a log of seed {log.seed}"
    if len({log.digest for log in entry.logs}) < len(entry.logs):
        yield BAD, "two logs are the same file"
    listed = entry.get("seeds")
    stated = [int(seed) for seed in listed if str(seed).isdigit()] if isinstance(listed, list | dict) else []
    if stated and sorted(stated) != known:
        yield BAD, f"submission.json has seeds {sorted(stated)}, the logs {known}"
    claimed = sorted(claims_by_seed(entry.data))
    if entry.ours and claimed != sorted(set(known)):
        yield BAD, f"seed_results has seeds {claimed}, the logs {sorted(set(known))}"
    yield OK, f"seeds {', '.join(map(str, logged))}"


@rule
def updates(entry: Entry) -> Found:
    """Test-time training made all of its updates, and scoring met its time budget: the score is that of the file and
    not of the machine."""
    for log in entry.logs:
        if not log.ours:
            yield UNKNOWN, "the logs do not count updates at test time"
            continue
        skipped = log.skipped_updates
        if skipped is None and is_adaptive(log.score_mode) is False:
            yield OK, f"{log.score_mode} does not adapt"
        elif skipped is None:
            yield UNKNOWN, f"{log.who}: the log does not tell how many updates were skipped"
        elif skipped:
            yield BAD, f"{log.who}: {skipped:,} updates were skipped for lack of time"
        else:
            yield OK, "none was skipped"
        if log.last("result").get("eval_fits") == "no":
            budget = log.settings.get("eval_budget")
            yield BAD, f"{log.who}: scoring took {log.eval_s} s, more than eval_budget={budget}"


def is_adaptive(mode: str) -> bool | None:
    """Whether a score mode trains at test time; None for one that this version does not have."""
    if mode not in train_gpt.SCORERS:
        return None
    return bool(train_gpt.find_scorer(mode).adapts)


@rule
def train_time(entry: Entry) -> Found:
    """Training stays within the seconds of the track."""
    allowed = entry.track_or_any.train_seconds
    if entry.track and allowed is None:
        yield OK, f"{entry.track_name} sets no time for training"
        return
    for log in entry.logs:
        if log.train_s is None:
            yield UNKNOWN, f"{log.who}: the log does not tell how long training took"
        elif allowed is None:
            yield UNKNOWN, f"{log.train_s:.1f} s, and no track that limits them"
        elif log.train_s <= allowed:
            yield OK, f"at most {max(other.train_s or 0 for other in entry.logs):.1f} s of {allowed:.0f} s"
        elif not log.ours and log.train_s - allowed <= 2 * (log.step_ms or 0) / 1000:
            why = "because of the step that was running, as in the challenge's own baseline"
            yield UNKNOWN, f"{log.who}: training took {log.train_s:.3f} s of {allowed:.0f} s, {why}"
        else:
            level = BAD if entry.is_settled else UNKNOWN
            yield level, f"{log.who}: training took {log.train_s:.3f} s of {allowed:.0f} s"


@rule
def train_tokens(entry: Entry) -> Found:
    """Where the track fixes the tokens, every seed trains the same number of them, set beforehand by --iterations."""
    track = entry.track_or_any
    if not track.has_fixed_tokens:
        yield OK, f"{entry.track_name or 'no track'} fixes no number of tokens"
        return
    tokens = sorted({log.last("result").get("tokens", "?") for log in entry.logs})
    if len(tokens) > 1:
        yield BAD, f"every seed has to train the same number of tokens, the logs have {', '.join(tokens)}"
    for log in entry.logs:
        if log.ours and log.settings.get("iterations") in (None, "0"):
            yield BAD, f"{log.who}: trained by the clock, the track wants --iterations"
    if track.train_tokens is not None and tokens != [str(track.train_tokens)]:
        yield BAD, f"the track trains {track.train_tokens:,} tokens, the logs have {', '.join(tokens)}"
    yield OK, f"{', '.join(tokens)} tokens"


@rule
def eval_time(entry: Entry) -> Found:
    """Scoring stays within the seconds of the track."""
    allowed = entry.track_or_any.eval_seconds
    if entry.track and allowed is None:
        yield OK, f"{entry.track_name} sets no time for scoring"
        return
    for log in entry.logs:
        if log.eval_s is None:
            yield UNKNOWN, f"{log.who}: the log does not tell how long scoring took"
        elif allowed is None:
            yield UNKNOWN, f"{log.eval_s:.1f} s, and no track that limits them"
        elif log.eval_s <= allowed:
            yield OK, f"at most {max(other.eval_s or 0 for other in entry.logs):.1f} s of {allowed:.0f} s"
        else:
            level = BAD if entry.is_settled else UNKNOWN
            yield level, f"{log.who}: scoring took {log.eval_s:.3f} s of {allowed:.0f} s"


@rule
def validation(entry: Entry) -> Found:
    """Every token that was to be scored was; that is the whole validation set, or the text that the track fixes."""
    for log in entry.logs:
        if not log.ours:
            yield whole_set(log, log.dataset)
            continue
        data = log.last("data", split="val")
        try:
            total, to_score, scored = int(data["tokens"]), int(data["scored"]), int(log.final_score_line["tokens"])
        except (KeyError, ValueError):
            yield UNKNOWN, f"{log.who}: the log does not tell how many tokens were scored"
            continue
        if scored != to_score - 1:  # the first token has nothing before it
            yield BAD, f"{log.who}: {scored:,} tokens in the score, {to_score - 1:,} were to be scored"
        elif entry.track and entry.track.text_sha256:
            yield same_text(log, data.get("text_sha256", ""), entry.track.text_sha256)
        elif to_score != total:
            yield BAD, f"{log.who}: {to_score:,} of {total:,} validation tokens were scored"
        else:
            yield whole_set(log, f"sp{log.settings.get('vocab_size')}")


def same_text(log: TrainLog, found: str, wanted: str) -> tuple[str, str]:
    """Whether a log was scored on the text that its track fixes."""
    if found != wanted:
        return BAD, f"{log.who}: scored on another text than the track's (text_sha256 {found[:16]}, not {wanted[:16]})"
    return OK, "the text of the track"


def whole_set(log: TrainLog, dataset: str) -> tuple[str, str]:
    """Whether a log has as many validation tokens as the challenge's set."""
    key = next((key for key in WHOLE if key in dataset), None)
    if log.val_tokens is None or key is None:
        tokens = "?" if log.val_tokens is None else f"{log.val_tokens:,}"
        return UNKNOWN, f"{log.who}: {tokens} tokens of {dataset or 'some set'}, whose size is not known here"
    if log.val_tokens < WHOLE[key] - LARGEST_WINDOW:
        return BAD, f"{log.who}: {log.val_tokens:,} validation tokens, the whole set has {WHOLE[key]:,}"
    if log.val_tokens > WHOLE[key] + LARGEST_WINDOW:
        return UNKNOWN, f"{log.who}: {log.val_tokens:,} validation tokens, more than the {WHOLE[key]:,} of {key}"
    return OK, f"{log.val_tokens:,} tokens, the whole set of {key}"
