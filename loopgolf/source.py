"""Which files a run is made of: the script and the modules of this repository that it imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

ENTRY = "train_gpt"


def find_counted(root: Path, lazy: Iterable[str]) -> dict[str, Path]:
    """The entry, every module of the repository that it imports outside of functions, and the lazy ones that it imports
    inside of them: dotted name to file, in the order of names."""
    found: dict[str, Path] = {}
    wanted = [ENTRY, *lazy]
    while wanted:
        name = wanted.pop()
        path = find_module(root, name)
        if name not in found and path is not None:
            found[name] = path
            wanted += list_imports(ast.parse(path.read_text(encoding="utf-8")))
    return dict(sorted(found.items()))


def find_module(root: Path, name: str) -> Path | None:
    """The file of a module of this repository."""
    path = root / (name.replace(".", "/") + ".py")
    return path if path.is_file() else None


def list_imports(node: ast.AST) -> list[str]:
    """Names of modules, and of what may be modules, that are imported outside of functions."""
    names: list[str] = []
    if isinstance(node, ast.FunctionDef):
        return names
    if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for child in ast.iter_child_nodes(node):
        names += list_imports(child)
    return names


def hash_files(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
