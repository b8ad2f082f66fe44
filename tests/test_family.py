"""The looped family: published sizes, every option against the equations of test_model.py or the smallest case that
shows it, sampled and truncated depth, caches and exits, Lion, and each recipe at tiny size from data to score.

float32 on a CPU: pytest tests/test_family.py
"""

import copy
import functools
import itertools
import json
import math
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from helpers import at, events, options, plain_state, tiny_config, tiny_context, tiny_model, tiny_settings
from test_model import draw_tokens, norm, states_one_by_one

import train_gpt
from data.shards import TokenStream
from loopgolf.cache import Cache
from loopgolf.coder import decode_matrices
from loopgolf.errors import ConfigError
from loopgolf.params import collect_specs, start_weights
from loopgolf.plan import ONCE, Depth, parse_plan
from loopgolf.scoring import BpbMeter
from tools import audit, sample
from tools.lib.exits import EarlyExit
from tools.lib.predictor import Predictor, load_predictor
from train_gpt import RECIPES, Config, Lion, compute_flops, expect_repetitions, settings_at

LOOP = dict(plan="ab(^cd)*re", skips="none", depth=2)
COUNTS = {
    "4b7l": 29_950_082, "recursive_d20": 328_335_360, "looped_s20": 328_380_160, "osrt_v3": 104_537_600,
    "osrt_v4": 356_497_926, "baseline9": 17_059_912, "frontier": 35_952_728,
    "golf": 36_849_550,
}  # fmt: skip


@pytest.mark.parametrize("recipe", COUNTS)
def test_a_dry_run_counts_the_published_parameters(recipe, capsys):
    assert train_gpt.main(["--recipe", recipe, "--dry_run", "--device=cpu", "--compile=none"], {}) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == f"params:{COUNTS[recipe]}"
    (model,) = events(text.partition("\n")[2], "model")
    assert "flops_per_token" in text and ("mean_r" in model) == ("*r" in RECIPES[recipe].get("plan", ""))
    if "mean_r" in model:
        assert float(model["mean_r"]) == pytest.approx(4.99, abs=0.01)


