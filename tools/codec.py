"""Compresses any file with an artifact's own probabilities and gives the same bytes back: a score that decodes is true.

The coder sees the distribution of a token before the token, from the same windows and with the same adaptation as the
score, so the file is as many bits long as the score claims. Both directions compute the same numbers bit by bit, which
holds on one kind of machine, one version of torch and one number of threads; the file says which, and decode insists.

Examples:
    python -m tools.codec encode runs/ID/artifact.lg text.txt --out text.lgz
    python -m tools.codec decode runs/ID/artifact.lg text.lgz --out same.txt
    python -m tools.codec encode runs/ID/artifact.lg text.txt --out text.lgz --mode plain --json

    file := "LOOPTEXT" | u32 version | u32 header length | header (JSON) | u64 state, u32 words of the coder | sha256 of
            all before                                                                            (little endian)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import train_gpt
from loopgolf.cache import Cache
from loopgolf.errors import Stop
from loopgolf.options import Parser
from loopgolf.runtime import Log, run_program, write_atomic
from loopgolf.scoring import BpbMeter, Scored
from tools.lib.predictor import InputError, Predictor, add_model_options, load_predictor, read_file

MAGIC, VERSION = b"LOOPTEXT", 1
FREQ_BITS = 24  # frequencies sum to 2^24: 1,024 symbols that all get at least 1 take 0.006% of it
LOWEST = 1 << 32  # the state of the coder grows from 0, then lives in [2^32, 2^64) and moves words of 32 bits
# fields of the header that have to be the same for the same numbers, and how to make them so
SAME = {
    "artifact": "give the artifact that it was coded with (sha256)",
    "mode": "leave --mode out, or give that one",
    "torch": "install that version",
    "numpy": "install that version",
    "device": "decode on the kind of machine that coded it",
    "instructions": "decode on the kind of machine that coded it",
    "dtype": "decode on the kind of machine that coded it",
    "threads": "set OMP_NUM_THREADS to that",
}
MOST_TOKENS = 4  # for a byte: two marks, a space that they take away, and a letter
NOTED = ("python", "code")  # may differ, and are named when decoding fails
TYPES = dict.fromkeys([*SAME, *NOTED, "sha256"], str) | dict.fromkeys(["threads", "tokens", "bytes"], int)


class DamagedFile(Stop):
    """A coded file that is truncated or changed, or does not decode to what it promises."""

    exit_code = 4


# --- coder: rANS with one state of 64 bits


def compute_frequencies(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities to integers of at least 1 that sum to 2^24. Both directions call this, and nothing else. What
    the model holds for less likely than 2^-24 costs 24 bits all the same, so noise may take less than is claimed."""
    if np.isnan(log_probs).any():
        raise DamagedFile("the model predicts something that is not a probability")
    shares = np.exp(log_probs.astype(np.float64) - log_probs.max())
    room = (1 << FREQ_BITS) - len(shares)
    freqs = 1 + np.floor(shares / shares.sum() * room).astype(np.int64)
    freqs[shares.argmax()] += (1 << FREQ_BITS) - freqs.sum()  # what rounding down left over
    return freqs


def encode_intervals(intervals: list[tuple[int, int]]) -> bytes:
    """(start, frequency) of every symbol to bytes; the last goes first, as the decoder runs the other way."""
    state, words = 0, []
    for start, freq in reversed(intervals):
        if state >= freq << (64 - FREQ_BITS):
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // freq << FREQ_BITS) + state % freq + start
    return struct.pack(f"<Q{len(words)}I", state, *reversed(words))


class IntervalDecoder:
    def __init__(self, payload: bytes):
        if len(payload) < 8 or len(payload) % 4:
            raise DamagedFile("its payload is cut short")
        self.state, *words = struct.unpack(f"<Q{len(payload) // 4 - 2}I", payload)
        self.words = iter(words)

    def next_symbol(self, freqs: np.ndarray) -> int:
        slot, ends = self.state & ((1 << FREQ_BITS) - 1), freqs.cumsum()
        symbol = int(ends.searchsorted(slot, "right"))
        freq = int(freqs[symbol])
        self.state = freq * (self.state >> FREQ_BITS) + slot - (int(ends[symbol]) - freq)
        if self.state < LOWEST and (word := next(self.words, None)) is not None:
            self.state = self.state << 32 | word  # without words it is on its way back to the 0 it grew from
        return symbol

    def check_end(self) -> None:
        if self.state or next(self.words, None) is not None:
            raise DamagedFile("its payload does not end with the last token")


