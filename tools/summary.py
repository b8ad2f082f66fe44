"""Says in six lines what a finished run made: `make run` ends with them.

    python -m tools.summary runs/ID

The other compressors get the text that was scored, in one piece, at their strongest.
"""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import sys
from pathlib import Path

import torch
import zstandard

import train_gpt
from data.shards import TokenStream
from loopgolf.errors import DataError
from loopgolf.options import Parser
from loopgolf.plan import parse_plan
from loopgolf.runtime import run_program
from loopgolf.words import decode_document
from tools.lib.predictor import load_predictor
from tools.lib.runlog import read_result
from tools.sample import generate

COMPRESSORS = {
    "zstd": lambda text: zstandard.ZstdCompressor(level=22).compress(text),
    "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    "bz2": bz2.compress,
}
SAMPLE_TOKENS = 60
PROMPT = "Returns the"


def describe_training(config: train_gpt.Config, result: dict[str, str], params: int) -> str:
    plan = parse_plan(config.plan)
    passes = plan.count_passes(config.depth)
    shape = f"{len(plan.names)} blocks, applied {passes} times ({config.plan})"
    if passes == len(plan.names):
        shape = f"{passes} blocks ({config.plan})"
    return f"{shape}: {params:,} weights, {int(result['tokens']):,} tokens in {float(result['train_s']):.0f} s"


def describe_file(path: Path, result: dict[str, str]) -> str:
    limit = int(result["limit"])
    allowed = f", {limit:,} are allowed" if limit else ""
    code = f", {int(result['code_bytes']):,} of them code" if int(result["code_bytes"]) else ""
    return f"{path}: {int(result['total_bytes']):,} bytes{code}{allowed}"


def read_scored_text(config: train_gpt.Config) -> bytes:
    """The text that the run was scored on."""
    tokenizer = train_gpt.load_tokenizer(config.tokenizer_file).model
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    documents = train_gpt.split_documents(stream.read(0, stream.total), config.bos_id)
    scored = documents[: config.score_documents or None]
    return "".join(decode_document(tokenizer, document.tolist()) for document in scored).encode()


def describe_score(config: train_gpt.Config, result: dict[str, str]) -> str:
    score = f"{float(result['val_bpb']):.4f} bits per byte"
    try:
        text = read_scored_text(config)
    except (DataError, OSError):
        return f"{score} (the text is gone, so no other compressor can be tried on it)"
    others = {name: 8 * len(compress(text)) / len(text) for name, compress in COMPRESSORS.items()}
    return f"{score}; the same text takes " + ", ".join(f"{bits:.2f} with {name}" for name, bits in others.items())


def write_sample(artifact: Path) -> str:
    """A few words of the model, on one line: those that tools.sample writes with its defaults."""
    predictor = load_predictor(artifact, None)
    prompt = predictor.speller.to_tokens(PROMPT.encode())
    drawn = generate(predictor, prompt, 0.8, 0.95, torch.Generator().manual_seed(1337))
    content = predictor.speller.to_bytes(prompt + list(itertools.islice(drawn, SAMPLE_TOKENS)))
    return " ".join(content.decode(errors="replace").split())


def summarize(folder: Path) -> list[str]:
    result = read_result(folder)
    config = train_gpt.Config(**json.loads((folder / "result.json").read_text())["config"])
    artifact = folder / "artifact.lg"
    params = sum(weight.numel() for weight in train_gpt.load_artifact(artifact).tensors.values())
    picture = folder / "report.png"
    return [
        f"model     {describe_training(config, result, params)}",
        f"file      {describe_file(artifact, result)}",
        f"score     {describe_score(config, result)}",
        f"sample    {write_sample(artifact)}",
        f"picture   {picture}" if picture.exists() else f"picture   python -m tools.plot {folder}",
        f'next      python -m tools.sample {artifact} --prompt "{PROMPT}"',
    ]


def run(folder: Path) -> None:
    print("\n".join(summarize(folder)))


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="runs/ID")
    return run_program(run, parser.parse_args(argv).folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
