"""Options: fields of a config that know their help and limits, and one way to write options for every program.

    @dataclass(frozen=True)
    class Config:
        depth: int = option(4, "repetitions of the *r group", low=1, high=256)

    python train_gpt.py --depth 8        --depth=8        DEPTH=8 in the environment
    python -m data.tokenizer --vocab-size 512        dashes and underscores are the same in every program

What cannot work stops with the nearest right name.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn

from loopgolf.errors import ConfigError

MOST = 2**40
TRUTH = {"0": False, "false": False, "1": True, "true": True}


def option(default: Any, help: str, *, low: float = 0, high: float = MOST, choices: tuple[str, ...] = ()) -> Any:
    """A field of a config. The limits hold for numbers, the choices for words."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def check_limits(config: Any) -> None:
    """Every number within its limits, every word one of its choices. A config can come from a stranger's file."""
    for f in fields(config):
        value, known = getattr(config, f.name), f.metadata
        if isinstance(value, str):
            if known["choices"]:
                check_choice(f.name, value, known["choices"])
        elif not known["low"] <= value <= known["high"]:
            raise ConfigError(f"{f.name}={value}: must lie between {known['low']} and {known['high']}")


def check_choice(name: str, word: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if word not in choices:
        raise ConfigError(f"{name}={word}: choose from {', '.join(choices)}{did_you_mean(word, choices)}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def cast_option(name: str, text: str, default: Any) -> Any:
    """Text to the type of the default; booleans are 0, 1, true or false and nothing else."""
    kind = type(default)
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0, 1, true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text}: expected {expected}, like {default}") from None


def parse_environment(environ: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`NAME=value`: every option has its name in upper case."""
    given = {name: environ[name.upper()] for name in defaults if name.upper() in environ}
    return {name: cast_option(name, text, defaults[name]) for name, text in given.items()}


def parse_command_line(argv: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`--name value`, `--name=value`, and a bare `--dry_run` for booleans."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in defaults:
            near = did_you_mean(f"--{name}", [f"--{known}" for known in defaults])
            raise ConfigError(f"unknown option {word.split('=')[0]}{near}; see --help")
        if not has_value:
            is_bare = not words or words[0].startswith("--")
            if not is_bare:
                text = words.pop(0)
            elif isinstance(defaults[name], bool):
                text = "1"
            else:
                raise ConfigError(f"option {word} needs a value")
        given[name] = cast_option(name, text, defaults[name])
    return given


def find_wrong_fields(values: Any, config: type) -> str:
    """Why values read from JSON cannot be settings of this config; empty if they can. Some may be missing."""
    if not isinstance(values, dict):
        return "not a table of settings"
    known = {f.name: f for f in fields(config)}
    for name, value in values.items():
        if name not in known:
            return f"unknown setting {name}{did_you_mean(name, known)}"
        if type(value) is not type(known[name].default):
            return f"{name}={value!r} is not of the kind of {known[name].default!r}"
    return ""


def describe_option(f: Field[Any], choices: Iterable[str] = ()) -> str:
    """The line of --help for a field."""
    words = ", ".join(choices or f.metadata["choices"])
    default = "" if f.default is MISSING else f" [{f.default}]"
    return f"  --{f.name:<22} {f.metadata['help']}{f': {words}' if words else ''}{default}"


class Parser(argparse.ArgumentParser):
    """The parser of every program but train_gpt.py: options are declared with underscores, and may be written with
    dashes. What stands after a lone -- belongs to another program and is left alone."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = list(sys.argv[1:] if args is None else args)
        own = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(write_with_underscores, words[:own]), *words[own:]], namespace)


def write_with_underscores(word: str) -> str:
    """An option with its dashes replaced; its value, and any other word, as it is."""
    found = re.fullmatch(r"--([\w-]+)(=.*)?", word, re.DOTALL)
    return f"--{found[1].replace('-', '_')}{found[2] or ''}" if found else word


def split_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a program is told itself, and the options of train_gpt.py that stand after --."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]
