"""The losses of 20 steps of every recipe at tiny size, against those that commit dab7f1d computed: whoever changes a
number has to say so here. Tokens are made up by numpy, so that no Python version and no text moves them. Learning rates
are a small part of the recipe's (all of it with Lion): then the rounding of one processor or another stays below the
tolerance, where full rates let it grow.

float32, uncompiled, one thread: pytest tests/test_golden.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_context

import train_gpt
from loopgolf.params import start_weights

STEPS, SEQUENCES, LENGTH, VOCAB = 20, 4, 32, 384
LOSSES = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
TINY = dict(
    model_dim=32, num_heads=2, rope_dims=8, vocab_size=VOCAB, seq_len=LENGTH, batch_tokens=SEQUENCES * LENGTH,
    iterations=STEPS, contexts="", moe_hidden=16, bigram_dim=8, ve_dim=8, stride=8, byte_limit=0,
    dtype="float32", compile="none", device="cpu",
)  # fmt: skip
WHERE_USED = dict(bigram_buckets=64, adapter_rank=4, head_dim=16)  # sizes of what a recipe may not have


def make_tokens() -> torch.Tensor:
    """A random walk over the vocabulary, with documents."""
    generator = np.random.default_rng(0)
    count = STEPS * SEQUENCES * LENGTH + 1
    walk = 2 + (100 + np.cumsum(generator.integers(-3, 5, count))) % (VOCAB - 2)
    walk[generator.random(count) < 1 / 24] = 1
    walk[0] = 1
    return torch.from_numpy(walk)


def tiny_recipe(recipe: str) -> train_gpt.Config:
    own = {**{f.name: f.default for f in train_gpt.fields(train_gpt.Config)}, **train_gpt.RECIPES[recipe]}
    kv_heads = 2 if own["num_kv_heads"] == own["num_heads"] else 1
    sizes = {name: size for name, size in WHERE_USED.items() if own[name]}
    share = 1.0 if own["optimizer"] == "lion" else 0.03
    rates = {name: share * own[name] for name in ("matrix_lr", "table_lr", "vector_lr")}
    changes = {**train_gpt.RECIPES[recipe], **TINY, **sizes, **rates, "num_kv_heads": kv_heads}
    return train_gpt.Config(**changes)


@pytest.mark.parametrize("recipe", train_gpt.RECIPES)
def test_the_losses_of_a_recipe_are_the_golden_ones(recipe):
    config, ctx, tokens = tiny_recipe(recipe), tiny_context(), make_tokens()
    model = train_gpt.build_model(config, ctx)
    start_weights(model, config.seed)
    state = train_gpt.build_state(config, ctx, model, train_gpt.plan_k_scale(config, model))
    losses = []
    for step in range(STEPS):
        settings = train_gpt.settings_at(config, (step + 1) / STEPS, step)
        piece = tokens[step * config.batch_tokens :][: config.batch_tokens + 1]
        batch = train_gpt.split_tokens(piece.unfold(0, config.seq_len + 1, config.seq_len), ctx)
        losses.append(train_gpt.train_step(model, state, batch, settings, ctx).item())
    assert recipe in LOSSES, f"a new recipe: add its line to golden_losses.json: {[round(x, 6) for x in losses]}"
    assert losses == pytest.approx(LOSSES[recipe], abs=1e-4, rel=0)
