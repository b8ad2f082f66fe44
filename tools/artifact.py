"""Looks into an artifact: what is in it, whether it is sound, what differs, and what a smaller limit would cost.

Examples:
    python -m tools.artifact show runs/ID/artifact.lg
    python -m tools.artifact verify runs/ID/artifact.lg
    python -m tools.artifact diff runs/A/artifact.lg runs/B/artifact.lg
    python -m tools.artifact size runs/ID/artifact.lg --code train_gpt_packed.py
    python -m tools.artifact fit runs/ID --byte_limit 1200000 --out small.lg
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import train_gpt
from loopgolf.artifact import Artifact
from loopgolf.options import Parser
from loopgolf.params import collect_specs
from loopgolf.quantize import RowGrid
from loopgolf.runtime import run_program, write_atomic
from tools.lib.finished import load_finished
from tools.lib.runlog import RunError
from tools.plot import COLORS, import_pyplot, measure_bytes


@dataclass(frozen=True)
class Row:
    """One parameter of the table; bytes are its share of the compressed streams, by entropy."""

    name: str
    shape: str
    role: str  # what it declared: its grid, or vector
    scheme: str  # what its format calls itself
    bits: int
    k: float | None  # of a grid per row
    entropy: float  # bits per number of what its format stores first
    bytes: float


def describe(path: Path) -> tuple[list[Row], Artifact]:
    artifact = train_gpt.load_artifact(path)
    specs = collect_specs(train_gpt.build_meta_model(train_gpt.config_from_stored(artifact.stored)))
    rows = []
    for name, described in artifact.layout.items():
        format = described.format
        stored = [artifact.raw[stored_name] for stored_name in described.stored(name)]
        k = None
        if isinstance(format, RowGrid):
            k = measure_k(artifact.tensors[name], stored[1], format)
        row = Row(
            name=name,
            shape="x".join(map(str, described.shape)),
            role=specs[name].role,
            scheme=format.scheme,
            bits=format.bits,
            k=k,
            entropy=8 * measure_bytes(stored[0]) / max(1, stored[0].numel()),
            bytes=sum(measure_bytes(tensor) for tensor in stored),
        )
        rows.append(row)
    return sorted(rows, key=lambda row: -row.bytes), artifact


def measure_k(weight: torch.Tensor, step: torch.Tensor, grid: RowGrid) -> float:
    """The k that a matrix was stored with."""
    spread = weight.square().mean(1).sqrt()
    return float((step.float() * grid.largest / spread.clamp_min(1e-12))[spread > 0].median())


def show(path: Path, picture: Path | None) -> None:
    rows, artifact = describe(path)
    total = sum(row.bytes for row in rows)
    print(f"{'tensor':<24}{'shape':>12}{'format':>8}{'bits':>6}{'k':>8}{'entropy':>9}{'bytes':>12}{'share':>8}")
    for row in rows:
        k = "-" if row.k is None else f"{row.k:.2f}"
        print(
            f"{row.name:<24}{row.shape:>12}{row.scheme:>8}{row.bits:>6}{k:>8}{row.entropy:>9.3f}{row.bytes:>12,.0f}"
            f"{row.bytes / total:>8.1%}"
        )
    for number, stream in enumerate(artifact.streams):
        print(f"stream {number} codec:{stream.codec} bytes:{stream.bytes} raw_bytes:{stream.raw_bytes}")
    print(
        f"artifact bytes:{artifact.size} params:{sum(t.numel() for t in artifact.tensors.values())} "
        f"sha256:{artifact.sha256}"
    )
    if picture:
        draw_shares(rows, path, picture)
        print(f"picture path:{picture}")


def draw_shares(rows: list[Row], path: Path, picture: Path) -> None:
    """A bar per parameter, a colour per declared grid and format."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    kinds = list(dict.fromkeys((row.role, row.scheme) for row in rows))
    for number, (role, scheme) in enumerate(kinds):
        places = [place for place, row in enumerate(rows) if (row.role, row.scheme) == (role, scheme)]
        kilobytes = [rows[place].bytes / 1000 for place in places]
        axes.barh(places, kilobytes, color=COLORS[number % len(COLORS)], label=f"{role}, {scheme}")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.legend(loc="lower right", frameon=False)
    axes.set_xlabel("kilobytes")
    axes.set_title(f"where the bytes of {path.name} go", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    figure.savefig(picture, dpi=130)


def diff(path_a: Path, path_b: Path) -> int:
    """Fields and tensors that differ; exit code 1 when any does."""
    a, b = train_gpt.load_artifact(path_a), train_gpt.load_artifact(path_b)
    ours, theirs = (asdict(train_gpt.config_from_stored(artifact.stored)) for artifact in (a, b))
    stored = [f.name for f in fields(train_gpt.Stored)]
    lines = [f"config {n}: {ours[n]} | {theirs[n]}" for n in stored if ours[n] != theirs[n]]
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        x, y = a.tensors.get(name), b.tensors.get(name)
        if x is None or y is None or x.shape != y.shape:
            lines.append(f"tensor {name}: {x is not None and tuple(x.shape)} | {y is not None and tuple(y.shape)}")
        elif not torch.equal(x, y):
            change = float((x - y).norm() / y.norm().clamp_min(1e-12))
            lines.append(f"tensor {name}: {(x != y).float().mean():.1%} of the weights differ, by {change:.2%} in norm")
    print("\n".join(lines) or f"no difference (sha256 {'equal' if a.sha256 == b.sha256 else 'not equal'})")
    return 1 if lines else 0


def size(path: Path, code: Path | None, limit: int) -> int:
    artifact_bytes = train_gpt.load_artifact(path).size
    if code and not code.is_file():
        raise RunError(f"--code {code}: no file there; python -m tools.pack --out {code} writes it")
    code_bytes = code.stat().st_size if code else train_gpt.Config().code_reserve
    total = artifact_bytes + code_bytes
    print(
        f"size code_bytes:{code_bytes} artifact_bytes:{artifact_bytes} total_bytes:{total} limit:{limit} "
        f"left:{limit - total} fits:{'yes' if total <= limit else 'no'}"
    )
    return 0 if total <= limit else 3


def fit(folder: Path, byte_limit: int, out: Path) -> None:
    """Exports a finished run again from its checkpoint, as train_gpt.py would have with this limit."""
    run = load_finished(folder)
    config = replace(run.config, byte_limit=byte_limit)
    content = run.fit(config)
    write_atomic(out, content)
    room = byte_limit - config.code_reserve
    share = f" of_limit:{(len(content) + config.code_reserve) / byte_limit:.4f}" if byte_limit else ""
    print(f"fit path:{out} bytes:{len(content)} room:{room}{share}")


def run(args: argparse.Namespace) -> int | None:
    if args.command == "show":
        show(args.artifact, args.picture)
    elif args.command == "verify":
        artifact = train_gpt.load_artifact(args.artifact)
        print(f"sound path:{args.artifact} bytes:{artifact.size} sha256:{artifact.sha256}")
    elif args.command == "diff":
        return diff(args.artifact, args.other)
    elif args.command == "size":
        return size(args.artifact, args.code, args.byte_limit)
    else:
        fit(args.run, args.byte_limit, args.out)
    return 0


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="table of tensors, biggest first")
    command.add_argument("artifact", type=Path)
    command.add_argument("--picture", type=Path, help="draw the shares into this PNG")
    command = commands.add_parser("verify", help="load it as a scorer would; exit code 4 when it is not sound")
    command.add_argument("artifact", type=Path)
    command = commands.add_parser("diff", help="what differs between two; exit code 1 when anything does")
    command.add_argument("artifact", type=Path)
    command.add_argument("other", type=Path)
    command = commands.add_parser("size", help="code and artifact against the limit; exit code 3 when over")
    command.add_argument("artifact", type=Path)
    command.add_argument("--code", type=Path, help="packed script (default: the reserve of the config)")
    command.add_argument("--byte_limit", type=int, default=train_gpt.Config().byte_limit)
    command = commands.add_parser("fit", help="export a finished run again for another limit; exit code 3 if hopeless")
    command.add_argument("run", type=Path)
    command.add_argument("--byte_limit", type=int, required=True)
    command.add_argument("--out", type=Path, required=True)
    return parser


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
