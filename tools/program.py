"""What the programs of tools/ share: options behind --, and how each ends: its own exit code, or one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from contracts.errors import Stop
from data.shards import DataError


def run_program(program: Callable[..., int | None], *given) -> int:
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
    except (Stop, DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def split_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a program is told itself, and the options of train_gpt.py that stand behind --."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]