# Sizes only: what a recipe switches on stays on.
SMALL = dict(
    model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=8, vocab_size=384, seq_len=32, batch_tokens=256,
    bigram_dim=8, bigram_buckets=64, ve_dim=8, moe_experts=3, moe_hidden=16, adapter_rank=4, max_r=6, stride=8,
    contexts="", average_every=1, ttt_chunk=64, ttt_batch=2, ttt_epochs=1, lora_rank=2, lora_chunk=32,
)  # fmt: skip
HERE = dict(device="cpu", dtype="float32", compile="none")
LION = dict(matrix_lr=0.003, table_lr=0.003, vector_lr=0.003)
# Learning rates are those of the recipe, except where a few steps of a small model need others.
RATES = {"recursive_d20": dict(table_lr=0.02), "looped_s20": dict(table_lr=0.02), "osrt_v3": LION, "osrt_v4": LION}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_small_model_of_a_recipe_lives_from_data_to_text(recipe, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    decode = functools.cache(decode_matrices)  # few codes take long to decode: once is enough
    monkeypatch.setattr("loopgolf.artifact.decode_matrices", lambda data, shapes: decode(data, tuple(shapes)))

    def call(program, *given, **named) -> str:
        arguments = [[*map(str, given), *options(**named)]] + [{}] * (program is train_gpt)
        assert program.main(*arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    own = RECIPES[recipe]
    sizes = {name: size for name, size in SMALL.items() if own.get(name, getattr(Config, name))}
    settings = sizes | RATES.get(recipe, {}) | dict(recipe=recipe, run_id="r", iterations=7, log_every=1)
    scoring = HERE | dict(data_path=dataset, also="none", score_documents=4, score_batch=4)
    text = call(train_gpt, **settings, **scoring)
    losses = [float(line["train_loss"]) for line in events(text, "train")]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.25, losses
    check_telemetry(recipe, events(text, "telemetry"))
    (result,) = events(text, "result")
    assert 0 < float(result["val_loss"]) < losses[0] and result["fits"] == "yes"

    path = tmp_path / "runs/r/artifact.lg"
    (again,) = events(call(train_gpt, **scoring, score=path), "result")
    for name in ("val_bpb", "val_loss", "score_mode", "artifact_sha256"):
        assert again[name] == result[name], name

    report = json.loads(call(audit, path, "--json", data_path=dataset, probes=1))
    assert report["mode"] == result["score_mode"] == own.get("score_mode", "sgd")
    assert {rule["rule"]: rule["verdict"] for rule in report["rules"]} == dict.fromkeys(audit.RULES, "holds"), report

    text = call(sample, path, prompt="the list", tokens=12, seed=7)
    predictor = load_predictor(path, mode="plain")
    prompt = predictor.speller.to_tokens(b"the list")
    drawn = [[*islice(sample.generate(predictor, prompt, 0.8, 0.95, seeded(seed)), 12)] for seed in (7, 8)]
    assert text == predictor.speller.to_bytes(prompt + drawn[0]).decode("utf-8", "replace") + "\n"
    assert drawn[0] != drawn[1]
    check_that_what_is_drawn_is_what_is_scored(predictor, dataset)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def check_that_what_is_drawn_is_what_is_scored(predictor: Predictor, dataset) -> None:
    """A window of text through tools.sample, token by token, and through the score, all at once; with noise on the
    weights, as a few steps leave late repetitions next to nothing to do. Neither masked nor recalled: a text is drawn
    from the model alone."""
    config = replace(predictor.config, canonical=False, recall_share=0.0)
    predictor, generator = replace(predictor, ctx=tiny_context(), config=config, mask=None), seeded(0)
    noisy = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in predictor.artifact.tensors.items()}
    predictor.model.to("cpu", torch.float32).load_state_dict(noisy)
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, predictor.config.seq_len + 1))
    meter, cache = BpbMeter(predictor.counter), Cache(predictor.config.seq_len)
    predictor.score(tokens, meter)
    logits = torch.stack([sample.stream_logits(predictor, cache, token) for token in tokens[:-1, None]])
    drawn = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    assert drawn == pytest.approx(meter.total(predictor.ctx).loss, rel=1e-5)


def check_telemetry(recipe: str, lines: list[dict]) -> None:
    plan = parse_plan(RECIPES[recipe].get("plan", Config.plan))
    sizes = [[float(size) for size in line["rms"].split(",")] for line in lines]
    assert bool(sizes) == plan.has_groups
    assert all(0.001 < size < 1000 for row in sizes for size in row)
    if "adapter_rank" in RECIPES[recipe]:
        assert len(sizes[0]) == 6 and len(lines[-1]["adapter_cosines"].split(",")) == plan.count_passes(1) - 1


BARE = dict(skips="none", smear=False, bigram_buckets=0, ve_passes="none", xsa_passes="none")


