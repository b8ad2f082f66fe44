"""Draws a finished run as report.png: loss against time with the learning rate, and bits per byte after each stage.

Example: python -m tools.plot runs/pocket-20260101-120000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.runlog import RunError, read_log, read_result

# colours that stay apart for colour-blind eyes (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#8A8A8A"
STAGES = {"trained": "last weights", "averaged": "averaged", "plain": "artifact, plain", "sliding": "artifact, sliding",
          "sgd": "artifact, sgd"}  # fmt: skip


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise RunError("pictures need matplotlib: python -m pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    return pyplot


def plot_loss(axes, folder: Path) -> None:
    lines = [line.values for line in read_log(folder) if line.event == "train"]
    rows = {int(v["step"]): v for v in lines}.values()  # a resumed run repeats steps: the later line counts
    seconds = [float(v["train_s"]) for v in rows]
    axes.plot(seconds, [float(v["train_loss"]) for v in rows], color=BLUE, linewidth=1.8)
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("training loss (nats per token)", color=BLUE)
    rate = axes.twinx()
    rate.fill_between(seconds, [float(v["lr_scale"]) for v in rows], color=ORANGE, alpha=0.25, linewidth=0)
    rate.set_ylim(0, 2.2)
    rate.set_yticks([0, 1])
    rate.set_ylabel("learning rate (of its peak)", color=ORANGE)
    rate.spines["top"].set_visible(False)


def plot_stages(axes, result: dict[str, str]) -> None:
    scores = {name: float(result[f"bpb_{name}"]) for name in STAGES if f"bpb_{name}" in result}
    scores[result["score_mode"]] = float(result["val_bpb"])
    names = [name for name in STAGES if name in scores]
    values = [scores[name] for name in names]
    colors = [GREEN if name == result["score_mode"] else BLUE if "artifact" in STAGES[name] else GREY for name in names]
    axes.barh([STAGES[name] for name in names], values, color=colors, height=0.6)
    spread = max(values) - min(values)
    left, right = min(values) - 0.6 * spread - 0.005, max(values) + 0.35 * spread + 0.005
    axes.set_xlim(left, right)  # the stages differ in the third digit, so the axis does not start at 0
    for place, value in enumerate(values):
        axes.text(value + 0.01 * (right - left), place, f"{value:.4f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte, lower is better (axis does not start at 0)")


def draw_report(folder: Path) -> Path:
    result = read_result(folder)
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3, 2), layout="constrained")
    plot_loss(left, folder)
    plot_stages(right, result)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
        axes.grid(axis="both", color=GREY, alpha=0.2)
        axes.set_axisbelow(True)
    megabytes = int(result["total_bytes"]) / 1e6
    figure.suptitle(
        f"{folder.name}: {float(result['val_bpb']):.4f} bits per byte ({result['score_mode']}), "
        f"{int(result['steps']):,} steps, {int(result['tokens']):,} tokens in {float(result['train_s']):.0f} s, "
        f"{megabytes:.2f} MB with code",
        fontsize=11,
    )
    path = folder / "report.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    try:
        print(f"picture path:{draw_report(parser.parse_args(argv).run)}")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
