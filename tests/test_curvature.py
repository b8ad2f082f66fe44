"""Where the loss minds rounding: what is measured, and the steps that follow from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import events, tiny_config, tiny_context, tiny_model, tiny_options, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import train_gpt
from loopgolf.artifact import unpack_artifact
from loopgolf.curvature import Curvature, CurvatureMeter, choose_steps
from loopgolf.errors import ConfigError
from loopgolf.layers import Linear, Table
from loopgolf.params import start_normal
from loopgolf.quantize import RowGrid, compute_entropy
from tools.lib.finished import load_finished

LOSS = dict(row_steps="loss", qat_start=1.0)


class Twice(nn.Module):
    """A table whose rows go through one layer twice, then through the table again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(7, 4, torch.float32, "embed", start_normal(1.0))
        self.layer = Linear(4, (4,), torch.float32, "core", start_normal(1.0))
        self.table.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        self.layer.weight.data.normal_(generator=torch.Generator().manual_seed(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(self.table(ids))))


def measure(model: Twice, ids: torch.Tensor, targets: torch.Tensor) -> dict[str, Curvature]:
    meter = CurvatureMeter(model)
    states = model(ids)
    logits = F.linear(states, model.table.weight)
    meter.watch_head("table.weight", states, logits)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    return meter.totals(lambda total: total)


