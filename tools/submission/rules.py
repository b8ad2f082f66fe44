"""All rules for a submission folder, ours or anybody's from the Parameter Golf challenge. What a folder does not tell
is reported as such and never guessed.
"""

from __future__ import annotations

from tools.submission import folder_rules, log_rules, number_rules
from tools.submission.entry import Entry
from tools.submission.verdicts import Verdict, decide

RULES = folder_rules.RULES | log_rules.RULES | number_rules.RULES
EXECUTING = {"runs"}  # rules that start the script


def judge(entry: Entry, static: bool = False) -> list[Verdict]:
    """One verdict per rule. `static` executes nothing, not even our own script."""
    wanted = {name: rule for name, rule in RULES.items() if not (static and name in EXECUTING)}
    return [decide(name, list(rule(entry))) for name, rule in wanted.items()]
