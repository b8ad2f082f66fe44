"""One process of a run: its rank, where and in what it computes, its log, its clock, the signals that it gets and what
its machine needs. The ranks of a run only ever agree through the methods of RunContext.

Log lines are `event key:value key:value …`, blanks in values percent-encoded: `dict(pair.split(":", 1) for pair in
line.split()[1:])` reads one back. Free text stands on lines that start with #.
"""

from __future__ import annotations

import ctypes
import io
import platform
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class Log:
    """Lines to the terminal and to a file; progress to a terminal only."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.file = quiet, io.StringIO()  # until there is a file, lines wait in memory

    def open(self, path: Path) -> None:
        if not self.quiet:
            early, self.file = self.file.getvalue(), open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the end)
            self.file.write(early)

    def line(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()
            print(text, file=self.file, flush=True)

    def __call__(self, event: str, **pairs) -> None:
        self.line(" ".join([event, *(f"{key}:{format_value(value)}" for key, value in pairs.items())]))

    def progress_bar(self, total: float, name: str) -> tqdm:
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        # disable=None hides it where there is no terminal
        return tqdm(total=total, desc=name, leave=False, disable=self.quiet or None, bar_format=form)


def format_value(value) -> str:
    """One word: floats with 4 decimals (text keeps its own), blanks percent-encoded so that a blank splits the line."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return re.sub(r"[%\s]", lambda found: quote(found[0]), text) or "-"


@dataclass(frozen=True)
class RunContext:
    """One process among `world` of them. `compile`: none, block or full; `code_bytes`: what the code takes."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: str
    log: Log
    code_bytes: int = 0

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in the order of ranks."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def agree(self, loss: Tensor, seconds: float, stop: bool) -> tuple[float, float, bool]:
        """Mean loss, the slowest rank's clock, and whether any rank was asked to stop: all that a step waits for."""
        mine = torch.tensor([loss.item(), seconds, float(stop)], dtype=torch.float64, device=self.device)  # sync
        losses, clocks, stops = torch.stack(self.gather(mine), 1).tolist()  # sync
        return sum(losses) / self.world, max(clocks), any(stops)


class Clock:
    """Seconds of training: runs from start() to stop(), continues from what a checkpoint had used."""

    def __init__(self, ctx: RunContext, used_s: float = 0.0):
        self.ctx, self.used_s = ctx, used_s

    def start(self) -> None:
        self.ctx.sync()
        self.ctx.log("clock", what="start", used_s=self.used_s)
        self.started_at = time.perf_counter()

    def read(self) -> float:
        """Seconds used, once everything launched so far is done."""
        self.ctx.sync()
        return self.used_s + time.perf_counter() - self.started_at

    def stop(self) -> float:
        total = self.read()
        self.ctx.log("clock", what="stop", used_s=total)
        return total


class StopSignals:
    """SIGTERM and Ctrl-C ask the run to stop after the step at hand; a second one acts as ever."""

    def __init__(self):
        self.seen = False

    def __enter__(self) -> StopSignals:
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame) -> None:
        self.seen = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """What a step frees is there for the next one. By itself glibc gives it back to the system, and every page of it
    costs a fault when it comes again: 8% of a step."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie unused at the top of the heap
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: from which size on a piece is mapped by itself


def find_compiler_fault(device: torch.device) -> str:
    """Why torch.compile cannot work here, in a line: mostly no C++ compiler, or one without OpenMP."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile failed ({str(error).strip().splitlines()[0][:100]})"
    return ""