@pytest.mark.parametrize(
    "changes, depth",
    [
        (dict(plan="ab", block_norm="sandwich"), 1),
        (dict(plan="(ab~)*2", norm_weights=True), 1),
        (dict(plan="(ab~)*2", norm_weights=True, block_norm="sandwich", embed_norm=False), 1),
        (dict(plan="a(^b~~)*rc", skips="none", inject="add"), 3),
        (dict(plan="a(bc)*2", windows="LSL", ttt_freeze="", **BARE), 1),
        (dict(plan="abab", windows="S"), 1),
        (dict(plan="(ab)*2", adapter_rank=3, **BARE), 1),
        (dict(plan="a(b)*r", adapter_rank=3, depth=1, max_r=2, **BARE), 4),
        (dict(plan="ab", mlp="swiglu", mlp_mult=1.5), 1),
        (dict(plan="ab", qk_norm=False, q_gain=0.0), 1),
        (dict(plan="abab", pass_scales=False), 1),
        (dict(plan="(ab~)*3", adapter_rank=2, norm_weights=True, embed_norm=False, qk_norm=False, q_gain=0.0, mlp="swiglu",
              pass_scales=False, **BARE), 1),
        (dict(plan="(ab~)*3", mlp="swiglu", norm_weights=True, adapter_rank=2, moe_experts=5, moe_hidden=8, **BARE), 1),
        (dict(plan="a(b)*rac", depth=2, moe_experts=3, moe_hidden=16, moe_top=1, ttt_freeze="", **BARE), 4),
        (dict(plan="ab(^cdef~~)*rgh", norm_weights=True, block_norm="sandwich", windows="LLSSSLLL", tied=False,
              pass_scales=False, q_gain=0.0, **BARE), 2),
    ],
)  # fmt: skip
def test_options_do_what_their_equations_say(changes, depth):
    config = tiny_config(**dict(seq_len=16, stride=8, batch_tokens=128) | changes)
    model, tokens = tiny_model(config), draw_tokens(config, 14)
    with torch.no_grad():
        found = model.hidden(tokens[None], at(depth))[0]
    torch.testing.assert_close(found, states_one_by_one(model, tokens, at(depth)), atol=5e-5, rtol=0)


@torch.no_grad()
def test_a_head_of_its_own_and_logits_without_a_cap():
    config = tiny_config(tied=False, softcap=0.0)
    model, tokens = tiny_model(config), draw_tokens(config, 9)
    x = model.hidden(tokens[None])
    assert torch.equal(model.logits(x), x @ model.unembed.weight.T)
    expected = -model.logits(x)[0, :-1].log_softmax(-1)[range(8), tokens[1:]].mean()
    torch.testing.assert_close(model(tokens[None, :-1], tokens[None, 1:]), expected, atol=1e-5, rtol=0)
    assert (collect_specs(model)["unembed.weight"].role, collect_specs(model)["unembed.weight"].group) == (
        "embed",
        "table",
    )


def test_fresh_adapters_and_norms_change_nothing():
    plain = tiny_config(plan="(ab~)*2")
    config = tiny_config(plan="(ab~)*2", adapter_rank=3, norm_weights=True)
    model, tokens = train_gpt.LoopedGPT(config), draw_tokens(config, 12)[None]
    start_weights(model, 1)
    bare = train_gpt.LoopedGPT(plain)
    bare.load_state_dict({n: p for n, p in model.state_dict().items() if n in bare.state_dict()})
    assert torch.equal(model.hidden(tokens), bare.hidden(tokens))
    assert model.passes.adapters[:, 0].std() > 0.005 and not model.passes.adapters[:, 1].any()


# Depth in training


def mean_by_quadrature(config, most: int) -> float:
    """E[min(1 + N, most)], N Poisson of a lognormal rate, by sums over the rates' quantiles and over N."""
    total = weight = 0.0
    for i in range(-600, 601):
        z = i / 100
        rate, w = config.depth * math.exp(0.5 * z - 0.125), math.exp(-z * z / 2)
        term, mean = math.exp(-rate), 0.0
        for n in range(400):
            mean += term * min(1 + n, most)
            term *= rate / (n + 1)
        total, weight = total + w * mean, weight + w
    return total / weight


@pytest.mark.slow
@pytest.mark.parametrize("depth, max_r", [(4, 16), (2, 3), (1, 8), (3, 0)])
def test_the_mean_depth_is_that_of_the_distribution(depth, max_r):
    """max_r is at least depth, so 0 cuts there."""
    config = tiny_config(**LOOP | dict(depth=depth, max_r=max_r, sample_depth=True))
    max_r = max(max_r, depth)
    assert expect_repetitions(config) == pytest.approx(mean_by_quadrature(config, max_r), abs=0.02)
    assert expect_repetitions(config, 2) == pytest.approx(mean_by_quadrature(config, min(2, max_r)), abs=0.02)
    drawn = [settings_at(config, 0.5, step).depth.r for step in range(4000)]
    assert min(drawn) == 1 and max(drawn) <= max_r
    assert sum(drawn) / 4000 == pytest.approx(expect_repetitions(config), abs=0.15)


