"""Fixtures: a tiny tokenizer and dataset, built once from the standard library's own documentation strings."""

import ast
import io
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import write_shard
from data.tokenizer import load_tokenizer, train_tokenizer

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("repeatable")
torch.set_num_threads(1)

MODULES = ("argparse", "calendar", "configparser", "difflib", "functools", "heapq", "statistics", "textwrap", "typing")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    found = []
    for name in MODULES:
        source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append(text)
    return sorted(set(found), key=found.index)


@pytest.fixture(scope="session")
def tokenizer_bytes(documents: list[str]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, model_type="bpe", vocab_size=384, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, num_threads=1,
        max_sentence_length=1 << 20, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_bytes)


@pytest.fixture(scope="session")
def marked_tokenizer(tmp_path_factory, documents) -> sentencepiece.SentencePieceProcessor:
    """One whose text has marks for its words."""
    path = tmp_path_factory.mktemp("marked") / "tokenizer.model"
    train_tokenizer(documents, path, 384, marked=True)
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents, tokenizer, tokenizer_bytes) -> Path:
    """A dataset folder: two training shards and one for validation, every document behind a BOS."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [np.array([1, *tokenizer.encode(text)], dtype=np.uint16) for text in documents]
    # first those of about a hundred tokens: tests score a few documents
    val_rows = sorted(rows[::10], key=lambda row: abs(len(row) - 100))
    val, train = np.concatenate(val_rows), np.concatenate([row for i, row in enumerate(rows) if i % 10])
    half = len(train) // 2
    write_shard(folder / "tiny_train_000000.bin", train[:half])
    write_shard(folder / "tiny_train_000001.bin", train[half:])
    write_shard(folder / "tiny_val_000000.bin", val)
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes)
    return folder
