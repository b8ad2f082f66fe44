"""The offline corpus: English technical prose that is already on the machine, as a dataset folder.

    python -m data.localtext [--out data/local] [--vocab_size 3072] [--force]
    python -m data.localtext --held_out [--out data/heldout]     to decide by: never tune on what is scored

It takes documentation strings of more than 200 characters (of modules, classes and functions, and those that
compiled functions are given by a call) and the help topics, of this Python's standard library and of every
distribution that requirements.txt installs, dependencies included. Sources are compiled, never imported or run.
Near duplicates go by one rule: a document is dropped when at least half of its four-word sequences (letters
only, case ignored) also occur in documents that have more of them. The rule comes before the split, so it
holds across it. Installed versions alone decide the result. With --held_out no validation document is in the
folder: some of the training documents take their place, for every choice that is made by measuring.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import marshal
import platform
import re
import struct
import sys
import sysconfig
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import CodeType

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import loopgolf.words
from data.folder import (
    TOKENIZER,
    building,
    compute_sha256,
    flatten,
    load_manifest,
    log,
    positive,
    started_pool,
    tidy_when_terminated,
    write_manifest,
)
from data.tokenizer import VAL_FRACTION, encode_documents, is_validation, train_tokenizer
from loopgolf.errors import DataError
from loopgolf.options import Parser
from loopgolf.runtime import run_program

ROOT = Path(__file__).resolve().parent.parent
MIN_CHARS = 200
HELD_OUT_FRACTION = 0.03  # of all documents, those that come next in the order of the split
SHINGLE_WORDS = 4
# Tests hold little prose, and some systems leave them out.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
DOC_CALLS = ("docstr", "newdoc")  # in the names of functions that give documentation to compiled ones


@dataclass(frozen=True)
class Source:
    """Something installed that holds prose."""

    name: str
    version: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    shingles: np.ndarray  # (n,) uint64, unique


# --- what is installed


def read_requirements(path: Path) -> list[Requirement]:
    if not path.is_file():
        raise DataError(f"{path}: missing; run this from a complete checkout")
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def find_distributions(requirements: Iterable[Requirement]) -> tuple[dict[str, Distribution], list[str]]:
    """Installed distributions reachable from the requirements (without extras), and the names of absent ones.

    Walking the requirements keeps whatever else is installed, development tools say, out of the corpus.
    """
    found, absent, queue = {}, set(), list(requirements)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or name in absent or not is_needed:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        queue += map(Requirement, found[name].requires or ())
    return {name: found[name] for name in sorted(found)}, sorted(absent)


def build_sources(distributions: dict[str, Distribution]) -> list[Source]:
    """The standard library, then distributions by name: the first source of a text is credited with it."""
    standard = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in standard.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(standard).parts)
    ]
    sources = [Source("python", platform.python_version(), tuple(sorted(files)))]
    for name, found in distributions.items():
        inside = [file for file in found.files or () if file.suffix == ".py" and ".." not in file.parts]
        files = [Path(str(found.locate_file(file))) for file in sorted(inside, key=str)]
        sources.append(Source(name, found.version, tuple(files)))
    return sources


# --- from source files to documents


def parse_documents(path: Path) -> list[str]:
    """The prose of one source file; a file that does not parse has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's odd escapes
        try:
            content = path.read_bytes()
            strings = (
                find_in_tree(path, content) if needs_tree(path, content) else find_in_code(load_code(path, content))
            )
        except (SyntaxError, ValueError, RecursionError, OSError):
            return []
    texts = [inspect.cleandoc(text) for text in strings]
    return [text for text in texts if len(text) > MIN_CHARS and is_utf8(text)]


def needs_tree(path: Path, content: bytes) -> bool:
    """Whether compiled code does not tell what counts; few files take this way, ten times as long."""
    words = (*DOC_CALLS, "\n__doc__")  # by assignment it is no documentation string
    return is_topics(path) or any(word.encode() in content for word in words)


