"""The one quantizer: codes within their bits, an error of at most half a step, bits that depend on k alone, k solved
from the byte limit, and weights that training computes with against those that an artifact gives back, bit by bit.

float32 on a CPU: pytest tests/test_quantization.py
"""

import math

import pytest
import torch
from helpers import tiny_config, tiny_context, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    COARSEST_K,
    DoesNotFit,
    Grid,
    Latents,
    LoopedGPT,
    Optimizers,
    Settings,
    build_grids,
    compute_code_bits,
    dequantize_tensor,
    forecast_bytes,
    load_weights,
    pack_artifact,
    quantize_tensor,
    train_step,
    unpack_artifact,
)

grids = st.builds(Grid, st.integers(2, 8), st.floats(0.5, 30.0))


def draw_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(grids, st.integers(0, 100), st.floats(1e-3, 1e3))
def test_codes_stay_within_their_bits_and_errors_within_half_a_step(grid, seed, scale):
    weight = draw_rows(5, 40, seed) * scale
    weight[0, 0] *= 50  # an outlier
    codes, step = quantize_tensor(weight, grid)
    assert codes.dtype == torch.int8 and step.dtype == torch.float16 and step.shape == (5,)
    assert codes.abs().max() <= 2 ** (grid.bits - 1) - 1 == grid.largest
    error = (dequantize_tensor(codes, step) - weight).abs() / step.float()[:, None]
    assert error[codes.abs() < grid.largest].max() <= 0.5 + 1e-4
    spread = weight.square().mean(1).sqrt()
    torch.testing.assert_close(step.float(), spread * grid.k / grid.largest, rtol=1e-3, atol=1e-7)


@given(grids, st.integers(0, 100))
def test_values_on_a_grid_are_codes_of_that_grid(grid, seed):
    """Quantizing twice may move the step (it follows the spread of what it is given), so the second pass is made on
    the steps of the first: there the codes come back."""
    codes, step = quantize_tensor(draw_rows(4, 32, seed), grid)
    again = (dequantize_tensor(codes, step) / step.float()[:, None]).round().to(torch.int8)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("power", [-6, -1, 3, 10])
def test_the_step_has_no_floor(power):
    weight, grid = draw_rows(4, 64), Grid(6, 8.0)
    codes, step = quantize_tensor(weight, grid)
    scaled_codes, scaled_step = quantize_tensor(weight * 2.0**power, grid)
    assert torch.equal(scaled_codes, codes) and torch.equal(scaled_step, step * 2.0**power)


def test_rows_are_quantized_each_for_itself():
    weight = draw_rows(6, 32) * torch.logspace(-2, 2, 6)[:, None]
    codes, step = quantize_tensor(weight, Grid(6, 6.0))
    for row, (one, its_step) in enumerate(zip(codes, step)):
        alone = quantize_tensor(weight[row : row + 1], Grid(6, 6.0))
        assert torch.equal(alone[0][0], one) and alone[1][0] == its_step


def test_rows_of_zeros_and_tiny_rows_give_zeros():
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-30), torch.full((16,), -1e-12), torch.ones(16)])
    back = dequantize_tensor(*quantize_tensor(weight, Grid(6, 6.0)))
    assert back.isfinite().all() and not back[:3].any() and back[3].allclose(torch.ones(16), atol=0.1)


@pytest.mark.parametrize("magnitude", [1e3, 1e4])
def test_large_rows(magnitude):
    weight = draw_rows(2, 64) * magnitude
    back = dequantize_tensor(*quantize_tensor(weight, Grid(6, 6.0)))
    assert back.isfinite().all() and (back - weight).abs().max() < magnitude * 6 / 31


@pytest.mark.parametrize("grid", [Grid(6, 4.0), Grid(6, 8.0), Grid(6, 24.0), Grid(8, 20.0), Grid(4, 2.0), Grid(2, 1.0)])
@pytest.mark.parametrize("scale", [0.02, 5.0])
def test_bits_of_a_code_are_the_entropy_of_gaussian_codes_whatever_their_scale(grid, scale):
    codes, _ = quantize_tensor(draw_rows(16, 1 << 16) * scale, grid)
    counts = torch.bincount(codes.flatten().long() + 128).double()
    chances = counts[counts > 0] / counts.sum()
    assert compute_code_bits(grid) == pytest.approx(-(chances * chances.log2()).sum().item(), rel=0.01)


