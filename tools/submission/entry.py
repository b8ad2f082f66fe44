"""What a submission folder is: the tracks and their limits, the folder read into one value, and the numbers that
submission.json and README.md must show, computed from the logs alone. tools.record builds from it, rules.py checks.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

import train_gpt
from loopgolf.options import cast_option
from tools.submission.stats import mean, sample_std
from tools.submission.trainlog import TrainLog, read_train_log

LIMIT_BYTES = 16_000_000


@dataclass(frozen=True)
class Track:
    """What a track asks for; None where it asks for nothing."""

    device: str | None
    world: int | None
    gpu: str | None
    seconds: float | None  # for training, and again for scoring
    seeds: int
    whole_validation: bool
    fixed_tokens: bool  # every seed trains the same number of tokens, set beforehand by --iterations
    ships_artifacts: bool


TRACKS = {
    "track_10min_16mb": Track("cuda", 8, "H100", 600.0, 3, True, False, False),
    "track_1gpu_16mb": Track("cuda", 1, None, 600.0, 3, True, False, False),
    "track_pocket": Track("cpu", 1, None, None, 3, False, True, True),
    "track_non_record_16mb": Track(None, None, None, None, 1, True, False, False),
}
META = ("author", "github_id", "name", "blurb", "date", "track")
PER_SEED = ("val_loss", "val_bpb", "artifact_bytes", "steps", "step_avg_ms", "eval_time_s")
PER_RUN_SETTINGS = {"seed", "run_id", "resume", "checkpoint_every_s", "log_every"}  # may differ between seeds


@dataclass
class Entry:
    """A submission folder as it lies there; nothing in it is believed or executed."""

    folder: Path
    data: dict | None  # submission.json
    fault: str  # why there is no data
    readme: str | None
    script: Path | None
    logs: list[TrainLog]  # one per seed
    others: list[TrainLog] = field(default_factory=list)  # logs that the numbers do not rest on
    track_name: str = ""

    @property
    def ours(self) -> bool:
        return any(log.ours for log in self.logs)

    @property
    def is_settled(self) -> bool:
        """Whether the logs are surely those of the submission, and not in part of other experiments."""
        named = all(log.name_seed is not None for log in self.logs)
        return self.ours or named or len(self.logs) == 1 or bool(claims(self.data))

    @property
    def track(self) -> Track | None:
        return TRACKS.get(self.track_name)

    def get(self, name: str):
        return (self.data or {}).get(name)


def read_entry(folder: Path) -> Entry:
    data, fault = read_json(folder)
    logs = [log for path in sorted(folder.rglob("*")) if is_log_name(path) and (log := read_train_log(path))]
    used, others = choose_logs(logs, claims(data))
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    return Entry(folder, data, fault, text, find_script(folder), used, others, find_track(folder, data))


def is_log_name(path: Path) -> bool:
    return path.suffix in (".log", ".txt") and path.name != "requirements.txt" and path.is_file()


def read_json(folder: Path) -> tuple[dict | None, str]:
    path = folder / "submission.json"
    if not path.is_file():
        found = sorted(folder.glob("submission*.json"))
        if not found:
            return None, "there is no submission.json"
        path = found[0]
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)  # keeps how many decimals were stated
    except (ValueError, RecursionError) as error:
        return None, f"{path.name} is not JSON: {error}"
    return (data, "") if isinstance(data, dict) else (None, f"{path.name} does not hold an object")


def find_script(folder: Path) -> Path | None:
    """train_gpt.py, or what stands in for it in older folders."""
    names = [path for path in sorted(folder.glob("train*.py")) if "human" not in path.name]
    return next((path for path in names if path.name == "train_gpt.py"), names[0] if names else None)


def find_track(folder: Path, data: dict | None) -> str:
    """The track that submission.json names; else that of the folder around it."""
    stated = str((data or {}).get("track") or "").replace("-", "_").removeprefix("track_")
    around = folder.resolve().parent.name
    for name in (f"track_{stated}", around):
        if name in TRACKS:
            return name
    return "track_non_record_16mb" if stated.startswith("non_record") else ""


def claims(data: dict | None) -> dict[int, dict]:
    """What submission.json says of each seed."""
    for name in ("seed_results", "seeds"):
        found = (data or {}).get(name)
        if isinstance(found, dict):
            numbered = {re.search(r"\d+", key): value for key, value in found.items()}
            return {int(key[0]): value for key, value in numbered.items() if key and isinstance(value, dict)}
    return {}


def agrees(stated, computed: float | None, slack: float = 1.0) -> bool:
    """Equal to the last decimal that is stated; `slack` in units of it (1 lets a number be cut instead of rounded)."""
    if computed is None or isinstance(stated, bool) or not isinstance(stated, int | float | Decimal):
        return False
    exponent = stated.as_tuple().exponent if isinstance(stated, Decimal) else 0
    return isinstance(exponent, int) and abs(float(stated) - computed) <= slack * 10.0**exponent * (1 + 1e-9)


def choose_logs(logs: list[TrainLog], claimed: dict[int, dict]) -> tuple[list[TrainLog], list[TrainLog]]:
    """The logs that the numbers rest on, and the rest: copies, reruns, other experiments."""
    if any(log.ours for log in logs):
        mine = [log for log in logs if re.fullmatch(r"train_seed\d+\.log", log.path.name)]
        return sorted(mine, key=lambda log: log.name_seed), []
    distinct = {log.digest: log for log in sorted(logs, key=lambda log: log.name_seed is not None)}
    logs = [log for log in logs if log is distinct[log.digest]]  # train.log is often a copy of one seed's
    if claimed:
        used = []
        for seed, values in claimed.items():
            mine = [log for log in logs if log.name_seed == seed] or [log for log in logs if log.seed == seed]
            stated = values.get("val_bpb")
            fitting = [log for log in mine if any(agrees(stated, score.bpb) for score in log.scores)]
            used += (fitting or mine)[:1]
    else:
        shallow = min((len(log.path.parts) for log in logs), default=0)
        used = [log for log in logs if len(log.path.parts) == shallow and log.is_finished] or logs
    return used, [log for log in logs if log not in used]


# ----------------------------------------------------------------------------------------------------------------------
# What our own folders must say, computed from the logs
# ----------------------------------------------------------------------------------------------------------------------


def describe_hardware(log: TrainLog) -> str:
    seen, versions = log.last("hardware"), log.last("versions")
    world, name = int(seen.get("world", 1)), seen.get("name", "?")
    what = name if seen.get("device") == "cuda" else f"CPU {name}, {seen.get('threads')} threads"
    return f"{f'{world}x ' if world > 1 else ''}{what}, {seen.get('dtype')}, Python {versions.get('python')}"


def describe_runs(logs: list[TrainLog], code_bytes: int) -> dict:
    """The fields of submission.json that the logs decide."""
    losses, scores = [log.final.loss for log in logs], [log.final.bpb for log in logs]
    results = {}
    for log in logs:
        row = (log.final.loss, log.final.bpb, log.artifact_bytes, log.steps, round(log.step_ms, 3), log.eval_s)
        results[str(log.seed)] = dict(zip(PER_SEED, row))
    return dict(
        val_loss=round(mean(losses), 8), val_bpb=round(mean(scores), 8), val_loss_std=round(sample_std(losses), 8),
        val_bpb_std=round(sample_std(scores), 8), seeds=[log.seed for log in logs], seed_results=results,
        bytes_total=max(log.artifact_bytes for log in logs) + code_bytes, bytes_code=code_bytes,
        hardware=describe_hardware(logs[0]), pytorch_version=logs[0].last("versions").get("torch"),
    )  # fmt: skip


def result_lines(logs: list[TrainLog], code_bytes: int) -> list[str]:
    """The lines of README.md that hold numbers."""
    facts = describe_runs(logs, code_bytes)
    lines = [
        f"**val_bpb {facts['val_bpb']:.5f} ± {facts['val_bpb_std']:.5f}** (mean and sample deviation of {len(logs)} "
        f"seeds; val_loss {facts['val_loss']:.5f} ± {facts['val_loss_std']:.5f} nats per token), "
        f"{facts['bytes_total']:,} bytes.",
        "",
        "| seed | val_bpb | val_loss | trained | file, plain | steps | ms/step | train s | eval s | artifact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for log in logs:
        found = log.last("result")
        trained, plain = (f"{float(found[n]):.5f}" if n in found else "-" for n in ("bpb_trained", "bpb_plain"))
        lines.append(f"| {log.seed} | {log.final.bpb:.5f} | {log.final.loss:.5f} | {trained} | {plain} | "
                     f"{log.steps} | {log.step_ms:.1f} | {log.train_s:.1f} | {log.eval_s:.1f} | "
                     f"{log.artifact_bytes:,} |")  # fmt: skip
    return lines


def options_of(log: TrainLog) -> list[str]:
    """The command-line options that make a run like this one, its seed aside."""
    defaults = {f.name: f.default for f in fields(train_gpt.Config)}
    recipe = log.settings["recipe"]
    usual = defaults | train_gpt.RECIPES.get(recipe, {})
    found = [f"--recipe={recipe}"]
    for name, text in log.settings.items():
        if name in defaults and name not in PER_RUN_SETTINGS | {"recipe", "score", "dry_run"}:
            value = cast_option(name, "" if text == "-" else text, defaults[name])
            found += [f"--{name}={'' if text == '-' else text}"] if value != usual[name] else []
    return found


def repeat_command(logs: list[TrainLog]) -> str:
    world = int(logs[0].last("hardware").get("world", 1))
    launch = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    seeds = " ".join(str(log.seed) for log in logs)
    return f"for SEED in {seeds}; do {launch} train_gpt.py {shlex.join(options_of(logs[0]))} --seed=$SEED; done"
