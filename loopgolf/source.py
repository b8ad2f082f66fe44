"""Which files a run is made of: the script and the modules of this repository that it imports.

An import inside a function is lazy: it counts only for the runs that use it, which name it. Imports name the whole way
(`from loopgolf.plan import Plan`), never relative to the importing file.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

ENTRY = "train_gpt"


def find_counted(root: Path, lazy: Iterable[str]) -> dict[str, Path]:
    """The entry, all that it imports from the repository outside of functions, directly or not, and the lazy modules
    with what these import; each with the packages that it lies in. Dotted name to file, in the order of names."""
    found: dict[str, Path] = {}

    def read(name: str) -> ast.Module | None:
        path = find_module(root, name)
        if path is None:
            return None
        found[name] = path
        return ast.parse(path.read_text(encoding="utf-8"))

    return {name: found[name] for name in follow_imports(read, lazy)}


def follow_imports(read: Callable[[str], ast.Module | None], lazy: Iterable[str]) -> list[str]:
    """Names of the entry, the lazy modules and all that they import, as far as `read` knows them."""
    found: set[str] = set()
    wanted = [ENTRY, *lazy]
    while wanted:
        name = wanted.pop()
        tree = None if name in found else read(name)
        if tree is not None:
            found.add(name)
            wanted += [*list_packages(name), *list_imports(tree)]
    return sorted(found)


def find_module(root: Path, name: str) -> Path | None:
    """The file of a module or package of this repository."""
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def list_packages(name: str) -> list[str]:
    """a and a.b for a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def list_imports(node: ast.AST) -> list[str]:
    """Names of modules, and of what may be modules, that are imported outside of functions."""
    names: list[str] = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return names
    if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for child in ast.iter_child_nodes(node):
        names += list_imports(child)
    return names


def hash_files(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
