"""The loop plan against an expansion by text replacement, which knows nothing of the parser's tree.

Asserts the laws of the notation (repetition, depth, rows of the per-pass tables, ^ and ~ marks), that every malformed
plan stops with the character that is wrong, and that no text makes the parser crash. CPU: pytest tests/test_plan.py
"""

import re
import signal

import pytest
from helpers import at, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from loopgolf.errors import ConfigError
from loopgolf.plan import ONCE, Depth, parse_pass_set, parse_plan

INNERMOST = re.compile(r"\((\^?)([a-zA-Z?!;]+)(~*)\)\*(\d+|r)")


def expand(text: str, depth: int) -> list[tuple[str, int, int, bool]]:
    """Replaces the innermost group by its repetitions until none is left. In the result ? marks an entered group with
    injection, ! an injection (both before their letter), ; a norm (behind it). Per pass: letter, entered groups,
    injections, norm."""

    def repeat(match: re.Match) -> str:
        inject, body, norms, count = match.groups()
        n = 1 if depth == 0 else depth if count == "r" else int(count)
        body = "!" * len(inject) + body
        rows = [body + (";" if len(norms) == 2 or (len(norms) == 1 and i < n - 1) else "") for i in range(n)]
        return "?" * len(inject) + "".join(rows)

    while (shorter := INNERMOST.sub(repeat, text)) != text:
        text = shorter
    found = re.findall(r"([?!]*)([a-zA-Z])(;*)", text)
    assert "".join(a + b + c for a, b, c in found) == text
    return [(letter, marks.count("?"), marks.count("!"), bool(norms)) for marks, letter, norms in found]


def build(items: list, free: list[bool]) -> str:
    """Text of a drawn tree; only the first group that asks for it repeats r times."""
    text = ""
    for item in items:
        if isinstance(item, str):
            text += item
            continue
        inject, inner, norms, count = item
        body = build(inner, free)
        if count == "r":
            count, free[0] = ("r" if free[0] else 2), False
        text += f"({'^' * inject}{body}{'~' * norms})*{count}"
    return text


letters = st.sampled_from("abcdefXYZ")
trees = st.recursive(
    st.lists(letters, min_size=1, max_size=4),
    lambda inner: st.lists(
        letters | st.tuples(st.booleans(), inner, st.integers(0, 2), st.sampled_from([1, 2, 3, "r"])),
        min_size=1,
        max_size=3,
    ),
    max_leaves=4,
)
plans = trees.map(lambda tree: build(tree, [True]))


def describe(text: str, depth: int, rows: int) -> list[tuple[str, int, int, bool]]:
    plan = parse_plan(text)
    return [(plan.names[p.block], len(p.enter), len(p.inject), p.norm) for p in plan.passes(at(depth), rows)]


@given(plans, st.integers(0, 4), st.integers(1, 4))
def test_passes_are_those_of_the_text_written_out(text, depth, rows):
    assert describe(text, depth, rows) == expand(text, depth)
    if depth:
        assert parse_plan(text).count_passes(depth) == len(expand(text, depth))


@given(plans)
def test_blocks_are_named_in_order_of_appearance(text):
    plan = parse_plan(text)
    seen = [c for c in text if c.isalpha() and (c != "r" or "*r" not in text)]
    assert list(plan.names) == list(dict.fromkeys(seen))
    assert plan.is_variable == ("*r" in text)


@given(plans)
def test_one_repetition_changes_nothing(text):
    assert describe(f"({text})*1", 2, 2) == describe(text, 2, 2)


@given(plans, st.integers(2, 3))
def test_a_repeated_plan_is_the_plan_said_again(text, n):
    assert describe(f"({text})*{n}", 2, 2) == describe(text, 2, 2) * n


@given(plans)
def test_depth_zero_runs_every_group_once(text):
    once = re.sub(r"\*(\d+|r)", "*1", text)
    assert [row[:3] for row in describe(text, 0, 2)] == [row[:3] for row in describe(once, 1, 1)]
    assert "".join(row[0] for row in describe(text, 0, 2)) == re.sub(r"\*(\d+|r)|[^a-zA-Z]", "", text)


@given(plans, st.integers(1, 4))
def test_slots_count_the_passes(text, depth):
    slots = [p.slot for p in parse_plan(text).passes(Depth(depth), depth)]
    assert slots == list(range(len(slots)))


@given(plans, st.integers(0, 6), st.integers(1, 3))
def test_slots_stay_within_the_tables_and_keep_their_block(text, depth, rows):
    plan = parse_plan(text)
    owner = {p.slot: p.block for p in plan.passes(Depth(rows), rows)}
    assert all(owner[p.slot] == p.block for p in plan.passes(at(depth), rows))


