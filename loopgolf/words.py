"""One form for every word: `the`, `The`, `THE` and the end of `_the` are one word, and marks say what it looked like.

A plain tokenizer learns each of them anew, which a small model can ill afford. In marked text a word is lower case
behind a blank, and before the blank stands how it differed: TITLE or UPPER, and JOIN where the text has no blank. So
"a DataFrame" becomes "a", TITLE, " data", TITLE, JOIN, " frame". Only ASCII letters make words; small ones behind a
digit or another letter stay as they are ("2nd"). A mark in the text itself, a control character that hardly ever
occurs, becomes ESCAPE and a sign. Marks stand for no bytes, nor does a blank behind JOIN.

A tokenizer that was trained on marked text has all the marks among its pieces and no capitals: that is how programs
recognise it. It normalizes nothing and begins another piece at each blank, as those of data/tokenizer.py.

(Marks for case: CaseOps, parameter-golf #1729; marks for joints too: case_markup and joiner_annotate of OpenNMT's
Tokenizer.)
"""

from __future__ import annotations

import re
from string import ascii_uppercase

import sentencepiece

TITLE, UPPER, JOIN, ESCAPE = MARKS = "\x01\x02\x03\x04"
SIGNS = "!#$%"  # one per mark: a single byte, as the mark is, and not a letter
WORD = re.compile(f"[{MARKS}]|(?P<blank> ?)(?P<word>[A-Z]{{2,}}(?![a-z])|[A-Z][a-z]*|[a-z]+)")


def has_marks(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    def has_piece(char: str) -> bool:
        return tokenizer.piece_to_id(char) != tokenizer.unk_id()

    return all(map(has_piece, MARKS)) and not any(map(has_piece, ascii_uppercase))


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
    is_first = at == 0  # the tokenizer itself puts a blank before a document
    goes_on = not is_first and found.string[at - 1].isalnum()  # the `nd` of `2nd`
    if not case and (is_first or goes_on):
        return lower
    return f"{case}{JOIN} {lower}"


def unmark_words(text: str) -> str:
    return Unmarker().feed(text.encode()).decode()


def decode_document(tokenizer: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens)
    return unmark_words(text) if has_marks(tokenizer) else text


class Unmarker:
    """Turns marked bytes back into those of the text; they may come in pieces of any size."""

    def __init__(self) -> None:
        self.case = ""  # TITLE or UPPER while it holds
        self.is_inside = False  # UPPER holds, and the word has begun
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
