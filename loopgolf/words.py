"""One form for every word: `the`, `The`, `THE` and the end of `_the` are one word, and marks say what it looked like.

A plain tokenizer has to learn each of them anew, and a small model too. In marked text a word is lower case behind a
blank, and before the blank stands what was different: TITLE or UPPER, and JOIN where the text has no blank. So
"a DataFrame" becomes "a", TITLE, " data", TITLE, JOIN, " frame". Only ASCII letters make words. A mark in the text
itself, a control character that hardly ever occurs, becomes ESCAPE and a sign. Marks stand for no bytes, nor does a
blank behind JOIN.

A tokenizer that was trained on marked text has all the marks among its pieces: that is how everybody knows.

(Marks for case: CaseOps, parameter-golf #1729; marks for joints too: case_markup and joiner_annotate of OpenNMT's
Tokenizer.)
"""

from __future__ import annotations

import re

import sentencepiece

TITLE, UPPER, JOIN, ESCAPE = MARKS = "\x01\x02\x03\x04"
SIGNS = "!#$%"  # one for each mark, of one byte as it, and no part of a word either
WORD = re.compile(f"[{MARKS}]|(?P<blank> ?)(?P<word>[A-Z]{{2,}}(?![a-z])|[A-Z][a-z]*|[a-z]+)")


def has_marks(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    return all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKS)


def drop_marks(piece: str) -> str:
    return piece.translate(dict.fromkeys(map(ord, MARKS)))


def mark_words(text: str) -> str:
    return WORD.sub(mark_word, text)


def mark_word(found: re.Match[str]) -> str:
    word = found["word"]
    if word is None:
        return ESCAPE + SIGNS[MARKS.index(found[0])]
    lower = word.lower()
    case = ""
    if word != lower:
        case = UPPER if len(word) > 1 and word.isupper() else TITLE
    if found["blank"]:
        return f"{case} {lower}"
    at = found.start()
    goes_on = at == 0 or found.string[at - 1].isalnum()  # a document's first blank is the tokenizer's; `nd` of `2nd`
    if goes_on and not case:
        return lower
    return f"{case}{JOIN} {lower}"


def unmark_words(text: str) -> str:
    return Unmarker().feed(text.encode()).decode()


def decode_tokens(tokenizer: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> str:
    """The text of a document."""
    text = tokenizer.decode(tokens)
    return unmark_words(text) if has_marks(tokenizer) else text


class Unmarker:
    """Marked bytes to those of the text, in any pieces."""

    def __init__(self) -> None:
        self.case = ""  # TITLE or UPPER while it holds
        self.is_inside = False  # a word in upper case has begun
        self.is_joined = False
        self.is_escaped = False

    def feed(self, content: bytes) -> bytes:
        return b"".join(self.read(content[at : at + 1]) for at in range(len(content)))

    def read(self, byte: bytes) -> bytes:
        if self.is_escaped:
            self.is_escaped = False
            return self.read_escaped(byte)
        is_letter = b"a" <= byte <= b"z"
        if self.is_inside and not is_letter:
            self.case = ""
            self.is_inside = False
        if is_letter:
            return self.read_letter(byte)
        if byte == b" ":
            blank = b"" if self.is_joined else byte
            self.is_joined = False
            return blank
        return self.read_other(byte)

    def read_letter(self, byte: bytes) -> bytes:
        letter = byte.upper() if self.case else byte
        if self.case == TITLE:
            self.case = ""
        self.is_inside = self.case == UPPER
        self.is_joined = False
        return letter

    def read_other(self, byte: bytes) -> bytes:
        char = chr(byte[0])
        if char in (TITLE, UPPER):
            self.case = char
            return b""
        if char == JOIN:
            self.is_joined = True
            return b""
        self.case = ""
        self.is_joined = False
        if char == ESCAPE:
            self.is_escaped = True
            return b""
        return byte

    def read_escaped(self, byte: bytes) -> bytes:
        sign = chr(byte[0])
        return MARKS[SIGNS.index(sign)].encode() if sign in SIGNS else byte
