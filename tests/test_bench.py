"""The bench on a tiny model: the parts are the step, two configurations take turns, a mode counts what it forwards, and
bad input is one line. No timing is asserted: pytest tests/test_bench.py
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, options, tiny_context

import train_gpt
from tools import bench

SMALL = ["--", *options(recipe="pocket", **TINY | dict(batch_tokens=64))]


def run(capsys, *args: str) -> dict:
    assert bench.main([*args, "--json", *SMALL]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_parts_make_the_step_and_the_floor_is_its_arithmetic(capsys):
    step = run(capsys, "--steps", "3")["step"]
    parts = [step[f"{part}_ms"] for part in bench.PARTS]
    assert all(ms > 0 for ms in parts) and sum(parts) == pytest.approx(step["step_ms"], rel=0.5)
    assert step["share_of_peak"] == pytest.approx(step["floor_ms"] / step["step_ms"])
    assert step["tokens_per_s"] == pytest.approx(64 / step["step_ms"] * 1000)
    config, _ = train_gpt.parse_config(SMALL[1:], {})
    flops = 64 * train_gpt.compute_flops(config, config.depth)
    assert step["achieved_tflops"] * step["step_ms"] * 1e9 == pytest.approx(flops)
    assert step["peak_tflops"] * step["floor_ms"] * 1e9 == pytest.approx(flops)
    assert 0 < step["share_of_peak"] < 1 and step["peak_memory_mb"] > 10


def test_a_step_does_what_that_of_a_run_does(tmp_path):
    """Measured in parts or whole, the same weights come out; of two micro batches."""
    parts, whole = (bench.Case([*SMALL[1:], "--micro_batch=1"], tmp_path) for _ in "ab")
    parts.step()
    config, ctx = whole.config, whole.ctx
    settings = train_gpt.settings_at(config, 0.5, 0)
    batch = train_gpt.load_batch(whole.text, 0, settings, ctx)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    train_gpt.train_step(whole.model, whole.state, batch, settings, ctx)
    after = dict(parts.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in whole.model.named_parameters())
    assert not torch.equal(after["embed.weight"], before["embed.weight"])


def test_the_ratio_is_that_of_times_per_token():
    order = []

    def case(name: str, batch_tokens: int, *seconds: float) -> SimpleNamespace:
        left, config = iter(seconds), SimpleNamespace(batch_tokens=batch_tokens)
        return SimpleNamespace(config=config, ctx=tiny_context(), step=lambda: order.append(name) or next(left))

    found = bench.compare(case("a", 100, 3.0, 9.0, 4.0), case("b", 200, 2.0, 3.0, 4.0), 3)
    assert found == dict(ratio=pytest.approx(3), lowest=pytest.approx(2), highest=pytest.approx(6), rounds=3)
    assert order == list("ababab")


@pytest.mark.slow
def test_two_configurations_take_turns(capsys):
    found = run(capsys, "--steps", "3", "--against", "--batch_tokens 128 --model_dim 16")
    assert found["against"]["rounds"] == 3
    assert found["against"]["lowest"] <= found["against"]["ratio"] <= found["against"]["highest"]
    assert found["other"]["batch_tokens"] == 128 and found["other"]["params"] < found["step"]["params"]


@pytest.mark.slow
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
