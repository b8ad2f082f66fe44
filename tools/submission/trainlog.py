"""Reads a training log into the numbers that a record is made of: our own logs, and the several formats that scripts of
the Parameter Golf challenge have printed over time. What a log does not say is None, never a guess.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from tools.lib.runlog import Line, parse_line

OURS = re.compile(r"^run recipe:\S+ seed:\d+ run_id:", re.MULTILINE)
NUMBER = r"(-?\d+(?:\.\d+)?)"
STAMP = re.compile(r"^\d{10}\.\d{3} ")  # some logs start every line with the time
SCORE = re.compile(rf"^([A-Za-z].*?)\s+(?:sliding )?val_loss[:=]\s*{NUMBER}\s.*?val_bpb[:=]\s*{NUMBER}(.*)$")
STEP = re.compile(r"^step:(\d+)/\d+\b|^(\d+)/\d+ (?:train|val)_loss: ")
STOPPED = re.compile(r"^stopping_early: \S+ train_time:\s*(\d+)ms(?: step:\s*(\d+))?")
TOTAL = re.compile(r"^Total submission size (\S.*?): (\d+) bytes|^()budget:(\d+)/\d+ ")
MODEL = re.compile(r"^Serialized model (\S.*?): (\d+) bytes")
CODE = re.compile(r"^Code size(?: \(compressed\))?: (\d+) bytes|^artifact:.* code:(\d+)$")
SEED = re.compile(r"^\s*seed:\s*(\d+)\s*$|^train_batch_tokens:.* seed:(\d+)\b")
VALIDATION = re.compile(r"^val_loader:shards pattern=(\S+) tokens:(\d+)|^()val_tokens: (\d+)")
SETTING = re.compile(r"^  ([a-z]\w*): (.+)$")  # the block of hyperparameters that these scripts print
FACT = re.compile(r"^world_size:(\d+)\b|^Running PyTorch (\S+)$")
DIAGNOSTIC = re.compile(r"diagnostic|pre.?quant|post.?ema|warm|^step\b|best|swa\d|raw", re.IGNORECASE)
IN_NAME = re.compile(r"(?:seed[_-]?(\d+)(?:_\w+)?|(?:_|train)(\d+))\.(?:log|txt)$")


@dataclass(frozen=True)
class Score:
    """One scoring of a model: what the log calls it, and what it took."""

    label: str
    bpb: float
    loss: float
    digits: int  # decimals of bpb
    eval_s: float | None = None


@dataclass
class TrainLog:
    """The facts of one run, as its log tells them; `ours` when train_gpt.py of this repository wrote it."""

    path: Path
    digest: str
    ours: bool = False
    seed: int | None = None
    name_seed: int | None = None  # what the file's name says
    scores: list[Score] = field(default_factory=list)  # of the exported model, in the order of the log
    is_finished: bool = False
    steps: int | None = None
    tokens: int | None = None  # ours only: consumed in training
    train_s: float | None = None
    eval_s: float | None = None
    step_ms: float | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    val_tokens: int | None = None
    dataset: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # ours only: where a setting came from (cli, recipe, …)
    numbers: set[str] = field(default_factory=set)  # every decimal number in the text, for tables in a README
    lines: list[Line] = field(default_factory=list)  # ours only

    @property
    def final(self) -> Score | None:
        return self.scores[-1] if self.scores else None

    @property
    def who(self) -> str:
        return self.path.name if self.seed is None else f"seed {self.seed}"

    def last(self, event: str, **wanted: str) -> dict[str, str]:
        """Values of the last line of a kind, in a log of ours."""
        for line in reversed(self.lines):
            if line.event == event and wanted.items() <= line.values.items():
                return line.values
        return {}

    @property
    def score_mode(self) -> str:
        return self.last("result").get("score_mode", "")

    @property
    def final_score_line(self) -> dict[str, str]:
        """The line of a log of ours where the artifact was scored in the mode that counts."""
        return self.last("score", what="artifact", mode=self.score_mode)

    @property
    def skipped_updates(self) -> int | None:
        """Updates at test time that were skipped for lack of time. Older logs tell it where they score only."""
        return parse_int(self.last("result").get("skipped", self.final_score_line.get("skipped")))


def read_train_log(path: Path) -> TrainLog | None:
    """A training log; None where the file holds neither steps nor a score, and so is something else."""
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    log = TrainLog(path, hashlib.sha256(content).hexdigest())
    named = IN_NAME.search(path.name)
    log.name_seed = int(named[1] or named[2]) if named else None
    log.ours = bool(OURS.search(text))
    if log.ours:
        read_ours(log, text)
    else:
        read_challenge(log, text)
    if log.seed is None:
        log.seed = log.name_seed
    log.numbers = set(re.findall(r"\d+\.\d{3,}", text))
    return log if log.ours or log.scores or log.steps else None


def parse_int(text: str | None) -> int | None:
    """None for what is missing or not a number: a log can be cut off in the middle of a word."""
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def parse_float(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def read_ours(log: TrainLog, text: str) -> None:
    """A log of train_gpt.py. A line that was cut off is left out; a log without its result line is not finished."""
    for row in text.splitlines():
        try:
            line = parse_line(row)
        except ValueError:
            continue
        if line:
            log.lines.append(line)
    for line in log.lines:
        if line.event == "config" and "name" in line.values:
            name = line.values["name"]
            log.settings[name] = line.values.get("value", "")
            # a resumed run logs its settings again, all of them from the folder
            log.sources.setdefault(name, line.values.get("source", ""))
    result = log.last("result")
    log.is_finished = bool(log.lines) and log.lines[-1].event == "result" and "artifact_sha256" in result
    log.seed = parse_int(log.last("run").get("seed"))
    log.steps = parse_int(result.get("steps"))
    log.tokens = parse_int(result.get("tokens", log.last("train").get("tokens")))  # older train lines tell none
    log.train_s = parse_float(result.get("train_s"))
    log.eval_s = parse_float(result.get("eval_s"))
    log.artifact_bytes = parse_int(result.get("artifact_bytes"))
    log.code_bytes = parse_int(result.get("code_bytes"))
    log.total_bytes = parse_int(result.get("total_bytes"))
    log.val_tokens = parse_int(log.last("data", split="val").get("tokens"))
    if log.train_s is not None and log.steps:
        log.step_ms = 1000 * log.train_s / log.steps
    bpb, loss = parse_float(result.get("val_bpb")), parse_float(result.get("val_loss"))
    if bpb is not None and loss is not None:
        log.scores.append(Score(log.score_mode, bpb, loss, 8, log.eval_s))


def read_challenge(log: TrainLog, text: str) -> None:
    scores: dict[str, Score] = {}
    total_eval_s = None
    for row in text.splitlines():
        row = STAMP.sub("", row)
        if found := STEP.match(row):
            log.steps = int(found[1] or found[2])
            if time := re.search(r"train_time:(\d+)ms", row):
                log.train_s = int(time[1]) / 1000
        elif found := STOPPED.match(row):
            log.train_s = int(found[1]) / 1000
            log.steps = int(found[2]) if found[2] else log.steps
        elif found := TOTAL.match(row):
            log.total_bytes = int(found[2] or found[4])
        elif found := MODEL.match(row):
            log.artifact_bytes = int(found[2])
        elif found := CODE.match(row):
            log.code_bytes = int(found[1] or found[2])
        elif found := SEED.match(row):
            log.seed = int(found[1] or found[2])
        elif found := VALIDATION.match(row):
            log.dataset = found[1] or log.dataset
            log.val_tokens = int(found[2] or found[4])
        elif found := SETTING.match(row):
            log.settings[found[1]] = found[2]
        elif found := FACT.match(row):
            log.settings.setdefault("world_size" if found[1] else "torch", found[1] or found[2])
        elif found := re.match(rf"^total_eval_time:{NUMBER}s", row):
            total_eval_s = float(found[1])
        elif (found := SCORE.match(row)) and not DIAGNOSTIC.search(found[1]):
            add_score(scores, found)
    log.dataset = log.settings.get("val_files", log.dataset)
    log.scores = list(scores.values())
    log.is_finished = bool(scores)
    if log.train_s is not None and log.steps:
        log.step_ms = 1000 * log.train_s / log.steps
    if log.final:
        log.eval_s = total_eval_s if total_eval_s is not None else log.final.eval_s
    if log.code_bytes is None:
        return
    if log.total_bytes is None and log.artifact_bytes is not None:
        log.total_bytes = log.artifact_bytes + log.code_bytes
    elif log.artifact_bytes is None and log.total_bytes is not None:
        log.artifact_bytes = log.total_bytes - log.code_bytes


def add_score(scores: dict[str, Score], found: re.Match[str]) -> None:
    """Adds the score of a line. A rounded line and its exact twin are one score; so is a second name for the same
    numbers."""
    label = re.sub(r"_exact\b.*|[ :(].*", "", found[1]) + ("_sliding" if " sliding val_loss" in found[0] else "")
    digits = len(found[3].partition(".")[2])
    seconds = re.search(rf"(?:eval_time|elapsed|\btime)[:=]{NUMBER}(ms|s)", found[0])
    eval_s = float(seconds[1]) / (1000 if seconds[2] == "ms" else 1) if seconds else None
    eval_s = eval_s or None  # a zero is a second line about a scoring whose time is on the first
    new = Score(label, float(found[3]), float(found[2]), digits, eval_s)
    for name, old in list(scores.items()):
        if abs(old.bpb - new.bpb) <= 0.51 * 10.0 ** -min(old.digits, digits) and (
            name == label or abs(old.loss - new.loss) <= 0.51 * 10.0 ** -min(old.digits, digits)
        ):
            better = old if old.digits > digits else new
            eval_s = eval_s if eval_s is not None else old.eval_s
            scores[name] = Score(name, better.bpb, better.loss, better.digits, eval_s)
            return
    scores.pop(label, None)
    scores[label] = new
