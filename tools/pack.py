"""Packs what a recipe uses into the one script of a record folder, which runs alone, under python and torchrun.

    python -m tools.pack --recipe pocket --out packed.py
    python packed.py --recipe pocket --dry_run
    python -m tools.pack --recipe pocket --out packed.py -- --score_mode plain         what is used with these options

The script is a zip application of two entries: a stub, and one bzip2 stream with a start script and the modules. The
start script writes them into a private temporary folder, because Triton and torch.compile read the source of what they
compile, and calls train_gpt.main(). bzip2 takes 1.5% less than LZMA with its best settings on this text. The same code
gives the same bytes on every machine; another minor version of Python, or of python-minifier, may write the same
program in other words.

Rules. What is packed is the source, but for these; nothing else in it has to be written for the packer.

1. Modules: train_gpt.py, what it imports outside of functions, the packages around, and of the lazy imports those that
   train_gpt.used_modules() names for the recipe. The others stay in the code and end in an error when they are used.
2. Comments, docstrings and annotations go, and asserts that only tell a type checker something (isinstance, not None).
   A field of a class is annotated `int` whatever it was, unless as ClassVar, InitVar or KW_ONLY; annotations stay in
   functions with a tl.constexpr, under triton.jit, or under custom_op.
3. The help of option(default, "help", ...) becomes empty.
4. A definition (function, class, assignment) at the top of a module goes when main() does not reach it by its name. A
   name is reached in all modules at once, and as an attribute or a word of a string ("loopgolf.adapting") as well; so
   too much stays rather than too little. An if or try that defines something goes or stays as a whole. What acts when a
   module is loaded stays: calls, and definitions under decorators other than the PLAIN ones.
5. An import at the top of a module goes when nothing there uses it any more; a module goes when nothing imports it any
   more.
6. Local variables get short names, for 6% of the bytes. Parameters, attributes and what stands at the top of a module
   keep theirs, and so does everything in functions under triton.jit or custom_op.
7. Of RECIPES one stays, the recipe that is packed.
8. What stands under `if __name__ == "__main__"` goes: the start script does it.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import train_gpt
from loopgolf.errors import DoesNotFit, Stop
from loopgolf.options import Parser, split_options
from loopgolf.runtime import run_program, write_atomic
from loopgolf.source import find_counted, follow_imports

ROOT = Path(train_gpt.__file__).resolve().parent
STUB = """import bz2
parts = bz2.decompress(__loader__.get_data("code")).decode().split("\\0")
exec(parts[0])
"""
START = """import os, sys, tempfile
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
code_bytes = os.path.getsize(sys.path[0])
with tempfile.TemporaryDirectory(prefix="loopgolf-", ignore_cleanup_errors=True) as folder:
    for name, text in zip(parts[1::2], parts[2::2]):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    sys.path[0] = folder
    import train_gpt
    sys.exit(train_gpt.main(sys.argv[1:], dict(os.environ), code_bytes))
