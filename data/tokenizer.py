"""Byte-exact SentencePiece tokenizers, and the way from any text to a dataset folder.

    python -m data.tokenizer train --out FILE [--vocab_size N] [--mark_words] FILES...
    python -m data.tokenizer encode --tokenizer FILE --out FOLDER FILES...

FILES are .txt (one document each), .jsonl or .jsonl.zst (one {"text": ...} per line). A dataset folder works too:
`train` reads its training documents; `encode`, which takes it alone, keeps its split. A document becomes BOS and
its pieces. Byte-exact means: the bytes that the challenge's rule counts for a document's pieces, marks of words and
what they hide apart, are its UTF-8 bytes, and decoding gives the document back.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

from data.folder import (
    TOKENIZER,
    building,
    compute_sha256,
    log,
    positive,
    started_pool,
    tidy_when_terminated,
    write_manifest,
)
from data.shards import find_shards, read_shard, write_shard
from loopgolf.errors import DataError
from loopgolf.options import Parser
from loopgolf.runtime import run_program, write_atomic
from loopgolf.words import MARKS, decode_document, has_marks, mark_words

SHARD_TOKENS = 100_000_000  # the challenge's own
VAL_FRACTION = 0.05  # of all documents, if nobody says another
TRAINING_BYTES = 50_000_000  # more text changes few merges and only costs time
SENTENCE_CHARS = 16_000  # SentencePiece drops sentences above its limit, and fails on words above 65,535
BATCH_CHARS = 500_000  # one task of a worker process
SPACE_MARKER = "\u2581"
LETTERS_OF_NOBODY = range(0xE000, 0xF900)  # Unicode's private use area


# --- tokenizers


def cut_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences: whole documents, so that pieces may hold newlines; only giants are cut."""
    for text in texts:
        for start in range(0, len(text), SENTENCE_CHARS):
            yield text[start : start + SENTENCE_CHARS]


