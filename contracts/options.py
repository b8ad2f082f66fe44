"""Options of a config, which is a frozen dataclass: from words of a command line, variables of an environment and JSON
to values of the right type, and the list that --help prints. What cannot work stops with the nearest right name.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import fields

from contracts.errors import ConfigError


def did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def cast_option(name: str, text: str, default) -> object:
    """Text to the type of the default; booleans are 0, 1, true or false and nothing else."""
    kind = type(default)
    try:
        return {"0": False, "false": False, "1": True, "true": True}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0, 1, true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text}: expected {expected}, like {default}") from None


def parse_environment(environ: dict[str, str], defaults: dict) -> dict[str, object]:
    """`NAME=value`: every option has its name in upper case."""
    return {n: cast_option(n, environ[n.upper()], d) for n, d in defaults.items() if n.upper() in environ}


def parse_command_line(argv: list[str], defaults: dict) -> dict[str, object]:
    """`--name value`, `--name=value`, and a bare `--dry_run` for booleans."""
    found, words = {}, deque(argv)
    while words:
        word = words.popleft()
        name, has_value, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in defaults:
            near = did_you_mean(f"--{name}", [f"--{known}" for known in defaults])
            raise ConfigError(f"unknown option {word.split('=')[0]}{near}; see --help")
        if not has_value:
            is_bare = not words or words[0].startswith("--")
            if is_bare and not isinstance(defaults[name], bool):
                raise ConfigError(f"option {word} needs a value")
            text = "1" if is_bare else words.popleft()
        found[name] = cast_option(name, text, defaults[name])
    return found


def holds_fields(values, config: type) -> bool:
    """Whether something read from JSON has exactly the fields of a config, each of its type."""
    types = {f.name: type(f.default) for f in fields(config)}
    return isinstance(values, dict) and {name: type(value) for name, value in values.items()} == types


def describe_options(config: type) -> list[str]:
    """A line for every option, with the comment behind its field; a packed script has no comments."""
    source = "".join(inspect.getsource(part) for part in config.__mro__[:-1])
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", source, re.MULTILINE))
    return [f"  --{f.name:<22} {notes.get(f.name, '')} [{f.default}]" for f in fields(config)]
