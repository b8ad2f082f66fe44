"""The one quantizer: codes within their bits, an error of at most half a step, bits that depend on k alone, k solved
from the byte limit, and weights that training computes with against those that an artifact gives back, bit by bit.

float32 on a CPU: pytest tests/test_quantization.py
"""

import pytest
import torch
from helpers import SMALL, pack_weights, plan_formats, tiny_config, tiny_context, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from loopgolf.artifact import unpack_artifact
from loopgolf.errors import DoesNotFit
from loopgolf.params import collect_specs, start_weights
from loopgolf.quantize import Half, RowGrid
from train_gpt import (
    COARSEST,
    FINEST,
    LoopedGPT,
    describe_stored,
    forecast_bytes,
    train_step,
)

grids = st.builds(RowGrid, st.integers(2, 8), st.floats(0.5, 30.0))


def draw_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(grids, st.integers(0, 100), st.floats(1e-3, 1e2))
def test_codes_stay_within_their_bits_and_errors_within_half_a_step(grid, seed, scale):
    weight = draw_rows(5, 40, seed) * scale
    weight[0, 0] *= 50  # an outlier
    codes, step = grid.quantize(weight)
    assert codes.dtype == torch.int8 and step.dtype == torch.float16 and step.shape == (5,)
    assert codes.abs().max() <= 2 ** (grid.bits - 1) - 1 == grid.largest
    error = (grid.dequantize([codes, step]) - weight).abs() / step.float()[:, None]
    assert error[codes.abs() < grid.largest].max() <= 0.5 + 1e-4
    spread = weight.square().mean(1).sqrt()
    torch.testing.assert_close(step.float(), spread * grid.k / grid.largest, rtol=1e-3, atol=1e-7)


@given(grids, st.integers(0, 100))
def test_values_on_a_grid_are_codes_of_that_grid(grid, seed):
    """Quantizing twice may move the step (it follows the spread of what it is given), so the second pass is made on
    the steps of the first: there the codes come back."""
    codes, step = grid.quantize(draw_rows(4, 32, seed))
    again = (grid.dequantize([codes, step]) / step.float()[:, None]).round().to(torch.int8)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("power", [-6, -1, 3, 10])
def test_the_step_has_no_floor(power):
    weight, grid = draw_rows(4, 64), RowGrid(6, 8.0)
    codes, step = grid.quantize(weight)
    scaled_codes, scaled_step = grid.quantize(weight * 2.0**power)
    assert torch.equal(scaled_codes, codes) and torch.equal(scaled_step, step * 2.0**power)


def test_rows_are_quantized_each_for_itself():
    weight = draw_rows(6, 32) * torch.logspace(-2, 2, 6)[:, None]
    codes, step = RowGrid(6, 6.0).quantize(weight)
    for row, (one, its_step) in enumerate(zip(codes, step)):
        alone = RowGrid(6, 6.0).quantize(weight[row : row + 1])
        assert torch.equal(alone[0][0], one) and alone[1][0] == its_step


def test_rows_of_zeros_and_tiny_rows_give_zeros():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), -1e-12), torch.ones(16)])
    grid = RowGrid(6, 6.0)
    back = grid.dequantize(grid.quantize(weight))
    assert back.isfinite().all() and not back[:3].any() and back[3].allclose(torch.ones(16), atol=0.1)


@pytest.mark.parametrize("magnitude", [1e3, 1e4, 1e8])
def test_large_rows(magnitude):
    weight = draw_rows(2, 64) * magnitude
    grid = RowGrid(6, 6.0)
    back = grid.dequantize(grid.quantize(weight))
    assert back.isfinite().all() and (magnitude > 1e6 or (back - weight).abs().max() < magnitude * 6 / 31)


@pytest.mark.parametrize(
    "grid", [RowGrid(6, 4.0), RowGrid(6, 8.0), RowGrid(6, 24.0), RowGrid(8, 20.0), RowGrid(4, 2.0), RowGrid(2, 1.0)]
)
@pytest.mark.parametrize("scale", [0.02, 5.0])
def test_bits_of_a_code_are_the_entropy_of_gaussian_codes_whatever_their_scale(grid, scale):
    codes, _ = grid.quantize(draw_rows(16, 1 << 16) * scale)
    counts = torch.bincount(codes.flatten().long() + 128).double()
    chances = counts[counts > 0] / counts.sum()
    assert grid.gaussian_bits() == pytest.approx(-(chances * chances.log2()).sum().item(), rel=0.01)


