"""The mixture of experts: batched dispatch against every expert on every token, the layer against the published
formulas written out token by token in float64, its losses, its size, and that nothing in it waits for a device.

float32 on a CPU: pytest tests/test_moe.py
"""

import functools
import math

import pytest
import torch
from helpers import events, options, tiny_config, tiny_model, tiny_options
from test_model import draw_tokens, mix_one_by_one
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from loopgolf.cache import Cache
from loopgolf.coder import decode_matrices
from loopgolf.moe import MoE, MoEShape, balance_losses, choose, dense_ref, dispatch
from loopgolf.params import collect_specs, start_weights
from loopgolf.quantize import RowGrid, round_with_feedback
from train_gpt import LoopedGPT, compute_flops, main

SHAPES = [(1, 8, 8, 1, 1), (5, 8, 16, 4, 2), (33, 16, 8, 11, 2), (64, 24, 16, 5, 3), (17, 8, 8, 3, 3)]  # N D H E top


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(D=16, H=8, E=5, top=2, loops=3, dtype=torch.float32) -> MoE:
    moe = MoE(D, MoEShape(E, H, top), loops, "core", dtype)
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.copy_(0.4 * draw(*p.shape, seed=i))
    return moe


def inner_weights(moe: MoE) -> dict[str, torch.nn.Parameter]:
    """All but the gates, which weigh the experts against the dense MLP of the block."""
    return {name: p for name, p in moe.named_parameters() if "gate" not in name}


