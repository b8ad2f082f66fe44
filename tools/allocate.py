"""Which weights deserve finer grids: what a byte buys in each tensor and role of a finished run, and the k of every
role at which it buys the same.

    python -m tools.allocate runs/ID
    python -m tools.allocate runs/ID --limits 140000,160000,180000 --batches 16 --out allocation.png
    python -m tools.allocate runs/ID --json

The step of a grid is k standard deviations of a row over the largest code. Bytes fall with the logarithm of k, and what
rounding costs grows with its square. So the cost of a tensor or role is measured at coarser steps, against no rounding
at all, with everything else rounded as usual, and scaled back to the present step by that square. Its slope is what it
loses for each kB that it saves, in thousandths of a bit per byte (mb); at the best allocation all slopes are the same.
The k's move three times to where they would be, and everything is measured again after each move.

At every limit files of four allocations are made by the exporter, read back and measured: one step for all roles, the
k's of the run, those found, and what --row_steps loss makes, for runs that train without rounding: a step for every row
by what errors in it cost. Differences are paired by batch; their standard errors are over the text, and do not contain
that one rounding of the same weights is luckier than another, by up to a mb.

The text is the training text that the run would have read next, never validation text, and the score is the plain loss.
Rounding here comes after training. Training adapts to its own grids, and a file on the very grid of its training is
better than its neighbours, which favours the k's of the run at its own limit: only runs with the options of the last
line decide.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import train_gpt
from data.folder import positive
from loopgolf.artifact import unpack_artifact
from loopgolf.curvature import find_hessian
from loopgolf.options import Parser
from loopgolf.params import collect_specs
from loopgolf.quantize import Format, RowGrid
from loopgolf.runtime import run_program
from loopgolf.scoring import ByteCounter
from tools.lib.finished import load_finished
from tools.lib.runlog import RunError
from tools.plot import COLORS, check_picture, import_pyplot, save_picture

COARSER = (1.4, 1.7, 2.0)  # times the step at hand: there the cost of rounding is measured
ROUNDS = 3
MOST_MOVE = 2.0  # of a k in one round, either way, before all are scaled to the same bytes
Ks = dict[str, float]  # by role


@dataclass(frozen=True)
class Cost:
    """Of rounding a role, or one tensor, at its present k."""

    name: str
    role: str
    k: float  # as the option says: k_scale is not in it
    step: float  # in standard deviations of a row
    weights: int
    bytes: float
    saved: float  # bytes, for each factor e by which k grows
    mb: float
    noise: float  # standard error of mb over the batches

    @property
    def slope(self) -> float:
        """mb for each kB that a coarser step would save: the cost grows with the square of k."""
        return 2 * self.mb / self.saved * 1000 if self.saved else 0.0

    @property
    def slope_noise(self) -> float:
        return 2 * self.noise / self.saved * 1000 if self.saved else 0.0


@dataclass(frozen=True)
class File:
    """A real file of one allocation, reloaded."""

    allocation: str
    k: Ks  # none, if the loss chose the steps
    bytes: int
    bpb: float
    mb: float  # against the uniform allocation
    noise: float  # standard error of mb over the batches
    mb_at_equal_bytes: float


@dataclass(frozen=True)
class Found:
    """What came out at one limit."""

    limit: int
    before: list[Cost]  # of the roles, at the k's of the run
    after: list[Cost]  # and at those found
    files: list[File]

    @property
    def options(self) -> str:
        return format_options({cost.name: cost.k for cost in self.after})


@dataclass(frozen=True)
class Report:
    run: str
    windows: int
    tokens: int
    bytes: int
    tensors: list[Cost]  # at the k's of the run and the first limit
    found: list[Found]


class Study:
    """A finished run, and the text on which its rounding is judged."""

    def __init__(self, folder: Path, n_batches: int):
        self.run = load_finished(folder)
        self.model = self.run.model.eval()
        self.config = replace(self.run.config, k_scale=0.0, row_steps="spread")
        self.roles: dict[str, list[str]] = {}  # the tensors of each
        self.specs = collect_specs(self.model)
        for name, spec in self.specs.items():
            if spec.grid:
                self.roles.setdefault(spec.grid, []).append(name)
        self.n_windows = n_batches * self.config.score_batch
        tokens = self.run.text.read(self.run.consumed, self.n_windows, self.config.seq_len)
        counter = ByteCounter(self.run.tokenizer.model)
        self.n_tokens = tokens[:, 1:].numel()
        self.n_bytes = counter.count(tokens[:, :-1].flatten().numpy(), tokens[:, 1:].flatten().numpy())
        self.batches = tokens.to(self.run.ctx.device).split(self.config.score_batch)

    @torch.no_grad()
    def losses(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Of each batch, in thousandths of a bit per byte."""
        self.model.load_state_dict(weights)
        nats = [float(self.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())) for tokens in self.batches]
        return torch.tensor(nats, dtype=torch.float64) * (1000 / math.log(2) * self.n_tokens / self.n_bytes)

    def config_at(self, limit: int, k: Ks) -> train_gpt.Config:
        changes: dict[str, Any] = {f"{role}_k": value for role, value in k.items()}
        return replace(self.config, byte_limit=limit, **changes)

    def solve(self, limit: int, k: Ks) -> float:
        """The k_scale of a file of that size, by entropy."""
        config = self.config_at(limit, k)

        def size_at(k_scale: float) -> int:
            formats = train_gpt.build_formats(config, self.model, k_scale)
            return train_gpt.forecast_bytes(self.model, formats, self.run.weights)

        k_scale = train_gpt.solve_k_scale(size_at, limit - config.code_reserve, config)
        if k_scale == train_gpt.FINEST:
            most = size_at(k_scale) + config.code_reserve
            raise RunError(f"--limits {limit}: the finest grids need {most:,} bytes; give a limit below")
        return k_scale

    def round(self, names: Iterable[str], formats: Mapping[str, Format], coarser: float = 1.0) -> dict[str, Tensor]:
        rounded = {}
        for name in names:
            form = formats[name]
            if isinstance(form, RowGrid):
                form = replace(form, k=form.k * coarser)
            stored = form.quantize(self.run.weights[name], find_hessian(self.run.curvatures, name))
            rounded[name] = form.dequantize(stored)
        return rounded

    def measure(self, groups: Mapping[str, list[str]], limit: int, k: Ks, bar: tqdm) -> list[Cost]:
        """Of each group of tensors of one role, while all others stay rounded."""
        formats = train_gpt.build_formats(self.config_at(limit, k), self.model, self.solve(limit, k))
        rounded = self.round(self.run.weights, formats)
        costs = []
        for name, members in groups.items():
            exact = self.losses(rounded | {member: self.run.weights[member] for member in members})
            rises = [self.losses(rounded | self.round(members, formats, by)) - exact for by in COARSER]
            mb = torch.stack(rises).sum(0) / sum(by**2 for by in COARSER)
            costs.append(self.describe(name, members, formats, k, mb))
            bar.update()
        return costs

    def describe(self, name: str, members: list[str], formats: Mapping[str, Format], k: Ks, mb: Tensor) -> Cost:
        role = self.specs[members[0]].role
        grid = formats[members[0]]
        assert isinstance(grid, RowGrid)
        weights = [self.run.weights[member] for member in members]

        def size_at(factor: float) -> float:
            form = replace(grid, k=grid.k * factor)
            return sum(form.expected_bytes(tuple(weight.shape), weight) for weight in weights)

        return Cost(
            name=name,
            role=role,
            k=k[role],
            step=grid.k / grid.largest,
            weights=sum(weight.numel() for weight in weights),
            bytes=size_at(1.0),
            saved=(size_at(1 / 1.2) - size_at(1.2)) / (2 * math.log(1.2)),
            mb=float(mb.mean()),
            noise=standard_error(mb),
        )


