"""The shard format: 256 little-endian int32 header words (magic, version, token count, zeros), uint16 tokens; and the
shards of a split as one stream of tokens.

It is the challenge's own format, so published shards drop in unchanged. This module ships inside the counted code; what
a training run does not use is not packed. It needs numpy, and torch by way of loopgolf.runtime, which writes its files.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np

from loopgolf.errors import DataError, TokenError
from loopgolf.runtime import write_atomic

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
CHECK_TOKENS = 1 << 22  # tokens per step of the range check, so that a shard never fills the memory
MAKE_DATA = "make it with `python -m data.localtext` (offline) or `python -m data.fineweb` (the challenge's)"
REPLACE = "delete it and build or download it again"


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of one split of a dataset folder, in the order of their names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such dataset folder; {MAKE_DATA}")
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise DataError(f"{folder}: no shard *_{split}_*.bin in it; {MAKE_DATA}")
    return paths


def read_token_count(path: Path) -> int:
    """The token count that the header promises, checked against the size of the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such shard; {MAKE_DATA}")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: zero-byte file; {REPLACE}")
    if size < HEADER_BYTES:
        raise DataError(f"{path}: truncated header, {size} of {HEADER_BYTES} bytes; {REPLACE}")
    magic, version, count = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise DataError(f"{path}: wrong magic {magic}, a shard starts with {SHARD_MAGIC}; {REPLACE}")
    if version != SHARD_VERSION:
        raise DataError(f"{path}: wrong version {version}, this program reads {SHARD_VERSION}; {REPLACE}")
    if count <= 0:
        raise DataError(f"{path}: the header counts {count} tokens; {REPLACE}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        fault = "truncated" if size < expected else "trailing bytes"
        raise DataError(f"{path}: {fault}, {size} bytes where {count} tokens need {expected}; {REPLACE}")
    return count


def read_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a shard, memory-mapped, read-only; with `vocab_size` every token id must be below it."""
    path = Path(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(read_token_count(path),))
    if vocab_size is not None:
        for start in range(0, len(tokens), CHECK_TOKENS):
            check_range(tokens[start : start + CHECK_TOKENS], vocab_size, path)
    return tokens


def check_range(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Every token id must be below `vocab_size`."""
    highest = int(tokens.max())
    if highest >= vocab_size:
        why = f"token {highest} is outside the vocabulary of {vocab_size}"
        raise TokenError(f"{path}: {why}; set --vocab_size, or use the tokenizer that the shard was made with")


class TokenStream:
    """The shards of one split as one long row of tokens that repeats after its end."""

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.vocab_size = vocab_size
        self.paths = find_shards(folder, split)
        self.shards = [read_shard(path) for path in self.paths]
        for path, shard in zip(self.paths, self.shards):
            check_range(shard[: 1 << 20], vocab_size, path)  # the start of every shard now, the rest as it is read
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.total = int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        pieces = [np.empty(0, np.int64)]
        while count:
            start %= self.total
            index = np.searchsorted(self.starts, start, side="right") - 1
            piece = self.shards[index][start - self.starts[index] :][:count]
            check_range(piece, self.vocab_size, self.paths[index])
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(windows, length): the tokens from each start on."""
        return np.stack([self.read(start, length) for start in starts.tolist()])

    def fingerprint(self) -> str:
        """sha256 over the counts and the first tokens of every shard: tells data apart without reading all of it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(struct.pack("<q", len(shard)) + shard[: 1 << 20].tobytes())
        return digest.hexdigest()


class WindowOrder:
    """Where the training windows of a run begin: a function of the seed and of the number of tokens consumed.

    The text is cut into blocks as long as the longest context of the run. An epoch reads all of them in a random order.
    Windows that are shorter are cut from the blocks. A round of blocks gives the first window of each, then the second
    of each and so on, so that neighbours in a document are never in one step. Batch and context may change between
    rounds; then every window is still read once per epoch."""

    def __init__(self, n_tokens: int, longest: int, round_tokens: int, seed: int):
        self.longest = longest
        self.round_tokens = round_tokens
        self.n_blocks = (n_tokens - 1) // longest  # the target of a block's last token is the token after it
        if self.n_blocks == 0:
            raise DataError(f"{n_tokens} training tokens are fewer than one window of {longest} needs")
        self.seed = seed % 2**64
        self.epochs: dict[int, np.ndarray] = {}  # a step reads from two at most

    def starts(self, consumed: int, count: int, length: int) -> np.ndarray:
        """The next windows after so many tokens, as positions in the text."""
        position = consumed + length * np.arange(count)
        blocks_each = self.round_tokens // self.longest
        index = position % self.round_tokens // length
        block = position // self.round_tokens * blocks_each + index % blocks_each
        epoch = block // self.n_blocks
        starts = index // blocks_each * length
        for number in np.unique(epoch).tolist():
            within = epoch == number
            blocks = self.order(number)[block[within] % self.n_blocks].astype(np.int64)  # a text may have 2**32 tokens
            starts[within] += self.longest * blocks
        return starts

    def order(self, epoch: int) -> np.ndarray:
        """The blocks in the order in which an epoch reads them."""
        if epoch not in self.epochs:
            for other in [number for number in self.epochs if abs(number - epoch) > 1]:
                del self.epochs[other]
            order = np.arange(self.n_blocks, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch, 1)).shuffle(order)
            self.epochs[epoch] = order
        return self.epochs[epoch]


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write a shard under a temporary name and rename it, so that a broken write leaves no file behind."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 0 < tokens.size < 1 << 31:
        raise DataError(
            f"{path}: a shard takes a row of 1 to 2**31 - 1 integers, not {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() > 0xFFFF:
        raise DataError(
            f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit into uint16; "
            "use a vocabulary of at most 65536"
        )
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    write_atomic(path, header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())
