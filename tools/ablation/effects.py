"""Effects of changes from paired runs: means, verdicts, the table and the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tools.ablation.ledger import Ledger, Run, Speed
from tools.ablation.table import BASELINE, Change, Table
from tools.plot import GREY, import_pyplot, save_picture
from tools.submission.stats import mean, sample_std


@dataclass(frozen=True)
class Effect:
    """Mean paired difference to the baseline in thousandths of a bit per byte, and its standard error."""

    mb: float
    error: float
    seeds: int

    @property
    def is_resolved(self) -> bool:
        return abs(self.mb) > 2 * self.error

    @property
    def verdict(self) -> str:
        if not self.is_resolved:
            return "not resolved"
        return "helps" if self.mb < 0 else "hurts"

    def __str__(self) -> str:
        return f"{self.mb:+.1f} ± {self.error:.1f} ({self.seeds})"


def measure_effect(ledger: Ledger, change: Change, iterations: int, seeds: list[int]) -> Effect | None:
    pairs = [
        (ledger.find(change, seed, iterations), ledger.find(BASELINE, seed, ledger.table.iterations)) for seed in seeds
    ]
    differences = [1000 * (a.val_bpb - b.val_bpb) for a, b in pairs if a and b]
    if len(differences) < 2:
        return None
    return Effect(mean(differences), sample_std(differences) / math.sqrt(len(differences)), len(differences))


@dataclass(frozen=True)
class Row:
    """What is known of a change."""

    change: Change
    at_steps: Effect | None
    speed: Speed | None
    at_time: Effect | None


def equal_time_steps(table: Table, speed: Speed) -> int:
    return round(table.iterations * speed.ratio)


def read_rows(ledger: Ledger, changes: list[Change]) -> list[Row]:
    table, rows = ledger.table, []
    for change in changes:
        speed = ledger.find_speed(change)
        at_time = measure_effect(ledger, change, equal_time_steps(table, speed), table.seeds) if speed else None
        rows.append(Row(change, measure_effect(ledger, change, table.iterations, table.seeds), speed, at_time))
    return rows


def format_noise(ledger: Ledger) -> str:
    scores = [run.val_bpb for seed in ledger.table.seeds if (run := find_baseline(ledger, seed))]
    spread = f"{1000 * sample_std(scores):.1f}" if len(scores) > 1 else "unknown"
    return (
        f"baseline {mean(scores):.5f} over {len(scores)} seeds, standard deviation {spread} mb; {ledger.commit[:7]}; "
        f"{ledger.cpu}"
    )


def find_baseline(ledger: Ledger, seed: int) -> Run | None:
    return ledger.find(BASELINE, seed, ledger.table.iterations)


def format_table(rows: list[Row]) -> str:
    headings = ["change", "predicted", "published", "equal steps, mb", "verdict", "speed", "equal time, mb", "verdict"]
    lines = [headings]
    for row in rows:
        published = "-" if row.change.published_mb is None else f"{row.change.published_mb:+.1f}"
        speed = f"{row.speed.ratio:.3f}" if row.speed else "-"
        steps, time = row.at_steps, row.at_time
        lines.append([row.change.name, row.change.predict or "-", published])
        lines[-1] += [str(steps), steps.verdict] if steps else ["-", "-"]
        lines[-1] += [speed]
        lines[-1] += [str(time), time.verdict] if time else ["-", "-"]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def format_signs(rows: list[Row]) -> list[str]:
    """How often the sign of the published effect came out, of the resolved rows that have one, by class."""
    known = [
        (row.change.kind or "all", row.change.published_mb < 0, row.at_steps.mb < 0)
        for row in rows
        if row.change.published_mb and row.at_steps and row.at_steps.is_resolved
    ]
    lines = []
    for kind in dict.fromkeys(["all", *(kind for kind, _, _ in known)]):
        ours = [(wanted, found) for own, wanted, found in known if kind in ("all", own)]
        shares = []
        for sign in (True, False):
            hits = [found == wanted for wanted, found in ours if wanted is sign]
            shares += [sum(hits) / len(hits)] if hits else []
        if shares:
            lines.append(
                f"signs, {kind}: balanced accuracy {mean(shares):.2f} over {len(ours)} rows (always one: 0.50)"
            )
    return lines


def draw(rows: list[Row], out: Path) -> None:
    """Left is better; a bar is two standard errors, a ring what was published at full scale."""
    rows = [row for row in rows if row.at_steps]
    figure, axes = import_pyplot().subplots(figsize=(8, 1.2 + 0.34 * len(rows)), layout="constrained")
    named: set[str] = set()

    def name_once(label: str) -> str | None:
        is_new = label not in named
        named.add(label)
        return label if is_new else None

    for at, row in enumerate(rows):
        for effect, shift, color, label in (
            (row.at_steps, -0.12, "#1f4e8c", "equal steps"),
            (row.at_time, 0.12, "#d1861d", "equal time"),
        ):
            if effect:
                style = dict(fmt="o", color=color, markersize=4, capsize=2, label=name_once(label))
                axes.errorbar(effect.mb, at + shift, xerr=2 * effect.error, **style)
        if row.change.published_mb is not None:
            ring = dict(markersize=9, markerfacecolor="none", color=GREY, label=name_once("published"))
            axes.plot(row.change.published_mb, at, "o", **ring)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.change.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("thousandths of a bit per byte against the baseline; left is better")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, out, dpi=150)