def format_options(k: Ks) -> str:
    return " ".join(f"--{role}_k {value:g}" for role, value in k.items())


def standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def common_slope(costs: Sequence[Cost]) -> float:
    """Of all k's that grow together."""
    return 2 * sum(cost.mb for cost in costs) / sum(cost.saved for cost in costs) * 1000


def equalise(costs: Sequence[Cost]) -> Ks:
    """The k's at which all slopes are the same if a slope grows with the square of its k."""
    common = max(0.0, common_slope(costs))
    k = {}
    for cost in costs:
        move = math.sqrt(common / cost.slope) if cost.slope > 0 else math.inf
        k[cost.role] = cost.k * min(max(move, 1 / MOST_MOVE), MOST_MOVE)
    return keep_bytes(k, costs)


def keep_bytes(k: Ks, costs: Sequence[Cost]) -> Ks:
    """The same ratios, with as many bytes at one k_scale as the k's of the costs."""
    moved = sum(cost.saved * math.log(k[cost.role] / cost.k) for cost in costs)
    factor = math.exp(-moved / sum(cost.saved for cost in costs))
    return {role: float(f"{value * factor:.4g}") for role, value in k.items()}


def uniform(study: Study, costs: Sequence[Cost]) -> Ks:
    """One step in all roles, so one number of bits per weight."""
    largest = {role: RowGrid(getattr(study.config, f"{role}_bits")).largest for role in study.roles}
    return keep_bytes({role: float(value) for role, value in largest.items()}, costs)