def size_at(k_scale: float, **changes) -> int:
    config = tiny_config(byte_limit=0, k_scale=k_scale, **changes)
    model = LoopedGPT(config)
    return forecast_bytes(model, plan_formats(config, model)) + config.code_reserve


@pytest.mark.parametrize("k_scale", [0.4, 1.0, 2.5])
def test_the_coarseness_of_all_grids_is_solved_from_the_byte_limit(k_scale):
    limit = size_at(k_scale, model_dim=64)
    config = tiny_config(byte_limit=limit, model_dim=64)
    model = LoopedGPT(config)
    found = plan_formats(config, model)
    for name, grid in found.items():
        role = collect_specs(model)[name].role
        if role == "vector":
            assert grid == Half()
        else:
            assert grid.bits == getattr(config, f"{role}_bits")
            assert grid.k == pytest.approx(k_scale * getattr(config, f"{role}_k"), rel=0.01)
    assert 0.995 * limit <= forecast_bytes(model, found) + config.code_reserve <= limit


def test_blocks_that_the_plan_repeats_are_core():
    model = LoopedGPT(tiny_config(plan="a(bc)*2d"))
    assert {collect_specs(model)[f"blocks.{name}.mlp.up.weight"].role for name in "bc"} == {"core"}
    assert {collect_specs(model)[f"blocks.{name}.mlp.up.weight"].role for name in "ad"} == {"edge"}
    assert (
        collect_specs(model)["embed.weight"].role == "embed" and collect_specs(model)["bigram.weight"].role == "table"
    )
    assert (
        collect_specs(model)["bigram_out.weight"].role == "edge"
        and collect_specs(model)["passes.mixes"].role == "vector"
    )


@pytest.mark.parametrize(
    "changes, k_scale",
    [(dict(k_scale=0.9, byte_limit=100_000), 0.9), (dict(byte_limit=0), FINEST), (dict(byte_limit=10_000_000), FINEST)],
)
def test_a_given_coarseness_is_kept_and_a_lifted_limit_asks_for_the_finest(changes, k_scale):
    config = tiny_config(**changes)
    grid = plan_formats(config, LoopedGPT(config))["blocks.a.mlp.up.weight"]
    assert grid.k == pytest.approx(k_scale * config.core_k)


def test_a_hopeless_limit_is_refused():
    least = size_at(COARSEST)
    config = tiny_config(byte_limit=least - 10)
    with pytest.raises(DoesNotFit, match="byte_limit") as error:
        plan_formats(config, LoopedGPT(config))
    assert f"{least:,}" in str(error.value) and "\n" not in str(error.value)
    config = tiny_config(byte_limit=least + 10)
    assert plan_formats(config, LoopedGPT(config))


@pytest.mark.parametrize("jump", [0.05, 0.1, 0.3])
def test_where_sizes_jump_over_the_limit_the_largest_file_that_fits_is_taken(monkeypatch, jump):
    limit = size_at(1.0, model_dim=64)
    config = tiny_config(byte_limit=limit, model_dim=64)
    model = tiny_model(config)
    room, encode = limit - config.code_reserve, train_gpt.encode_artifact

    def encode_with_jump(*args):
        content = encode(*args)
        return content + bytes(int(jump * room)) if len(content) > 0.98 * room else content

    monkeypatch.setattr(train_gpt, "encode_artifact", encode_with_jump)
    trained = train_gpt.Trained(model.state_dict(), {}, train_gpt.plan_k_scale(config, model), train_gpt.Position())
    content = train_gpt.fit_artifact(config, model, trained, dict(sha256="", vocab=384))
    assert 0.6 * room < len(content) <= 0.98 * room


