"""The loop plan: which physical blocks a forward applies, in which order, with what in between.

    plan  := item+            item := block | group
    group := '(' '^'? item+ '~'* ')' '*' count      block := one letter       count := integer | 'r'

A letter is a block, allocated at its first appearance; each appearance is one pass. Everything that depends on depth
is derived from the parsed plan.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from loopgolf.errors import ConfigError

LONGEST_TEXT = 1000
DEEPEST_NESTING = 16
HIGHEST_COUNT = 256


@dataclass(frozen=True)
class Depth:
    """How deep one forward is: repetitions of the *r group, and whether groups repeat at all."""

    r: int = 1
    loops: bool = True


ONCE = Depth(1, loops=False)  # every group runs once, with the parameters of its first repetition


@dataclass
class Pass:
    """One application of a physical block."""

    block: int
    slot: int  # row of the per-pass tables
    visit: int = 0  # rows of the tables before this one that belong to the same block
    enter: tuple[int, ...] = ()  # groups whose incoming stream is kept before this pass
    inject: tuple[int, ...] = ()  # groups whose kept stream is mixed in before this pass
    norm: bool = False  # a norm follows this pass
    ends: bool = False  # a repetition of a group ends with this pass
    repetitions_left: int | None = None  # of the *r group that this pass belongs to, if it does


@dataclass(frozen=True)
class Group:
    """`(items)*count` of a plan."""

    items: tuple[int | Group, ...]  # blocks are numbers
    count: int | None = 1  # None stands for r
    inject: tuple[int, ...] = ()  # the group's own number where ^ asks for its input
    norm_between: bool = False  # ~: a norm between two repetitions
    norm_last: bool = False  # ~~: a norm after the last one, too

    def count_passes(self, r: int) -> int:
        repetitions = r if self.count is None else self.count
        return repetitions * self.count_body(r)

    def count_body(self, r: int) -> int:
        """Passes of one repetition."""
        return sum(item.count_passes(r) if isinstance(item, Group) else 1 for item in self.items)

    def expand(self, depth: Depth, covered: int, first_slot: int) -> list[Pass]:
        """The passes, the first one at this row of the per-pass tables. The tables cover so many repetitions of the *r
        group; deeper ones reuse the last row."""
        rows = covered if self.count is None else self.count
        repetitions = depth.r if self.count is None else self.count
        if not depth.loops:
            repetitions = 1
        passes: list[Pass] = []
        for repetition in range(repetitions):
            is_last = repetition == repetitions - 1
            row = min(repetition, rows - 1)
            body = self.expand_body(depth, covered, first_slot + row * self.count_body(covered))
            body[0].inject = self.inject + body[0].inject
            if repetition == 0:
                body[0].enter = self.inject + body[0].enter
            if self.norm_last if is_last else self.norm_between:
                body[-1].norm = True
            if self.count != 1:
                body[-1].ends = True
            if self.count is None:
                for p in body:
                    p.repetitions_left = repetitions - 1 - repetition
            passes += body
        return passes

    def expand_body(self, depth: Depth, covered: int, slot: int) -> list[Pass]:
        """One repetition."""
        passes: list[Pass] = []
        for item in self.items:
            if isinstance(item, Group):
                passes += item.expand(depth, covered, slot)
                slot += item.count_passes(covered)
            else:
                passes.append(Pass(item, slot))
                slot += 1
        return passes

    def find_groups(self) -> list[Group]:
        """The groups within, at any depth."""
        groups = []
        for item in self.items:
            if isinstance(item, Group):
                groups += [item, *item.find_groups()]
        return groups


@dataclass(frozen=True)
class Plan:
    """A parsed loop plan."""

    body: Group  # all of it, once
    names: str  # letters of the blocks in order of first appearance
    injected: tuple[int, ...]  # numbers of the groups that re-inject their input

    def passes(self, depth: Depth, covered: int) -> list[Pass]:
        """The passes of a forward; `covered` repetitions of the *r group have rows in the per-pass tables."""
        owners = self.slot_owners(covered)
        passes = self.body.expand(depth, covered, 0)
        for p in passes:
            p.visit = owners[: p.slot].count(p.block)
        return passes

    def count_passes(self, r: int) -> int:
        return self.body.count_passes(r)

    def slot_owners(self, covered: int) -> list[int]:
        """The block that each row of the per-pass tables belongs to."""
        return [p.block for p in self.body.expand(Depth(covered), covered, 0)]

    @property
    def has_groups(self) -> bool:
        return bool(self.body.find_groups())

    @property
    def is_variable(self) -> bool:
        """Whether one group repeats r times."""
        return any(group.count is None for group in self.body.find_groups())

    @property
    def injects_into_variable_group(self) -> bool:
        """Whether every repetition of the *r group sees the stream that entered it."""
        return any(group.count is None and group.inject for group in self.body.find_groups())


@functools.lru_cache
def parse_plan(text: str) -> Plan:
    """The plan that a text stands for; errors point at the character."""
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"plan of {len(text)} characters: at most {LONGEST_TEXT} are read")
    return PlanParser(text).parse()


class PlanParser:
    """Recursive descent over the text of a plan."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.names: dict[str, int] = {}  # letter -> block number
        self.groups = 0  # opened so far
        self.injected: list[int] = []
        self.is_variable = False

    def parse(self) -> Plan:
        items = self.parse_items(nesting=0)
        if self.position < len(self.text):
            self.fail(self.expected_item())
        return Plan(Group(items), "".join(self.names), tuple(self.injected))

    def parse_items(self, nesting: int) -> tuple[int | Group, ...]:
        items: list[int | Group] = []
        while not items or self.sees("[a-zA-Z(]"):
            if self.sees("[a-zA-Z]"):
                letter = self.take("[a-zA-Z]")
                items.append(self.names.setdefault(letter, len(self.names)))
            elif self.sees(r"\(") and nesting < DEEPEST_NESTING:
                items.append(self.parse_group(nesting + 1))
            else:
                self.fail(self.expected_item())
        return tuple(items)

    def parse_group(self, nesting: int) -> Group:
        opened_at = self.position + 1
        number = self.groups
        self.groups += 1
        self.take(r"\(")
        inject: tuple[int, ...] = ()
        if self.sees(r"\^"):
            self.take(r"\^")
            inject = (number,)
            self.injected.append(number)
        items = self.parse_items(nesting)
        marks = self.take("~{0,2}")
        self.take(r"\)", f"a letter, at most two '~', or ')' for the '(' at character {opened_at}")
        self.take(r"\*", "'*' and a count, as in (ab)*3")
        return Group(items, self.parse_count(), inject, norm_between=marks != "", norm_last=marks == "~~")

    def parse_count(self) -> int | None:
        expected = f"a count from 1 to {HIGHEST_COUNT}, or r in one group only"
        if self.sees("r(?![0-9])") and not self.is_variable:
            self.take("r")
            self.is_variable = True
            return None
        if not self.sees("[1-9][0-9]{0,2}(?![0-9])"):
            self.fail(expected)
        start = self.position
        count = int(self.take("[0-9]+"))
        if count > HIGHEST_COUNT:
            self.position = start
            self.fail(expected)
        return count

    def sees(self, pattern: str) -> bool:
        return re.compile(pattern).match(self.text, self.position) is not None

    def take(self, pattern: str, expected: str = "") -> str:
        found = re.compile(pattern).match(self.text, self.position)
        if not found:
            self.fail(expected)
        self.position = found.end()
        return found[0]

    def expected_item(self) -> str:
        return f"a block letter or '(' (nested at most {DEEPEST_NESTING} deep)"

    def fail(self, expected: str) -> NoReturn:
        character = self.text[self.position : self.position + 1] or "end"
        raise ConfigError(f"plan {self.text!r}, character {self.position + 1} ({character}): expected {expected}")


def parse_pass_set(name: str, text: str, n_passes: int) -> frozenset[int]:
    """`none`, `all`, `last4` or `3,5,6` as a set of pass numbers, counted from 0."""
    if text == "none":
        return frozenset()
    passes = range(n_passes)
    problem = f"{name}={text}: expected none, all, last4 or numbers like 3,5,6 from 0 to {n_passes - 1}"
    try:
        if text == "all":
            chosen: Sequence[int] = passes
        elif text.startswith("last"):
            chosen = range(n_passes - int(text[4:]), n_passes)
        else:
            chosen = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(problem) from None
    if not all(number in passes for number in chosen):
        raise ConfigError(problem)
    return frozenset(chosen)