def test_depth_zero_uses_the_parameters_of_the_first_repetition():
    assert [p.slot for p in parse_plan("abc(def)*3ghijk").passes(ONCE, 4)] == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16]


@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_repetitions_beyond_the_table_reuse_its_last_row(depth, rows):
    slots = [p.slot for p in parse_plan("ab(^cdef)*rgh").passes(at(depth), rows)]
    body = [2 + 4 * min(rep, rows - 1) + i for rep in range(depth) for i in range(4)]
    assert slots == [0, 1, *body, 2 + 4 * rows, 3 + 4 * rows]


def test_marks_stand_at_the_right_passes():
    between = parse_plan("ab(^cd~)*3e").passes(Depth(1), 1)
    assert [i for i, p in enumerate(between) if p.inject] == [2, 4, 6]
    assert [i for i, p in enumerate(between) if p.enter] == [2]
    assert [i for i, p in enumerate(between) if p.norm] == [3, 5]
    assert [i for i, p in enumerate(parse_plan("ab(^cd~~)*3e").passes(Depth(1), 1)) if p.norm] == [3, 5, 7]


def test_nested_injections_are_mixed_in_from_the_outside():
    first = parse_plan("(^(^ab)*2)*2").passes(Depth(1), 1)[0]
    assert first.enter == first.inject == (0, 1)


@pytest.mark.parametrize(
    "text, character",
    [
        ("", 1), ("1", 1), ("a b", 2), ("ab)", 3), ("(ab", 4), ("()*2", 2), ("(ab)", 5), ("(ab)3", 5), ("(ab)*", 6),
        ("(ab)*0", 6), ("(ab)*257", 6), ("(ab)*x", 6), ("(ab)*-1", 6), ("(a~~~)*2", 5), ("a^b", 2), ("(a^b)*2", 3),
        ("(^)*2", 3), ("^a", 1), ("a~", 2), ("(~a)*2", 2), ("(a)*r(b)*r", 10), ("((a)*r)*r", 9), ("aé", 2),
        ("(a))*2", 4), ("a*3", 2), ("(a)*²", 5), ("(a)*٣", 5), ("(a)*0000000011", 5), ("(^^a)*2", 3), ("(" * 20 + "a", 17),
    ],
)  # fmt: skip
def test_malformed_plans_point_at_the_character(text, character):
    with pytest.raises(ConfigError) as error:
        parse_plan(text)
    shown = text[character - 1 : character] or "end"
    assert f"character {character} ({shown})" in str(error.value) and "\n" not in str(error.value)


@given(st.text(alphabet="ab()^~*r0123 ", max_size=25) | st.text(max_size=12))
def test_no_text_crashes_the_parser(text):
    try:
        parse_plan(text)
    except ConfigError:
        pass


@given(plans, st.data())
def test_a_broken_plan_is_refused_or_still_a_plan(text, data):
    at = data.draw(st.integers(0, len(text)))
    broken = data.draw(st.sampled_from([text[:at] + text[at + 1 :], text[:at] + "(" + text[at:], text[:at]]))
    try:
        plan = parse_plan(broken)
    except ConfigError:
        return
    assert [plan.names[p.block] for p in plan.passes(Depth(2), 2)] == [row[0] for row in expand(broken, 2)]


@pytest.mark.parametrize(
    "text",
    ["(" * 16 + "a" + ")*256" * 16, "(" * 400 + "a", "a" * 2000, "(a)*256" * 3, "(a)*" + "9" * 900, "((a)*256)*r",
     "(" * 12 + "a" + ")*200" * 12],
)  # fmt: skip
def test_absurd_plans_are_refused_before_they_are_built(text):
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the plan is expanded before it is counted"))
    signal.alarm(10)
    try:
        with pytest.raises(ConfigError):
            tiny_config(plan=text, skips="none", ttt_freeze="")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_pass_sets():
    assert parse_pass_set("xsa_passes", "none", 7) == frozenset()
    assert parse_pass_set("xsa_passes", "all", 3) == {0, 1, 2}
    assert parse_pass_set("xsa_passes", "last4", 7) == {3, 4, 5, 6}
    assert parse_pass_set("xsa_passes", "3,5,6", 7) == {3, 5, 6}
    for wrong in ("", "some", "last", "last9", "last9999999999999", "7", "-1", "1,,2", "1.5"):
        with pytest.raises(ConfigError, match="xsa_passes"):
            parse_pass_set("xsa_passes", wrong, 7)