# --- probabilities


def walk(predictor: Predictor, n_tokens: int, choose: Callable[[Tensor], int], title: str) -> list[int]:
    """One document of n tokens from left to right, as score_tokens takes it: `choose` gets the log-probabilities (V,)
    of a token and says which it is. Nothing here has seen a token before it is chosen, in coding as in decoding."""
    scorer, config = predictor.build_scorer(), predictor.config
    row = torch.full((1 + n_tokens,), 0 if config.bos_id else 1)  # within one document only its length matters
    row[0] = config.bos_id
    owner = torch.zeros(1, dtype=torch.int64, device=predictor.ctx.device)  # it is alone in its batch
    with predictor.ctx.log.progress_bar(n_tokens, title) as bar:
        for track in scorer.tracks(row):
            for index, chunk in enumerate(track):
                for window in chunk:
                    cache, fresh = Cache(scorer.band), row[window.start : window.first]
                    memory = scorer.start_memory()
                    for position in range(window.first, window.stop):
                        with torch.no_grad():
                            tokens = fresh[None].to(predictor.ctx.device)
                            states = predictor.model.hidden(tokens, cache=cache, lora=scorer.lora)
                            if memory:
                                memory.add(tokens, states)
                            scored = Scored(
                                positions=torch.tensor([position]),
                                states=states[:, -1],
                                owners=owner,
                                places=owner + position - 1 - window.start,
                                memory=memory,
                            )
                            log_probs = scorer.distribution(fresh[-1:], scored)[0]
                        row[position] = choose(log_probs)
                        fresh = row[position : position + 1]
                        bar.update()
                if index + 1 < len(track):
                    scorer.observe(row, chunk, index / len(track), math.inf)
            scorer.reset()
    return row[1:].tolist()


def encode_tokens(predictor: Predictor, tokens: list[int]) -> bytes:
    intervals, left = [], iter(tokens)

    def choose(log_probs: Tensor) -> int:
        freqs, token = compute_frequencies(log_probs.cpu().numpy()), next(left)
        intervals.append((int(freqs[:token].sum()), int(freqs[token])))
        return token

    walk(predictor, len(tokens), choose, "encoding")
    return encode_intervals(intervals)


def decode_tokens(predictor: Predictor, n_tokens: int, payload: bytes) -> list[int]:
    decoder = IntervalDecoder(payload)

    def choose(log_probs: Tensor) -> int:
        return decoder.next_symbol(compute_frequencies(log_probs.cpu().numpy()))

    tokens = walk(predictor, n_tokens, choose, "decoding")
    decoder.check_end()
    return tokens


# --- file


