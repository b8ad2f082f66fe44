"""Fuses the counted code into the one script of a record folder: train_gpt.py and the modules of this repository that
it imports become one module, without comments, docstrings and what main() never reaches, minified and compressed. A
module that is imported inside a function, as loopgolf.moe by a block with experts, comes along only --with its name.

The result is a zip application of two entries: a stub, and one bzip2 stream (2% smaller than LZMA on this text) with a
start script and the module. The stub runs the start script, which writes the module into a private temporary folder,
because Triton and torch.compile read the source of what they compile, and calls main(). The same code always gives the
same bytes.

Example:
    python -m tools.pack --out packed.py
    python packed.py --recipe 4b7l --dry_run
    python -m tools.pack --out packed.py --with loopgolf.moe --code_reserve 25000      for --recipe osrt_v4
"""

from __future__ import annotations

import argparse
import ast
import builtins
import bz2
import copy
import hashlib
import io
import sys
import zipfile
from collections import deque
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import train_gpt
from loopgolf.errors import DoesNotFit, Stop
from loopgolf.options import Parser
from loopgolf.runtime import run_program, write_atomic

ROOT = Path(train_gpt.__file__).resolve().parent
ENTRY = "train_gpt"
STUB = """import bz2
parts=bz2.decompress(__loader__.get_data("code")).decode().split("\\0")
exec(parts[0])
"""
START = """import os,sys,tempfile
archive,folder=sys.path[0],tempfile.TemporaryDirectory(prefix="loopgolf-",ignore_cleanup_errors=True)
with open(folder.name+"/train_gpt.py","w",encoding="utf-8") as file: file.write(parts[1])
sys.path[0]=folder.name
import train_gpt
sys.exit(train_gpt.main(sys.argv[1:],dict(os.environ),os.path.getsize(archive)))
"""


# A word that stands for the same thing everywhere compresses better than a letter that differs from place to place.
KEPT_LOCALS, KEPT_GLOBALS = ("config", "ctx", "model", "self"), dir(builtins)


class PackError(Stop):
    """Packing cannot go on: one line that says why and names the mend."""


def find_module(name: str) -> Path | None:
    """The file of a module of this repository."""
    path = ROOT / (name.replace(".", "/") + ".py")
    return path if path.is_file() else None


def load_counted(lazy: list[str] | tuple[str, ...] = ()) -> dict[str, ast.Module]:
    """The entry, every repository module that it imports outside of functions, and the lazy ones, by dotted name."""
    found, wanted = {}, [ENTRY, *lazy]
    while wanted:
        name = wanted.pop()
        if name in found or not (path := find_module(name)):
            continue
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
        wanted += imported_by(found[name])
    return found


def imported_by(tree: ast.Module) -> list[str]:
    """Names of modules, and of what may be modules, that are imported outside of functions."""
    found, nodes = [], deque([tree])
    while nodes:
        node = nodes.popleft()
        if not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def names_in(node: ast.AST) -> set[str]:
    used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    used |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return used | {alias.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for alias in n.names}


def defined_by(line: ast.AST) -> set[str]:
    """Names that a line at the top of a module binds, where nothing else depends on its being run."""
    if isinstance(line, ast.FunctionDef | ast.ClassDef):
        return {line.name}
    if isinstance(line, ast.Import | ast.ImportFrom):  # not even __future__ counts: annotations are not kept
        return {(alias.asname or alias.name).split(".")[0] for alias in line.names}
    if isinstance(line, ast.If | ast.Try | ast.ExceptHandler):  # what is there only beside Triton goes as a whole
        return set().union(*(defined_by(node) for node in ast.iter_child_nodes(line)))
    targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def keep_reachable(tree: ast.Module) -> None:
    """Removes the definitions and imports that main() cannot reach, going by names alone: rather too many stay."""
    kept, wanted = set(), {"main"}
    while wanted:
        reached = [line for line in tree.body if id(line) not in kept and defined_by(line) & wanted]
        kept |= {id(line) for line in reached}
        wanted = set().union(*(names_in(line) for line in reached))
    tree.body = [line for line in tree.body if id(line) in kept]


class DropImports(ast.NodeTransformer):
    """Modules that are fused need not import names from one another."""

    def __init__(self, modules: Collection[str]):
        self.modules = modules

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module not in self.modules:
            return node
        if renamed := [alias.name for alias in node.names if alias.asname]:
            raise PackError(f"{node.module}: {renamed[0]} is imported under another name; fused it has only its own")
        return ast.Pass()


