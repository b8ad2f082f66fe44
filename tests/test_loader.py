"""The batch of a step is a function of the step: ranks read disjoint parts of the same global batch, shards join
without a seam, and the stream starts over at its end. CPU: pytest tests/test_loader.py
"""

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_context
from hypothesis import given
from hypothesis import strategies as st

from data.shards import TokenStream, write_shard
from loopgolf.errors import DataError
from train_gpt import load_batch, settings_at


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Three shards that count 0, 1, 2, … 999."""
    folder = tmp_path_factory.mktemp("counting")
    for index, (start, stop) in enumerate([(0, 400), (400, 407), (407, 1000)]):
        write_shard(folder / f"n_train_{index:06d}.bin", np.arange(start, stop))
    return folder


@given(start=st.integers(0, 5000), count=st.integers(0, 2500))
def test_a_stream_is_one_row_that_repeats(counting, start, count):
    found = TokenStream(str(counting), "train", 1000).read(start, count)
    assert found.tolist() == [(start + i) % 1000 for i in range(count)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 7, 100])
def test_ranks_share_a_batch_without_overlap(counting, world, step):
    config = tiny_config(data_path=str(counting), vocab_size=1000)
    stream = TokenStream(str(counting), "train", 1000)
    settings = settings_at(config, 0.5, step)
    parts = [load_batch(stream, 128 * step, settings, tiny_context(rank, world)) for rank in range(world)]
    inputs, targets = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    expected = (torch.arange(129) + 128 * step) % 1000
    assert all(x.shape == (4 // world, 32) for x, _ in parts)
    assert torch.equal(inputs.flatten(), expected[:-1]) and torch.equal(targets.flatten(), expected[1:])


def test_another_number_of_sequences_in_a_shard_changes_nothing(counting, tmp_path):
    write_shard(tmp_path / "n_train_000000.bin", np.arange(1000))
    one, many = TokenStream(str(tmp_path), "train", 1000), TokenStream(str(counting), "train", 1000)
    assert (one.read(350, 900) == many.read(350, 900)).all()
    assert one.fingerprint() != many.fingerprint()


def test_a_token_beyond_the_vocabulary_is_refused(counting):
    with pytest.raises(DataError, match="999"):
        TokenStream(str(counting), "train", 999)
    assert TokenStream(str(counting), "train", 1000).total == 1000


def test_a_fingerprint_follows_the_tokens(counting, tmp_path):
    for name, source in [("a", np.arange(50)), ("b", np.arange(50)), ("c", np.arange(50) + 1)]:
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "x_val_000000.bin", source)
    a, b, c = (TokenStream(str(tmp_path / name), "val", 100).fingerprint() for name in "abc")
    assert a == b != c
