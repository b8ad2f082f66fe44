"""How many bits an artifact needs per byte of a text, next to what file compressors need, and where it is surprised.

The number is what `tools.codec encode` would come to, without its header; nobody counts the model or the compressor.
Spans are coloured by bits per byte, from green to red, on a terminal without NO_COLOR.

Examples:
    python -m tools.surprise runs/ID/artifact.lg README.md
    python -m tools.surprise runs/ID/artifact.lg a.txt b.txt --mode plain --json
"""

from __future__ import annotations

import argparse
import bz2
import codecs
import json
import lzma
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zstandard
from torch import Tensor

from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.lib.predictor import InputError, Predictor, TokenReader, add_model_options, load_predictor, read_file

SPAN_BYTES = 60  # a span ends at the first space after so many bytes
SHOWN = 4  # spans of each kind
COLORS = [40, 76, 112, 148, 184, 220, 214, 208, 202, 196]  # of 256: green to red, one for each bit per byte
COMPRESSORS = {
    "zstd-22": lambda content: zstandard.compress(content, 22),
    "xz": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
    "bz2": lambda content: bz2.compress(content, 9),
}


class TokenMeter:
    """Nats of each token of a row; position 0, the BOS, has none."""

    def __init__(self, row: Tensor):
        self.nats = np.full(len(row), np.nan)
        self.nats[0] = 0.0

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        chosen = log_probs.gather(1, tokens[positions].to(log_probs.device)[:, None])
        self.nats[positions.numpy()] = -chosen[:, 0].double().cpu().numpy()


@dataclass(frozen=True)
class Span:
    """A stretch of text: the byte it starts at, its bits per byte, and text with the bits per byte of each piece."""

    start: int
    bpb: float
    parts: list[tuple[str, float]]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class Report:
    file: str
    mode: str
    bytes: int
    tokens: int
    bpb: dict[str, float]  # of the artifact and of each compressor
    spans: list[Span]


def cut_spans(pieces: list[bytes], bits: np.ndarray) -> Iterator[Span]:
    """Spans of some words. A character spelled by several pieces belongs to the last of them, and marks of words, which
    have no bytes, to the piece after them."""
    start = at = shown = 0
    total = hidden = 0.0
    parts, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
    for index, (piece, cost) in enumerate(zip(pieces, bits)):
        at += len(piece)
        hidden += cost
        is_last = index + 1 == len(pieces)
        text = decoder.decode(piece, final=is_last)
        if not text and not is_last:
            continue
        parts.append((text, hidden / max(1, at - shown)))
        total += hidden
        hidden, shown = 0.0, at
        if is_last or (at - start >= SPAN_BYTES and pieces[index + 1][:1].isspace()):
            yield Span(start, total / max(1, at - start), [part for part in parts if part[0]])
            start, total, parts = at, 0.0, []


def measure(predictor: Predictor, path: Path) -> Report:
    content = read_file(path)
    if not content:
        raise InputError(f"{path}: empty, so there is nothing to predict")
    tokens = predictor.speller.to_tokens(content)
    row = predictor.row(tokens)
    meter = TokenMeter(row)
    predictor.score(row, meter)
    bits = meter.nats[1:] / math.log(2)
    pieces = list(map(TokenReader(predictor.speller).read, tokens))
    bpb = {"artifact": float(bits.sum() / len(content))}
    bpb |= {name: 8 * len(compress(content)) / len(content) for name, compress in COMPRESSORS.items()}
    spans = sorted(cut_spans(pieces, bits), key=lambda span: -span.bpb)
    return Report(str(path), predictor.mode, len(content), len(tokens), bpb, spans)


def paint(span: Span, is_colored: bool) -> str:
    """One line, whatever is in the text: a terminal obeys control characters."""
    line = ""
    for text, bpb in span.parts:
        shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
        color = COLORS[min(int(bpb), len(COLORS) - 1)]
        line += f"\x1b[38;5;{color}m{shown}\x1b[0m" if is_colored else shown
    return line


def show(reports: list[Report], is_colored: bool) -> None:
    names = list(reports[0].bpb)
    width = max(len("bits per byte"), *(len(report.file) for report in reports))
    print(f"{'bits per byte':<{width}}{'bytes':>12}{'tokens':>10}", *(f"{name:>9}" for name in names))
    for report in reports:
        values = (f"{report.bpb[name]:>9.4f}" for name in names)
        print(f"{report.file:<{width}}{report.bytes:>12,}{report.tokens:>10,}", *values)
    for report in reports:
        shown = min(SHOWN, len(report.spans) // 2)
        for title, spans in (("most", report.spans[:shown]), ("least", report.spans[::-1][:shown])):
            if spans:
                print(f"\n{report.file}: {title} surprising ({report.mode}), bits per byte and text")
            for span in spans:
                print(f"{span.bpb:>8.3f}  {paint(span, is_colored)}")


def run(args: argparse.Namespace) -> None:
    predictor = load_predictor(args.artifact, args.tokenizer, args.mode)
    reports = [measure(predictor, path) for path in args.files]
    if args.json:
        spans = [[dict(start=s.start, bpb=s.bpb, text=s.text) for s in report.spans] for report in reports]
        print(json.dumps([asdict(report) | dict(spans=s) for report, s in zip(reports, spans)]))
    else:
        show(reports, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    add_model_options(parser, "that of the artifact")
    parser.add_argument("--json", action="store_true", help="report as JSON, with all spans, most surprising first")
    return parser


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
