"""Imports point one way: tools, then train_gpt.py, then loopgolf, then kernels and the shard format.

Anywhere, by reading the files: pytest tests/test_house.py
"""

import ast
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from loopgolf.source import find_module

OWN = ("train_gpt", "loopgolf", "data", "kernels", "tools", "tests")
MAY_IMPORT = {
    "tools": ("train_gpt", "loopgolf", "data", "kernels", "tools"),
    "train_gpt.py": ("loopgolf", "data.shards", "kernels"),
    "loopgolf": ("loopgolf", "kernels"),
    "data": ("data", "loopgolf.runtime", "loopgolf.errors", "loopgolf.options", "loopgolf.words"),
    "kernels": ("kernels",),
}
FILES = [
    path for room in MAY_IMPORT for path in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
]


def imported_by(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole way"
            # `from data import shards` is data.shards; `from data.shards import write_shard` is too, for the room it names
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n for n in inner if find_module(ROOT, n)} or {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imported_by(path):
        if name.split(".")[0] in OWN:
            assert any(name == to or name.startswith(f"{to}.") for to in MAY_IMPORT[room]), f"{path}: {name}"
        elif room == "kernels":
            assert name.split(".")[0] in sys.stdlib_module_names | {"torch", "triton"}, f"{path}: {name}"


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if not room.endswith(".py")])
def test_a_room_is_a_package(room):
    """A folder without this file gives way to any package of its name that is installed."""
    assert (ROOT / room / "__init__.py").is_file()
