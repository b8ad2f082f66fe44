"""What recipes would do: the table against the functions that train_gpt.py itself forecasts with.

pytest tests/test_forecast.py
"""

import json

import pytest

import train_gpt
from tools import forecast


def test_the_challenges_recipes_fit_and_stand_side_by_side(capsys):
    assert forecast.main(["--json"]) == 0
    rows = {row["recipe"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["golf", "4b7l", "frontier", "baseline9"]
    for name, row in rows.items():
        assert 10_000_000 < row["total_bytes"] <= 16_000_000
        assert row["steps"][1] == pytest.approx(1.25 * row["steps"][0], rel=1e-3)
        assert (row["gflop_once"] < row["gflop_looped"]) == ("*" in train_gpt.RECIPES[name].get("plan", ""))
    assert rows["4b7l"]["gflop_looped"] * 1e9 == pytest.approx(train_gpt.compute_flops(train_gpt.Config(), 1.0))


def test_steps_follow_the_schedule(capsys):
    def steps(options: str) -> int:
        assert forecast.main(["frontier", "--options", options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)[0]["steps"][0]

    always, late, never = (steps(f"--loop_start {start}") for start in (0, 0.5, 1))
    assert always < late < never and late == pytest.approx((always + never) / 2, abs=2)
    assert steps("--contexts 1024:0.9") > steps("")


@pytest.mark.parametrize(
    "given",
    [
        ["gold"],
        ["golf", "--peak", "0"],
        ["golf", "--seconds", "nan"],
        ["golf", "--options", "--plan 'a"],
        ["golf", "--options", "--recipe pocket"],
    ],
)
def test_bad_input_is_one_line(given, capsys):
    try:
        code = forecast.main(given)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