"""

PLAIN = {"cache", "custom_op", "dataclass", "jit", "lru_cache", "no_grad"}  # decorators that enter nothing anywhere
TELLING = {"ClassVar", "InitVar", "KW_ONLY"}  # annotations that change what a dataclass makes of a field
# changes that python-minifier would make besides
OTHER_CHANGES = (
    *("combine_imports", "constant_folding", "convert_posargs_to_args", "hoist_literals", "remove_annotations"),
    *("remove_builtin_exception_brackets", "remove_explicit_return_none", "remove_literal_statements"),
    *("remove_object_base", "remove_pass"),
)


class PackError(Stop):
    """Packing cannot go on: one line that says why and names the fix."""


# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def names_in(*nodes: ast.AST) -> set[str]:
    """All names that something mentions, attributes and words of strings included."""
    found: set[str] = set()
    for node in (child for parent in nodes for child in ast.walk(parent)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.:]+", node.value):
            found.update(re.split("[.:]", node.value))
    return found


def names_bound_by(line: ast.AST) -> set[str]:
    """Names that a line at the top of a module defines or imports."""
    if isinstance(line, ast.FunctionDef | ast.ClassDef):
        return {line.name}
    if isinstance(line, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in line.names}
    if isinstance(line, ast.If | ast.Try | ast.ExceptHandler):
        return set().union(*(names_bound_by(child) for child in ast.iter_child_nodes(line)))
    if isinstance(line, ast.Assign):
        return {node.id for target in line.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def decorator_names(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """`jit` for @triton.jit, `custom_op` for @torch.library.custom_op(...)."""
    found = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        found.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "?"))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rules
# ----------------------------------------------------------------------------------------------------------------------


class Strip(ast.NodeTransformer):
    """Rules 2, 3, 7 and 8."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.fields: set[ast.AnnAssign] = set()

    def visit_Module(self, node: ast.Module) -> ast.Module:
        drop_docstring(node)
        node.body = [line for line in node.body if not (isinstance(line, ast.If) and "__name__" in names_in(line.test))]
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        drop_docstring(node)
        self.fields.update(line for line in node.body if isinstance(line, ast.AnnAssign))
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        drop_docstring(node)
        everyone = [arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        is_read = any(arg.annotation and "constexpr" in names_in(arg.annotation) for arg in everyone)
        if not is_read and not is_compiled_from_source(node):
            node.returns = None
            for arg in everyone:
                arg.annotation = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        if "RECIPES" in names_in(node.target) and isinstance(node.value, ast.Dict):
            keep_entry(node.value, self.recipe)
        if node not in self.fields:
            return ast.Assign([node.target], node.value) if node.value else ast.Pass()
        if not names_in(node.annotation) & TELLING:
            node.annotation = ast.Name("int")
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.Assert | None:
        return None if tells_types_only(node.test) else node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "option" and len(node.args) > 1:
            node.args[1] = ast.Constant("")
        return node


def tells_types_only(test: ast.expr) -> bool:
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id == "isinstance"
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)


def keep_entry(table: ast.Dict, key: str) -> None:
    """Drops every other entry of a table whose keys are words."""
    pairs = [(k, v) for k, v in zip(table.keys, table.values) if isinstance(k, ast.Constant) and k.value == key]
    table.keys = [k for k, _ in pairs]
    table.values = [v for _, v in pairs]


def drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> None:
    if ast.get_docstring(node, clean=False) is not None:
        rest = node.body[1:]
        node.body = rest if rest or isinstance(node, ast.Module) else [ast.Pass()]


def is_compiled_from_source(node: ast.FunctionDef) -> bool:
    return bool(decorator_names(node) & {"jit", "custom_op"})


def split_imports(tree: ast.Module) -> None:
    """One name to a line, so that each can go by itself."""
    lines: list[ast.stmt] = []
    for line in tree.body:
        if isinstance(line, ast.Import):
            lines += [ast.Import([alias]) for alias in line.names]
        elif isinstance(line, ast.ImportFrom):
            lines += [ast.ImportFrom(line.module, [alias], line.level) for alias in line.names]
        else:
            lines.append(line)
    tree.body = lines


def join_imports(tree: ast.Module) -> None:
    """Neighbouring lines that import from the same module become one again."""
    lines: list[ast.stmt] = []
    for line in tree.body:
        before = lines[-1] if lines else None
        if isinstance(line, ast.ImportFrom) and isinstance(before, ast.ImportFrom) and before.module == line.module:
            before.names += line.names
        else:
            lines.append(line)
    tree.body = lines


def acts(line: ast.stmt) -> bool:
    """Whether something happens when a module is loaded, other than that names get a meaning."""
    if isinstance(line, ast.FunctionDef | ast.ClassDef):
        return not decorator_names(line) <= PLAIN
    return not names_bound_by(line)