def test_ranks_and_resumed_runs_draw_the_same_depth():
    config = tiny_config(**LOOP, max_r=9, sample_depth=True, seed=-3)

    def draw(config, steps):
        torch.manual_seed(len(steps))
        return [settings_at(config, 0.5, step).depth.r for step in steps]

    assert draw(config, range(30)) == draw(config, range(10)) + draw(config, range(10, 30))
    assert draw(config, range(30)) != draw(tiny_config(**LOOP, max_r=9, sample_depth=True, seed=4), range(30))
    assert settings_at(tiny_config(**LOOP, max_r=9), 0.5, 7).depth == Depth(2)
    late = tiny_config(**LOOP, max_r=9, sample_depth=True, loop_start=0.6)
    assert settings_at(late, 0.5, 3).depth == ONCE and settings_at(late, 0.7, 3).depth.loops


@pytest.mark.parametrize("changes, name", [
    (dict(sample_depth=True, max_r=8), "sample_depth"), (dict(windows="LX"), "windows"), (dict(mlp="gelu"), "mlp"),
    (dict(inject="sum"), "inject"), (dict(optimizer="lino"), "lion"), (dict(LOOP, score_depth=257), "score_depth"),
    (dict(moe_experts=2, moe_top=3), "moe_top"), (dict(moe_experts=2, moe_hidden=12), "moe_hidden"),
    (dict(moe_experts=2, model_dim=36), "model_dim"), (dict(LOOP, depth=200, plan="(abc)*r"), "600"), (dict(LOOP, plan="ab(cd)*re", bptt=1), "bptt"), (dict(LOOP, score_depth=200, plan="(abc)*r"), "600"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        tiny_config(**changes)


def test_rows_beyond_the_trained_depth_belong_to_deeper_repetitions():
    config = tiny_config(plan="a(b)*rc", skips="none", depth=2, max_r=4, ve_passes="none")
    model, tokens = tiny_model(config), draw_tokens(config, 12)[None]
    assert len(model.passes.mixes) == 6
    plain = tiny_model(tiny_config(plan="abbbc", skips="none", ve_passes="none"))
    rows = [0, 1, 2, 3, 5]
    plain.load_state_dict(
        {n: p[rows] if n in ("passes.mixes", "passes.scales") else p for n, p in model.state_dict().items()}
    )
    assert torch.equal(model.hidden(tokens, Depth(3)), plain.hidden(tokens))


def gradients(model, tokens, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    states = model.hidden(tokens, **kwargs)
    torch.nn.functional.cross_entropy(model.logits(states)[0, :-1], tokens[0, 1:]).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", ["ab(^cd)*re", "ab(^cd~)*re", "ab(^cd~~)*re"])
@pytest.mark.parametrize("k, depth", [(1, 4), (2, 4), (3, 2)])
def test_truncated_gradients_are_those_of_a_detached_state(plan, k, depth):
    changes = LOOP | dict(plan=plan, max_r=4)
    tokens = draw_tokens(tiny_config(), 20)[None]
    cut, whole = tiny_model(tiny_config(**changes, bptt=k)), tiny_model(tiny_config(**changes))

    def detach(p, x):
        return x.detach() if p.ends and p.repetitions_left is not None and p.repetitions_left >= k else x

    found, expected = (
        gradients(cut, tokens, depth=Depth(depth)),
        gradients(whole, tokens, depth=Depth(depth), on_pass=detach),
    )
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    full = gradients(whole, tokens, depth=Depth(depth))
    differs = (full["blocks.c.mlp.up.weight"] - found["blocks.c.mlp.up.weight"]).abs().max() > 1e-4
    assert differs == (depth > k) and torch.equal(cut.hidden(tokens, at(depth)), whole.hidden(tokens, at(depth)))


def test_repetitions_without_gradient_keep_no_memory():
    tokens = draw_tokens(tiny_config(), 30)[None]

    def count_saved(bptt: int, depth: int) -> int:
        model, kept = tiny_model(tiny_config(**LOOP, max_r=8, bptt=bptt, ve_passes="none")), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
            model.hidden(tokens, at(depth))
        return sum(kept)

    assert count_saved(1, 8) == count_saved(1, 2) < count_saved(0, 3) < count_saved(0, 8)


def test_operations_follow_the_mean_depth():
    config = tiny_config(**LOOP, bptt=2, max_r=8)
    two, three, six = (compute_flops(config, r) for r in (2, 3, 6))
    assert six - three == 3 * (three - two) and compute_flops(config, 2.5) == pytest.approx((two + three) / 2, abs=1)
    assert compute_flops(config, 6, 2) == pytest.approx(two + (six - two) / 3, abs=2)
    D, T, hidden = 32, 32, 64
    block = D * (32 + 16 + 16) + D * D + 2 * D * hidden
    assert three - two == 2 * (6 * block + 12 * D * T // 2) + 6 * 2 * D * D
    short, flat = compute_flops(tiny_config(plan="ab", windows="S"), 1), compute_flops(tiny_config(plan="ab"), 1)
    assert flat - short == 2 * 12 * D * (T // 2 - 3 * T // 8)
    adapted = compute_flops(tiny_config(plan="ab", adapter_rank=5), 1)
    assert adapted - flat == 2 * 6 * 2 * D * 5
    wide = compute_flops(tiny_config(plan="ab", head_dim=D), 1)  # 2 heads and their keys and values, twice as wide
    assert wide - flat == 2 * (6 * 6 * 16 * D + 12 * 2 * 16 * T // 2) + 6 * 8 * 16


def test_lion_moves_by_the_sign_of_its_mix():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = Lion([dict(params=[weight], lr=0.1, weight_decay=0.5)], (0.9, 0.99))
    w, m = weight.detach().clone(), torch.zeros(3)
    for grad in ([1.0, -1.0, 0.0], [-0.5, 2.0, 0.1], [-3.0, 0.0, -0.1]):
        weight.grad = g = torch.tensor(grad)
        lion.step()
        w = (1 - 0.1 * 0.5) * w - 0.1 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        torch.testing.assert_close(weight.detach(), w)


def test_lion_takes_all_parameters_and_continues():
    def build():
        return plain_state(tiny_model(tiny_config(optimizer="lion", beta2=0.99)))

    def advance(state, seed):
        generator = torch.Generator().manual_seed(seed)
        flat_grad = state.master.flat_grad
        flat_grad.copy_(torch.randn(flat_grad.shape, generator=generator))
        state.step(1.0, 0.9)

    state = build()
    held = [p for group in state.optimizers["lion"].param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, state.master.weights.values()))
    advance(state, 0)
    again = build()
    again.load_state_dict(copy.deepcopy(state.state_dict()))
    for either in (state, again):
        advance(either, 1)
    assert all(torch.equal(w, again.master.weights[n]) for n, w in state.master.weights.items())


# Depth at test time


@torch.no_grad()
def test_scoring_takes_the_depth_of_the_config():
    config = tiny_config(**LOOP, score_depth=5)
    model, tokens = tiny_model(config), draw_tokens(config, 20)[None]
    assert torch.equal(model.hidden(tokens), model.hidden(tokens, Depth(5))) and not torch.equal(
        model.hidden(tokens), model.hidden(tokens, Depth(2))
    )
    assert "score_depth" in config.stored()


@pytest.mark.parametrize("plan", ["ab(^cd)*re", "ab(^cd~)*re", "ab(^cd~~)*re"])
@torch.no_grad()
def test_early_exit_spans_from_two_repetitions_to_all(plan):
    config = tiny_config(**LOOP | dict(plan=plan))
    model, tokens = tiny_model(config), torch.stack([draw_tokens(config, 20, i) for i in range(3)])
    depths = {}
    for tau in (0.0, 0.4, 0.6, 1.0, math.inf):
        early = EarlyExit(tau)
        depths[tau], states = early, model.hidden(tokens, Depth(6), on_pass=early)
        assert 2 <= early.mean_depth <= 6 and early.positions == 60
        if tau == 0:
            torch.testing.assert_close(states, model.hidden(tokens, Depth(6)))
        if tau == math.inf:
            torch.testing.assert_close(states, model.hidden(tokens, Depth(2)))
    means = [early.mean_depth for early in depths.values()]
    assert means == sorted(means, reverse=True) and means[0] == 6 and means[-1] == 2 and len(set(means)) > 2
    early = EarlyExit(math.inf)
    for _ in range(2):
        model.hidden(tokens, Depth(4), Cache(8), on_pass=early)
    assert early.mean_depth == 2 and early.positions == 120


@torch.no_grad()
def test_positions_leave_when_their_own_change_is_small():
    config = tiny_config(**LOOP)
    model, tokens, seen = tiny_model(config), draw_tokens(config, 20)[None], []
    early = EarlyExit(0.6)

    def both(p, x):
        x = early(p, x)
        if p.ends:
            seen.append(x[0])
        return x

    model.hidden(tokens, Depth(5), on_pass=both)
    changes = torch.stack([(b - a).norm(dim=-1) / b.norm(dim=-1) for a, b in itertools.pairwise(seen)])
    left = torch.ones(20)
    for t in range(20):
        used = 1
        for change in changes[:, t]:
            used += 1
            if change < 0.6:
                break
        assert (changes[used - 1 :, t] == 0).all(), "what has left keeps its state"
        left[t] = used
    assert early.mean_depth == pytest.approx(left.mean().item()) and 2 < early.mean_depth < 5


KEPT = [(256, 3, True), (3, 3, True), (1, 3, False), (2, 3, False), (1, 1, True)]


@pytest.mark.parametrize("repetitions, depth, is_equal", KEPT)
@torch.no_grad()
def test_cached_generation_equals_one_forward_where_all_keys_are_kept(repetitions, depth, is_equal):
    config = tiny_config(**LOOP)
    model, tokens = tiny_model(config), draw_tokens(config, 24)[None]
    cache = Cache(config.seq_len, repetitions)
    found = torch.cat([model.hidden(piece, at(depth), cache) for piece in tokens.split([9, 1, 1, 13], 1)], 1)
    whole = model.hidden(tokens, at(depth))
    torch.testing.assert_close(found[:, :9], whole[:, :9], atol=1e-5, rtol=0)
    assert torch.allclose(found, whole, atol=1e-5) == is_equal
    assert len(cache.kept) == 3 + 2 * min(repetitions, depth) and cache.length == 24


@torch.no_grad()
def test_a_shared_slot_holds_the_last_repetition():
    config = tiny_config(**LOOP)
    model, tokens = tiny_model(config), draw_tokens(config, 10)[None]
    every, last = Cache(config.seq_len), Cache(config.seq_len, 1)
    for cache in (every, last):
        model.hidden(tokens, Depth(3), cache)
    keys = [torch.cat(kept.keys_values, -1) for kept in every.kept.values()]
    for kept, index in zip(last.kept.values(), (0, 1, 6, 7, 8)):
        assert torch.equal(torch.cat(kept.keys_values, -1), keys[index])


@torch.no_grad()
def test_telemetry_measures_repetitions_before_the_norm(dataset, capsys):
    config = tiny_config(plan="(ab~~)*3", adapter_rank=2, data_path=str(dataset))
    model, ctx = tiny_model(config), train_gpt.build_context(config, {})
    stream = TokenStream(str(dataset), "train", 384)
    train_gpt.log_telemetry(model, 7, stream, ctx)
    (line,) = events(capsys.readouterr().out, "telemetry")
    assert line["step"] == "7" and re.fullmatch(r"\d+\.\d{3}(,\d+\.\d{3}){2}", line["rms"])
    tokens, rms = torch.from_numpy(stream.read(0, config.seq_len))[None], []
    model.hidden(tokens, on_pass=lambda p, x: rms.append(x) or x)
    expected = [x.square().mean().sqrt().item() for x in rms[1::2]]
    assert [float(v) for v in line["rms"].split(",")] == pytest.approx(expected, abs=1e-3)
    ups = [model.passes.adapters[i, 1].flatten() for i in range(6)]
    cosines = [(ups[0] @ up / ups[0].norm() / up.norm()).item() for up in ups[1:]]
    assert [float(v) for v in line["adapter_cosines"].split(",")] == pytest.approx(cosines, abs=1e-3)
    assert norm(rms[1]).square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


@pytest.fixture
def graphs(monkeypatch):
    """Counts what torch.compile traces; the graphs then run as they are, which is as good here and much faster."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_as_ever = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_as_ever(f, backend="eager", **kwargs))
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(norm_weights=True, block_norm="sandwich", windows="LS", adapter_rank=2, plan="ab(^cd~~)*re"),
    dict(plan="ab(^cd)*re", pass_scales=False, **BARE),
])  # fmt: skip
def test_no_depth_is_compiled_after_the_warm_up(changes, graphs):
    config = tiny_config(**LOOP | dict(sample_depth=True, max_r=8, bptt=2, loop_start=0.5, xsa_passes="none") | changes)
    plain, model = tiny_model(config), train_gpt.LoopedGPT(config, compile_mode="block")
    model.load_state_dict(plain.state_dict())
    state, ctx = plain_state(model), tiny_context()
    train_gpt.warm_up(model, state, config, ctx)
    warm = graphs()
    batch = train_gpt.split_tokens(draw_tokens(config, 132).view(4, 33), ctx)
    for depth in range(9):
        assert torch.allclose(model.hidden(batch[0], at(depth)), plain.hidden(batch[0], at(depth)), atol=1e-4)
        train_gpt.train_step(model, state, batch, tiny_settings(0.0, depth=depth), ctx)
    assert graphs() == warm > 0


def test_nothing_is_compiled_for_what_looks_at_every_pass(graphs):
    """The telemetry of a run does, on the clock."""
    config = tiny_config(plan="a(b)*2c", skip_gates=True)
    plain, model = tiny_model(config), train_gpt.LoopedGPT(config, compile_mode="block")
    model.load_state_dict(plain.state_dict())
    tokens = draw_tokens(config, 20)[None]
    torch.testing.assert_close(model.hidden(tokens, on_pass=lambda _, x: x), plain.hidden(tokens))
    assert graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(plan="ab(^cd~~)*re", norm_weights=True, block_norm="sandwich", windows="LS", bptt=1, tied=False),
    dict(plan="(ab~)*3", adapter_rank=2, norm_weights=True, embed_norm=False, mlp="swiglu", pass_scales=False, q_gain=0.0),
])  # fmt: skip
def test_the_whole_graph_is_the_model(changes, graphs):
    config = tiny_config(**dict(skips="none", depth=3) | changes)
    plain, model = tiny_model(config), train_gpt.LoopedGPT(config, compile_mode="full")
    model.load_state_dict(plain.state_dict())
    tokens = draw_tokens(config, 20)[None]
    found, expected = gradients(model, tokens), gradients(plain, tokens)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    assert graphs() == 1