def allocate(study: Study, limit: int, own: Ks) -> Found:
    with tqdm(desc=f"{limit:,} bytes", total=(1 + ROUNDS) * len(study.roles), leave=False, disable=None) as bar:
        k = own
        before = costs = study.measure(study.roles, limit, k, bar)
        for _ in range(ROUNDS):
            k = equalise(costs)
            costs = study.measure(study.roles, limit, k, bar)
    allocations = {"uniform": uniform(study, costs), "k's of run": own, "equalised": k}
    if study.run.curvatures:
        allocations["by the loss"] = {}
    return Found(limit, before, costs, compare(study, limit, allocations, costs))


def compare(study: Study, limit: int, allocations: Mapping[str, Ks], costs: Sequence[Cost]) -> list[File]:
    """The real files, against the first one. Without k's the loss chooses the steps."""
    files: list[File] = []
    first_bytes, first_losses = 0, torch.zeros(0)
    for name, k in allocations.items():
        config = study.config_at(limit, k)
        content = study.run.fit(config if k else replace(config, row_steps="loss", qat_start=1.0))
        n_bytes = len(content)
        losses = study.losses(unpack_artifact(content, train_gpt.describe_stored).tensors)
        if not files:
            first_bytes, first_losses = n_bytes, losses
        change = losses - first_losses
        file = File(
            allocation=name,
            k=k,
            bytes=n_bytes,
            bpb=float(losses.mean()) / 1000,
            mb=float(change.mean()),
            noise=standard_error(change),
            mb_at_equal_bytes=float(change.mean()) + common_slope(costs) * (n_bytes - first_bytes) / 1000,
        )
        files.append(file)
    return files


def study_run(folder: Path, limits: list[int], n_batches: int) -> Report:
    study = Study(folder, n_batches)
    limits = limits or [study.config.byte_limit]
    if not limits[0]:
        raise RunError(f"{folder}: this run had no limit; give --limits")
    own = {role: getattr(study.config, f"{role}_k") for role in study.roles}
    for limit in limits:
        study.solve(limit, own)  # refuses what cannot be before the first is measured
    tensors = {name: [name] for names in study.roles.values() for name in names}
    with tqdm(desc="tensors", total=len(tensors), leave=False, disable=None) as bar:
        costs = study.measure(tensors, limits[0], own, bar)
    return Report(
        run=str(folder),
        windows=study.n_windows,
        tokens=study.n_tokens,
        bytes=study.n_bytes,
        tensors=sorted(costs, key=lambda cost: -cost.slope),
        found=[allocate(study, limit, own) for limit in limits],
    )