@pytest.mark.slow
@pytest.mark.parametrize("k_scale", [0.4, 0.8, 1.5])
def test_the_forecast_is_the_size_of_an_artifact_of_gaussian_weights(k_scale):
    shape = dict(model_dim=128, num_heads=4, bigram_buckets=512, bigram_dim=64, ve_dim=64)
    config = tiny_config(**shape, k_scale=k_scale)
    model = tiny_model(config)
    found = plan_formats(config, model)
    content = pack_weights(config, model.state_dict(), dict(sha256="", vocab=384))
    assert forecast_bytes(model, found) == pytest.approx(len(content), rel=0.03)
    assert forecast_bytes(model, found, model.state_dict()) == pytest.approx(len(content), rel=0.03)


def draw_inputs(columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4 * columns, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("columns, rank", [(96, 96), (300, 300), (200, 150), (64, 2), (64, 0)])
def test_feedback_keeps_the_grid_and_changes_the_outputs_less(columns, rank):
    """Rank-deficient and empty inputs included."""
    weight, grid, x = draw_rows(48, columns), RowGrid(6, 14.0), draw_inputs(columns, rank)
    plain, step = grid.quantize(weight)
    codes, same_step = grid.quantize(weight, x.T @ x)
    assert torch.equal(step, same_step) and codes.abs().max() <= grid.largest and codes.dtype == torch.int8

    def damage(found: torch.Tensor) -> float:
        return (x @ (grid.dequantize([found, step]) - weight).T).square().sum().item()

    assert damage(codes) <= 0.98 * damage(plain) if rank else torch.equal(codes, plain)


def test_feedback_with_unrelated_inputs_is_plain_rounding():
    weight, grid = draw_rows(16, 64), RowGrid(6, 10.0)
    assert torch.equal(grid.quantize(weight, 3 * torch.eye(64))[0], grid.quantize(weight)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(plan="a(^b~)*2c", core_bits=5, edge_bits=5, table_bits=7)])
def test_an_artifact_gives_back_the_weights_that_training_computed_with(dtype, changes):
    config = tiny_config(core_k=8.0, edge_k=8.0, k_scale=1.0, **SMALL | changes)
    model = LoopedGPT(config, dtype)
    start_weights(model, 3)
    state = train_gpt.build_state(config, tiny_context(), model, k_scale=1.0)
    tokens = torch.randint(config.vocab_size, (4, config.seq_len), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        train_step(model, state, (tokens, tokens.roll(-1, 1)), tiny_settings(), tiny_context())
    weights = state.master.detached()
    content = pack_weights(config, weights, dict(sha256="", vocab=384))
    artifact = unpack_artifact(content, describe_stored)
    loaded = LoopedGPT(config, dtype)
    loaded.load_state_dict(artifact.tensors)
    for name, p in model.named_parameters():
        own = p.half().to(p.dtype) if collect_specs(model)[name].group == "vector" else p
        assert torch.equal(dict(loaded.named_parameters())[name], own), name
    now = model.state_dict()
    moved = [
        n
        for n, w in weights.items()
        if collect_specs(model)[n].group == "matrix" and not torch.equal(w.to(dtype), now[n])
    ]
    assert len(moved) >= len(model.plan.names) * 2, "training computed on the grid, not with the master weights"


@given(st.integers(0, 10), st.integers(0, 200))
def test_steps_keep_so_many_bits_of_their_mantissa(bits, seed):
    weight = draw_rows(12, 16, seed) * torch.logspace(-3, 3, 12)[:, None]
    grid, exact = RowGrid(6, 8.0, bits), RowGrid(6, 8.0)
    codes, step = grid.quantize(weight)
    mantissa, _ = torch.frexp(step.float())
    assert torch.equal(mantissa * 2 ** (bits + 1), (mantissa * 2 ** (bits + 1)).round())
    whole = exact.quantize(weight)[1].float()
    assert ((step.float() - whole).abs() <= whole * 2.0 ** (-bits - 1) + 1e-7).all() and step.isfinite().all()
    inside = codes.abs() < grid.largest
    error = (weight - grid.dequantize([codes, step])).abs()
    assert (error <= 0.5001 * step.float()[:, None])[inside].all()
    assert grid.expected_bytes((12, 16)) <= exact.expected_bytes((12, 16))