def is_topics(path: Path) -> bool:
    return path.parts[-2:] == ("pydoc_data", "topics.py")


def load_code(path: Path, content: bytes) -> CodeType:
    """The compiled file, from Python's cache where it has the file as it is now: that takes a tenth of the time."""
    try:
        cached = Path(importlib.util.cache_from_source(str(path))).read_bytes()
        stat = path.stat()
        expected = importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, int(stat.st_mtime) & 0xFFFFFFFF, len(content))
        if cached[:16] == expected:
            return marshal.loads(cached[16:])
    except (OSError, EOFError, ValueError, TypeError):
        pass
    return compile(content, str(path), "exec", dont_inherit=True, optimize=0)


def find_in_code(code: CodeType) -> list[str]:
    """Documentation strings of a compiled module and all classes and functions in it."""
    found = []
    waiting = [code]
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        constants = code.co_consts
        if code.co_flags & inspect.CO_OPTIMIZED:  # a function: its first constant, unless it is a lambda or a generator
            constants = () if code.co_name.startswith("<") else constants[:1]
        elif "__doc__" not in code.co_names[:6]:
            constants = ()
        elif code.co_name != "<module>":
            constants = constants[1:]  # the name of a class comes first
        found += [constant for constant in constants if isinstance(constant, str)][:1]
    return found


def find_in_tree(path: Path, content: bytes) -> list[str]:
    tree = ast.parse(content)
    return [text for node in ast.walk(tree) for text in find_strings(node, is_topics(path))]