def format_costs(costs: Sequence[Cost]) -> list[str]:
    heads = f"{'k':>9}{'step':>8}{'bits':>7}{'bytes':>12}{'mb':>9}{'±':>7}{'mb/kB':>9}{'±':>7}"
    width = 2 + max(len(cost.name) for cost in costs)
    lines = [f"{'':<{width}}{'role':<7}{heads}"]
    for cost in costs:
        lines.append(
            f"{cost.name:<{width}}{cost.role:<7}{cost.k:>9.4g}{cost.step:>8.3f}{8 * cost.bytes / cost.weights:>7.2f}"
            f"{cost.bytes:>12,.0f}{cost.mb:>9.3f}{cost.noise:>7.3f}{cost.slope:>9.3f}"
            f"{cost.slope_noise:>7.3f}"
        )
    return lines


def format_files(found: Found) -> list[str]:
    roles = list(found.files[0].k)
    heads = "".join(f"{role + '_k':>9}" for role in roles)
    lines = [f"{'':<12}{heads}{'bytes':>12}{'bpb':>10}{'mb':>9}{'±':>7}{'equal bytes':>13}"]
    for file in found.files:
        k = "".join(f"{file.k[role]:>9.4g}" if file.k else f"{'':>9}" for role in roles)
        lines.append(
            f"{file.allocation:<12}{k}{file.bytes:>12,}{file.bpb:>10.5f}{file.mb:>9.3f}{file.noise:>7.3f}"
            f"{file.mb_at_equal_bytes:>13.3f}"
        )
    return lines


def format_report(report: Report) -> str:
    lines = [
        f"# {report.run}: {report.windows} windows of training text, {report.tokens:,} tokens, {report.bytes:,} bytes",
        f"# tensors at {report.found[0].limit:,} bytes with the k's of the run",
        *format_costs(report.tensors),
    ]
    for found in report.found:
        lines += [
            "",
            f"# roles at {found.limit:,} bytes with the k's of the run",
            *format_costs(found.before),
            "# with slopes equalised",
            *format_costs(found.after),
            f"# files at {found.limit:,} bytes",
            *format_files(found),
            found.options,
        ]
    return "\n".join(lines)


def draw(report: Report, out: Path) -> None:
    """Left the slopes of tensors, right the loss of the allocations over the limits."""
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(12, 5), layout="constrained")
    names = [cost.name for cost in report.tensors]
    for number, role in enumerate(report.found[0].before):
        costs = [cost for cost in report.tensors if cost.role == role.role]
        left.barh(
            [names.index(cost.name) for cost in costs],
            [cost.slope for cost in costs],
            xerr=[cost.slope_noise for cost in costs],
            color=COLORS[number],
            label=role.role,
        )
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(f"mb lost per kB saved, at {report.found[0].limit:,} bytes")
    left.legend(loc="lower right", frameon=False)
    found = sorted(report.found, key=lambda found: found.limit)
    for number, name in enumerate(file.allocation for file in found[0].files):
        files = [one.files[number] for one in found]
        sizes = [file.bytes / 1000 for file in files]
        right.plot(sizes, [file.bpb for file in files], marker="o", color=COLORS[number], label=name)
    right.set_xlabel("kilobytes of the file")
    right.set_ylabel("bits per byte of training text")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    save_picture(figure, out)


def read_limits(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


def run(args: argparse.Namespace) -> None:
    if args.out:
        check_picture(args.out)
    report = study_run(args.run, args.limits, args.batches)
    print(json.dumps(asdict(report), indent=1) if args.json else format_report(report))
    if args.out:
        draw(report, args.out)


def at_least_two(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text}: 2 or more are needed, or there is no telling the noise")
    return value


def build_parser() -> Parser:
    parser = Parser(prog="python -m tools.allocate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--limits", type=read_limits, default=[], help="bytes, with commas between [that of the run]")
    parser.add_argument("--batches", type=at_least_two, default=8, help="of score_batch windows to measure on [8]")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw it as well: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    return parser


def main(argv: list[str]) -> int:
    return run_program(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
