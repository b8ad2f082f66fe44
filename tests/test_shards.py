"""The shard format: what is written comes back, and every way in which a file can be broken is named.

python -m pytest tests/test_shards.py
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from data import shards
from data.shards import HEADER_BYTES, SHARD_MAGIC, TokenStream, find_shards, read_shard, write_shard
from loopgolf import runtime
from loopgolf.errors import DataError, TokenError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "text_train_000000.bin"
    write_shard(path, np.arange(1000))
    return path


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=300),
    dtype=st.sampled_from(["uint16", "int32", "int64", ">u2"]),
)
def test_round_trip(tmp_path: Path, tokens: list[int], dtype: str) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array(tokens, dtype=dtype))
    assert read_shard(path).tolist() == tokens


def test_layout_is_the_challenge_s(shard: Path) -> None:
    content = shard.read_bytes()
    assert len(content) == 256 * 4 + 1000 * 2
    assert np.frombuffer(content, "<i4", 256).tolist() == [20240520, 1, 1000] + [0] * 253
    assert content[1024:1030] == bytes([0, 0, 1, 0, 2, 0])


def test_tokens_are_mapped_and_read_only(shard: Path) -> None:
    tokens = read_shard(shard)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    with pytest.raises(ValueError):
        tokens[0] = 1


def break_header(path: Path, word: int, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(4 * word)
        file.write(np.array([value], "<i4").tobytes())


CORRUPTIONS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(b""), "zero-byte file"),
    (lambda path: os.truncate(path, HEADER_BYTES - 1), "truncated header"),
    (lambda path: os.truncate(path, 7), "truncated header"),
    (lambda path: os.truncate(path, HEADER_BYTES), "truncated"),
    (lambda path: os.truncate(path, HEADER_BYTES + 1999), "truncated"),
    (lambda path: os.truncate(path, HEADER_BYTES + 2001), "trailing bytes"),
    (lambda path: break_header(path, 0, 7), f"wrong magic 7, a shard starts with {SHARD_MAGIC}"),
    (lambda path: break_header(path, 1, 2), "wrong version 2"),
    (lambda path: break_header(path, 2, -5), "counts -5 tokens"),
    (lambda path: (os.truncate(path, HEADER_BYTES), break_header(path, 2, 0)), "counts 0 tokens"),
    (lambda path: path.unlink(), "no such shard"),
]


def test_each_corruption_is_named(shard: Path) -> None:
    for harm, fault in CORRUPTIONS:
        write_shard(shard, np.arange(1000))
        harm(shard)
        with pytest.raises(DataError) as raised:
            read_shard(shard)
        message = str(raised.value)
        assert message.startswith(f"{shard}: ") and ";" in message and "\n" not in message, fault
        assert fault in message


def test_token_range_is_checked_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHECK_TOKENS", 64)
    for position in (0, 57, 999):
        tokens = np.full(1000, 7)
        tokens[position] = 1024
        write_shard(tmp_path / "a.bin", tokens)
        assert read_shard(tmp_path / "a.bin", vocab_size=1025)[position] == 1024
        with pytest.raises(DataError, match="token 1024 is outside the vocabulary of 1024"):
            read_shard(tmp_path / "a.bin", vocab_size=1024)


def test_writing_refuses_what_is_no_row_of_uint16(tmp_path: Path) -> None:
    for tokens in ([-1, 2], [65536], [0.5, 1.0], [], [[1, 2]], ["a"], 5):
        with pytest.raises(DataError, match="a.bin"):
            write_shard(tmp_path / "a.bin", np.array(tokens))
        assert not list(tmp_path.iterdir()), tokens


def test_an_interrupted_write_leaves_the_old_file(shard: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
            monkeypatch.setattr(os, step, interrupt)
            write_shard(shard, np.arange(5))
        assert list(shard.parent.iterdir()) == [shard] and len(read_shard(shard)) == 1000, step


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path: Path, mode: str) -> object:
        Path(path).touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(runtime, "open", open_full, raising=False)
    with pytest.raises(OSError) as raised:
        write_shard(tmp_path / "a.bin", np.arange(60_000))
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_find_shards_sorts_and_keeps_splits_apart(tmp_path: Path) -> None:
    for name in ("t_train_000001.bin", "t_train_000000.bin", "t_val_000000.bin", ".t_train_000002.bin.9.tmp"):
        (tmp_path / name).touch()
    train, val = find_shards(tmp_path, "train"), find_shards(str(tmp_path), "val")
    assert [path.name for path in train] == ["t_train_000000.bin", "t_train_000001.bin"]
    assert [path.name for path in val] == ["t_val_000000.bin"]


def test_missing_data_names_the_folder_and_the_commands(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError) as raised:
            find_shards(folder, "train")
        for part in (str(folder), "python -m data.localtext", "python -m data.fineweb"):
            assert part in str(raised.value)


def test_a_token_beyond_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    tokens = np.full((1 << 20) + 300, 7)
    tokens[-2] = 1024  # later than what is looked at before a run starts
    write_shard(tmp_path / "a_train_0.bin", tokens)
    stream = TokenStream(str(tmp_path), "train", vocab_size=1024)
    assert stream.read(0, 1000).max() == 7
    with pytest.raises(
        DataError, match=r"a_train_0\.bin: token 1024 is outside the vocabulary of 1024; set --vocab_size"
    ):
        stream.read_windows(np.array([0, 1 << 20]), 300)


def test_what_one_rank_alone_may_read_is_told_by_that_rank(monkeypatch, capsys) -> None:
    for error, printed in ((TokenError("token 9"), "error: token 9\n"), (DataError("no shard"), "")):
        monkeypatch.setattr(train_gpt, "parse_config", Mock(side_effect=error))
        assert train_gpt.main([], {"LOCAL_RANK": "1"}) == 2
        assert capsys.readouterr().err == printed
