"""What is scored: the first so many documents, the same text in any vocabulary. CPU: pytest tests/test_validation.py"""

import contextlib
import io
from dataclasses import replace

import numpy as np
import sentencepiece
from helpers import events, tiny_config, tiny_context

import train_gpt
from data.shards import TokenStream, write_shard
from data.tokenizer import train_tokenizer
from loopgolf.runtime import Log


def load_scored(folder, **changes):
    """The log lines and the validation text of a config."""
    log = io.StringIO()
    config = tiny_config(data_path=str(folder), **changes)
    ctx = tiny_context()
    with contextlib.redirect_stdout(log):
        val = train_gpt.load_validation(config, replace(ctx, log=Log()))
    return log.getvalue(), val


def test_documents_are_scored_whole_and_are_the_same_text_in_another_vocabulary(dataset, documents, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    model = sentencepiece.SentencePieceProcessor(model_file=str(dataset / "tokenizer.model"))
    train_tokenizer(documents, other / "tokenizer.model", 512)
    larger = sentencepiece.SentencePieceProcessor(model_file=str(other / "tokenizer.model"))
    tokens = TokenStream(str(dataset), "val", 384)
    rows = train_gpt.split_documents(tokens.read(0, tokens.total), bos_id=1)
    texts = [model.decode(row.tolist()) for row in rows]
    write_shard(other / "x_val_000000.bin", np.concatenate([[1, *larger.encode(text)] for text in texts]))
    (log, val), (other_log, other_val) = (
        load_scored(folder, vocab_size=size, score_documents=3) for folder, size in ((dataset, 384), (other, 512))
    )
    line, other_line = events(log, "data")[0], events(other_log, "data")[0]
    assert line["documents"] == other_line["documents"] == "3"
    assert line["text_sha256"] == other_line["text_sha256"]
    assert len(val.tokens) == sum(map(len, rows[:3])) > len(other_val.tokens)
    bytes_of = [v.counter.count(v.tokens[:-1].numpy(), v.tokens[1:].numpy()) for v in (val, other_val)]
    assert bytes_of[0] == bytes_of[1] == len("".join(texts[:3]).encode())


def test_a_run_says_that_it_is_scored_on_another_text_than_its_recipe(dataset):
    log, _ = load_scored(dataset, score_documents=3)
    sha256 = events(log, "data")[0]["text_sha256"]
    assert "warning" not in load_scored(dataset, score_documents=3, text_sha256=sha256)[0]
    for changes in (dict(score_documents=2), dict(score_documents=0)):
        told = load_scored(dataset, text_sha256=sha256, **changes)[0]
        assert "# warning: the text is not the one that 4b7l is scored on" in told
