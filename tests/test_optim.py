"""Optimizers: every parameter in exactly one, decay where it belongs, Newton-Schulz against the singular values of a
full decomposition, clipping, a gradient that is not finite, averages, accumulation, and a warm-up without a trace.

float32 on a CPU: pytest tests/test_optim.py
"""

import copy
import math

import pytest
import torch
from helpers import plain_state, tiny_config, tiny_context, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from data.shards import TokenStream
from kernels.newton_schulz import orthogonalize_ref as orthogonalize
from loopgolf.params import collect_specs
from loopgolf.state import TrainState, WeightAverage
from train_gpt import Config, LoopedGPT, train_step, warm_up

FULL = tiny_settings()


def build(seed: int = 1, **changes) -> tuple[Config, LoopedGPT, TrainState]:
    config = tiny_config(**changes)
    model = tiny_model(config, seed)
    return config, model, plain_state(model)


def draw_batch(config, rows: int = 4):
    tokens = torch.randint(config.vocab_size, (rows, config.seq_len + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def copies(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in state.master.detached().items()}


@pytest.mark.parametrize("changes", [{}, dict(plan="a(^bc~)*rd", skips="none"), dict(ve_passes="none", smear=False)])
def test_every_parameter_is_in_exactly_one_optimizer(changes):
    _, model, state = build(**changes)
    assert set(state.master.weights) == {n for n, _ in model.named_parameters()}
    groups = [group for part in state.optimizers.values() for group in part.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(w) for w in state.master.weights.values())
    muon = {id(p) for p in state.optimizers["muon"].param_groups[0]["params"]}
    assert {n for n, w in state.master.weights.items() if id(w) in muon} == set(held_names(model, "matrix"))


def held_names(model, kind: str) -> list[str]:
    return [n for n, _ in model.named_parameters() if collect_specs(model)[n].group == kind]


def test_without_a_gradient_matrices_and_tables_shrink_and_vectors_stay():
    _config, model, state = build(weight_decay=0.5, matrix_lr=0.1, table_lr=0.2, vector_lr=0.3)
    before = copies(state)
    state.step(1.0, 0.9)
    shrink = {"matrix": 1 - 0.1 * 0.5, "table": 1 - 0.2 * 0.5, "vector": 1.0}
    for name, weight in state.master.weights.items():
        torch.testing.assert_close(
            weight.detach(), before[name] * shrink[collect_specs(model)[name].group], rtol=1e-6, atol=0
        )
        if collect_specs(model)[name].group == "vector":
            assert torch.equal(weight, before[name]), name


def test_a_learning_rate_of_zero_changes_nothing():
    config, model, state = build()
    before = copies(state)
    train_step(model, state, draw_batch(config), tiny_settings(0.0), tiny_context())
    assert all(torch.equal(w, before[n]) for n, w in state.master.weights.items())


def draw_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random directions, singular values spread evenly from 0.1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, n, generator=generator))[0]
    return u @ torch.diag(torch.linspace(0.1, 1.0, n)) @ v.T


