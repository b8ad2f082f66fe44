"""The loop plan: which physical blocks a forward applies, in which order, with what in between.

    plan  := item+            item := block | group
    group := '(' '^'? item+ '~'* ')' '*' count      block := one letter       count := integer | 'r'

A letter is a block, allocated at its first appearance; each appearance is one pass. Everything that depends on depth
is derived from the parsed plan.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from loopgolf.errors import ConfigError


@dataclass
class Pass:
    """One application of a physical block."""

    block: int
    slot: int  # row of the per-pass tables
    enter: tuple[int, ...] = ()  # groups whose incoming stream is kept before this pass
    inject: tuple[int, ...] = ()  # groups whose kept stream is mixed in before this pass
    norm: bool = False  # a norm follows this pass
    ends: bool = False  # a repetition of a group ends with this pass
    left: int = -1  # inside the *r group: its repetitions that still follow


@dataclass(frozen=True)
class Group:
    """`(items)*count` of a plan; count 0 stands for r."""

    items: tuple[int | Group, ...]  # blocks are numbers
    count: int = 1
    inject: tuple[int, ...] = ()  # the group's own number where ^ asks for its input
    norms: int = 0  # 1 between repetitions, 2 after each

    def count_passes(self, depth: int) -> int:
        return (self.count or depth) * sum(i.count_passes(depth) if isinstance(i, Group) else 1 for i in self.items)

    def expand(self, depth: int, rows: int, slot: int = 0) -> list[Pass]:
        """The passes with r = depth, the first one at row `slot` of the per-pass tables; depth 0 runs every group once.
        The tables cover `rows` repetitions of the *r group, deeper ones reuse the last row."""
        passes, repetitions = [], self.count or rows
        stride = self.count_passes(rows) // repetitions
        last = (self.count or depth if depth else 1) - 1
        for repetition in range(last + 1):
            first, at = len(passes), slot + stride * min(repetition, repetitions - 1)
            for item in self.items:
                passes += item.expand(depth, rows, at) if isinstance(item, Group) else [Pass(item, at)]
                at += item.count_passes(rows) if isinstance(item, Group) else 1
            passes[first].inject = self.inject + passes[first].inject
            if repetition == 0:
                passes[first].enter = self.inject + passes[first].enter
            passes[-1].norm |= self.norms == 2 or (self.norms == 1 and repetition < last)
            passes[-1].ends |= self.count != 1
            if not self.count:
                for p in passes[first:]:
                    p.left = last - repetition
        return passes


@dataclass(frozen=True)
class Plan(Group):
    """A parsed loop plan."""

    names: str = ""  # letters of the blocks in order of first appearance
    injected: tuple[int, ...] = ()  # numbers of the groups that re-inject their input
    is_variable: bool = False  # one group repeats r times

    def passes(self, depth: int, rows: int) -> tuple[Pass, ...]:
        return tuple(self.expand(depth, rows))


@functools.lru_cache
def parse_plan(text: str) -> Plan:
    """The plan that a text stands for; errors point at the character."""
    names, opened, at = {}, [], 0
    item = "a block letter or '(' (nested at most 16 deep)"

    def take(pattern: str, expected: str = "") -> str:
        nonlocal at
        found = re.compile(pattern).match(text, at)
        if not found:
            raise ConfigError(f"plan {text!r}, character {at + 1} ({text[at : at + 1] or 'end'}): expected {expected}")
        at = found.end()
        return found[0]

    def items(nesting: int) -> tuple[int | Group, ...]:
        found = []
        while not found or re.match("[a-zA-Z(]", text[at:]):
            mark = take(r"[a-zA-Z]|\(\^?" if nesting < 16 else "[a-zA-Z]", item)
            if mark.isalpha():
                found.append(names.setdefault(mark, len(names)))
                continue
            begin, inject = at + 1 - len(mark), (len(opened),) if mark == "(^" else ()
            opened.append(inject)
            inner = items(nesting + 1)
            norms = len(take("~{0,2}"))
            take(r"\)", f"a letter, at most two '~', or ')' for the '(' at character {begin}")
            take(r"\*", "'*' and a count, as in (ab)*3")
            counts = [str(n) for n in range(256, 0, -1)] + ["r"] * ("*r" not in text[:at])
            count = take(f"({'|'.join(counts)})(?![0-9])", "a count from 1 to 256, or r in one group only")
            found.append(Group(inner, 0 if count == "r" else int(count), inject, norms))
        return tuple(found)

    if len(text) > 1000:
        raise ConfigError(f"plan of {len(text)} characters: at most 1000 are read")
    tree = items(0)
    take(r"\Z", item)
    return Plan(tree, names="".join(names), injected=sum(opened, ()), is_variable="*r" in text)


def parse_pass_set(name: str, text: str, n_passes: int) -> frozenset[int]:
    """`none`, `all`, `last4` or `3,5,6` as a set of pass numbers, counted from 0."""
    passes = range(n_passes)
    try:
        if text in ("none", "all"):
            chosen = passes if text == "all" else ()
        elif text.startswith("last"):
            chosen = range(n_passes - int(text[4:]), n_passes)
        else:
            chosen = [int(word) for word in text.split(",")]
        if all(number in passes for number in chosen):
            return frozenset(chosen)
    except ValueError:
        pass
    raise ConfigError(f"{name}={text}: expected none, all, last4 or numbers like 3,5,6 from 0 to {n_passes - 1}")
