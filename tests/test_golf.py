"""The parts of recipe golf, each against the formula that it stands for: causal, over a cache as at once, harmless at the
start where that is promised; the optimizer's rules; batch and context that grow.

float32 on a CPU: pytest tests/test_golf.py
"""

import contextlib
import itertools
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SMALL,
    events,
    plain_state,
    run_cli,
    tiny_config,
    tiny_context,
    tiny_model,
    tiny_options,
    tiny_settings,
    train,
)
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from kernels.attention import build_rotation
from kernels.newton_schulz import COEFFICIENTS, orthogonalize_ref
from loopgolf.cache import Cache
from loopgolf.errors import ConfigError
from loopgolf.params import start_weights
from train_gpt import LoopedGPT, PassRow, Stream, list_forwards, list_shapes, look_back, settings_at, train_step

LOOP = dict(plan="a(b)*2c", ttt_freeze="", ve_passes="all")
PARTS = {
    "mlp_slope": dict(mlp_slope=0.5),
    "skip_gates": dict(skip_gates=True),
    "head_gate": dict(head_gate=4),
    "parallel_passes": dict(parallel_passes="last2"),
    "depth_scale": dict(depth_scale=True),
    "look_back": dict(look_back=3),
}
ALL = {name: value for changes in PARTS.values() for name, value in changes.items()}