@pytest.mark.parametrize("rows, columns", [(64, 16), (16, 64), (32, 32), (1, 8), (8, 1)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalized_updates_have_singular_values_near_one(rows, columns, scale):
    batch = torch.stack([draw_matrix(rows, columns, seed) for seed in range(3)]) * scale
    found = orthogonalize(batch, torch.float32)
    values = torch.linalg.svdvals(found)
    assert found.shape == batch.shape and values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(batch, full_matrices=False)
    alike = (found * (u @ v)).sum((1, 2)) / found.norm(dim=(1, 2)) / math.sqrt(min(rows, columns))
    assert alike.min() > 0.97, "the directions are those of the nearest orthogonal matrix"
    for one, row in zip(batch, found):
        torch.testing.assert_close(orthogonalize(one[None], torch.float32)[0], row, rtol=0, atol=1e-4)


def test_fused_projections_are_orthogonalized_each_for_itself():
    _config, model, state = build(weight_decay=0.0, matrix_lr=0.1)
    name = "blocks.a.attention.qkv.weight"
    weight, before = state.master.weights[name], copies(state)[name]
    parts = model.blocks["a"].attention.qkv.parts
    grads = [draw_matrix(rows, 32, seed) * 10.0**seed for seed, rows in enumerate(parts)]
    weight.grad.copy_(torch.cat(grads))
    state.step(1.0, 0.9)
    for rows, change in zip(parts, (before - weight.detach()).split(parts)):
        values = torch.linalg.svdvals(change) / 0.1 / max(1, rows / 32) ** 0.5
        assert len(parts) == 3 and values.min() > 0.6 and values.max() < 1.3


def test_momentum_remembers_the_gradient():
    _config, _, state = build(weight_decay=0.0)
    name = "blocks.a.mlp.up.weight"
    for grad in (1.0, 2.0):
        state.master.weights[name].grad.fill_(grad)
        state.step(1.0, 0.9)
    assert torch.allclose(
        state.optimizers["muon"].state[state.master.weights[name]]["momentum"], torch.tensor(0.9 * 1.0 + 2.0)
    )
    assert not state.master.flat_grad.any(), "a step leaves the gradient at zero"


@pytest.mark.parametrize("clip", [0.5, 0.0, 1e6])
def test_gradients_are_scaled_and_clipped_as_one(clip):
    _, _, state = build()
    raw = torch.randn(state.master.flat_grad.shape, generator=torch.Generator().manual_seed(0))
    state.master.flat_grad.copy_(raw)
    state.reduce(tiny_context().sum, 0.25, clip)
    expected = raw * 0.25
    if clip == 0.5:
        expected *= 0.5 / expected.norm()
    torch.testing.assert_close(state.master.flat_grad, expected, rtol=1e-4, atol=1e-7)
    some = state.master.weights["blocks.b.mlp.down.weight"]
    assert some.grad.data_ptr() != 0 and some.grad.norm() > 0, "the weights' gradients are views of it"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_loss_of_its_step(bad):
    """Of a kernel's backward pass, say: the loss itself was good, and a run that went on would learn no more."""
    config, model, state = build()
    before = train_step(model, state, draw_batch(config), FULL, tiny_context())
    model.blocks["b"].mlp.down.weight.register_hook(lambda grad: grad * bad)
    after = train_step(model, state, draw_batch(config), FULL, tiny_context())
    assert before.isfinite() and not after.isfinite() and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_finite_weights(bad):
    _, model, state = build()
    state.master.flat_grad.fill_(1.0)
    state.master.flat_grad[17] = bad
    assert not state.reduce(tiny_context().sum, 1.0, 1.0).isfinite()
    assert not state.master.flat_grad.any()
    state.step(1.0, 0.9)
    assert all(w.isfinite().all() for w in [*state.master.weights.values(), *model.state_dict().values()])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.integers(1, 3), st.floats(0, 0.9))
def test_averages(values, every, start):
    steps = [(i, (i + 1) / len(values), torch.tensor([v, -v])) for i, v in enumerate(values)]
    chosen = [w for i, progress, w in steps if progress >= start and i % every == 0]
    last = {"w": steps[-1][2]}
    for kind in ("swa", "ema", "none"):
        average = WeightAverage(kind, start, every, 0.75)
        for i, progress, w in steps:
            average.update({"w": w}, i, progress)
        expected = last["w"]
        if chosen and kind == "swa":
            expected = torch.stack(chosen).mean(0)
        elif chosen and kind == "ema":
            expected = chosen[0]
            for w in chosen[1:]:
                expected = 0.75 * expected + 0.25 * w
        torch.testing.assert_close(average.result(last)["w"], expected, rtol=1e-5, atol=1e-5)


def test_an_average_keeps_its_own_copy():
    average, weight = WeightAverage("swa"), torch.ones(2)
    average.update({"w": weight}, 0, 1.0)
    weight.zero_()
    assert average.result({"w": weight})["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch(micro_batch, monkeypatch):
    found = {}
    for size in (0, micro_batch):
        config, model, state = build(micro_batch=size, grad_clip=0.0)
        grads = found.setdefault(size, [])
        flat_grad = state.master.flat_grad
        monkeypatch.setattr(state, "step", lambda *_, g=grads, flat=flat_grad: g.append(flat.clone()))
        loss = train_step(model, state, draw_batch(config), FULL, tiny_context())
        grads.append(loss)
    (whole, loss), (summed, other) = found[0], found[micro_batch]
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)


def test_a_step_against_plain_autograd():
    """The gradient that reaches the latents is the one of the mean loss at the working weights."""
    config, model, state = build(grad_clip=0.0)
    reference = copy.deepcopy(model)
    inputs, targets = draw_batch(config)
    reference(inputs, targets).backward()
    state.step = lambda *_: None
    train_step(model, state, (inputs, targets), FULL, tiny_context())
    for name, p in reference.named_parameters():
        torch.testing.assert_close(state.master.weights[name].grad, p.grad, rtol=1e-5, atol=1e-7)


def test_state_and_load_continue_where_they_were():
    config, model, state = build()
    batch, ctx = draw_batch(config), tiny_context()
    train_step(model, state, batch, FULL, ctx)
    saved = copy.deepcopy(state.state_dict())
    train_step(model, state, batch, FULL, ctx)
    config, other, fresh = build(seed=2)
    fresh.load_state_dict(saved)
    train_step(other, fresh, batch, FULL, ctx)
    assert all(torch.equal(p, other.state_dict()[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_warm_up_leaves_no_trace(steps_before):
    config, model, state = build(loop_start=0.5, plan="a(b)*2")
    batch, ctx = draw_batch(config), tiny_context()
    for _ in range(steps_before):
        train_step(model, state, batch, FULL, ctx)
    state.master.write(is_rounded=True)
    kept, random_state = copy.deepcopy((state.state_dict(), model.state_dict())), torch.get_rng_state()
    warm_up(model, state, config, ctx)
    assert torch.equal(torch.get_rng_state(), random_state) and not state.master.flat_grad.any()
    assert_same(kept, (state.state_dict(), model.state_dict()))


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same(a, b)
    else:
        assert one == other


def test_the_warm_up_does_not_read_data(monkeypatch):
    config, model, state = build()
    monkeypatch.setattr(TokenStream, "read", lambda *_: pytest.fail("the warm-up reads the data"))
    warm_up(model, state, config, tiny_context())