def sample_evenly(sentences: Iterable[str], max_bytes: int) -> list[str]:
    """Every n-th sentence, n the smallest power of two that keeps them under `max_bytes`; no randomness."""
    kept: list[str] = []
    kept_bytes, stride = 0, 1
    for index, sentence in enumerate(sentences):
        if index % stride:
            continue
        kept.append(sentence)
        kept_bytes += len(sentence.encode())
        if kept_bytes > max_bytes:
            kept, stride = kept[::2], 2 * stride
            kept_bytes = sum(len(sentence.encode()) for sentence in kept)
    return kept


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 1024, marked: bool = False) -> None:
    """Train a byte-exact BPE tokenizer; the same texts give the same file, byte for byte. `marked`: on marked text."""
    sentences, model = sample_evenly(cut_sentences(texts), TRAINING_BYTES), io.BytesIO()
    if not sentences:
        raise DataError(f"{path}: no text to train a tokenizer on; give files that hold text")
    if marked:
        sentences = [mark_words(sentence) for sentence in sentences]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            required_chars=MARKS if marked else "",
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            # A run of blanks stays a run, and each blank starts another piece: inside a piece its marker
            # would be counted as three bytes.
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * SENTENCE_CHARS,
            num_threads=2,  # it is stored in the file, so it is fixed
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1].split(". Increase")[0].rstrip(".")
        raise DataError(
            f"{path}: cannot train {vocab_size} pieces on this text ({reason}); "
            "choose another --vocab_size or give more text"
        ) from None
    if has_marks(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())) != marked:
        raise DataError(f"{path}: a tokenizer of this text would pass for one with marks of words; add --mark_words")
    write_atomic(Path(path), model.getvalue())


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Load a tokenizer and check that shards can hold its tokens and that it can spell every text."""
    path, tokenizer = Path(path), sentencepiece.SentencePieceProcessor()
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; make one with `python -m data.tokenizer train`")
    try:
        tokenizer.load_from_serialized_proto(path.read_bytes())
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model; train or download it again") from None
    if len(tokenizer) > 1 << 16:
        raise DataError(f"{path}: {len(tokenizer)} pieces do not fit into uint16 shards; use at most 65536")
    if tokenizer.bos_id() < 0 or not tokenizer.is_byte(tokenizer.piece_to_id("<0x00>")):
        raise DataError(f"{path}: no BOS or no byte pieces; train it with `python -m data.tokenizer train`")
    return tokenizer


def encode_document(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """BOS, then the pieces of the text, with marks for its words where the tokenizer has them."""
    if has_marks(tokenizer):
        text = mark_words(text)
    return [tokenizer.bos_id(), *encode_text(tokenizer, text)]


def encode_text(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """The pieces of a text.

    SentencePiece writes a blank as U+2581 and would read a U+2581 of the text as a blank. That character is
    spelled as its three bytes: a private letter that text and vocabulary lack takes its place, comes out as
    three byte pieces, and those are exchanged.
    """
    if SPACE_MARKER not in text:
        return tokenizer.encode(text)
    stand_in = next(
        letter
        for letter in map(chr, LETTERS_OF_NOBODY)
        if letter not in text and tokenizer.piece_to_id(letter) == tokenizer.unk_id()
    )
    wanted, found = spell_bytes(tokenizer, SPACE_MARKER), spell_bytes(tokenizer, stand_in)
    ids, position = encode_text(tokenizer, text.replace(SPACE_MARKER, stand_in)), 0
    while position < len(ids):
        if ids[position : position + 3] == found:
            ids[position : position + 3] = wanted
        position += 1
    return ids


def spell_bytes(tokenizer: sentencepiece.SentencePieceProcessor, character: str) -> list[int]:
    return [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]


# --- reading text


def read_documents(folder: str | Path, split: str) -> Iterator[str]:
    """The documents of a dataset folder; the shards may cut them anywhere."""
    tokenizer = load_tokenizer(Path(folder) / TOKENIZER)
    unfinished = np.empty(0, np.uint16)
    for path in find_shards(folder, split):
        tokens = read_shard(path, len(tokenizer))
        first, *others = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id()))
        unfinished = np.concatenate([unfinished, first])
        for document in others:
            if len(unfinished):
                yield decode_document(tokenizer, unfinished.tolist())
            unfinished = document
    yield decode_document(tokenizer, unfinished.tolist())


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """The documents of .txt, .jsonl and .jsonl.zst files, and the training documents of dataset folders, in order."""
    for path in map(Path, paths):
        if path.is_dir():
            yield from read_documents(path, "train")
        elif not path.is_file():
            raise DataError(f"{path}: no such file; check the path")
        elif path.suffix == ".txt":
            yield decode_utf8(path.read_bytes(), str(path))
        elif path.suffix == ".jsonl" or path.name.endswith(".jsonl.zst"):
            yield from read_json_lines(path)
        else:
            raise DataError(f"{path}: unknown kind of file; give .txt, .jsonl, .jsonl.zst or a dataset folder")


def read_json_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        lines = split_lines(decompress(file, path)) if path.suffix == ".zst" else file
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_line(line, f"{path}, line {number}")


def parse_line(line: bytes, where: str) -> str:
    try:
        record = json.loads(decode_utf8(line, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); correct or remove the line") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no "text" string in it; each line must be {{"text": "..."}}')
    try:
        text.encode()  # JSON can spell lone surrogates, which no UTF-8 text holds
    except UnicodeEncodeError:
        raise DataError(f"{where}: not valid UTF-8 (a lone surrogate); correct or remove the line") from None
    return text


def decode_utf8(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start}; convert it to UTF-8") from None


def decompress(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The content of all zstd frames of a file; unlike the library's own reader it notices a missing end."""
    decoder, is_inside = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while chunk := file.read(1 << 18):
            while chunk:
                yield decoder.decompress(chunk)
                chunk, is_inside = decoder.unused_data, not decoder.eof
                if decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: not a zstd file ({error}); compress or download it again") from None
    if is_inside:
        raise DataError(f"{path}: truncated zstd file; compress or download it again")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


