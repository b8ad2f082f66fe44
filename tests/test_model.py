"""The model against a second implementation of its equations, written here in loops over positions and heads.

Also asserts parameter counts, causality bit by bit, that nothing crosses a document boundary in the embedding, what
exclusive self attention excludes, that a cached stream equals one forward, and fresh weights.
float32 on a CPU: pytest tests/test_model.py
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import at, tiny_config, tiny_model
from torch import Tensor

from kernels.attention import attend_fused, attend_in_blocks, build_rotation
from kernels.head import softcap_logits
from loopgolf.cache import Cache
from loopgolf.params import collect_specs, start_weights
from loopgolf.plan import Depth
from train_gpt import RECIPES, Config, LoopedGPT, PassRow, Stream


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def embed_one_by_one(model: LoopedGPT, tokens: list[int]) -> Tensor:
    config, w = model.config, dict(model.named_parameters())
    stream = [config.bos_id, config.bos_id, *tokens]
    rows = []
    for before, token in itertools.pairwise(stream):
        row = w["embed.weight"][token]
        if config.bigram_buckets:
            before = config.bos_id if token == config.bos_id else before
            bucket = (92821 * before + token) % config.bigram_buckets
            row = row + w["bigram_out.weight"] @ w["bigram.weight"][bucket]
        rows.append(norm(row, w.get("norms.embed", 1.0)) if config.embed_norm else row)
    if not config.smear:
        return torch.stack(rows[1:])
    gate = torch.sigmoid(w["smear_gate"])
    mixed = [
        (1 - gate) * row + gate * (torch.zeros_like(row) if token == config.bos_id else before)
        for before, row, token in zip(rows, rows[1:], tokens)
    ]
    return torch.stack(mixed)


def rotate_one(x: Tensor, position: int, config: Config) -> Tensor:
    half, x = config.rope_dims // 2, x.clone()
    for i in range(half):
        angle = position * config.rope_base ** (-i / half)
        a, b = x[i].clone(), x[i + half].clone()
        x[i], x[i + half] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
    return x


def attend_one_by_one(model: LoopedGPT, letter: str, x: Tensor, value: Tensor | None, is_xsa: bool) -> Tensor:
    config, block = model.config, model.blocks[letter]
    K, H, J = config.head_width, config.num_heads, config.num_kv_heads
    qkv, unit = x @ block.attention.qkv.weight.T, norm if config.qk_norm else torch.clone
    kinds = config.windows or "L"
    reach = config.seq_len // (2 if kinds[model.plan.names.index(letter) % len(kinds)] == "S" else 1)
    q, k, v = qkv[:, : H * K], qkv[:, H * K : (H + J) * K], qkv[:, (H + J) * K :]
    v = v if value is None else v + value
    out = torch.zeros(len(x), H * K)
    for h in range(H):
        j, mine = h // (H // J), slice(h * K, h * K + K)
        theirs = slice(j * K, j * K + K)
        keys = [rotate_one(unit(row), t, config) for t, row in enumerate(k[:, theirs])]
        for t in range(len(x)):
            query = rotate_one(unit(q[t, mine]), t, config) * (block.attention.q_gain[h] if config.q_gain else 1)
            seen = slice(max(0, t + 1 - reach), t + 1)
            chances = torch.stack([query @ key / math.sqrt(K) for key in keys[seen]]).softmax(0)
            y = sum(chance * row for chance, row in zip(chances, v[seen, theirs]))
            own = v[t, theirs] / v[t, theirs].norm()
            out[t, mine] = y - (y @ own) * own if is_xsa else y
    return out @ block.attention.out.weight.T


def mix_one_by_one(w: dict[str, Tensor], top: int, loop: int, h: Tensor) -> Tensor:
    """The mixture of experts for one token after the other, one expert after the other; `w` holds weights by name."""

    def expert(x, gate, up, down):
        a = gate @ x
        return down @ (a * torch.sigmoid(a) * (up @ x))

    D, H = w["shared_down.weight"].shape
    halves, downs, out = w["up.weight"].split(H), w["down.weight"].split(D), []
    for x in h:
        p = torch.sigmoid(w["router"] @ torch.cat((x, w["loops"][loop])))
        y = expert(x, *w["shared_up.weight"].split(H), w["shared_down.weight"])
        for e in p.argsort(descending=True)[:top].tolist():
            y = y + p[e] * expert(x, halves[2 * e], halves[2 * e + 1], downs[e])
        out.append(y)
    return torch.stack(out)


@torch.no_grad()
def states_one_by_one(model: LoopedGPT, tokens: Tensor, depth: Depth) -> Tensor:
    """(T,) tokens to (T, D) states: the passes written out, with the table rows that the plan names."""
    config, w = model.config, dict(model.named_parameters())
    passes = model.plan.passes(depth, config.table_repetitions)
    x = x0 = embed_one_by_one(model, tokens.tolist())
    slots = list(range(model.plan.count_passes(config.table_repetitions)))
    value_rows = {"none": [], "all": slots}.get(config.ve_passes)
    if value_rows is None:
        value_rows = slots[-int(config.ve_passes.removeprefix("last")) :]
    entered, pushed, half = {}, [], len(passes) // 2 if config.skips == "unet" else 0
    for index, p in enumerate(passes):
        for group in p.enter:
            entered[group] = x
        for group in p.inject:
            both = torch.cat((entered[group], x), -1)
            x = x + entered[group] if config.inject == "add" else both @ w[f"inject.{group}.weight"].T
        if half <= index < 2 * half:
            x = x + w["passes.skips"][len(pushed) - 1] * pushed.pop()
        letter, block = model.plan.names[p.block], model.blocks[model.plan.names[p.block]]
        mix, scale = (w["passes.mixes"][p.slot], w["passes.scales"][p.slot]) if config.pass_scales else ((1, 0), (1, 1))
        is_sandwich = config.block_norm == "sandwich"

        def block_norm(x: Tensor, name: str, letter: str = letter) -> Tensor:
            return norm(x, w.get(f"blocks.{letter}.norms.{name}", 1.0))

        value = None
        if p.slot in value_rows:
            table = w["value.weight"][tokens] @ w["value_out.weight"].T
            value = w["passes.value_scales"][value_rows.index(p.slot)] * table
        is_xsa = config.xsa_passes == "all" or str(p.slot) in config.xsa_passes.split(",")
        x = mix[0] * x + mix[1] * x0
        if config.adapter_rank:
            x = x + x @ w["passes.adapters"][p.slot, 0] @ w["passes.adapters"][p.slot, 1].T
        x = x + scale[0] * attend_one_by_one(model, letter, block_norm(x, "attention"), value, is_xsa)
        x = block_norm(x, "attention_out") if is_sandwich else x
        hidden = block_norm(x, "mlp") @ block.mlp.up.weight.T
        gate, gated = hidden[:, : config.mlp_dim], hidden[:, config.mlp_dim :]
        hidden = gate * gate.sigmoid() * gated if config.mlp == "swiglu" else hidden.clamp(min=0).square()
        y = hidden @ block.mlp.down.weight.T
        if config.moe_experts:
            earlier = model.plan.slot_owners(config.table_repetitions)[: p.slot]
            experts = dict(block.moe.named_parameters())
            mixed = mix_one_by_one(experts, config.moe_top, earlier.count(p.block), block_norm(x, "moe"))
            y = block.moe.mlp_gate * y + block.moe.moe_gate * mixed
        x = x + scale[1] * y
        x = block_norm(x, "mlp_out") if is_sandwich else x
        if p.norm:
            x = norm(x, w.get("norms.loop", 1.0))
        if index < half:
            pushed.append(x)
    return norm(x, w.get("norms.final", 1.0))


def draw_tokens(config: Config, count: int, seed: int = 0) -> Tensor:
    """Random tokens with a few document starts among them."""
    tokens = torch.randint(4, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    tokens[count // 3] = tokens[count // 2] = config.bos_id
    return tokens


BARE = dict(skips="none", smear=False, bigram_buckets=0, ve_passes="none", xsa_passes="none")


@pytest.mark.parametrize(
    "changes, depth",
    [
        (dict(plan="abcd", ttt_freeze="", **BARE), 1),
        (dict(plan="abcde", ttt_freeze=""), 1),
        (dict(plan="abab", num_heads=4, rope_dims=4, xsa_passes="1,3", ve_passes="all"), 1),
        (dict(plan="ab", num_kv_heads=2, rope_dims=16), 1),
        (dict(plan="abab", num_heads=3, head_dim=8, ve_passes="all"), 1),
        (dict(plan="ab", head_dim=24, rope_dims=20), 1),
        (dict(plan="ab", rope_dims=0, skips="none"), 1),
        (dict(plan="a(^bc~)*rd", skips="none", depth=2), 2),
        (dict(plan="a(^bc~~)*rd", skips="none", depth=2), 4),
        (dict(plan="a(^bc~)*rd", skips="none", depth=2), 0),
        (dict(plan="(^a(^b)*2~)*2"), 1),
    ],
)
def test_states_are_those_of_the_equations(changes, depth):
    config = tiny_config(**changes)
    model, tokens = tiny_model(config), draw_tokens(config, 14)
    with torch.no_grad():
        found = model.hidden(tokens[None], at(depth))[0]
    torch.testing.assert_close(found, states_one_by_one(model, tokens, at(depth)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("depth, rows", [(1, [0, 1, 4]), (2, [0, 1, 2, 4]), (3, [0, 1, 2, 3, 4]),
                                         (5, [0, 1, 2, 3, 3, 3, 4]), (0, [0, 1, 4])])  # fmt: skip
def test_depth_r_is_the_plan_written_out(depth, rows):
    config = tiny_config(plan="a(b)*rc", depth=3, skips="none", ve_passes="none")
    model, tokens = tiny_model(config), draw_tokens(config, 20)[None]
    plain = LoopedGPT(tiny_config(plan="a" + "b" * max(depth, 1) + "c", skips="none", ve_passes="none"))
    weights = {n: p[rows] if n in ("passes.mixes", "passes.scales") else p for n, p in model.state_dict().items()}
    plain.load_state_dict(weights)
    assert torch.equal(model.hidden(tokens, at(depth)), plain.hidden(tokens))


def test_the_depth_is_the_configs_unless_said():
    config = tiny_config(plan="a(b)*rc", depth=3, skips="none")
    model, tokens = tiny_model(config), draw_tokens(config, 20)[None]
    assert torch.equal(model.hidden(tokens), model.hidden(tokens, Depth(3))) and not torch.equal(
        model.hidden(tokens), model.hidden(tokens, Depth(2))
    )


def test_4b7l_has_the_parameters_of_the_entry_it_started_from():
    with torch.device("meta"):
        model = LoopedGPT(Config(**RECIPES["4b7l"]))
    assert sum(p.numel() for p in model.parameters()) == 29_950_082


def test_shared_weights_are_counted_once():
    def count(plan: str) -> int:
        model = LoopedGPT(tiny_config(plan=plan, skips="none", ve_passes="none"))
        return sum(p.numel() for p in model.parameters())

    per_pass = 4 * 32
    assert count("ababab") - count("ab") == count("(ab)*3") - count("ab") == 4 * per_pass
    block = 32 * (32 + 16 + 16) + 32 * 32 + 2 * 32 * 64 + 2
    assert count("abc") - count("ab") == block + per_pass


@pytest.mark.parametrize("length", [24, 200])
def test_a_token_changes_nothing_before_it(length):
    config = tiny_config(seq_len=256, batch_tokens=256)
    model, tokens = tiny_model(config), draw_tokens(config, length)
    with torch.no_grad():
        before = model.hidden(tokens[None])[0]
        for t in (0, 1, length // 2, length - 1):
            changed = tokens.clone()
            changed[t] = 5 + tokens[t] % 7
            after = model.hidden(changed[None])[0]
            assert torch.equal(after[:t], before[:t])
            assert not torch.equal(after[t], before[t]) and not torch.equal(after[-1], before[-1])


@torch.no_grad()
def test_the_embedding_does_not_look_across_a_document_start():
    config = tiny_config()
    model = tiny_model(config)

    def embed(*tokens: int) -> torch.Tensor:
        return model.embed_tokens(torch.tensor([tokens]))

    ours, theirs = embed(40, 41, 7, 8, 9, 1, 20, 21, 22), embed(45, 46, 30, 31, 32, 1, 20, 21, 22)
    assert torch.equal(ours[:, 3:], theirs[:, 3:]) and not torch.equal(ours[:, 2], theirs[:, 2])
    assert torch.equal(embed(40, 41, 1, 20, 21), embed(99, 98, 1, 20, 21))
    assert torch.equal(embed(40, 41, 1, 20, 21), ours[:, 3:6])
    same, far, near = embed(40, 41, 20, 21), embed(50, 41, 20, 21), embed(41, 42, 20, 21)
    assert not torch.equal(same[:, 0], near[:, 0])
    assert torch.equal(same[:, 1], far[:, 1]), "two tokens back reach the first position only"


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("past", "window", "has_docs"), [(0, 999, False), (0, 150, True), (37, 90, True), (37, 20, False)]
)
def test_both_forms_of_attention_are_that_with_a_dense_mask(heads, past, window, has_docs):
    B, T, J, K = 2, 201, 2, 8
    generator = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(B, n, h, K, generator=generator) for n, h in ((T, heads * J), (past + T, J), (past + T, J)))
    docs = (torch.rand(B, past + T, generator=generator) < 0.02).cumsum(1) if has_docs else None
    lag = torch.arange(past, past + T)[:, None] - torch.arange(past + T)
    mask = ((lag >= 0) & (lag < window)).expand(B, 1, T, past + T)
    if has_docs:
        mask = mask & (docs[:, None, past:, None] == docs[:, None, None])
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, enable_gqa=True)
    for form in (attend_in_blocks, attend_fused):
        torch.testing.assert_close(form(q, k, v, window, docs), y.transpose(1, 2).reshape(B, T, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_exclusive_attention_leaves_nothing_along_the_own_value():
    config = tiny_config(num_heads=4, rope_dims=4, num_kv_heads=2)
    model, x = tiny_model(config), torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(3))
    value = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(4))
    stream = Stream(x, *build_rotation(11, config.rope_dims, config.rope_base, x), 32, None)
    attention = model.blocks["a"].attention
    attention.out.weight.copy_(torch.eye(32))

    def along_own(is_xsa: bool) -> float:
        row = PassRow(value=value, value_scale=torch.tensor(1.0), is_xsa=is_xsa, keeps=True)
        y, kept = attention(x, row, stream)
        own = torch.nn.functional.normalize(kept[1], dim=-1).repeat_interleave(2, dim=2)
        return (y.view(2, 11, 4, 8) * own).sum(-1).abs().max().item()

    assert along_own(True) < 1e-5 < 0.1 < along_own(False)


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 13, 9], [29, 1], [30]])
@pytest.mark.parametrize("changes", [{}, dict(plan="a(^bc~)*rd", skips="none", depth=2), dict(doc_attention=True)])
@torch.no_grad()
def test_a_cached_stream_equals_one_forward(pieces, changes):
    config = tiny_config(**changes)
    model, tokens = tiny_model(config), draw_tokens(config, 30)[None]
    cache = Cache(config.seq_len)
    found = torch.cat([model.hidden(piece, None, cache) for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(found, model.hidden(tokens), atol=3e-5, rtol=0)


@torch.no_grad()
def test_a_long_stream_in_pieces_equals_the_stream_at_once():
    config = tiny_config()
    model, tokens = tiny_model(config), torch.stack([draw_tokens(config, 40, 1), draw_tokens(config, 40, 2)])
    at_once, cache = model.hidden(tokens, None, Cache(8)), Cache(8)
    found = torch.cat([model.hidden(piece, None, cache) for piece in tokens.split([3, 20, 1, 16], 1)], 1)
    torch.testing.assert_close(found, at_once, atol=1e-5, rtol=0)
    assert cache.length == 8


@pytest.mark.parametrize("window", [4, 8])
@torch.no_grad()
def test_one_pass_sees_its_window_and_nothing_beyond(window):
    config = tiny_config(plan="a", skips="none", smear=False, bigram_buckets=0, ve_passes="none")
    model, tokens = tiny_model(config), draw_tokens(config, 20)[None]
    changed = tokens.clone()
    changed[0, 5] = 3
    a, b = model.hidden(tokens, None, Cache(window))[0], model.hidden(changed, None, Cache(window))[0]
    differs = [t for t in range(20) if not torch.equal(a[t], b[t])]
    assert differs == list(range(5, 5 + window))


@pytest.mark.parametrize("window", [32, 8])
@torch.no_grad()
def test_attention_stops_at_document_starts_where_the_config_says_so(window):
    tokens = draw_tokens(tiny_config(), 30)[None]
    tokens[tokens == 1] = 2
    tokens[0, [9, 17]] = 1
    changed = tokens.clone()
    changed[0, 12] = 3
    for stops in (False, True):
        model = tiny_model(tiny_config(doc_attention=stops))
        a, b = (model.hidden(t, cache=Cache(window))[0] for t in (tokens, changed))
        differs = [t for t in range(30) if not torch.equal(a[t], b[t])]
        assert (set(differs) <= set(range(12, 17))) == stops and 12 in differs
        alone = model.hidden(tokens[:, 17:], cache=Cache(window))[0]
        assert torch.allclose(alone, a[17:], atol=1e-5) == stops


@torch.no_grad()
def test_adapters_belong_to_their_row_and_do_nothing_at_zero():
    config = tiny_config()
    model, tokens = tiny_model(config), torch.stack([draw_tokens(config, 20, 1), draw_tokens(config, 20, 2)])
    generator = torch.Generator().manual_seed(1)
    for layer in ("qkv", "out", "up", "down"):
        fan_out, fan_in = model.linears()["b"][layer].weight.shape
        down = torch.randn(2, fan_in, 3, generator=generator)
        up = torch.randn(2, 3, fan_out, generator=generator)
        up[0] = 0
        with_lora, base = model.hidden(tokens, lora={"b": {layer: (down, up)}}), model.hidden(tokens)
        torch.testing.assert_close(with_lora[0], base[0], atol=1e-5, rtol=0)
        assert (with_lora[1] - base[1]).abs().max() > 0.01
        merged = tiny_model(config)
        merged.linears()["b"][layer].weight += (down[1] @ up[1]).T
        torch.testing.assert_close(with_lora[1], merged.hidden(tokens)[1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_are_capped_and_the_loss_is_their_cross_entropy():
    config = tiny_config(softcap=3.0)
    model, tokens = tiny_model(config), draw_tokens(config, 21)
    x = model.hidden(tokens[None, :-1])
    logits = model.logits(x)
    assert logits.dtype == torch.float32 and logits.abs().max() <= 3.0
    raw = x[0] @ model.embed.weight.T
    torch.testing.assert_close(logits[0], 3.0 * torch.tanh(raw / 3.0), atol=1e-5, rtol=0)
    assert torch.equal(logits, softcap_logits(x, model.embed.weight, 3.0))
    expected = -logits[0].log_softmax(-1)[range(20), tokens[1:]].mean()
    torch.testing.assert_close(model(tokens[None, :-1], tokens[None, 1:]), expected, atol=1e-5, rtol=0)


VARIANTS = [
    {}, dict(plan="a(^bc~)*rd", skips="none"), dict(plan="(ab~)*2", ve_passes="none", bigram_buckets=0),
    dict(plan="(ab~)*2", adapter_rank=3, norm_weights=True, embed_norm=False, mlp="swiglu", pass_scales=False, q_gain=0.0),
    dict(plan="a(^bc~~)*rd", skips="none", norm_weights=True, block_norm="sandwich", tied=False, windows="LSSL"),
    dict(plan="a(b)*2c", skip_gates=True, head_gate=4, look_back=2, parallel_passes="last2"),
    dict(plan="a(b)*2c", depth_scale=True, mlp_slope=0.5),
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS)
def test_fresh_weights_cover_every_parameter_and_follow_the_seed(changes):
    def fresh(seed: int, before: float) -> dict[str, Tensor]:
        model = LoopedGPT(tiny_config(**changes))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(before)
        torch.manual_seed(int(abs(before)) if math.isfinite(before) else 0)
        start_weights(model, seed)
        return model.state_dict()

    one, same, other = fresh(1, math.nan), fresh(1, 123.0), fresh(2, math.nan)
    assert all(p.isfinite().all() for p in one.values())
    assert all(torch.equal(one[n], same[n]) for n in one)
    drawn = [n for n in one if n == "embed.weight" or n.endswith(("qkv.weight", "up.weight"))]
    assert len(drawn) > 2 and all(not torch.equal(one[n], other[n]) for n in drawn)


@torch.no_grad()
def test_a_fresh_model_passes_its_embedding_through():
    """Matrices that write to the stream start at zero, mixes keep the stream, so only skips add copies of it."""
    config = tiny_config(plan="abc", skips="none", q_gain=1.25)
    model, tokens = LoopedGPT(config), draw_tokens(config, 12)[None]
    start_weights(model, 1)
    x = model.embed_tokens(torch.nn.functional.pad(tokens, (2, 0), value=1))
    assert torch.equal(model.hidden(tokens), torch.nn.functional.rms_norm(x, (32,), eps=1e-6))
    weights = dict(model.named_parameters())
    assert weights["passes.mixes"][:, 0].eq(1).all() and weights["passes.mixes"][:, 1].eq(0).all()
    assert weights["passes.scales"].eq(1).all() and weights["passes.value_scales"].eq(1).all()
    assert weights["blocks.b.attention.q_gain"].eq(1.25).all()
    unet = LoopedGPT(tiny_config(plan="abc"))
    start_weights(unet, 1)
    assert unet.passes.skips.eq(1).all()
    for part in weights["blocks.a.attention.qkv.weight"].split(model.blocks["a"].attention.qkv.parts):
        torch.testing.assert_close(part @ part.T, torch.eye(len(part)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    config = tiny_config(**changes)
    model, tokens = tiny_model(config), draw_tokens(config, 32)[None]
    model(tokens, tokens.roll(-1, 1)).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


def test_kinds_of_parameters():
    model = LoopedGPT(tiny_config(plan="a(^b)*2"))
    kinds = {n: collect_specs(model)[n].group for n, _ in model.named_parameters()}
    assert {n for n, k in kinds.items() if k == "table"} == {"embed.weight", "bigram.weight", "value.weight"}
    tables = {f"passes.{name}" for name in ("mixes", "scales", "skips", "value_scales")}
    vectors = tables | {"smear_gate", "blocks.a.attention.q_gain", "blocks.b.attention.q_gain"}
    assert {n for n, k in kinds.items() if k == "vector"} == vectors
