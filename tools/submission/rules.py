"""All rules of a submission folder, ours or anybody's from the Parameter Golf challenge, and their verdicts. What a
folder does not tell is said to be so, and never guessed.
"""

from __future__ import annotations

from tools.submission import folder_rules, number_rules
from tools.submission.entry import Entry
from tools.submission.verdicts import Verdict, decide

RULES = folder_rules.RULES | number_rules.RULES


def judge(entry: Entry, static: bool = False) -> list[Verdict]:
    """One verdict per rule. `static` runs no script at all, not even our own."""
    return [decide(name, list(rule(entry))) for name, rule in RULES.items() if not (static and name == "runs")]
