"""What has been run for a table, one line each in TABLE.runs.jsonl, and which lines belong together."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tools.ablation.table import Change, Table
from tools.lib.runlog import RunError


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
    turns: list[float]


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
            if isinstance(found, Run):
                self.runs.append(found)
            else:
                self.speeds.append(found)

    def add(self, found: Run | Speed) -> None:
        with self.table.runs_path.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        self.remember(found)

    def digest(self, change: Change) -> str:
        versions = [platform.python_version(), torch.__version__]
        facts = [self.table.options, change.options, self.table.data_digest, versions]
        text = json.dumps(facts).encode() + self.table.patch_of(change)
        return hashlib.sha256(text).hexdigest()[:12]

    def find(self, change: Change, seed: int, iterations: int) -> Run | None:
        digest = self.digest(change)
        same = [r for r in self.runs if (r.digest, r.seed, r.iterations) == (digest, seed, iterations)]
        return same[-1] if same else None

    def find_speed(self, change: Change) -> Speed | None:
        same = [speed for speed in self.speeds if speed.digest == self.digest(change)]
        return same[-1] if same else None
