"""Looks into the scripts of submission folders without running them: ours, packed by tools.pack next to its readable
source, and strangers', plain or wrapped in a decompressing line.
"""

from __future__ import annotations

import ast
import base64
import bz2
import hashlib
import io
import lzma
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import train_gpt
from tools import pack

MAX_SOURCE_BYTES = 8 << 20  # more than any script; a few bytes can decompress to gigabytes
DIVIDER = "# ==== {} ===="
PREFACE = """# The readable source of the packed train_gpt.py beside it: the files that it was packed from, unchanged,
# one below the other. To read, not to run.
"""


class ScriptError(ValueError):
    """A script that cannot work: one line."""


class Unreadable(ValueError):
    """A script that may well work, but cannot be looked into here."""


# ----------------------------------------------------------------------------------------------------------------------
# Ours
# ----------------------------------------------------------------------------------------------------------------------


def counted_sources(config: train_gpt.Config) -> dict[str, str]:
    """The files of this repository that a run of this config counts, by path, in the order in which it hashes them."""
    return pack.read_counted(config)


def hash_sources(sources: dict[str, str]) -> str:
    return hashlib.sha256("".join(sources.values()).encode()).hexdigest()


def join_sources(sources: dict[str, str]) -> str:
    return PREFACE + "".join(f"{DIVIDER.format(name)}\n{text}" for name, text in sources.items())


def split_sources(text: str) -> dict[str, str]:
    """The files back from a readable source; empty where it is not one of ours."""
    parts = re.split(r"^# ==== (\S+) ====\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


@cache
def pack_sources(joined: str, recipe: str) -> bytes:
    """What tools.pack makes of the files in a readable source for a recipe."""
    return pack.pack(split_sources(joined), recipe)


def unpack_modules(content: bytes) -> dict[str, str]:
    """The modules inside a packed script of ours, by path, in the order in which a run of it hashes them."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if max(sizes.values(), default=0) > MAX_SOURCE_BYTES or archive.testzip():
                raise ValueError("an entry is damaged or too large")
            main = archive.read("__main__.py").decode()
            code = archive.read("code") if "code" in sizes else b""
    except Exception as error:  # a damaged archive makes zipfile raise nearly anything
        raise ScriptError(f"the zip application does not unzip: {error}") from None
    if main != pack.STUB:
        parse_source(main)
        raise Unreadable("a zip application of another packer")
    try:
        start, *parts = bz2.BZ2Decompressor().decompress(code, MAX_SOURCE_BYTES).decode().split("\0")
    except (ValueError, OSError) as error:
        raise ScriptError(f"the code in the zip application does not decompress: {error}") from None
    if start != pack.START:
        raise Unreadable("a zip application with another start script")
    return dict(zip(parts[::2], parts[1::2]))


def unpack_zip(content: bytes) -> str:
    """The modules inside a packed script of ours, one below the other."""
    return "".join(unpack_modules(content).values())


# ----------------------------------------------------------------------------------------------------------------------
# Anybody's
# ----------------------------------------------------------------------------------------------------------------------


def parse_source(text: str | bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are the author's
            return ast.parse(text)
    except SyntaxError as error:
        if "f-string" in str(error):
            raise Unreadable(f"line {error.lineno} needs a newer Python than this one: {error.msg}") from None
        raise ScriptError(f"does not compile: {error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ScriptError(f"does not compile: {error.__class__.__name__}: {error}") from None


def decode_text(text: str | bytes, filters: list[dict]) -> bytes | None:
    """What a long literal holds once its base85 or base64 and its compression are undone."""
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode):
        try:
            raw = decode(text)
        except ValueError:
            continue
        readers: list[Callable[[], Any]] = [lambda: lzma.LZMADecompressor(memlimit=1 << 28), zlib.decompressobj]
        if filters:
            readers.append(lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters))
        for reader in readers:
            try:
                return reader().decompress(raw, MAX_SOURCE_BYTES)
            except (lzma.LZMAError, zlib.error, ValueError, TypeError):
                continue
    return None


def find_filters(tree: ast.Module) -> list[dict]:
    """The literal `filters=[{…}]` of a call of lzma, with no more memory than a script needs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "filters" and isinstance(node.value, ast.List):
            found = []
            for item in node.value.elts:
                pairs = zip(item.keys, item.values) if isinstance(item, ast.Dict) else ()
                settings = {getattr(key, "value", None): constant_of(value) for key, value in pairs}
                found.append(settings | {"dict_size": MAX_SOURCE_BYTES})
            return found
    return []


def constant_of(node: ast.expr):
    """A number, or one of lzma's constants."""
    if isinstance(node, ast.Attribute):
        return getattr(lzma, node.attr, None) if node.attr.isupper() else None
    return node.value if isinstance(node, ast.Constant) else None


def unwrap(content: bytes) -> tuple[ast.Module, bool]:
    """The tree of a stranger's script, and whether it was wrapped."""
    tree = parse_source(content)
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str | bytes)]
    longest = max(texts, key=len, default="")
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    if "exec" not in calls or len(longest) < len(content) // 2:
        return tree, False
    inner = decode_text(longest, find_filters(tree))
    if inner is None:
        raise Unreadable("wrapped in a way that this check does not undo without running it")
    return parse_source(inner), True


def helper_files(script: Path, tree: ast.Module) -> list[Path]:
    """Python files next to the script that it imports or names: they count as code too."""
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name.split(".")[0] + ".py" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named.add(node.module.split(".")[0] + ".py")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            named.add(node.value.rsplit("/", 1)[-1])
    return [path for path in sorted(script.parent.glob("*.py")) if path.name in named and path != script]