def fuse(modules: dict[str, ast.Module]) -> ast.Module:
    """One module of all: what they import, each name once, then their lines: a module's behind those of the modules
    that it imports, the entry's last. A name has to mean the same everywhere."""
    imports, lines, owners = {}, [], {}
    needs = {name: sorted(modules.keys() & imported_by(modules[name])) for name in sorted(modules)}
    needs[ENTRY] = [name for name in needs if name != ENTRY]
    for name in TopologicalSorter(needs).static_order():
        for line in DropImports(modules).visit(modules[name]).body:
            if isinstance(line, ast.Import | ast.ImportFrom):
                for alias in line.names:
                    single = copy.copy(line)
                    single.names = [alias]
                    imports[ast.unparse(single)] = single
            elif not isinstance(line, ast.Expr | ast.Pass):
                lines.append(line)
                if isinstance(line, ast.Try):  # an import of Triton and what serves without it: the same in all modules
                    continue
                for bound in defined_by(line):
                    if owners.setdefault(bound, name) != name:
                        raise PackError(f"{owners[bound]} and {name} both define {bound}; rename it in one of them")
    return ast.Module([*imports.values(), *lines], [])


def drop_annotations(tree: ast.Module) -> None:
    """All but those that Triton reads; a dataclass field needs any."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg) and not is_constexpr(node):
            node.annotation = None


def is_constexpr(arg: ast.arg) -> bool:
    return arg.annotation is not None and "constexpr" in ast.unparse(arg.annotation)


def keywords_in(tree: ast.Module) -> set[str]:
    """Names of parameters that some call may give by keyword. By names alone: a call reaches the functions of the name
    that it calls, and those that are handed around as values; whatever is called, __call__ or forward may be behind."""
    takes, values, called = {}, {"__call__", "forward"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            names = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
            takes.setdefault(getattr(node, "name", "__call__"), set()).update(names)
        elif isinstance(node, ast.Call):
            called.add(id(node.func))
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in called:  # a call comes before what it calls
            values.add(name_of(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            takes.setdefault(node.name, set()).update(takes.get("__init__", ()))
    loose = set().union(*(takes.get(name, ()) for name in values))
    others = set(dir(builtins)) - takes.keys()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node.func) not in others]
    return set().union(*(
        {keyword.arg for keyword in call.keywords} & (loose | takes.get(name_of(call.func), set())) for call in calls
    ))  # fmt: skip


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def minify(tree: ast.Module, public: set[str]) -> str:
    """Without docstrings, with short names for all but attributes, what is `public` in a module, parameters that some
    call of the code gives by keyword, and what is better KEPT."""
    try:
        import python_minifier
    except ImportError:
        raise PackError("packing needs python-minifier: python -m pip install -r requirements-dev.txt") from None
    fixed, keywords = [], keywords_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            everyone = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            if any(map(is_constexpr, everyone)):
                fixed += [arg.arg for arg in everyone]  # Triton reads these; it wants builtins by their names, too
            else:
                while node.args and node.args[0].arg not in keywords:
                    node.posonlyargs.append(node.args.pop(0))
    annotations = python_minifier.RemoveAnnotationsOptions(
        remove_class_attribute_annotations=False, remove_argument_annotations=False
    )
    return python_minifier.minify(
        ast.unparse(tree), remove_literal_statements=True, remove_annotations=annotations, hoist_literals=False,
        rename_globals=True, preserve_globals=sorted(public.union(KEPT_GLOBALS)),
        preserve_locals=[*fixed, *KEPT_LOCALS],
    )  # fmt: skip


def pack(modules: dict[str, ast.Module]) -> tuple[bytes, int]:
    """The script, and the characters in it before compression."""
    tree = fuse(modules)
    drop_annotations(tree)
    keep_reachable(tree)
    text = minify(tree, {"main"})
    code = bz2.compress(f"{START}\0{text}".encode())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("__main__.py", STUB.encode()), ("code", code)):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # or the packing system would show in the bytes
            archive.writestr(entry, content)
    return buffer.getvalue(), len(text)


def run(args: argparse.Namespace) -> None:
    if unknown := [name for name in args.lazy if not find_module(name)]:
        raise PackError(f"--with {unknown[0]}: no module of this repository; write it like loopgolf.moe")
    content, characters = pack(load_counted(args.lazy))
    if len(content) > args.code_reserve:
        over = f"{len(content)} bytes, more than code_reserve={args.code_reserve}"
        raise DoesNotFit(f"the packed code has {over}; there are {characters} characters in it to shorten")
    write_atomic(args.out, content)
    print(f"pack path:{args.out} code_bytes:{len(content)} raw_bytes:{characters} reserve:{args.code_reserve} "
          f"sha256:{hashlib.sha256(content).hexdigest()}")  # fmt: skip


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--code_reserve", type=int, default=train_gpt.Config().code_reserve, help="most bytes [24000]")
    parser.add_argument("--with", dest="lazy", nargs="+", default=[], metavar="MODULE", help="lazy imports to pack")
    return run_program(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
