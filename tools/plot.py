"""Draws runs: loss against time and tokens with the schedule, bits per byte after each stage, where the bytes of the
file go, and how large the residual stream is after every pass.

    python -m tools.plot runs/ID                                 writes runs/ID/report.png
    python -m tools.plot runs/A runs/B runs/C --out compare.png  one colour per run

Bytes and stream sizes are computed from the artifact; the latter needs the run's dataset and is left out without it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import train_gpt
from data.shards import TokenStream
from loopgolf.artifact import STREAMS, Artifact
from loopgolf.errors import DataError
from loopgolf.options import Parser
from loopgolf.params import collect_specs
from loopgolf.quantize import compute_entropy
from loopgolf.runtime import run_program, write_atomic
from tools.lib.runlog import RunError, read_log, read_result

# colours that stay apart for colour-blind eyes (Okabe and Ito)
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#8A8A8A"
STAGES = {"trained": "last weights", "averaged": "master weights", **{mode: mode for mode in train_gpt.SCORERS}}
PARTS = {
    "core": "shared matrices",
    "edge": "other matrices",
    "embed": "token embedding",
    "table": "tables",
    "vector": "vectors, steps",
}


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise RunError("pictures need matplotlib: python -m pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot


def check_picture(out: Path) -> None:
    """Refuses a picture that could not be written, before hours are spent on what it shows."""
    import_pyplot()
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise RunError(f"{out}: a picture has to end in .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise RunError(f"{out}: there is no folder {out.parent}; create it or name another")


def save_picture(figure, out: Path, dpi: int = 120) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=out.suffix[1:], dpi=dpi)
    import_pyplot().close(figure)
    write_atomic(out, content.getvalue())


def name_points(axes, points: list, names: list[str], others: Sequence = (), is_beside: bool = True, **style) -> None:
    """Each name where it covers neither a name nor a point of either list: better next to its point than above or
    below, or the other way round. For when all else is drawn."""
    from matplotlib.patheffects import withStroke

    style |= dict(textcoords="offset points", parse_math=False, path_effects=[withStroke(linewidth=2, foreground="w")])
    pairs = [(1, 0), (-1, 0)], [(0, 1), (0, -1)], [(x, y) for x in (0.8, -0.8) for y in (0.8, -0.8)]
    sides = [side for pair in (pairs if is_beside else (pairs[1], pairs[0], pairs[2])) for side in pair]
    axes.figure.canvas.draw()  # the layout is settled only now
    frame, radius = axes.get_window_extent().frozen(), 5 * axes.figure.dpi / 72
    centers = axes.transData.transform([*points, *others])
    taken = [frame.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in centers]
    for point, name in zip(points, names):
        found: list = []
        for dx, dy in sides:
            ha, va = "left" if dx > 0 else "right", "bottom" if dy > 0 else "top"
            label = axes.annotate(
                name, point, (9 * dx, 9 * dy), ha=ha if dx else "center", va=va if dy else "center", **style
            )
            box = label.get_window_extent()
            cost = box.count_overlaps(taken) + 2 * (box.x0 < frame.x0 or box.x1 > frame.x1)
            found.append((cost, len(found), label, box))
        _, best, _, box = min(found, key=lambda entry: entry[:2])
        for _, index, label, _ in found:
            if index != best:
                label.remove()
        taken.append(box)


@dataclass(frozen=True)
class Run:
    """A finished run as it is drawn; `steps` are its train lines, `stream` the size of the residual stream by pass."""

    name: str
    color: str
    result: dict[str, str]
    steps: list[dict[str, float]]
    bytes_by_part: dict[str, float]
    stream: list[float]


def load_run(folder: Path, color: str) -> Run:
    result = read_result(folder)
    lines = [line.values for line in read_log(folder) if line.event == "train"]
    config = json.loads((folder / "result.json").read_text())["config"]
    steps = {int(line["step"]): read_step(line, config["batch_tokens"]) for line in lines}
    artifact = train_gpt.load_artifact(folder / "artifact.lg")
    model = train_gpt.LoopedGPT(train_gpt.config_from_stored(artifact.stored))
    model.load_state_dict(artifact.tensors)
    # a resumed run repeats steps: the later line counts
    return Run(
        name=folder.name,
        color=color,
        result=result,
        steps=list(steps.values()),
        bytes_by_part=count_bytes(artifact, model, int(result["code_bytes"])),
        stream=measure_stream(model, config),
    )


def read_step(line: dict[str, str], batch_tokens: int) -> dict[str, float]:
    """The numbers of a train line. Older logs tell no tokens: there every step took as many."""
    values = {key: float(value) for key, value in line.items()}
    values.setdefault("tokens", values["step"] * batch_tokens)
    return values


def count_bytes(artifact: Artifact, model: train_gpt.LoopedGPT, code_bytes: int) -> dict[str, float]:
    """Bytes of the file by part: a stream's bytes are shared out by the entropy of what lies in it."""
    specs = collect_specs(model)
    weights: list[dict[str, float]] = [defaultdict(float) for _ in STREAMS]
    for name, described in artifact.layout.items():
        role = specs[name].role
        for number, (stored_name, tensor) in enumerate(described.stored(name).items()):
            # what a format stores besides its first tensor are the steps of its grid
            part = PARTS.get(role, role) if number == 0 else PARTS["vector"]
            weights[STREAMS.index(tensor.dtype)][part] += measure_bytes(artifact.raw[stored_name])
    found: dict[str, float] = defaultdict(float, code=code_bytes)
    for stream, parts in zip(artifact.streams, weights):
        for part, weight in parts.items():
            found[part] += stream.bytes * weight / sum(parts.values())
    found["header"] = artifact.size + code_bytes - sum(found.values())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_bytes(stored: torch.Tensor) -> float:
    """Bytes of a stored tensor: of codes as many as their entropy needs."""
    if stored.dtype != torch.int8:
        return float(stored.numel() * stored.dtype.itemsize)
    return compute_entropy(stored) * stored.numel() / 8 if stored.numel() else 0.0