def gradients_by_use(model: Twice, ids: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """(uses, rows, columns): the gradient of every token by each single use of a parameter, by plain autograd."""
    found: dict[str, list[torch.Tensor]] = {"table.weight": [], "layer.weight": []}
    for token, target in zip(ids.flatten(), targets.flatten()):
        uses = [p.detach().clone().requires_grad_() for p in [model.table.weight] * 2 + [model.layer.weight] * 2]
        look, head, first, second = uses
        state = F.linear(torch.tanh(F.linear(look[token], first)), second)
        F.cross_entropy(F.linear(state, head), target).backward()
        for use, name in zip(uses, ["table.weight"] * 2 + ["layer.weight"] * 2):
            found[name].append(use.grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def test_both_averages_are_those_of_the_gradients_of_every_token_and_use():
    model, generator = Twice(), torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(7, (2, 9), generator=generator) for _ in range(2))
    curvatures = measure(model, ids, targets)
    for name, grads in gradients_by_use(model, ids, targets).items():
        found = curvatures[name]
        torch.testing.assert_close(found.rows, grads.square().sum((0, 2)))
        torch.testing.assert_close(found.columns, torch.einsum("urc,urd->cd", grads, grads))


def test_what_is_not_used_has_no_curvature():
    model = Twice()
    model.spare = Linear(4, (3,), torch.float32, "core", start_normal(1.0))
    ids = torch.arange(6)[None]
    assert sorted(measure(model, ids, ids)) == ["layer.weight", "table.weight"]


def test_ranks_add_up():
    model, ids = Twice(), torch.arange(6)[None]
    meter = CurvatureMeter(model)
    model(ids).square().sum().backward()
    alone, doubled = meter.totals(lambda total: total), meter.totals(lambda total: total + total)
    for name, curvature in alone.items():
        assert torch.equal(doubled[name].rows, 2 * curvature.rows)
        assert torch.equal(doubled[name].columns, 2 * curvature.columns)


def draw_case(seed: int, spread: float) -> tuple[dict, dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(small=(12, 96), tall=(40, 64))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    grids = dict(small=RowGrid(6, 8.0), tall=RowGrid(8, 40.0))
    curvatures = {
        name: Curvature(torch.eye(columns), (spread * torch.randn(rows, generator=generator)).exp())
        for name, (rows, columns) in shapes.items()
    }
    return weights, grids, curvatures


def count_bits(weight: torch.Tensor, step: torch.Tensor, grid: RowGrid) -> float:
    """Order-0 entropy of each row's codes by itself."""
    return sum(
        len(row) * compute_entropy(grid.quantize(row[None], step=own[None])[0]) for row, own in zip(weight, step)
    )


@given(st.integers(0, 200), st.floats(0.0, 1.5))
def test_steps_by_the_loss_cost_less_at_the_same_bits(seed, spread):
    weights, grids, curvatures = draw_case(seed, spread)
    steps = choose_steps(weights, grids, curvatures)
    costs, bits = {}, {}
    for kind in ("usual", "chosen"):
        costs[kind] = bits[kind] = 0.0
        for name, weight in weights.items():
            step = steps[name] if kind == "chosen" else grids[name].find_steps(weight)
            costs[kind] += float((curvatures[name].rows.double() * step.double().square()).sum())
            bits[kind] += count_bits(weight, step, grids[name])
    assert bits["chosen"] == pytest.approx(bits["usual"], rel=0.03)
    assert costs["chosen"] <= 1.02 * costs["usual"]


def test_four_times_the_curvature_is_half_the_step():
    weights, grids, curvatures = draw_case(0, 0.0)
    rows = curvatures["small"].rows
    curvatures["small"].rows[3] = 4 * (rows[0] + 0.1 * rows.mean()) - 0.1 * rows.mean()
    steps = choose_steps(weights, grids, curvatures)["small"].float()
    assert steps[3] / steps[0] == pytest.approx(0.5, rel=0.02)


def test_no_step_is_wider_than_its_row_and_the_largest_weight_has_a_code():
    weights, grids, curvatures = draw_case(1, 6.0)
    weights["tall"][5] = 0
    curvatures["small"].rows[2] = 1e12
    steps = choose_steps(weights, grids, curvatures)
    for name, step in steps.items():
        weight, grid = weights[name], grids[name]
        assert (step.float() <= 1.001 * weight.square().mean(1).sqrt()).all()
        codes = grid.quantize(weight, step=step)[0]
        error = (weight - grid.dequantize([codes, step])).abs()
        assert (error <= 0.501 * step.float()[:, None]).all(), "a weight is beyond the largest code"
    assert steps["tall"][5] == 0


def test_where_training_is_coarse_steps_may_be_too():
    weights, _, curvatures = draw_case(1, 1.0)
    grids = dict(small=RowGrid(6, 124.0), tall=RowGrid(6, 124.0))
    for name, step in choose_steps(weights, grids, curvatures).items():
        assert (step.float() > 2 * weights[name].square().mean(1).sqrt()).any()


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-7])
def test_rows_too_small_for_a_step_move_no_other_step(spread):
    """As in a table whose rarest tokens have decayed."""
    weights, grids, curvatures = draw_case(1, 0.5)
    usual = choose_steps(weights, grids, curvatures)
    weights["tall"][7] *= spread
    found = choose_steps(weights, grids, curvatures)
    others = torch.arange(40) != 7
    torch.testing.assert_close(found["tall"][others], usual["tall"][others], rtol=0.05, atol=0)
    torch.testing.assert_close(found["small"], usual["small"], rtol=0.05, atol=0)


def test_rows_of_zeros_alone_are_no_trouble():
    weights, grids = dict(a=torch.zeros(3, 4)), dict(a=RowGrid(6, 8.0))
    steps = choose_steps(weights, grids, dict(a=Curvature(torch.eye(4), torch.ones(3))))
    assert steps["a"].tolist() == [0, 0, 0]
    assert choose_steps(weights, grids, {}) == {}


def test_steps_by_the_loss_need_training_without_rounding():
    with pytest.raises(ConfigError, match="row_steps=loss.*--qat_start 1.*spread"):
        train_gpt.parse_config(["--recipe=pocket", "--qat_start=0"], {})


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    place = tmp_path_factory.mktemp("curvature")
    return train(place, dataset, run_id="r", iterations=8, calibration_tokens=512, byte_limit=6500, **LOSS)