def choose_logits(kind: str, N: int, E: int) -> torch.Tensor:
    logits = draw(N, E, seed=9)
    if kind == "one expert without a token":
        logits[:, E // 2] = -50.0
    if kind == "all tokens on one expert":
        logits[:, E - 1] = 5.0
    return logits


@pytest.mark.parametrize("kind", ["any", "one expert without a token", "all tokens on one expert"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dispatch_equals_every_expert_on_every_token(shape, kind):
    N, D, H, E, top = shape
    chosen, share = choose(choose_logits(kind, N, E), top)
    if top < E and kind != "any":
        used = chosen.flatten().bincount(minlength=E)
        assert (used == 0).any() if "without" in kind else used[-1] == N
    inputs = [draw(N, D), share, draw(E, 2 * H, D, seed=1) / D**0.5, draw(E, D, H, seed=2) / H**0.5]
    found = []
    for run in (dispatch, dense_ref):
        h, share, up, down = leaves = [t.clone().requires_grad_() for t in inputs]
        y = run(h, chosen, share, up, down)
        found.append([y, *torch.autograd.grad((y * draw(N, D, seed=3)).sum(), leaves)])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loop", [0, 2])
def test_the_layer_and_every_gradient_are_those_of_the_published_formula(loop):
    moe, h = build(), draw(2, 9, 16)
    y, _ = moe(h.requires_grad_(), moe.loops[loop])
    y.mul(draw(*y.shape, seed=3)).sum().backward()
    assert all(len(part) == 8 for part in moe.up.weight.split(moe.up.parts)) and len(moe.up.parts) == 2 * 5
    exact = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    tokens = h.detach().double().flatten(0, 1).requires_grad_()
    expected = mix_one_by_one(exact, 2, loop, tokens)
    expected.mul(draw(*y.shape, seed=3).flatten(0, 1)).sum().backward()
    torch.testing.assert_close(y.double().flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad.double().flatten(0, 1), tokens.grad, rtol=1e-5, atol=1e-5)
    for name, p in inner_weights(moe).items():
        torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=1e-5, atol=1e-5, msg=name)
        assert p.grad.any(), name


def test_losses_are_the_published_ones():
    logits, E = draw(40, 6).requires_grad_(), 6
    chosen, _ = choose(logits, 2)
    assigned = torch.tensor([(chosen == e).sum().item() / 80 for e in range(E)])
    probability = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean(0)
    expected = E * (assigned * probability).sum(), logits.exp().sum(1).log().pow(2).mean()
    ours = balance_losses(logits, chosen)
    for got, want in zip(ours, expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_even_routing_costs_one_and_a_collapse_as_much_as_there_are_experts():
    even = torch.arange(12).reshape(6, 2) % 4
    torch.testing.assert_close(balance_losses(torch.zeros(6, 4), even), torch.tensor([1.0, math.log(4) ** 2]))
    collapsed = balance_losses(torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6), torch.zeros(6, 1, dtype=torch.long))
    torch.testing.assert_close(collapsed[0], torch.tensor(4.0))


def test_the_published_model_has_the_published_size():
    D, V, blocks, loops = 1536, 65536, 3, 6
    with torch.device("meta"):
        moe = MoE(D, MoEShape(11, 1024, 2), loops, "core", torch.float32)
    assert sum(p.numel() for p in moe.parameters()) == (1 + 11) * 3 * D * 1024 + 11 * 2 * D + loops * D + 2
    assert moe.active_weights() == (1 + 2) * 3 * D * 1024 + 11 * 2 * D
    attention, dense = 4 * D * D, 3 * D * 4096
    norms = blocks * 3 * D + 2 * D  # before attention, dense and mixture; between loops; after all
    adapters = blocks * loops * 2 * 16 * D
    rest = V * D + blocks * (attention + dense) + norms + adapters
    assert rest + blocks * sum(p.numel() for p in moe.parameters()) == 356_497_926


def compute_all(moe: MoE, h: torch.Tensor, run=None) -> list[torch.Tensor]:
    moe.zero_grad()
    y, losses = (run or moe)(h, moe.loops[1])
    (y.float().square().sum() + losses.sum()).backward()
    return [y.detach(), losses.detach(), *(p.grad.clone() for p in inner_weights(moe).values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits(dtype):
    moe, h = build(dtype=dtype), draw(4, 50, 16).to(dtype)
    first = compute_all(moe, h)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, compute_all(moe, h)))
    recomputed = compute_all(moe, h, lambda *args: checkpoint(moe, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(first, recomputed))


def test_a_token_does_not_depend_on_the_others():
    moe, h = build(), draw(1, 30, 16)
    y, _ = moe(h, moe.loops[0])
    for t in (0, 13, 29):
        others = draw(1, 30, 16, seed=50 + t)
        others[:, t] = h[:, t]
        torch.testing.assert_close(moe(others, moe.loops[0])[0][:, t], y[:, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moe(h[:, t], moe.loops[0])[0], y[:, t], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_reads_a_tensor_back(dtype):
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        moe = MoE(16, MoEShape(5, 8, 2), 3, "core", dtype)
        found = compute_all(moe, torch.empty(2, 7, 16, dtype=dtype))
        assert found[0].shape == (2, 7, 16) and found[1].shape == (2,)
        with pytest.raises(DataDependentOutputException):
            moe.router.sum().item()


def test_one_graph_serves_all_loops():
    moe, h = build(), draw(2, 9, 16)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda h, loop: moe(h, loop), backend=count, fullgraph=True, dynamic=False)
    for row in moe.loops:
        torch.testing.assert_close(compiled(h, row), moe(h, row))
    assert len(graphs) == 1


@pytest.mark.parametrize("D, H, E, top", [(12, 8, 4, 2), (16, 10, 4, 2), (16, 8, 4, 5), (16, 8, 4, 0)])
def test_sizes_that_do_not_work_are_named(D, H, E, top):
    with pytest.raises(ValueError, match=f"dim={D} .*hidden={H} .*multiples of 8.*top={top} .*experts={E}"):
        MoE(D, MoEShape(E, H, top), 1, "core", torch.float32)


# In the model

MIXED = dict(plan="(ab~)*3", skips="none", norm_weights=True, moe_experts=4, moe_hidden=16)


def loss_and_gradients(model, depth=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = draw_tokens(model.config, 66).view(2, 33)
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:], depth)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_adds_the_mean_losses_of_the_passes_and_scoring_does_not():
    model = tiny_model(tiny_config(**MIXED))
    found = []
    for block in model.blocks.values():
        block.moe.register_forward_hook(lambda _, __, output: found.append(output[1].detach()))
    trained, pulled = loss_and_gradients(model)
    assert len(found) == 6
    scored, plain = loss_and_gradients(model.eval())
    balance, z = torch.stack(found[:6]).mean(0)
    torch.testing.assert_close(trained - scored, 0.01 * balance + 0.001 * z, rtol=1e-3, atol=1e-5)
    for letter in "ab":
        assert (pulled[f"blocks.{letter}.moe.router"] - plain[f"blocks.{letter}.moe.router"]).abs().max() > 1e-5


@pytest.mark.parametrize("changes", [MIXED, MIXED | dict(plan="a(^b)*rc", depth=3, bptt=2), dict(plan="abab")])
def test_passes_that_are_computed_again_give_the_same_gradients(changes):
    kept, again = (tiny_model(tiny_config(**changes, checkpoint_passes=on)) for on in (False, True))
    (loss, expected), (same, found) = loss_and_gradients(kept), loss_and_gradients(again)
    assert torch.equal(loss, same) and expected.keys() == found.keys()
    assert all(torch.equal(grad, found[name]) for name, grad in expected.items())


def test_passes_that_are_computed_again_keep_no_memory():
    def count_saved(on: bool) -> int:
        model, kept = tiny_model(tiny_config(**MIXED, checkpoint_passes=on)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
            model.hidden(draw_tokens(model.config, 32)[None])
        return sum(kept)

    assert count_saved(True) < count_saved(False) / 5


@torch.no_grad()
def test_what_comes_later_changes_no_state():
    model = tiny_model(tiny_config(**MIXED))
    tokens = draw_tokens(model.config, 30)[None]
    other = torch.cat((tokens[:, :17], draw_tokens(model.config, 13, seed=5)[None]), 1)
    a, b = model.hidden(tokens), model.hidden(other)
    torch.testing.assert_close(a[:, :17], b[:, :17], rtol=1e-5, atol=1e-5)
    assert (a[:, 17:] - b[:, 17:]).abs().max() > 0.1
    cache = Cache(32)
    stepped = torch.cat([model.hidden(tokens[:, i : i + 1], cache=cache) for i in range(30)], 1)
    torch.testing.assert_close(stepped, a, rtol=1e-4, atol=1e-4)


def test_fresh_weights_and_their_kinds():
    model = LoopedGPT(tiny_config(**MIXED))
    start_weights(model, 3)
    block = model.blocks["b"]
    moe = block.moe
    for part in (*moe.up.weight.split(moe.up.parts), *moe.shared_up.weight.split(moe.shared_up.parts)):
        torch.testing.assert_close(part @ part.T, torch.eye(16), rtol=0, atol=1e-5)
    assert not moe.down.weight.any() and not moe.shared_down.weight.any() and moe.mlp_gate == moe.moe_gate == 0.5
    assert all(abs(p.std().item() - 0.02) < 0.005 for p in (moe.router, moe.loops)) and len(moe.loops) == 3
    kinds = [
        collect_specs(model)[f"blocks.b.{name}"].group
        for name in ("moe.up.weight", "moe.router", "moe.loops", "moe.moe_gate", "norms.mlp")
    ]
    assert kinds == ["matrix", *["vector"] * 4] and collect_specs(model)["blocks.b.moe.down.weight"].role == "core"


def test_a_token_is_charged_for_the_experts_it_uses():
    D, H, E = 32, 16, 4
    experts = dict(moe_experts=E, moe_hidden=H)
    flops = [compute_flops(tiny_config(plan="abab", skips="none", **changes), 1) for changes in (experts, {})]
    assert flops[0] - flops[1] == 4 * 6 * ((1 + 2) * 3 * D * H + 2 * D * E)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "lora", "sgd"])
def test_a_mixture_learns_and_is_scored_from_its_file(mode, dataset, tmp_path, monkeypatch, capsys):
    """With a byte limit that binds, so that weights are rounded with feedback, but for routed experts: their inputs are
    not collected."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "loopgolf.quantize.round_with_feedback",
        lambda w, step, largest, h: seen.append(h.any().item()) or round_with_feedback(w, step, largest, h),
    )
    decode = functools.cache(decode_matrices)  # few codes take long to decode: once is enough
    monkeypatch.setattr("loopgolf.artifact.decode_matrices", lambda data, shapes: decode(data, tuple(shapes)))
    limit = dict(byte_limit=15_000, calibration_tokens=256) if mode == "plain" else {}
    small = dict(model_dim=16, moe_hidden=8, moe_experts=3)
    settings = (
        MIXED | small | limit | dict(run_id="m", iterations=10, batch_tokens=256, score_documents=2, score_mode=mode)
    )
    assert main(tiny_options(dataset, **settings, bigram_buckets=0, checkpoint_passes=1), {}) == 0
    text = capsys.readouterr().out
    losses = [float(line["train_loss"]) for line in events(text, "train")]
    (result,) = events(text, "result")
    assert (set(seen) == {True}) == (mode == "plain")
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3 and result["fits"] == "yes"
    assert float(result["val_loss"]) < losses[0]
    again = dict(score="runs/m/artifact.lg", data_path=dataset, score_documents=2, also="none", device="cpu")
    assert main(options(**again, dtype="float32", compile="none"), {}) == 0
    (again,) = events(capsys.readouterr().out, "result")
    assert float(again["val_loss"]) == pytest.approx(float(result["val_loss"]), abs=1e-6)


def test_a_matrix_without_known_inputs_is_rounded_plainly():
    weight, grid = draw(24, 16), RowGrid(4, 3.0)
    codes, step = grid.quantize(weight)
    assert torch.equal(round_with_feedback(weight, step, grid.largest, torch.zeros(16, 16)), codes)