def describe_numbers(predictor: Predictor) -> dict:
    """All that the computed numbers depend on."""
    ctx = predictor.ctx
    name = torch.cuda.get_device_name() if ctx.device.type == "cuda" else platform.machine()
    return dict(
        artifact=predictor.artifact.sha256,
        mode=predictor.mode,
        torch=str(torch.__version__),
        numpy=np.__version__,
        device=f"{ctx.device.type} {name}",
        instructions=torch.backends.cpu.get_cpu_capability(),
        dtype=str(ctx.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        code=train_gpt.hash_counted_code(predictor.config),
    )


def pack_file(header: dict, payload: bytes) -> bytes:
    words = json.dumps(header, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<II", VERSION, len(words)) + words + payload
    return body + hashlib.sha256(body).digest()


def unpack_file(content: bytes) -> tuple[dict, bytes]:
    if len(content) < 48 or content[:8] != MAGIC:
        raise DamagedFile("it is too short or was not written by tools.codec encode")
    version, header_bytes = struct.unpack("<II", content[8:16])
    if version != VERSION:
        raise DamagedFile(f"it has version {version}, this program reads {VERSION}")
    if hashlib.sha256(content[:-32]).digest() != content[-32:] or header_bytes > len(content) - 48:
        raise DamagedFile("its digest does not match: truncated or changed")
    try:
        header = json.loads(content[16 : 16 + header_bytes])
        is_good = {name: type(value) for name, value in header.items()} == TYPES and header["tokens"] >= 0
    except (ValueError, AttributeError, RecursionError):
        is_good = False
    # every token but marks, and the space that may open a document, stands for a byte at least
    if not is_good or header["tokens"] > MOST_TOKENS * (header["bytes"] + 1) or header["mode"] not in train_gpt.SCORERS:
        raise DamagedFile("its header does not hold what this version writes")
    return header, content[16 + header_bytes : -32]


def check_same(header: dict, here: dict) -> None:
    for name, fix in SAME.items():
        if header[name] != here[name]:
            raise InputError(f"coded with {name} {header[name]}, here it is {here[name]}; {fix}")


# --- commands


def encode(predictor: Predictor, content: bytes, out: Path) -> dict:
    tokens = predictor.speller.to_tokens(content)
    started = time.perf_counter()
    payload = encode_tokens(predictor, tokens)
    seconds = time.perf_counter() - started
    sizes = dict(sha256=hashlib.sha256(content).hexdigest(), tokens=len(tokens), bytes=len(content))
    packed = pack_file(describe_numbers(predictor) | sizes, payload)
    meter = BpbMeter(predictor.counter)
    predictor.score(predictor.row(tokens), meter)
    claimed, coded = meter.total(predictor.ctx).bpb, 8 * len(payload) / max(1, len(content))
    write_atomic(out, packed)
    return dict(
        mode=predictor.mode,
        bytes=len(content),
        tokens=len(tokens),
        file_bytes=len(packed),
        payload_bytes=len(payload),
        claimed_bpb=claimed,
        coded_bpb=coded,
        overhead_percent=100 * (coded / claimed - 1) if claimed else 0.0,
        seconds=seconds,
        tokens_per_s=len(tokens) / seconds,
        sha256=sizes["sha256"],
    )


def decode(predictor: Predictor, header: dict, payload: bytes, out: Path) -> dict:
    here = describe_numbers(predictor)
    check_same(header, here)
    started = time.perf_counter()
    try:
        tokens = decode_tokens(predictor, header["tokens"], payload)
        content = predictor.speller.to_bytes(tokens)
        if len(content) != header["bytes"] or hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise DamagedFile("the decoded bytes do not have the promised digest")
    except DamagedFile as error:
        other = "".join(f"; it was coded with {n} {header[n]}, here {here[n]}" for n in NOTED if header[n] != here[n])
        raise DamagedFile(f"{error}{other}") from None
    seconds = time.perf_counter() - started
    write_atomic(out, content)
    return dict(
        mode=predictor.mode,
        bytes=len(content),
        tokens=len(tokens),
        payload_bytes=len(payload),
        seconds=seconds,
        tokens_per_s=len(tokens) / seconds,
        sha256=header["sha256"],
    )


def convert(args: argparse.Namespace) -> dict:
    content = read_file(args.file)
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise InputError(f"{args.out}: no file can be written there; name one in a folder that exists")
    if args.command == "encode":
        return encode(load_predictor(args.artifact, args.tokenizer, args.mode), content, args.out)
    try:
        header, payload = unpack_file(content)
        predictor = load_predictor(args.artifact, args.tokenizer, args.mode or header["mode"])
        return decode(predictor, header, payload, args.out)
    except DamagedFile as error:
        raise DamagedFile(f"{args.file}: {error}") from None


def run(args: argparse.Namespace) -> None:
    report = convert(args)
    print(json.dumps(report)) if args.json else Log()(f"{args.command}d", **report)


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("encode", "compress a file"), ("decode", "give the bytes of a compressed file back")):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("artifact", type=Path)
        command.add_argument("file", type=Path)
        command.add_argument("--out", type=Path, required=True, help="the file to write")
        add_model_options(command, "that of the artifact" if name == "encode" else "that of the file")
        command.add_argument("--json", action="store_true", help="report as JSON")
    return parser


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
