"""Marks of words: what they look like, that every text comes back in whatever pieces, and that bytes are those of the
text.

pytest tests/test_words.py
"""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.tokenizer import encode_document
from loopgolf.scoring import ByteCounter
from loopgolf.words import MARKS, SIGNS, Unmarker, decode_document, drop_marks, has_marks, mark_words, unmark_words

SHOWN = str.maketrans(MARKS, "TUJE")  # for reading; the texts here have none of these letters
PARTS = ["the", "The", "THE", "a", "A", "éa", " ", "  ", "\n", "_", "(", "2", ".", "▁", "😀", *MARKS, *SIGNS]

texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40), st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
)


@pytest.mark.parametrize(
    "text, marked",
    [
        ("one more word", "one more word"),
        ("one More WORD", "oneT moreU word"),
        ("a DataFrame", "aT dataTJ frame"),
        ("HTTPServer, HTTPs", "UJ httpTJ server,U httTJ ps"),
        ("snake_case\nline", "snake_J case\nJ line"),
        ("I am", "TJ i am"),
        ("THE end OF it", "UJ the endU of it"),
        ("2nd x2 2X", "2nd x2 2TJ x"),
        ("dès lors", "dès lors"),
        (" the  end", " the  end"),
        ("a \x03b\x01", "a E$J bE!"),
        ("", ""),
    ],
)
def test_what_is_marked(text, marked):
    assert mark_words(text).translate(SHOWN) == marked
    assert unmark_words(mark_words(text)) == text


@given(texts)
@example("".join(MARKS))
def test_every_text_comes_back(text):
    assert unmark_words(mark_words(text)) == text


@given(texts)
def test_words_have_one_form(text):
    words = mark_words(text)
    assert not any("A" <= char <= "Z" for char in words)
    bare = drop_marks(words)
    letters = [(before, char) for before, char in itertools.pairwise(bare) if "a" <= char <= "z"]
    assert all(before.isalnum() or before == " " for before, _ in letters)


@given(texts, st.data())
def test_marks_are_read_in_any_pieces(text, data):
    content = mark_words(text).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    unmarker = Unmarker()
    parts = [unmarker.feed(content[start:stop]) for start, stop in itertools.pairwise([0, *cuts, len(content)])]
    assert b"".join(parts).decode() == text


@given(st.binary(max_size=40))
def test_marks_in_disorder_do_no_harm(content):
    """A model may write them so."""
    assert len(Unmarker().feed(content)) <= len(content)


@given(texts)
def test_tokens_come_back_and_their_bytes_are_those_of_the_text(marked_tokenizer, text):
    tokens = encode_document(marked_tokenizer, text)
    assert decode_document(marked_tokenizer, tokens) == text
    row = np.array(tokens)
    assert ByteCounter(marked_tokenizer).count(row[:-1], row[1:]) == len(text.encode())


def test_who_has_marks(tokenizer, marked_tokenizer):
    assert has_marks(marked_tokenizer) and not has_marks(tokenizer)
    assert decode_document(tokenizer, tokenizer.encode("The end_Of")) == "The end_Of"


def test_marks_share_words(tokenizer, marked_tokenizer, documents):
    last = [marked_tokenizer.encode(mark_words(text), out_type=str)[-1] for text in ("x the", "x The", "x(the", "xThe")]
    assert last == 4 * ["▁the"]
    marked = [encode_document(marked_tokenizer, text) for text in documents]
    plain = [encode_document(tokenizer, text) for text in documents]
    assert sum(map(len, marked)) < sum(map(len, plain)), "with as many pieces"