def keep_reached(trees: Iterable[ast.Module]) -> None:
    """Rule 4, for definitions; of the imports those stay that may be used."""
    trees = list(trees)
    waiting = [line for tree in trees for line in tree.body]
    reached, kept = {"main"}, set()
    while found := [line for line in waiting if acts(line) or names_bound_by(line) & reached]:
        kept.update(found)
        reached |= names_in(*found)
        waiting = [line for line in waiting if line not in kept]
    for tree in trees:
        tree.body = [line for line in tree.body if line in kept or isinstance(line, ast.Import | ast.ImportFrom)]


def keep_used_imports(tree: ast.Module, used_before: set[str]) -> None:
    """Rule 5. An import that was never used is there for what it does."""
    unused = used_before - names_used(tree)
    tree.body = [line for line in tree.body if not (is_import(line) and names_bound_by(line) <= unused)]


def is_import(line: ast.stmt) -> bool:
    return isinstance(line, ast.Import | ast.ImportFrom)


def names_used(tree: ast.Module) -> set[str]:
    return names_in(*(line for line in tree.body if not is_import(line)))


def minify(tree: ast.Module) -> str:
    """Rule 6, and no more blanks than needed."""
    try:
        import python_minifier
    except ImportError:
        raise PackError("packing needs python-minifier: python -m pip install -r requirements-dev.txt") from None
    nodes = list(ast.walk(tree))
    kept = {node.arg for node in nodes if isinstance(node, ast.arg)}
    kept |= names_in(*(node for node in nodes if isinstance(node, ast.FunctionDef) and is_compiled_from_source(node)))
    text = ast.unparse(ast.fix_missing_locations(tree))
    settings: dict[str, Any] = dict.fromkeys(OTHER_CHANGES, False)
    short = python_minifier.minify(text, preserve_locals=sorted(kept), **settings)
    return short + "\n" if short else ""


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def read_counted(config: train_gpt.Config) -> dict[str, str]:
    """The source files that a run of this config counts, by path, in the order in which the run hashes them."""
    paths = find_counted(ROOT, train_gpt.used_modules(config)).values()
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def shorten(sources: Mapping[str, str], recipe: str) -> dict[str, str]:
    """What is packed of source files for a recipe, by their paths."""
    paths = {module_name(path): path for path in sources}
    trees = {name: ast.parse(sources[path]) for name, path in paths.items()}
    lazy = trees.keys() - set(follow_imports(trees.get, []))
    used_before = {name: names_used(tree) for name, tree in trees.items()}
    for tree in trees.values():
        Strip(recipe).visit(tree)
        split_imports(tree)
    keep_reached(trees.values())
    for name, tree in trees.items():
        keep_used_imports(tree, used_before[name])
        join_imports(tree)
    return {paths[name]: minify(trees[name]) for name in follow_imports(trees.get, lazy)}


def pack(sources: Mapping[str, str], recipe: str) -> bytes:
    """The script that runs a recipe and holds these source files, which are given by their paths."""
    parts = [part for pair in shorten(sources, recipe).items() for part in pair]
    entries = {"__main__.py": STUB.encode(), "code": bz2.compress("\0".join([START, *parts]).encode())}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # or the packing system would show in the bytes
            archive.writestr(entry, content)
    return buffer.getvalue()


def run(args: argparse.Namespace, options: list[str]) -> None:
    config, _ = train_gpt.parse_config([f"--recipe={args.recipe}", *options], {})
    reserve = config.code_reserve if args.code_reserve is None else args.code_reserve
    content = pack(read_counted(config), config.recipe)
    if reserve and len(content) > reserve:
        what = f"the code of recipe {config.recipe} is packed in {len(content):,} bytes"
        raise DoesNotFit(f"code_reserve={reserve:,}: {what}; raise --code_reserve, here and for the run")
    write_atomic(args.out, content)
    digest = hashlib.sha256(content).hexdigest()
    print(f"pack path:{args.out} recipe:{config.recipe} code_bytes:{len(content)} reserve:{reserve} sha256:{digest}")


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--recipe", default="4b7l", help="what it shall be able to run [4b7l]")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--code_reserve", type=int, help="most bytes [as the recipe says]")
    return run_program(run, *split_options(parser, argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