def draw_tokens(count: int) -> torch.Tensor:
    return torch.randint(384, (1, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("part", [*PARTS, "all"])
@torch.no_grad()
def test_every_part_is_causal_and_over_a_cache_as_at_once(part):
    config = tiny_config(**LOOP, **(ALL if part == "all" else PARTS[part]))
    model, tokens = tiny_model(config), draw_tokens(30)
    whole = model.hidden(tokens)
    changed = tokens.clone()
    changed[0, 17] = 5 + tokens[0, 17] % 7
    after = model.hidden(changed)
    assert torch.equal(after[0, :17], whole[0, :17]) and not torch.equal(after[0, 17], whole[0, 17])
    cache = Cache(config.seq_len)
    pieces = torch.cat([model.hidden(piece, None, cache) for piece in tokens.split([7, 1, 13, 9], 1)], 1)
    torch.testing.assert_close(pieces, whole, atol=3e-5, rtol=0)


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_every_part_changes_the_model(part):
    """An option that nothing reads would look like a change without an effect."""
    base = tiny_model(tiny_config(**LOOP))
    model = LoopedGPT(tiny_config(**LOOP, **PARTS[part]))
    tiny = tiny_model(model.config)
    kept = {name: value for name, value in base.state_dict().items() if name in tiny.state_dict()}
    tiny.load_state_dict(tiny.state_dict() | kept)
    assert not torch.equal(tiny.hidden(draw_tokens(30)), base.hidden(draw_tokens(30)))


@pytest.mark.parametrize("part", ["head_gate", "look_back"])
@torch.no_grad()
def test_what_starts_as_nothing_changes_nothing_at_the_start(part):
    def fresh(**changes) -> LoopedGPT:
        model = LoopedGPT(tiny_config(**LOOP, **changes))
        start_weights(model, 1)
        return model

    base, model = fresh(), fresh(**PARTS[part])
    for name, value in base.state_dict().items():
        if name.endswith(("out.weight", "down.weight")):  # of a fresh model they are zero, and nothing would show
            value.normal_(generator=torch.Generator().manual_seed(2))
            model.state_dict()[name].copy_(value)
    assert torch.equal(model.hidden(draw_tokens(30)), base.hidden(draw_tokens(30)))


@torch.no_grad()
def test_a_block_is_what_its_formula_says():
    config = tiny_config(plan="a", skips="none", mlp_slope=0.25, head_gate=4, xsa_passes="none", ve_passes="none")
    block, x = tiny_model(config).blocks["a"], torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    stream = Stream(x, *build_rotation(6, config.rope_dims, config.rope_base, x), 32, None)
    row = PassRow(is_parallel=True, depth_scale=torch.tensor(0.5))
    found, _, _ = block(x, row, stream)
    read = 0.5 * F.rms_norm(x, (32,), eps=1e-6)
    attention = block.attention
    q, k, v = (t.view(1, 6, -1, 16) for t in attention.qkv(read).split([32, 16, 16], -1))
    q, k = (F.rms_norm(t, (16,), eps=1e-6) for t in (q, k))
    half = config.rope_dims // 2

    def turn(t):
        a, b = t[..., :half], t[..., half : 2 * half]
        rotated = [a * stream.cos - b * stream.sin, a * stream.sin + b * stream.cos, t[..., 2 * half :]]
        return torch.cat(rotated, -1).transpose(1, 2)

    scores = turn(q) * attention.q_gain[:, None, None]
    y = F.scaled_dot_product_attention(scores, turn(k), v.transpose(1, 2), is_causal=True, enable_gqa=True)
    gates = 2 / (1 + torch.exp(-read[..., :4] @ attention.gate.T))
    y = (y.transpose(1, 2) * gates[..., None]).flatten(2) @ attention.out.weight.T
    up = read @ block.mlp.up.weight.T
    hidden = torch.where(up > 0, up, 0.25 * up) ** 2
    torch.testing.assert_close(found, x + y + hidden @ block.mlp.down.weight.T, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_skips_are_mixed_as_their_formula_says():
    passes = tiny_model(tiny_config(**LOOP, skip_gates=True)).passes
    x, left = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    share = torch.sigmoid(passes.skip_gates[1])
    torch.testing.assert_close(
        train_gpt.join(x, left, *passes.joints()[1]), share * x + (1 - share) * passes.skips[1] * left
    )


@torch.no_grad()
def test_look_back_is_a_convolution_that_stops_at_document_starts():
    x, weights = torch.randn(1, 12, 5), torch.randn(3, 5)
    docs = torch.tensor([[0] * 4 + [1] * 2 + [2] * 6])
    found, last = look_back(x, weights, None, docs)
    for t in range(12):
        expected = x[0, t].clone()
        for lag in range(1, 4):
            if t >= lag and docs[0, t - lag] == docs[0, t]:
                expected += weights[lag - 1] * x[0, t - lag]
        torch.testing.assert_close(found[0, t], expected)
    assert torch.equal(last, x[:, -3:])


@pytest.mark.parametrize("doc_attention", [False, True])
@torch.no_grad()
def test_look_back_never_passes_a_bos(doc_attention):
    """Whether attention does or not."""
    shape = dict(plan="a", skips="none", smear=False, bigram_buckets=0, ve_passes="none")
    model = tiny_model(tiny_config(**shape, look_back=3, doc_attention=doc_attention))
    heard = []
    forward = model.blocks["a"].attention.forward
    model.blocks["a"].attention.forward = lambda x, row, stream: heard.append(x) or forward(x, row, stream)
    tokens = draw_tokens(20)
    tokens[0, 9] = 1
    changed = tokens.clone()
    changed[0, 8] = 5 + tokens[0, 8] % 7
    for text in (tokens, changed):
        model.hidden(text, cache=Cache(32))
    assert [t for t in range(20) if not torch.equal(heard[0][0, t], heard[1][0, t])] == [8]


def test_muons_rules():
    name = "blocks.a.mlp.up.weight"

    def step(gradients: list[torch.Tensor], **changes) -> torch.Tensor:
        """What the last of them moves the weight by."""
        model = tiny_model(tiny_config(grad_clip=0.0, matrix_lr=0.1, weight_decay=0.0, **changes))
        state = plain_state(model)
        weight = state.master.weights[name]
        for gradient in gradients:
            before = weight.detach().clone()
            weight.grad.copy_(gradient)
            state.step(1.0, 0.9)
        return before - weight.detach()

    generator = torch.Generator().manual_seed(1)
    rows, columns = tiny_model(tiny_config()).blocks["a"].mlp.up.weight.shape
    first, second = torch.randn(2, rows, columns, generator=generator)
    gain = 0.1 * max(1, rows / columns) ** 0.5

    def orthogonal(x: torch.Tensor, kind: str = "jordan") -> torch.Tensor:
        return gain * orthogonalize_ref(x[None], torch.float32, COEFFICIENTS[kind])[0]

    close = dict(atol=2e-4, rtol=1e-3)
    move = step([first], newton_schulz="polar_express")
    torch.testing.assert_close(move, orthogonal(first, "polar_express"), **close)
    uneven = first * torch.linspace(0.01, 10, rows)[:, None]
    move = step([uneven], row_norm=True)
    torch.testing.assert_close(move, orthogonal(first / first.norm(dim=1, keepdim=True)), **close)
    move = step([first, second])
    torch.testing.assert_close(move, orthogonal(second + 0.9 * (0.9 * first + second)), **close)


@torch.no_grad()
def test_weights_are_rounded_from_a_fraction_of_the_budget_on():
    config = tiny_config(qat_start=0.5)
    model, ctx = tiny_model(config), tiny_context()
    state = train_gpt.build_state(config, ctx, model, train_gpt.plan_k_scale(config, model))
    name = "blocks.a.mlp.up.weight"
    form, master = state.master.formats[name], state.master.weights[name]

    def is_rounded() -> bool:
        rounded = torch.empty_like(master)
        form.write_rounded(master, rounded)
        assert not torch.equal(rounded, master)
        assert torch.equal(model.state_dict()[name], rounded) or torch.equal(model.state_dict()[name], master)
        return torch.equal(model.state_dict()[name], rounded)

    assert not is_rounded()
    for progress, expected in ((0.25, False), (0.5, True), (1.0, True)):
        settings = settings_at(config, progress, 0)
        for weight in state.master.weights.values():
            weight.grad.normal_(generator=torch.Generator().manual_seed(1))
        state.step(settings.lr_scale, settings.momentum, settings.is_rounded)
        assert is_rounded() == expected
        before = model.state_dict()[name].clone()
        state.load_state_dict(state.state_dict())
        assert torch.equal(model.state_dict()[name], before)


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_all_coefficients_orthogonalize(kind):
    batch = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize_ref(batch, torch.float32, COEFFICIENTS[kind]))
    assert values.min() > 0.6 and values.max() < 1.3


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True), st.floats(0, 1))
def test_contexts_hold_up_to_their_ends(ends, progress):
    ends = sorted({round(end, 3) for end in ends})
    lengths = [8 * 2**i for i in range(len(ends))]
    contexts = ",".join(f"{length}:{end}" for length, end in zip(lengths, ends))
    config = tiny_config(contexts=contexts, seq_len=256, batch_tokens=1024)
    expected = next((length for length, end in zip(lengths, ends) if progress <= end), 256)
    assert settings_at(config, progress, 0).seq_len == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(contexts="16"), "a context and where it ends"),
        (dict(contexts="16:0.5,8:0.2"), "rise"),
        (dict(contexts="16:1.5"), "rise"),
        (dict(contexts="64:0.5"), "contexts=64:0.5: must be between 2 and seq_len=32"),
        (dict(contexts="24:0.5"), "contexts=24:0.5: 128 tokens are no whole sequences of seq_len=24"),
        (dict(contexts="24:0.301,16:0.302"), "no whole sequences of seq_len=24"),
        (dict(head_gate=33), "at most model_dim=32"),
        (dict(look_back=3, band=2), "at most 2, what attention sees"),
        (dict(mlp_slope=0.5, mlp="swiglu"), "needs --mlp relu2"),
        (dict(parallel_passes="9"), "parallel_passes"),
    ],
)
def test_bad_settings_are_told(changes, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(**changes)


def test_contexts_grow_in_a_run_and_it_resumes_bit_for_bit(dataset, tmp_path, monkeypatch):
    grows = dict(contexts="8:0.4,16:0.7", iterations=24, plan="a(b)*2c", ttt_freeze="", **ALL)
    grows |= dict(row_norm=True, newton_schulz="polar_express", qat_start=0.6)  # it stops before weights are rounded
    whole = train(tmp_path, dataset, run_id="whole", **grows)
    assert len(events((whole / "log.txt").read_text(), "train")) == 24
    calls, load_batch = itertools.count(1), train_gpt.load_batch

    def stop_at_the_ninth(*given):
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return load_batch(*given)

    with contextlib.chdir(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "load_batch", stop_at_the_ninth)
            assert train_gpt.main(tiny_options(dataset, **(SMALL | grows), run_id="parts"), {}) == 1
        assert train_gpt.main(["--resume", "runs/parts"], {}) == 0
    digests = [train_gpt.load_artifact(tmp_path / "runs" / name / "artifact.lg").sha256 for name in ("whole", "parts")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_two_ranks_train_it_as_one(dataset, tmp_path):
    """Up to the file, whose steps both measure together."""
    grows = dict(contexts="16:0.4", iterations=6, plan="a(b)*2c", ttt_freeze="", **ALL)
    grows |= dict(row_norm=True, newton_schulz="polar_express", qat_start=1.0, row_steps="loss")
    grows |= SMALL | dict(byte_limit=7000, calibration_tokens=256)
    train(tmp_path, dataset, run_id="r1", **grows)
    done = run_cli(tiny_options(dataset, run_id="r2", **grows), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / "runs" / name / "log.txt").read_text() for name in ("r1", "r2")]
    losses = [[float(line["train_loss"]) for line in events(log, "train")] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and len(losses[0]) == 6
    results = [events(log, "result")[0] for log in logs]
    assert float(results[0]["val_bpb"]) == pytest.approx(float(results[1]["val_bpb"]), abs=2e-3)
    files = [train_gpt.load_artifact(tmp_path / "runs" / name / "artifact.lg") for name in ("r1", "r2")]
    steps = [file.raw["embed.weight.step"].float() for file in files]
    ratio = steps[0] / steps[1]
    assert (ratio / ratio.mean() - 1).abs().mean() < 0.002, "more than another fit"


def test_a_run_compiles_the_forwards_that_it_has():
    """Neither one that it lacks, in the middle of the clock, nor one that never comes."""
    grows = dict(contexts="8:0.301,16:0.309", loop_start=0.302)
    config = tiny_config(**LOOP, **grows)
    listed = {(s.batch_tokens, s.seq_len, s.depth) for s in list_forwards(config, "block")}
    over_run = [settings_at(config, step / 4000, step) for step in range(4001)]
    assert listed == {(s.batch_tokens, s.seq_len, s.depth) for s in over_run} and len(listed) == 4


def test_a_gradient_step_at_every_shape_of_a_run():
    config = tiny_config(contexts="8:0.4,16:0.5", **LOOP, **ALL)
    assert list_shapes(config) == [(128, 8), (128, 16), (128, 32)]
    model = tiny_model(config)
    for batch_tokens, seq_len in list_shapes(config):
        tokens = torch.randint(384, (batch_tokens // seq_len, seq_len + 1))
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        assert train_step(model, plain_state(model), batch, tiny_settings(), tiny_context()).isfinite()