def test_a_run_chooses_its_steps_by_the_loss(folder):
    content = (folder / "artifact.lg").read_bytes()
    assert 0.98 * 5500 <= len(content) <= 5500
    held = unpack_artifact(content, train_gpt.describe_stored)
    step = held.raw["embed.weight.step"].float()
    ratio = step / held.tensors["embed.weight"].square().mean(1).sqrt().clamp_min(1e-6)
    assert ratio.max() > 1.5 * ratio.min(), "steps follow the spread of rows"
    run = load_finished(folder)
    assert run.fit(run.config) == content


def test_every_matrix_and_table_of_a_model_has_a_curvature(folder):
    run = load_finished(folder)
    matrices = [name for name, weight in run.weights.items() if weight.dim() == 2 and "passes" not in name]
    assert sorted(run.curvatures) == sorted(matrices)
    for name, curvature in run.curvatures.items():
        assert float(curvature.rows.sum()) == pytest.approx(float(curvature.columns.trace()), rel=1e-4), name


class Ticking:
    """A clock that is read once for each number."""

    def __init__(self, *seconds: float):
        self.seconds = iter(seconds)

    def read_slowest(self) -> float:
        return next(self.seconds)


def test_a_batch_starts_only_if_it_will_end_in_time():
    time_left = train_gpt.TimeForBatches(Ticking(5.0, 6.0, 8.5, 9.4), 11.0, first_s=5.5)
    assert [time_left.fits_another(0) for _ in range(4)] == [True, True, False, False]
    assert not train_gpt.TimeForBatches(Ticking(5.0), 10.0, first_s=5.0).fits_another(0)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tied=False),
        dict(moe_experts=3, moe_hidden=8),
        dict(plan="a(b~)*2", skips="none", adapter_rank=2, mlp="swiglu"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_model_has_curvatures(changes, dtype, dataset):
    config = tiny_config(data_path=str(dataset), calibration_tokens=128, ttt_freeze="", **changes)
    ctx = replace(tiny_context(), dtype=dtype)
    weights = {name: weight.detach().to(dtype) for name, weight in tiny_model(config).named_parameters()}
    text = train_gpt.TrainingText(config, train_gpt.list_shapes(config))
    found = train_gpt.calibrate(config, ctx, weights, text, train_gpt.wants_tokens(config))
    assert "blocks.a.attention.qkv.weight" in found and ("unembed.weight" in found) == (not config.tied)
    assert not any("expert" in name for name in found)
    for name, curvature in found.items():
        assert float(curvature.rows.sum()) == pytest.approx(float(curvature.columns.trace()), rel=1e-3), name


@pytest.mark.parametrize("plan", ["abab", "a(^b)*rc"])
def test_the_gradient_reaches_every_pass(plan, dataset):
    """Of a model whose training stops it before the last repetition, too."""
    shape = dict(plan=plan, skips="none", ttt_freeze="a", data_path=str(dataset), calibration_tokens=128)
    config = tiny_config(**shape)
    weights = dict(tiny_model(config).named_parameters())
    weights = {name: weight.detach() for name, weight in weights.items()}
    ctx = tiny_context()
    text = train_gpt.TrainingText(config, train_gpt.list_shapes(config))
    whole = train_gpt.calibrate(config, ctx, weights, text, train_gpt.wants_tokens(config))
    short = {"bptt": 1} if "r" in plan else {"checkpoint_passes": True}
    same = train_gpt.calibrate(tiny_config(**shape, **short), ctx, weights, text, train_gpt.wants_tokens(config))
    for name, curvature in whole.items():
        assert torch.equal(curvature.rows, same[name].rows), name
        assert math.isfinite(float(curvature.rows.sum()))


def test_a_calibration_says_how_much_text_it_read(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = dict(byte_limit=20_000, iterations=2, calibration_tokens=300)
    assert train_gpt.main(tiny_options(dataset, run_id="c", **settings), {}) == 0
    (line,) = events(capsys.readouterr().out, "calibration")
    assert int(line["tokens"]) == 384  # whole batches
