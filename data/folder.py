"""Common to the programs that make a dataset folder: a safe way to build it, its manifest, its log.

A dataset folder holds shards `*_train_NNNNNN.bin` and `*_val_NNNNNN.bin`, `tokenizer.model`, `manifest.json`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from loopgolf.errors import DataError
from loopgolf.runtime import Log, write_atomic

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"

log = Log()


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


@contextlib.contextmanager
def tidy_when_terminated() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C, so that what is half made is removed."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


@contextlib.contextmanager
def started_pool(workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, one per core by default; spawned, as the caller may have threads; deaf to Ctrl-C."""
    pool = ProcessPoolExecutor(
        workers or os.cpu_count(), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure there is nothing to wait for


def flatten(splits: dict[str, dict[str, int]]) -> dict[str, int]:
    """The counts of all splits as fields of one log line."""
    return {f"{split}_{key}": count for split, part in splits.items() for key, count in part.items()}


def compute_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, content: dict) -> None:
    """Write `manifest.json`: the given content, then size and sha256 of every other file of the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps(content | {"files": files}, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / MANIFEST, text.encode())


def load_manifest(folder: str | Path) -> dict:
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {folder} is no finished dataset folder, make it again") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); delete the folder and build it again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path}: no list of files in it; delete the folder and build it again")
    return manifest


@contextlib.contextmanager
def building(out: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` at the end; on failure `out` stays as it was."""
    out = Path(out)
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not (replace and (out / MANIFEST).is_file()):  # never sweep away something else
        raise DataError(f"{out}: already there; delete it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    partial.mkdir()
    try:
        yield partial
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
