"""The batch of a step is a function of the seed and of the tokens consumed: ranks read disjoint parts of one batch, every
window of the text is read once per epoch, also when the context grows in the middle. CPU: pytest tests/test_loader.py
"""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_context, tiny_options
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from data.shards import TokenStream, WindowOrder, write_shard
from loopgolf.errors import ConfigError, DataError
from train_gpt import TrainingText, load_batch, settings_at


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


def test_windows_are_read_across_the_borders_of_shards(counting):
    stream = TokenStream(str(counting), "train", 1000)
    rows = stream.read_windows(np.array([390, 401, 0]), 20)
    assert rows.tolist() == [list(range(start, start + 20)) for start in (390, 401, 0)]


@given(
    n_blocks=st.integers(1, 40),
    rest=st.integers(1, 16),
    pieces=st.sampled_from([1, 2, 4]),
    steps=st.integers(1, 6),
    sequences=st.integers(1, 7),
    seed=st.integers(-(2**40), 2**40),
)
def test_every_window_is_read_once_per_epoch(n_blocks, rest, pieces, steps, sequences, seed):
    """Steps of any size: over as many rounds as it takes, all windows are read equally often, and none leaves the text."""
    longest, length = 16, 16 // pieces
    round_tokens = steps * pieces * sequences * longest
    order = WindowOrder(n_blocks * longest + rest, longest, round_tokens, seed)
    epochs = round_tokens // longest  # so that the last round ends with an epoch
    starts = [
        order.starts(consumed, sequences, length)
        for consumed in range(0, epochs * n_blocks * longest, sequences * length)
    ]
    windows, counts = np.unique(np.concatenate(starts), return_counts=True)
    assert windows.tolist() == list(range(0, n_blocks * longest, length))
    assert (counts == epochs).all()


def test_an_epoch_is_read_before_the_next_one_begins():
    order = WindowOrder(1001, 10, 50, seed=1)
    for epoch in range(3):
        starts = order.starts(1000 * epoch, 100, 10)
        assert sorted(starts) == list(range(0, 1000, 10))
        assert sorted(starts) != starts.tolist()
    assert len(order.epochs) <= 2


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [WindowOrder(1001, 10, 50, seed).starts(consumed, 100, 10).tolist() for seed, consumed in
              [(1, 0), (1, 0), (2, 0), (1, 1000)]]  # fmt: skip
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


def test_neighbours_in_a_document_are_never_in_one_step():
    order = WindowOrder(64_001, 64, round_tokens=4 * 256, seed=0)
    for consumed in range(0, 64_000, 256):
        blocks = order.starts(consumed, 16, 16) // 64
        assert len(set(blocks.tolist())) == 16


def test_a_large_text_needs_four_bytes_for_a_window():
    """Ten thousand million tokens, whose positions need more."""
    order = WindowOrder(10**10 + 1, 1024, 8192, seed=0)
    starts = order.starts(0, order.n_blocks, 1024)
    assert order.epochs[0].nbytes == 4 * order.n_blocks
    assert starts.max() == 1024 * (order.n_blocks - 1) and starts.sum() == 1024 * sum(range(order.n_blocks))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 7, 100])
def test_ranks_share_a_batch_without_overlap(counting, world, step):
    config = tiny_config(data_path=str(counting), vocab_size=1000)
    text = TrainingText(config, [(128, 32)])
    settings = settings_at(config, 0.5, step)
    parts = [load_batch(text, 128 * step, settings, tiny_context(rank, world)) for rank in range(world)]
    inputs, targets = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    assert all(x.shape == (4 // world, 32) for x, _ in parts)
    assert torch.equal(inputs + 1, targets)
    assert (inputs[:, 0] % 32 == 0).all() and len(inputs[:, 0].unique()) == 4
    alone, _ = load_batch(text, 128 * step, settings, tiny_context())
    assert torch.equal(inputs, alone)


def test_another_number_of_shards_changes_nothing(counting, tmp_path):
    write_shard(tmp_path / "n_train_000000.bin", np.arange(1000))
    one, many = TokenStream(str(tmp_path), "train", 1000), TokenStream(str(counting), "train", 1000)
    assert (one.read(350, 900) == many.read(350, 900)).all()
    assert one.fingerprint() != many.fingerprint()


def test_a_round_is_long_enough_for_the_shortest_windows(counting):
    """The largest batch of the shortest windows still takes one from each block."""
    text = TrainingText(tiny_config(data_path=str(counting), vocab_size=1000), [(256, 32), (256, 64)])
    for step in range(4):
        inputs = text.read(256 * step, 8, 32)
        assert len((inputs[:, 0] // 64).unique()) == 8


@pytest.mark.slow
def test_the_context_may_grow_in_the_middle_of_a_run(dataset, tmp_path, monkeypatch, capsys):
    """Interrupted within a round, too: the same windows, each once."""
    monkeypatch.chdir(tmp_path)
    read = []
    original = TrainingText.read

    def spy(self, consumed, count, length):
        read.append((consumed, count, length, self.order.starts(consumed, count, length).tolist()))
        return original(self, consumed, count, length)

    monkeypatch.setattr(TrainingText, "read", spy)
    grows = dict(seq_len=64, batch_tokens=256, contexts="32:0.34")
    assert train_gpt.main(tiny_options(dataset, iterations=11, run_id="grown", **grows), {}) == 0
    steps = [(count, length) for _, count, length, _ in read]
    assert set(steps) == {(8, 32), (4, 64)}
    starts = [position for _, _, length, found in read for start in found for position in range(start, start + length)]
    assert len(starts) == len(set(starts))  # less than an epoch: nothing twice
    assert json.loads((tmp_path / "runs/grown/result.json").read_text())["result"]["tokens"] == sum(
        count * length for count, length in steps
    )


def test_a_context_that_does_not_divide_the_longest_is_refused():
    with pytest.raises(ConfigError, match="seq_len=24: must divide 32"):
        train_gpt.check_split(tiny_config(batch_tokens=96, contexts="24:0.5"), tiny_context())


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="32 training tokens"):
        WindowOrder(32, 32, 128, seed=0)


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