def find_strings(node: ast.AST, takes_all: bool) -> list[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [ast.get_docstring(node, clean=False) or ""]
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return list_constants(node) if any(part in name for part in DOC_CALLS) else []
    return list_constants(node) if takes_all and isinstance(node, ast.Dict) else []


def list_constants(tree: ast.AST) -> list[str]:
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


def is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:  # documentation about surrogates may hold some
        return False


def compute_shingles(text: str) -> np.ndarray:
    """Hashes of all sequences of SHINGLE_WORDS words; words are runs of letters, so numbers do not matter."""
    words = [zlib.crc32(word.encode()) for word in re.findall(r"[^\W\d_]+", text.lower())]
    padded = np.array(words + [0] * (SHINGLE_WORDS - len(words)), dtype=np.uint64)
    hashes = np.zeros(len(padded) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + padded[offset : offset + len(hashes)]
    return np.unique(hashes)


def read_source_file(path: Path) -> list[tuple[str, np.ndarray]]:
    """Work of one process: the documents of a file with their shingles."""
    gc.disable()  # syntax trees are large and free of cycles: collecting them doubles the time
    return [(text, compute_shingles(text)) for text in parse_documents(path)]


def collect_documents(sources: list[Source], workers: int | None = None) -> list[Document]:
    """Every distinct text of the sources, credited to the first source that has it."""
    paths = [(source.name, path) for source in sources for path in source.files]
    found: dict[str, Document] = {}
    with started_pool(workers) as pool:
        results = pool.map(read_source_file, [path for _, path in paths], chunksize=16)
        for (source, _), documents in zip(paths, results, strict=True):
            for text, shingles in documents:
                found.setdefault(text, Document(text, source, shingles))
    return list(found.values())


def drop_near_duplicates(documents: list[Document]) -> list[Document]:
    """The rule of the file's docstring; the result is in the order of the content hashes, a fixed shuffle."""
    if not documents:
        return []
    by_size = sorted(documents, key=lambda document: (-len(document.shingles), content_hash(document)))
    shingles = np.concatenate([document.shingles for document in by_size])
    is_new = np.zeros(len(shingles), dtype=np.int64)
    is_new[np.unique(shingles, return_index=True)[1]] = 1  # the first place is in the largest document
    sizes = np.array([len(document.shingles) for document in by_size])
    new_counts = np.add.reduceat(is_new, np.cumsum(sizes) - sizes)
    kept = [by_size[index] for index in np.flatnonzero(2 * new_counts > sizes)]
    return sorted(kept, key=content_hash)


def content_hash(document: Document) -> str:
    return hashlib.sha256(document.text.encode()).hexdigest()


# --- the dataset folder


def compute_key(distributions: dict[str, Distribution], absent: list[str], vocab_size: int, held_out: bool) -> dict:
    """Everything that decides the corpus; a folder whose manifest holds the same key needs no new build."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(loopgolf.words.__file__)]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return {
        "python": platform.python_version(),
        "vocab_size": vocab_size,
        "held_out": held_out,
        "code_sha256": code.hexdigest(),
        "distributions": {name: found.version for name, found in distributions.items()},
        "absent": absent,
    }


def is_valid(out: Path, key: dict) -> bool:
    """Whether a folder was built from this key and still has all its files in full."""
    try:
        manifest = load_manifest(out)
    except DataError:
        return False
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    return manifest.get("key") == key and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items()
    )


def build_corpus(out: Path, sources: list[Source], key: dict) -> dict[str, dict[str, int]]:
    found = collect_documents(sources)
    documents = drop_near_duplicates(found)
    log("documents", found=len(found), kept=len(documents), dropped=len(found) - len(documents))
    name, val_fraction, vocab_size = "local", VAL_FRACTION, key["vocab_size"]
    if key["held_out"]:
        documents = [document for document in documents if not is_validation(document.text, VAL_FRACTION)]
        name, val_fraction = "heldout", VAL_FRACTION + HELD_OUT_FRACTION
    texts = [document.text for document in documents]
    with building(out, replace=True) as folder:
        training = [text for text in texts if not is_validation(text, val_fraction)]
        train_tokenizer(training, folder / TOKENIZER, vocab_size, marked=True)
        log("tokenizer", vocab_size=vocab_size, sha256=compute_sha256(folder / TOKENIZER))
        counts = encode_documents(texts, folder / TOKENIZER, folder, name, val_fraction)
        facts = {"name": name, "vocab_size": vocab_size, "splits": counts}
        write_manifest(folder, facts | {"sources": describe_sources(sources, documents), "key": key})
    return counts


def describe_sources(sources: list[Source], documents: list[Document]) -> list[dict]:
    counts = Counter(document.source for document in documents)
    text_bytes: Counter[str] = Counter()
    for document in documents:
        text_bytes[document.source] += len(document.text.encode())
    return [
        {
            "distribution": source.name,
            "version": source.version,
            "documents": counts[source.name],
            "text_bytes": text_bytes[source.name],
        }
        for source in sources
    ]


def make_local(out: str, vocab_size: int, held_out: bool, force: bool) -> None:
    start, folder = time.perf_counter(), Path(out)
    distributions, absent = find_distributions(read_requirements(ROOT / "requirements.txt"))
    key = compute_key(distributions, absent, vocab_size, held_out)
    if not force and is_valid(folder, key):
        counts, state = load_manifest(folder)["splits"], "ready"
    else:
        log("sources", python=key["python"], distributions=len(distributions), absent=",".join(absent) or "-")
        counts, state = build_corpus(folder, build_sources(distributions), key), "built"
    log("localtext", state=state, out=out, **flatten(counts), seconds=f"{time.perf_counter() - start:.1f}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m data.localtext", description="Build the offline corpus from what is installed.")
    parser.add_argument("--out", help="the dataset folder (data/local, or data/heldout with --held_out)")
    parser.add_argument("--vocab_size", type=positive, default=3072, help="pieces of the tokenizer (3072)")
    parser.add_argument("--held_out", action="store_true", help="score training documents instead, to decide by")
    parser.add_argument("--force", action="store_true", help="build it again even when it is there and valid")
    args = vars(parser.parse_args(argv))
    args["out"] = args["out"] or ("data/heldout" if args["held_out"] else "data/local")
    with tidy_when_terminated():
        return run_program(lambda: make_local(**args))


if __name__ == "__main__":
    sys.exit(main())
