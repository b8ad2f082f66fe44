"""Reads what a run left behind: its log lines and its result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from loopgolf.errors import Stop


class RunError(Stop):
    """A run folder that cannot be used: one line that names it and the fix."""


@dataclass(frozen=True)
class Line:
    """One `event key:value …` line; values are text, blanks restored."""

    event: str
    values: dict[str, str]


def parse_line(text: str) -> Line | None:
    """None for free text: blank lines and lines that start with #."""
    if not text.strip() or text.startswith("#"):
        return None
    event, *pairs = text.split()
    return Line(event, {key: unquote(value) for key, value in (pair.split(":", 1) for pair in pairs)})


def read_log(folder: Path) -> list[Line]:
    path = folder / "log.txt"
    if not path.is_file():
        raise RunError(f"{folder}: no log.txt there; name a folder under runs/")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = parse_line(text)
        except ValueError:
            raise RunError(f"{path}, line {number}: not `event key:value …`: {text[:60]!r}") from None
        lines += [line] if line else []
    return lines


def read_result(folder: Path) -> dict[str, str]:
    """The fields of the result line; a run that did not finish has none."""
    path = folder / "result.json"
    try:
        return {name: str(value) for name, value in json.loads(path.read_text())["result"].items()}
    except FileNotFoundError:
        raise RunError(f"{folder}: no result.json, so the run has not finished; continue it with --resume") from None
    except (ValueError, KeyError):
        raise RunError(f"{path}: not a result of train_gpt.py") from None
