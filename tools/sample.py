"""Lets an artifact write: text after a prompt, token by token as it is drawn.

A cache carries keys and values of every pass, so a token costs one position; beyond its window the stream goes on, each
position attending to the last ones that fit. A document ends where the model draws its BOS, or after --tokens.

Examples:
    python -m tools.sample runs/ID/artifact.lg --prompt "The list of"
    python -m tools.sample runs/ID/artifact.lg --tokens 1000 --temperature 0.8 --top_p 0.95 --seed 7
    python -m tools.sample runs/ID/artifact.lg --interactive          one prompt per line, until the end of the input
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loopgolf.cache import Cache
from loopgolf.options import Parser
from loopgolf.runtime import run_program
from tools.lib.predictor import InputError, Predictor, TokenReader, add_model_options, load_predictor


def keep_top(probs: Tensor, top_p: float) -> Tensor:
    """(V,) probabilities without the tail: the fewest tokens whose mass reaches top_p, scaled to sum to one."""
    ordered, index = probs.sort(descending=True, stable=True)
    ordered = torch.where(ordered.cumsum(0) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(probs).index_copy(0, index, ordered / ordered.sum())


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from logits (V,); temperature 0 takes the most likely."""
    logits = logits.double().cpu()
    if temperature == 0:
        return int(logits.argmax())
    probs = keep_top((logits / temperature).softmax(0), top_p)
    return int(torch.multinomial(probs, 1, generator=generator))


@torch.no_grad()
def stream_logits(predictor: Predictor, cache: Cache, tokens: Tensor) -> Tensor:
    """Logits (V,) of what follows these tokens in the stream of the cache."""
    for piece in tokens.split(predictor.config.seq_len):  # a long prompt takes no more memory than a window
        states = predictor.model.hidden(piece[None].to(predictor.ctx.device), cache=cache)
    return predictor.model.logits(states[:, -1])[0]


def generate(
    predictor: Predictor, prompt: list[int], temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    """Tokens after the prompt, until the model starts another document."""
    cache, fresh = Cache(predictor.config.band or predictor.config.seq_len), predictor.row(prompt)
    while True:
        token = draw(stream_logits(predictor, cache, fresh), temperature, top_p, generator)
        if token == predictor.config.bos_id:
            return
        yield token
        fresh = torch.tensor([token])


def write_text(predictor: Predictor, prompt: bytes, args: argparse.Namespace, generator: torch.Generator) -> None:
    """Continues the prompt on stdout; a character comes out as soon as the last of its bytes is drawn."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens, count, started = predictor.speller.to_tokens(prompt), 0, time.perf_counter()
    reader = TokenReader(predictor.speller)
    for known in tokens:
        reader.read(known)
    drawn = generate(predictor, tokens, args.temperature, args.top_p, generator)
    for token in (next(drawn, None) for _ in range(args.tokens)):
        if token is None:
            break
        print(decoder.decode(reader.read(token)), end="", flush=True)
        count += 1
    print(decoder.decode(b"", final=True), flush=True)
    seconds = time.perf_counter() - started
    print(f"# {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens per second", file=sys.stderr, flush=True)


def read_prompts() -> Iterator[bytes]:
    """Lines of stdin; bytes, as a prompt need not be UTF-8."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.buffer.readline()):
            return
        yield line.rstrip(b"\r\n")


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", default="", help="text to continue, printed first (default: a new document)")
    start.add_argument("--interactive", action="store_true", help="continue every line of stdin, each on its own")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to draw (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="1 draws as predicted, 0 the most likely (0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="mass of the likeliest tokens to draw from (0.95)")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed draws the same (1337)")
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    for name, is_good, wanted in (
        ("tokens", args.tokens >= 0, "0 or more"),
        ("temperature", 0 <= args.temperature < float("inf"), "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", -(1 << 63) <= args.seed < 1 << 63, "of 64 bits at most"),
    ):
        if not is_good:
            raise InputError(f"--{name} {getattr(args, name)}: has to be {wanted}")
    predictor = load_predictor(args.artifact, args.tokenizer)
    generator = torch.Generator().manual_seed(args.seed)
    if args.interactive:
        for prompt in read_prompts():
            write_text(predictor, prompt, args, generator)
        return
    prompt = os.fsencode(args.prompt)
    print(prompt.decode("utf-8", "replace"), end="", flush=True)
    write_text(predictor, prompt, args, generator)


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