# --- from texts to shards


class ShardWriter:
    """Gathers the tokens of one split and writes each shard that is full, cutting documents as needed."""

    def __init__(self, folder: Path, name: str, split: str, shard_tokens: int) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, f"{name}_{split}", shard_tokens
        self.pending: list[np.ndarray] = []
        self.counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": 0}

    def add(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        self.pending.append(tokens)
        for key, count in (("documents", documents), ("tokens", len(tokens)), ("text_bytes", text_bytes)):
            self.counts[key] += count
        if self.counts["tokens"] >= (self.counts["shards"] + 1) * self.shard_tokens:
            self.flush()

    def flush(self, is_last: bool = False) -> None:
        tokens = np.concatenate([np.empty(0, np.uint16), *self.pending])
        while len(tokens) >= self.shard_tokens or (is_last and len(tokens)):
            name = f"{self.prefix}_{self.counts['shards']:06d}.bin"
            write_shard(self.folder / name, tokens[: self.shard_tokens])
            self.counts["shards"] += 1
            tokens = tokens[self.shard_tokens :]
        self.pending = [tokens]


def is_validation(text: str, val_fraction: float) -> bool:
    """The split: by content alone, so equal documents stay together and no other document matters."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2.0**64


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def tokenizer_of_worker(path: str) -> sentencepiece.SentencePieceProcessor:
    return load_tokenizer(path)


def encode_batch(texts: list[str], tokenizer_path: str, val_fraction: float) -> dict[str, tuple]:
    """Work of one process: (tokens, documents, text bytes) for each split; empty documents are left out."""
    tokenizer = tokenizer_of_worker(tokenizer_path)
    parts: dict[str, list[str]] = {"train": [], "val": []}
    for text in filter(None, texts):
        parts["val" if is_validation(text, val_fraction) else "train"].append(text)
    tokens = {
        split: [token for text in part for token in encode_document(tokenizer, text)] for split, part in parts.items()
    }
    return {
        split: (np.array(tokens[split], np.uint16), len(part), sum(len(text.encode()) for text in part))
        for split, part in parts.items()
    }


def map_in_order(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Like `pool.map`, but reads at most `ahead` items ahead, so that the input may be larger than memory."""
    items = iter(items)
    futures = deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    while futures:
        yield futures.popleft().result()
        futures.extend(pool.submit(function, item) for item in itertools.islice(items, 1))


def encode_documents(
    texts: Iterable[str],
    tokenizer_path: str | Path,
    folder: str | Path,
    name: str = "text",
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
) -> dict[str, dict[str, int]]:
    """Write `NAME_train_*.bin` and `NAME_val_*.bin` into a folder; returns the counts of each split.

    The shards do not depend on the number of worker processes.
    """
    load_tokenizer(tokenizer_path)  # a bad one stops here and not inside a worker
    writers = {split: ShardWriter(Path(folder), name, split, shard_tokens) for split in ("train", "val")}
    encode = functools.partial(encode_batch, tokenizer_path=str(tokenizer_path), val_fraction=val_fraction)
    ahead = 3 * (workers or os.cpu_count() or 1)
    bar = tqdm(unit="B", unit_scale=True, desc="encode", disable=None)  # None: on terminals
    with started_pool(workers) as pool, bar as progress:
        for batch in map_in_order(pool, encode, batch_texts(texts), ahead):
            for split, part in batch.items():
                writers[split].add(*part)
                progress.update(part[2])
    for writer in writers.values():
        writer.flush(is_last=True)
    return check_counts({split: writer.counts for split, writer in writers.items()}, val_fraction)


def encode_folder(
    source: str,
    tokenizer_path: str | Path,
    folder: Path,
    name: str,
    shard_tokens: int,
    workers: int | None,
) -> dict[str, dict[str, int]]:
    """The documents of a dataset folder with another tokenizer, each in the split where it was."""
    splits = [split for split in ("train", "val") if any(Path(source).glob(f"*_{split}_*.bin"))]
    counts = {}
    for split in splits or ["train"]:  # without any, the search for its shards says what is missing
        texts = read_documents(source, split)
        val_fraction = 1.0 if split == "val" else 0.0
        encoded = encode_documents(texts, tokenizer_path, folder, name, val_fraction, shard_tokens, workers)
        counts[split] = encoded[split]
    return counts


def check_counts(counts: dict[str, dict[str, int]], val_fraction: float) -> dict[str, dict[str, int]]:
    if not any(split["documents"] for split in counts.values()):
        raise DataError("empty input: no document with text in it; give files that hold text")
    for split, share in (("train", 1 - val_fraction), ("val", val_fraction)):
        if share > 0 and not counts[split]["documents"]:
            raise DataError(f"no document fell into the {split} split; give more documents or change --val_fraction")
    return counts


# --- command line


def train_command(files: list[str], out: str, vocab_size: int, marked: bool) -> None:
    train_tokenizer(read_texts(files), out, vocab_size, marked)
    log("tokenizer", vocab_size=vocab_size, sha256=compute_sha256(Path(out)), file=out)


def encode_command(
    files: list[str],
    out: str,
    tokenizer: str,
    name: str,
    val_fraction: float | None,
    shard_tokens: int,
    workers: int | None,
) -> None:
    pieces = len(load_tokenizer(tokenizer))
    folders = [file for file in files if Path(file).is_dir()]
    if folders and (len(files) > 1 or val_fraction is not None):
        raise DataError(f"{folders[0]}: a dataset folder keeps its split; encode it alone, without --val_fraction")
    with building(out) as folder:
        if folders:
            counts = encode_folder(folders[0], tokenizer, folder, name, shard_tokens, workers)
        else:
            share = VAL_FRACTION if val_fraction is None else val_fraction
            counts = encode_documents(read_texts(files), tokenizer, folder, name, share, shard_tokens, workers)
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        write_manifest(folder, {"name": name, "vocab_size": pieces, "splits": counts})
    for split, fields in counts.items():
        log("encode", split=split, **fields)


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m data.tokenizer", description="Train a tokenizer, or turn text into shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a tokenizer on text files")
    train.add_argument("--vocab_size", type=positive, default=1024, help="number of pieces (1024)")
    train.add_argument(
        "--mark_words", dest="marked", action="store_true", help="one form for every word, and marks (see docs)"
    )
    train.add_argument("--out", required=True, help="the tokenizer file to write")
    encode = commands.add_parser("encode", help="turn text files into a dataset folder")
    encode.add_argument("--tokenizer", required=True, help="a SentencePiece model with byte pieces")
    encode.add_argument("--out", required=True, help="the dataset folder to write; must not exist")
    encode.add_argument("--name", default="text", help="first part of the names of the shards (text)")
    encode.add_argument("--val_fraction", type=fraction, help=f"share for validation ({VAL_FRACTION})")
    encode.add_argument(
        "--shard_tokens", type=positive, default=SHARD_TOKENS, metavar="N", help=f"tokens per shard ({SHARD_TOKENS})"
    )
    encode.add_argument("--workers", type=positive, help="processes (one per core)")
    for command in (train, encode):
        command.add_argument("files", nargs="+", help=".txt, .jsonl or .jsonl.zst; or a dataset folder")
    args = vars(parser.parse_args(argv))
    programs: dict[str, Callable[..., None]] = {"train": train_command, "encode": encode_command}
    program = programs[args.pop("command")]
    with tidy_when_terminated():
        return run_program(lambda: program(**args))


if __name__ == "__main__":
    sys.exit(main())
