"""What a rule of a submission folder is, and what it says: ok, violated, or that the folder does not tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from tools.submission.entry import Entry

OK, BAD, UNKNOWN = "ok", "violated", "cannot tell"
Found = Iterator[tuple[str, str]]  # one of the three, and a line of detail
Rule = Callable[[Entry], Found]


@dataclass(frozen=True)
class Verdict:
    rule: str
    verdict: str
    detail: str


def register(rules: dict[str, Rule]) -> Callable[[Rule], Rule]:
    """A decorator that enters a rule under its own name."""

    def rule(function: Rule) -> Rule:
        rules[function.__name__] = function
        return function

    return rule


def decide(name: str, found: list[tuple[str, str]]) -> Verdict:
    """The worst of what a rule found, with at most four details of that kind."""
    found = found or [(UNKNOWN, "nothing in the folder tells")]
    worst = max((level for level, _ in found), key=[OK, UNKNOWN, BAD].index)
    details = list(dict.fromkeys(text for level, text in found if level == worst))
    more = f"; and {len(details) - 4} more" if len(details) > 4 else ""
    return Verdict(name, worst, " ".join("; ".join(details[:4]).split()) + more)


def has_kind(value, kind) -> bool:
    """Of a type; float stands for any finite number."""
    if kind is float:
        return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
