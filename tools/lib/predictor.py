"""An artifact made ready to predict: its model, tokenizer and scorer, and any bytes as a row of its tokens.

Programs that use an artifact on text (tools.codec, tools.surprise, tools.sample) share what is here.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

import train_gpt
from data.folder import TOKENIZER
from data.tokenizer import LETTERS_OF_NOBODY, SPACE_MARKER, encode_document
from loopgolf.artifact import Artifact
from loopgolf.errors import Stop
from loopgolf.runtime import RunContext
from loopgolf.scoring import ByteCounter, Mask, WindowScorer, score_tokens
from loopgolf.words import Unmarker, has_marks

BAD_BYTES = "\udc80-\udcff"  # what errors="surrogateescape" makes of bytes that are not UTF-8
BATCH = 16  # windows that are scored in one forward


class InputError(Stop):
    """Input that does not fit together: one line that names it and the fix."""


class Speller:
    """Bytes to tokens and back, for any bytes. Text goes through the tokenizer, as its own document; bytes that
    are not UTF-8, and characters that this tokenizer would change, go by byte pieces and leave the rest as it is.
    The bytes of tokens are those of their pieces, marks of words read; the space that the tokenizer puts before a
    document is left out."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer = tokenizer
        self.pieces = [self.read_piece(token) for token in range(len(tokenizer))]
        self.opens_with_space = [tokenizer.id_to_piece(i).startswith(SPACE_MARKER) for i in range(len(tokenizer))]
        self.by_byte = [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.opener = chr(LETTERS_OF_NOBODY[0])  # text after it gets no space in front
        self.opener_tokens = len(encode_document(tokenizer, self.opener))
        self.has_marks = has_marks(tokenizer)

    def read_piece(self, token: int) -> bytes:
        tests = (self.tokenizer.is_control, self.tokenizer.is_unknown, self.tokenizer.is_unused)
        piece = self.tokenizer.id_to_piece(token)
        if self.tokenizer.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return b"" if any(test(token) for test in tests) else piece.replace(SPACE_MARKER, " ").encode()

    def to_bytes(self, tokens: list[int]) -> bytes:
        return b"".join(map(TokenReader(self).read, tokens))

    def to_tokens(self, content: bytes) -> list[int]:
        """Without the BOS."""
        tokens: list[int] = []
        for part in re.findall(f"[{BAD_BYTES}]+|[^{BAD_BYTES}]+", content.decode("utf-8", "surrogateescape")):
            is_text = part[0] < BAD_BYTES[0] or part[0] > BAD_BYTES[-1]
            tokens += self.spell_text(part, not tokens) if is_text else self.spell_bytes(part)
        assert self.to_bytes(tokens) == content
        return tokens

    def spell_bytes(self, text: str) -> list[int]:
        return [self.by_byte[byte] for byte in text.encode("utf-8", "surrogateescape")]

    def spell_text(self, text: str, is_first: bool) -> list[int]:
        try:
            lead = "" if is_first else self.opener
            tokens = encode_document(self.tokenizer, lead + text)[1 if is_first else self.opener_tokens :]
        except StopIteration:  # a text with U+2581 and every private letter leaves no stand-in; its halves will
            tokens = []
        found = b"".join(map(TokenReader(self, is_first).read, tokens))
        if found == text.encode():
            return tokens
        if len(text) == 1:
            return self.spell_bytes(text)
        half = len(text) // 2
        return self.spell_text(text[:half], is_first) + self.spell_text(text[half:], False)


class TokenReader:
    """Tokens to bytes, one after another. `is_first`: they begin a document."""

    def __init__(self, speller: Speller, is_first: bool = True):
        self.speller = speller
        self.is_first = is_first
        self.unmarker = Unmarker()

    def read(self, token: int) -> bytes:
        content = self.speller.pieces[token]
        if self.is_first and self.speller.opens_with_space[token]:
            content = content[1:]
        self.is_first = False
        return self.unmarker.feed(content) if self.speller.has_marks else content


@dataclass(frozen=True)
class Predictor:
    """A model with the weights of an artifact, and what belongs to it."""

    artifact: Artifact
    config: train_gpt.Config
    ctx: RunContext
    model: train_gpt.LoopedGPT
    speller: Speller
    counter: ByteCounter
    mode: str
    mask: Mask | None

    def row(self, tokens: list[int]) -> Tensor:
        """The tokens of one document after its BOS."""
        return torch.tensor([self.config.bos_id, *tokens])

    def build_scorer(self, batch: int = 1) -> WindowScorer:
        config = replace(self.config, score_batch=batch)
        return train_gpt.build_scorer(self.mode, self.model, config, self.ctx, self.mask)

    def score(self, row: Tensor, meter) -> None:
        """What a run does to get its val_bpb, without a limit on the time of adaptation."""
        sizes = [len(chunk) for track in self.build_scorer().tracks(row) for chunk in track]
        scorer = self.build_scorer(min(BATCH, max([1, *sizes])))  # rows that stay empty would cost as much as others
        score_tokens(scorer, row, meter, self.mode)


def load_predictor(path: Path, tokenizer_path: Path | None = None, mode: str = "") -> Predictor:
    """`mode`: how to predict, by default as the artifact says that it is scored."""
    artifact = train_gpt.load_artifact(path)
    config = replace(train_gpt.config_from_stored(artifact.stored), compile="none")
    tokenizer_path = tokenizer_path or path.with_name(TOKENIZER)
    if not tokenizer_path.is_file():
        raise InputError(f"{tokenizer_path}: no tokenizer there; name the one of this artifact with --tokenizer")
    tokenizer, identity = train_gpt.load_tokenizer(tokenizer_path)
    if artifact.tokenizer != identity:
        wanted = artifact.tokenizer["sha256"]
        raise InputError(f"{tokenizer_path}: not the tokenizer of this artifact; give the one with sha256 {wanted}")
    ctx = train_gpt.build_context(config, {})
    if ctx.device.type == "cuda":  # sums in the gradients of tables would come in another order each time
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = train_gpt.load_eval_model(artifact, config, ctx)
    return Predictor(
        artifact=artifact,
        config=config,
        ctx=ctx,
        model=model,
        speller=Speller(tokenizer),
        counter=ByteCounter(tokenizer),
        mode=mode or config.score_mode,
        mask=train_gpt.build_mask(tokenizer, config, ctx),
    )


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def add_model_options(parser: argparse.ArgumentParser, default_mode: str = "") -> None:
    """--tokenizer, and --mode where there is a choice."""
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.model next to the artifact")
    if default_mode:
        modes = tuple(train_gpt.SCORERS)
        parser.add_argument("--mode", choices=modes, default="", help=f"how to predict (default: {default_mode})")
