"""All rules of a submission folder, ours or anybody's from the Parameter Golf challenge, and their verdicts. What a
folder does not tell is said to be so, and never guessed.
"""

from __future__ import annotations

from tools import rules_folder, rules_numbers
from tools.entry import Entry
from tools.verdicts import Verdict, decide

RULES = rules_folder.RULES | rules_numbers.RULES


def judge(entry: Entry, static: bool = False) -> list[Verdict]:
    """One verdict per rule. `static` runs no script at all, not even our own."""
    return [decide(name, list(rule(entry))) for name, rule in RULES.items() if not (static and name == "runs")]
