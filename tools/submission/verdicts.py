"""What a rule about a submission folder is, and what it says: ok, violated, or cannot tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from types import UnionType
from typing import Any

from tools.submission.entry import Entry

OK, BAD, UNKNOWN = "ok", "violated", "cannot tell"
FROM_BEST_TO_WORST = [OK, UNKNOWN, BAD]
MOST_DETAILS = 4
Found = Iterator[tuple[str, str]]  # one of the three, and a detail
Rule = Callable[[Entry], Found]


@dataclass(frozen=True)
class Verdict:
    rule: str
    verdict: str
    detail: str


def register(rules: dict[str, Rule]) -> Callable[[Rule], Rule]:
    """A decorator that enters a rule into a table under its own name."""

    def enter(rule: Rule) -> Rule:
        rules[rule.__name__] = rule
        return rule

    return enter


def decide(rule: str, found: list[tuple[str, str]]) -> Verdict:
    """The worst of what a rule found, with the first few details of that kind."""
    found = found or [(UNKNOWN, "nothing in the folder tells")]
    worst = max((level for level, _ in found), key=FROM_BEST_TO_WORST.index)
    details = list(dict.fromkeys(detail for level, detail in found if level == worst))
    text = " ".join("; ".join(details[:MOST_DETAILS]).split())
    if len(details) > MOST_DETAILS:
        text += f"; and {len(details) - MOST_DETAILS} more"
    return Verdict(rule, worst, text)


def has_kind(value: Any, kind: type | UnionType) -> bool:
    """Whether a value is of a type, where float accepts every finite number and bool is no number."""
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float | Decimal) and math.isfinite(value)
    return isinstance(value, kind)