def shapes_of(model: LoopedGPT) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in model.named_parameters()}


def size_at(k: float, **changes) -> int:
    config = tiny_config(byte_limit=0, matrix_k=k, **changes)
    model = LoopedGPT(config)
    return forecast_bytes(config, build_grids(config, model), shapes_of(model)) + config.code_reserve


@pytest.mark.parametrize("k", [5.0, 9.0, 20.0])
def test_k_is_solved_from_the_byte_limit(k):
    limit = size_at(k, model_dim=64)
    config = tiny_config(byte_limit=limit, model_dim=64)
    model = LoopedGPT(config)
    found = build_grids(config, model)
    kinds = {kind: {found[n] for n in found if model.kind(n) == kind} for kind in ("matrix", "table", "vector")}
    (matrix,), (table,) = kinds["matrix"], kinds["table"]
    assert matrix.k == pytest.approx(k, rel=0.01) and matrix.bits == config.matrix_bits
    assert table == Grid(config.table_bits, config.table_k) and kinds["vector"] == {None}
    forecast = forecast_bytes(config, found, shapes_of(model)) + config.code_reserve
    assert 0.995 * limit <= forecast <= limit


def test_a_given_k_is_kept_and_a_lifted_limit_asks_for_the_finest():
    for changes, k in ((dict(matrix_k=11.0, byte_limit=100_000), 11.0), (dict(byte_limit=0), 4.0),
                       (dict(byte_limit=10_000_000), 4.0)):  # fmt: skip
        config = tiny_config(**changes)
        assert build_grids(config, LoopedGPT(config))["blocks.a.up.weight"].k == k


def test_a_hopeless_limit_is_refused():
    least = size_at(COARSEST_K)
    config = tiny_config(byte_limit=least - 10)
    with pytest.raises(DoesNotFit, match="byte_limit") as error:
        build_grids(config, LoopedGPT(config))
    assert f"{least:,}" in str(error.value) and "\n" not in str(error.value)
    config = tiny_config(byte_limit=least + 10)
    assert build_grids(config, LoopedGPT(config))


def test_the_forecast_is_the_size_of_an_artifact_of_gaussian_weights():
    config = tiny_config(model_dim=128, num_heads=4, bigram_buckets=512, bigram_dim=32, ve_dim=32, matrix_k=6.0)
    model = tiny_model(config)
    found = build_grids(config, model)
    content = pack_artifact(config, model.state_dict(), found, dict(sha256="", vocab=384))
    assert forecast_bytes(config, found, shapes_of(model)) == pytest.approx(len(content), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(plan="a(^b~)*2c", matrix_bits=5, table_bits=7)])
def test_an_artifact_gives_back_the_weights_that_training_computed_with(dtype, changes):
    config = tiny_config(matrix_k=8.0, **changes)
    model = LoopedGPT(config, dtype)
    model.init_weights(3)
    latents = Latents(model, build_grids(config, model))
    optim = Optimizers(model, latents, config, tiny_context())
    tokens = torch.randint(config.vocab_size, (4, config.seq_len), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        train_step(model, optim, (tokens, tokens.roll(-1, 1)), Settings(1.0, 0.9, 1), config, tiny_context())
    weights = {n: w.detach() for n, w in latents.weights.items()}
    artifact = unpack_artifact(pack_artifact(config, weights, latents.grids, dict(sha256="", vocab=384)))
    loaded = LoopedGPT(config, dtype)
    load_weights(loaded, artifact.tensors)
    for name, p in model.named_parameters():
        own = p.half().to(p.dtype) if model.kind(name) == "vector" else p
        assert torch.equal(dict(loaded.named_parameters())[name], own), name
    now = model.state_dict()
    moved = [n for n, w in weights.items() if model.kind(n) == "matrix" and not torch.equal(w.to(dtype), now[n])]
    assert len(moved) >= len(model.plan.names) * 2, "training computed on the grid, not with the latents"


def test_publishing_without_the_grid_gives_the_latents():
    config = tiny_config(matrix_k=8.0)
    model = tiny_model(config)
    latents = Latents(model, build_grids(config, model))
    before = {n: w.detach().clone() for n, w in latents.weights.items()}
    latents.publish()
    assert not torch.equal(model.embed.weight, before["embed.weight"])
    latents.publish(before, quantized=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(math.isnan(p.sum().item()) for p in model.parameters())