@torch.no_grad()
def measure_stream(model: train_gpt.LoopedGPT, config: dict) -> list[float]:
    """Root mean square of the residual stream after every pass, over one batch of validation text."""
    try:
        stream = TokenStream(config["data_path"], "val", config["vocab_size"])
    except (DataError, OSError):
        return []
    sizes: list[float] = []

    def measure(_, x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.float().square().mean().sqrt().item())
        return x

    length = config["seq_len"]
    tokens = torch.from_numpy(stream.read(0, min(4, stream.total // length) * length))
    model.hidden(tokens.view(-1, length), on_pass=measure)
    return sizes


def plot_loss(axes, runs: list[Run], x: str, label: str, unit: float = 1.0) -> None:
    """`x`: the number of a train line that is drawn to the right, in units of `unit`."""
    rate, tops = axes.twinx(), []
    for run in runs:
        places = [step[x] / unit for step in run.steps]
        losses = [step["train_loss"] for step in run.steps]
        near = [losses[max(0, i - 2) : i + 3] for i in range(len(losses))]
        smooth = [sum(part) / len(part) for part in near]
        tops.append(max(losses[len(losses) // 10 :]))
        axes.plot(places, losses, color=run.color, linewidth=0.8, alpha=0.3)
        axes.plot(places, smooth, color=run.color, linewidth=2, label=run.name)
        rate.plot(places, [step["lr_scale"] for step in run.steps], color=run.color, linewidth=1, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("training loss (nats per token)")
    axes.set_ylim(top=max(tops) + 0.1)  # the first steps would flatten the rest
    rate.set_ylim(0, 5)
    rate.set_yticks([0, 1])
    rate.set_ylabel("learning rate (dotted, of its peak)", color=GREY)
    rate.spines["top"].set_visible(False)


def plot_stages(axes, runs: list[Run]) -> None:
    names = [name for name in STAGES if any(f"bpb_{name}" in r.result or r.result["score_mode"] == name for r in runs)]
    for run in runs:
        scores = {name: float(run.result[f"bpb_{name}"]) for name in names if f"bpb_{name}" in run.result}
        scores[run.result["score_mode"]] = float(run.result["val_bpb"])
        places = [names.index(name) for name in scores]
        axes.scatter(list(scores.values()), places, color=run.color, s=60, zorder=3)
        final = run.result["score_mode"]
        axes.scatter(scores[final], names.index(final), s=160, facecolors="none", edgecolors=run.color, linewidths=1.5)
        for name, value in scores.items():
            if len(runs) == 1:  # of several runs, the numbers stand next to their names
                axes.annotate(
                    f"{value:.4f}",
                    (value, names.index(name)),
                    (0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=run.color,
                )
    axes.set_yticks(range(len(names)), [STAGES[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.set_xlabel("bits per byte of validation text (circled: val_bpb)")


def plot_bytes(axes, runs: list[Run]) -> None:
    parts = list(dict.fromkeys(part for run in runs for part in run.bytes_by_part))
    height = 0.8 / len(runs)
    for index, run in enumerate(runs):
        values = [run.bytes_by_part.get(part, 0.0) / 1000 for part in parts]
        places = [place + (index - (len(runs) - 1) / 2) * height for place in range(len(parts))]
        axes.barh(places, values, height=0.9 * height, color=run.color)
        for place, value in zip(places, values):
            axes.text(value, place, f" {value:,.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(parts)), parts)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("thousand bytes in the file, and code")


def plot_stream(axes, runs: list[Run]) -> None:
    for run in runs:
        axes.plot(range(len(run.stream)), run.stream, color=run.color, marker="o", linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("pass of the plan")
    axes.set_ylabel("size of the stream (root mean square)")


def draw(folders: list[Path], out: Path) -> Path:
    if len(folders) > len(COLORS):
        raise RunError(f"{len(folders)} runs: at most {len(COLORS)} can be told apart in one picture")
    check_picture(out)
    runs = [load_run(folder, color) for folder, color in zip(folders, COLORS)]
    pyplot = import_pyplot()
    has_stream = any(run.stream for run in runs)
    figure, grid = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained", width_ratios=(3, 3, 2.4))
    plot_loss(grid[0, 0], runs, "train_s", "training time (s)")
    plot_loss(grid[0, 1], runs, "tokens", "training tokens (millions)", unit=1e6)
    plot_stages(grid[1, 0], runs)
    plot_bytes(grid[1, 1], runs)
    if has_stream:
        plot_stream(grid[0, 2], runs)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GREY, alpha=0.2)
        axes.set_axisbelow(True)
    for axes in [grid[1, 2], *([] if has_stream else [grid[0, 2]])]:
        axes.axis("off")
    for index, run in enumerate(runs):
        r = run.result
        text = f"{run.name}\n{float(r['val_bpb']):.4f} bits per byte ({r['score_mode']}), {int(r['steps']):,} steps"
        if len(runs) <= 3:  # there is room
            text += (
                f"\n{int(r['tokens']):,} tokens in {float(r['train_s']):.0f} s\n"
                f"{float(r['eval_s']):.0f} s to score\n{int(r['total_bytes']):,} bytes with code"
            )
        top = 1 - index / max(len(runs), 3)
        grid[1, 2].text(0, top, text, color=run.color, va="top", fontsize=10, transform=grid[1, 2].transAxes)
    save_picture(figure, out)
    return out


def run(args: argparse.Namespace) -> None:
    if args.out is None and len(args.runs) > 1:
        raise RunError("several runs need --out, the picture to write")
    print(f"picture path:{draw(args.runs, args.out or args.runs[0] / 'report.png')}")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tools.plot", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="picture to write (one run: report.png in its folder)")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
