"""A submission folder, read into one value: its track, its submission.json, its logs. Nothing in it is believed or
executed here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from tools.submission.tracks import ANY_TRACK, TRACKS, Track
from tools.submission.trainlog import TrainLog, read_train_log


@dataclass
class Entry:
    """A submission folder as it was found."""

    folder: Path
    data: dict[str, Any] | None  # submission.json
    fault: str  # why there is no data
    readme: str | None
    script: Path | None
    logs: list[TrainLog]  # one per seed
    others: list[TrainLog] = field(default_factory=list)  # logs that the numbers do not rest on
    track_name: str = ""

    @property
    def ours(self) -> bool:
        """Whether train_gpt.py of this repository wrote the logs."""
        return any(log.ours for log in self.logs)

    @property
    def recipe(self) -> str:
        """What the first log ran."""
        return self.logs[0].settings.get("recipe", "") if self.logs else ""

    @property
    def is_settled(self) -> bool:
        """Whether the logs are certainly those of the submission, with none of other experiments among them."""
        are_named = all(log.name_seed is not None for log in self.logs)
        return self.ours or are_named or len(self.logs) == 1 or bool(claims_by_seed(self.data))

    @property
    def track(self) -> Track | None:
        return TRACKS.get(self.track_name)

    @property
    def track_or_any(self) -> Track:
        return self.track or ANY_TRACK

    @property
    def code_bytes(self) -> int:
        """The size of the script that is here."""
        return self.script.stat().st_size if self.script else 0

    def get(self, name: str) -> Any:
        """A field of submission.json."""
        return (self.data or {}).get(name)


def read_entry(folder: Path) -> Entry:
    data, fault = read_submission_json(folder)
    logs = []
    for path in sorted(folder.rglob("*")):
        log = read_train_log(path) if is_log_name(path) else None
        if log:
            logs.append(log)
    used, others = choose_logs(logs, claims_by_seed(data))
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
    return Entry(folder, data, fault, text, find_script(folder), used, others, find_track(folder, data))


def is_log_name(path: Path) -> bool:
    return path.suffix in (".log", ".txt") and path.name != "requirements.txt" and path.is_file()


def read_submission_json(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The object in submission.json; or None, and why."""
    path = folder / "submission.json"
    if not path.is_file():
        found = sorted(folder.glob("submission*.json"))
        if not found:
            return None, "submission.json is missing"
        path = found[0]
    try:
        # Decimal keeps how many decimals were stated
        data = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        return None, f"{path.name} is not JSON: {error}"
    if not isinstance(data, dict):
        return None, f"{path.name} does not hold an object"
    return data, ""


def find_script(folder: Path) -> Path | None:
    """train_gpt.py, or what replaces it in older folders."""
    scripts = [path for path in sorted(folder.glob("train*.py")) if "human" not in path.name]
    for path in scripts:
        if path.name == "train_gpt.py":
            return path
    return scripts[0] if scripts else None


def find_track(folder: Path, data: dict[str, Any] | None) -> str:
    """The track that submission.json names, or else the one whose folder this is in."""
    stated = str((data or {}).get("track") or "").replace("-", "_").removeprefix("track_")
    parent = folder.resolve().parent.name
    for name in (f"track_{stated}", parent):
        if name in TRACKS:
            return name
    return "track_non_record_16mb" if stated.startswith("non_record") else ""


def claims_by_seed(data: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """What submission.json says about each seed."""
    for name in ("seed_results", "seeds"):
        found = (data or {}).get(name)
        if isinstance(found, dict):
            claims = {}
            for key, values in found.items():
                number = re.search(r"\d+", key)
                if number and isinstance(values, dict):
                    claims[int(number[0])] = values
            return claims
    return {}


def agrees(stated: Any, computed: float | None) -> bool:
    """Whether a stated number is the computed one to its last decimal, rounded or cut off."""
    if computed is None or isinstance(stated, bool) or not isinstance(stated, int | float | Decimal):
        return False
    exponent = stated.as_tuple().exponent if isinstance(stated, Decimal) else 0
    if not isinstance(exponent, int):
        return False  # infinite, or not a number
    unit = 10.0**exponent
    return abs(float(stated) - computed) <= unit * (1 + 1e-9)


def choose_logs(logs: list[TrainLog], claims: dict[int, dict[str, Any]]) -> tuple[list[TrainLog], list[TrainLog]]:
    """The logs that the numbers rest on, and the others: copies, reruns, other experiments."""
    if any(log.ours for log in logs):
        used = [log for log in logs if re.fullmatch(r"train_seed\d+\.log", log.path.name)]
        return sorted(used, key=lambda log: log.name_seed or 0), []
    # train.log is often a copy of one seed's log; of two copies, the one whose name holds a seed is kept
    kept = {log.digest: log for log in sorted(logs, key=lambda log: log.name_seed is not None)}
    logs = [log for log in logs if log is kept[log.digest]]
    if claims:
        used = []
        for seed, values in claims.items():
            of_seed = [log for log in logs if log.name_seed == seed] or [log for log in logs if log.seed == seed]
            stated = values.get("val_bpb")
            fitting = [log for log in of_seed if any(agrees(stated, score.bpb) for score in log.scores)]
            used += (fitting or of_seed)[:1]
    else:
        least_depth = min((len(log.path.parts) for log in logs), default=0)
        used = [log for log in logs if len(log.path.parts) == least_depth and log.is_finished] or logs
    return used, [log for log in logs if log not in used]
