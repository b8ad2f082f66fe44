"""The table of changes that tools.ablate reads, and what is wrong with one."""

from __future__ import annotations

import hashlib
import shlex
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train_gpt
from tools.lib.runlog import RunError

VERDICTS = ("helps", "hurts", "neither")
OURS = ("seed", "iterations", "run_id", "resume", "score", "dry_run")  # settings that a row cannot have


@dataclass(frozen=True)
class Change:
    """A row of the table; the baseline is one that changes nothing."""

    name: str
    options: str = ""
    patch: str = ""
    predict: str = ""
    kind: str = ""
    published_mb: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Table:
    path: Path
    options: list[str]
    iterations: int
    seeds: list[int]
    changes: list[Change]
    data_digest: str

    @property
    def runs_path(self) -> Path:
        return self.path.with_suffix(".runs.jsonl")

    def patch_of(self, change: Change) -> bytes:
        return (self.path.parent / change.patch).read_bytes() if change.patch else b""


def read_table(path: Path) -> Table:
    try:
        content = tomllib.loads(path.read_text())
        baseline, rows = content["baseline"], content.get("row", [])
        options = shlex.split(baseline["options"])
        seeds = [int(seed) for seed in baseline["seeds"]]
        changes = [read_change(row) for row in rows]
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: not a table ({error}); see --help for its form") from None
    config, _ = train_gpt.parse_config(options, {})
    if not config.iterations or len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise RunError(f"{path}: the baseline needs --iterations and at least two seeds, each only once")
    names, same = [change.name for change in changes], [(change.options, change.patch) for change in changes]
    for change in changes:
        if names.count(change.name) > 1 or change.name == "baseline":
            raise RunError(f"{path}: {change.name!r}: every row needs a name of its own")
        if same.count((change.options, change.patch)) > 1:
            raise RunError(f"{path}: {change.name!r}: another row is the same change")
    data = Path(config.data_path).resolve()
    return Table(
        path=path,
        options=[*options, f"--data_path={data}"],  # runs are made elsewhere
        iterations=config.iterations,
        seeds=seeds,
        changes=[check_change(path, change, options) for change in changes],
        data_digest=describe_data(data),
    )


def read_change(row: dict[str, Any]) -> Change:
    change = Change(**{"kind" if key == "class" else key: row[key] for key in row})
    words = (change.name, change.options, change.patch, change.predict, change.kind, change.source)
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"row {change.name!r}: a text is needed")
    published = change.published_mb
    return replace(change, published_mb=None if published is None else float(published))


def check_change(path: Path, change: Change, options: list[str]) -> Change:
    """The change with the whole paths of its data, for runs are made elsewhere."""
    where = f"{path}: {change.name!r}"
    if bool(change.options) == bool(change.patch):
        raise RunError(f"{where} needs either options or a patch")
    if change.patch and not (path.parent / change.patch).is_file():
        raise RunError(f"{where}: {path.parent / change.patch} is not there")
    if change.patch and not (path.parent / change.patch).read_bytes().strip():
        raise RunError(f"{where}: {path.parent / change.patch} is empty, so nothing would change")
    if change.predict and change.predict not in VERDICTS:
        raise RunError(f"{where}: predict is one of {', '.join(VERDICTS)}")
    try:
        own = shlex.split(change.options)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from None
    base, _ = train_gpt.parse_config(options, {})
    config, _ = train_gpt.parse_config([*options, *own], {})
    given = [name for name in OURS if getattr(config, name) != getattr(base, name)]
    if given:
        raise RunError(f"{where}: --{given[0]} is not for a row; the table sets it")
    for name in ("data_path", "tokenizer_path"):
        if getattr(config, name) != getattr(base, name):
            own.append(f"--{name}={Path(getattr(config, name)).resolve()}")
    return replace(change, options=shlex.join(own))


def describe_data(folder: Path) -> str:
    """A digest that changes with the data set."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no data set there; python -m data.localtext --held_out builds data/heldout")
    sizes = [(file.name, file.stat().st_size) for file in sorted(folder.glob("*.bin"))]
    tokenizer = folder / "tokenizer.model"
    content = tokenizer.read_bytes() if tokenizer.is_file() else b""
    return hashlib.sha256(repr(sizes).encode() + content).hexdigest()


BASELINE = Change("baseline")
