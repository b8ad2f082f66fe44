"""The bench on a tiny model: the parts are the step, two configurations take turns, a mode counts what it forwards, and
bad input is one line. No timing is asserted: pytest tests/test_bench.py
"""

import json

import pytest
from helpers import TINY, options

from tools import bench

SMALL = ["--", *options(recipe="pocket", **TINY | dict(batch_tokens=64))]


def run(capsys, *args: str) -> dict:
    assert bench.main([*args, "--json", *SMALL]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_parts_make_the_step_and_the_floor_is_its_arithmetic(capsys):
    step = run(capsys, "--steps", "3")["step"]
    parts = [step[f"{part}_ms"] for part in bench.PARTS]
    assert all(ms > 0 for ms in parts) and sum(parts) == pytest.approx(step["step_ms"], rel=0.5)
    assert step["share_of_peak"] == pytest.approx(step["floor_ms"] / step["step_ms"])
    assert step["tokens_per_s"] == pytest.approx(64 / step["step_ms"] * 1000)
    assert 0 < step["share_of_peak"] < 1 and step["peak_memory_mb"] > 10


def test_two_configurations_take_turns(capsys):
    found = run(capsys, "--steps", "3", "--against", "--batch_tokens 128 --model_dim 16")
    assert found["against"]["rounds"] == 3
    assert found["against"]["lowest"] <= found["against"]["ratio"] <= found["against"]["highest"]
    assert found["other"]["batch_tokens"] == 128 and found["other"]["params"] < found["step"]["params"]


def test_scoring_counts_what_it_forwards(capsys):
    modes = "plain,sliding,banded,lora"
    rows = run(capsys, "--steps", "1", "--modes", modes, "--score_tokens", "257")["score"]
    assert [row["mode"] for row in rows] == modes.split(",")
    cost = {row["mode"]: row["forward_per_scored"] for row in rows}
    assert cost["plain"] == pytest.approx(1.0) and cost["plain"] < cost["banded"] < cost["sliding"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("args", [["--steps", "0"], ["--against", "--no_such_option 1"], ["--modes", "wrong"]])
def test_bad_input_is_one_line(args, capsys):
    assert bench.main([*args, "--steps", "1", *SMALL] if args[0] != "--steps" else [*args, *SMALL]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and len(error.splitlines()) == 1
