"""One process of a run: its rank, where and in what it computes, its log, its clock, its files, the signals that it
gets, what its machine needs, and how it ends. The ranks of a run only ever agree through the methods of RunContext.

Log lines are `event key:value key:value …`, blanks in values percent-encoded: `dict(pair.split(":", 1) for pair in
line.split()[1:])` reads one back. Free text stands on lines that start with #.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from loopgolf.errors import Stop


class Log:
    """Lines to the terminal and to a file; progress to a terminal only."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.file: TextIO = io.StringIO()  # until there is a file, lines wait in memory

    def open(self, path: Path) -> None:
        if self.quiet:
            return
        early = self.file
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the end)
        if isinstance(early, io.StringIO):
            self.file.write(early.getvalue())

    def line(self, text: str) -> None:
        if self.quiet:
            return
        tqdm.write(text)
        sys.stdout.flush()
        print(text, file=self.file, flush=True)

    def __call__(self, event: str, **pairs: object) -> None:
        self.line(" ".join([event, *(f"{key}:{format_value(value)}" for key, value in pairs.items())]))

    def progress_bar(self, total: float, name: str) -> tqdm:
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        # disable=None hides it where there is no terminal
        return tqdm(total=total, desc=name, leave=False, disable=self.quiet or None, bar_format=form)


def format_value(value: object) -> str:
    """One word: floats with 4 decimals (text keeps its own), blanks percent-encoded so that a blank splits the line."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return re.sub(r"[%\s]", lambda blank: quote(blank[0]), text) or "-"


def write_atomic(path: Path, content: bytes) -> None:
    """The whole file or none: written under another name, flushed to disk, renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunContext:
    """One process among `world` of them. `compile`: none, block or full; `code_bytes`: what the code takes;
    `host_group`: where ranks exchange what their processors know, so that no device is waited for (None: the group
    of the devices is that of the processors)."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: str
    log: Log
    code_bytes: int = 0
    host_group: dist.ProcessGroup | None = None

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """The tensor of every rank, in the order of ranks."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return parts

    def wait_for_all(self) -> None:
        """Returns once every rank is here."""
        self.gather_numbers(0.0)

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """For each number its values on all ranks. Only processors take part."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        return torch.stack(self.gather(mine, self.host_group), 1).tolist()

    def mean_loss(self, loss: Tensor) -> float:
        """Over all ranks. The device is waited for here, once a step."""
        losses: list[float] = torch.stack(self.gather(loss.double())).tolist()  # sync
        return sum(losses) / self.world


class Clock:
    """Seconds of training: runs from start() to stop(), continues from what a checkpoint had used. Ranks agree on the
    slowest one's. It does not wait for the device: whoever reads it has just fetched what a step computed."""

    def __init__(self, ctx: RunContext, used_s: float = 0.0):
        self.ctx = ctx
        self.used_s = used_s
        self.started_at = 0.0

    def start(self) -> None:
        self.ctx.sync()
        self.ctx.log("clock", what="start", used_s=self.used_s)
        self.started_at = time.perf_counter()

    def read(self) -> float:
        """Seconds used, on this rank."""
        return self.used_s + time.perf_counter() - self.started_at

    def read_slowest(self) -> float:
        return max(self.ctx.gather_numbers(self.read())[0])

    def stop(self) -> float:
        self.ctx.sync()
        total = self.read_slowest()
        self.ctx.log("clock", what="stop", used_s=total)
        return total


class StopSignals:
    """SIGTERM and Ctrl-C ask the run to stop after the step at hand; a second one acts as it did before."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> StopSignals:
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_program(program: Callable[..., int | None], *given: Any) -> int:
    """The exit code of a program that may end with one line instead of a result."""
    try:
        code = program(*given) or 0
        sys.stdout.flush()  # or what cannot be printed would show when nobody catches it any more
        return code
    except BrokenPipeError:
        sys.stdout = None  # whoever read it has seen enough; nothing is left to flush
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except (Stop, OSError) as error:
        print_error(error)
        return getattr(error, "exit_code", 1)


def print_error(error: BaseException) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


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
