"""The challenge's published FineWeb shards and tokenizer, from the Hugging Face hub into a dataset folder.

    python -m data.fineweb [--variant sp1024|sp8192] [--train_shards N] [--out FOLDER] [--repo OWNER/NAME]
    python -m data.fineweb verify [--out FOLDER]

The published manifest says what there is. The files get their places in the folder when all have arrived, so
that nobody trains on half of the data; a second call resumes with the files that are missing. `verify` reads
everything and works on any dataset folder of this repository.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from data.folder import (
    MANIFEST,
    TOKENIZER,
    compute_sha256,
    flatten,
    load_manifest,
    log,
    positive,
    tidy_when_terminated,
    write_manifest,
)
from data.shards import find_shards, read_shard
from data.tokenizer import load_tokenizer
from loopgolf.errors import DataError
from loopgolf.options import Parser
from loopgolf.runtime import run_program

# The challenge's own repository holds sp1024 only; other vocabularies are published by participants.
REPOSITORIES = {"sp1024": "willdepueoai/parameter-golf", "sp8192": "kevclark/parameter-golf"}
REMOTE_ROOT = "datasets"
USUAL_TRAIN_SHARDS = 80
CONNECTIONS = 4
# A crawl repeats a page now and then. The accident to catch is larger: documents given to both splits.
MAX_SHARED_FRACTION = 0.01

T = TypeVar("T")


# --- the hub


@dataclass(frozen=True)
class RemoteFile:
    """A published file, and its name in the dataset folder."""

    path: str
    name: str
    size: int
    etag: str  # sha256 of a large file, git's blob hash of a small one
    commit: str


def import_hub() -> ModuleType:
    try:
        import huggingface_hub.errors
    except ImportError:
        raise DataError("huggingface_hub is not installed; `pip install huggingface_hub`") from None
    return huggingface_hub


def ask_hub(repo: str, path: str, request: Callable[[], T]) -> T:
    """Make one request to the hub; its many exceptions become one line each."""
    errors = import_hub().errors
    try:
        return request()
    except errors.RepositoryNotFoundError:
        raise DataError(f"{repo}: no such public dataset repository; check --repo") from None
    except errors.EntryNotFoundError:
        raise DataError(f"{repo}: {path} is missing there; choose fewer --train_shards or another --repo") from None
    except errors.HFValidationError:
        raise DataError(f"{repo}: not the name of a repository; give --repo OWNER/NAME") from None
    except errors.OfflineModeIsEnabled:
        raise OSError("the hub client is in offline mode; unset HF_HUB_OFFLINE and run again") from None
    except (errors.HTTPError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise OSError(
            f"{repo}: {path} did not arrive ({reason}); run again, files that have arrived are kept"
        ) from None


def look_up(repo: str, path: str, name: str) -> RemoteFile:
    """Size and hash of a published file, without its content."""
    hub = import_hub()
    found = ask_hub(repo, path, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(repo, path, repo_type="dataset")))
    if found.size is None or not found.etag:
        raise DataError(f"{repo}: the server tells no size or hash of {path}; check HF_ENDPOINT")
    return RemoteFile(path, name, found.size, found.etag, found.commit_hash or "")


def fetch(repo: str, remote: RemoteFile, part: Path) -> Path:
    """Download one file and check that it is what was published."""
    hub = import_hub()

    def request() -> str:
        return hub.hf_hub_download(repo, remote.path, repo_type="dataset", local_dir=part / "hub")

    arrived = Path(ask_hub(repo, remote.path, request))
    if arrived.stat().st_size != remote.size or not matches_etag(arrived, remote.etag):
        raise DataError(f"{repo}: {remote.path} arrived damaged; run again")
    return arrived


def fetch_into(repo: str, remote: RemoteFile, part: Path) -> RemoteFile:
    """Download one file; it gets its name among the arrived ones after it was checked."""
    arrived = fetch(repo, remote, part)
    if remote.name.endswith(".bin"):
        try:
            read_shard(arrived)
        except DataError as error:
            fault = str(error).removeprefix(f"{arrived}: ").split(";")[0]
            raise DataError(f"{repo}: {remote.path} is broken there ({fault}); use another --repo") from None
    arrived.replace(part / remote.name)
    return remote


def matches_etag(path: Path, etag: str) -> bool:
    if len(etag) == 64:
        return compute_sha256(path) == etag
    if len(etag) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == etag
    return True  # a mirror that tags files in another way: the size has to do


# --- what to download


def load_published(repo: str, part: Path) -> dict:
    path = f"{REMOTE_ROOT}/{MANIFEST}"
    arrived = fetch(repo, look_up(repo, path, MANIFEST), part)
    try:
        published = json.loads(arrived.read_bytes())
    except ValueError:
        published = None
    if not isinstance(published, dict):
        raise DataError(f"{repo}: {path} is not a JSON object; use another --repo")
    return published


def choose(published: dict, kind: str, name: object, repo: str) -> dict:
    """The entry of this name in one of the lists of the published manifest."""
    entries = [entry for entry in published.get(kind) or [] if isinstance(entry, dict)]
    for entry in entries:
        if entry.get("name") == name:
            return entry
    names = ", ".join(str(entry.get("name")) for entry in entries) or "nothing"
    raise DataError(f"{repo}: no {name} among its {kind} ({names}); choose another --variant or --repo")


def choose_files(published: dict, variant: str, train_shards: int | None, repo: str) -> tuple[dict, dict[str, str]]:
    """The published facts about a dataset, and remote path -> local name of every file to have."""
    dataset = choose(published, "datasets", f"fineweb10B_{variant}", repo)
    tokenizer = choose(published, "tokenizers", dataset.get("tokenizer_name"), repo)
    stats = dataset.get("stats") or {}
    if "model_path" not in tokenizer or not {"files_train", "files_val"} <= stats.keys():
        raise DataError(f"{repo}: its manifest lacks tokenizer or shard counts of {variant}; use another --repo")
    wanted = train_shards or min(USUAL_TRAIN_SHARDS, stats["files_train"])
    if wanted > stats["files_train"]:
        raise DataError(
            f"{repo}: {variant} has {stats['files_train']} training shards, not {wanted}; "
            "choose a smaller --train_shards"
        )
    names = [
        f"fineweb_{split}_{index:06d}.bin"
        for split, count in (("val", stats["files_val"]), ("train", wanted))
        for index in range(count)
    ]
    paths = {f"{REMOTE_ROOT}/{tokenizer['model_path']}": TOKENIZER}
    return dataset, paths | {f"{REMOTE_ROOT}/datasets/{dataset['name']}/{name}": name for name in names}


def check_folder(out: Path, names: set[str]) -> None:
    """Refuse a folder with more shards than asked for: neither deleting them nor training on them is safe."""
    extra = sorted({path.name for path in out.glob("*.bin")} - names)
    if extra:
        raise DataError(
            f"{out / extra[0]}: not among the files asked for; choose a larger --train_shards or another --out"
        )


def check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: {needed / 1e9:.2f} GB to download but {free / 1e9:.2f} GB free; "
            "free some space, choose a smaller --train_shards or another --out"
        )


def is_there(remote: RemoteFile, folder: Path) -> bool:
    """Whether a file is there in full; its content is compared with the published hash at the end."""
    path = folder / remote.name
    return path.is_file() and path.stat().st_size == remote.size


# --- download


def download(variant: str, train_shards: int | None, out: Path, repo: str) -> None:
    """Make a dataset folder of the published files; what has arrived waits in its folder .part."""
    part = out / ".part"
    try:
        part.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{out}: not a folder; choose another --out") from None
    try:
        dataset, paths = choose_files(load_published(repo, part), variant, train_shards, repo)
        check_folder(out, set(paths.values()))
        with ThreadPoolExecutor(4 * CONNECTIONS) as pool:
            remotes = list(pool.map(lambda path: look_up(repo, path, paths[path]), paths))
        fetch_missing(repo, remotes, out, part)
        finish(remotes, dataset, repo, out, part)
    finally:
        shutil.rmtree(part / "hub", ignore_errors=True)
        for folder in (part, out):  # leave no empty folder behind
            if not any(folder.iterdir()):
                folder.rmdir()


def fetch_missing(repo: str, remotes: list[RemoteFile], out: Path, part: Path) -> None:
    """Fetch files over a few connections; on a terminal with one bar, elsewhere with a line for each."""
    missing = [remote for remote in remotes if not is_there(remote, out) and not is_there(remote, part)]
    missing_bytes = sum(remote.size for remote in missing)
    log("fineweb", repo=repo, files=len(remotes), missing=len(missing), missing_bytes=missing_bytes)
    check_disk(out, missing_bytes)
    import_hub().utils.disable_progress_bars()  # its own bars, one for each file, would cross each other
    with (
        tqdm(total=missing_bytes, unit="B", unit_scale=True, desc="download", disable=None) as progress,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        for number, remote in enumerate(pool.map(lambda remote: fetch_into(repo, remote, part), missing), 1):
            progress.update(remote.size)
            if progress.disable:
                log("download", file=remote.name, bytes=remote.size, done=f"{number}/{len(missing)}")


def finish(remotes: list[RemoteFile], dataset: dict, repo: str, out: Path, part: Path) -> None:
    """Give all files their place, compare them with what was published, write the manifest."""
    for remote in remotes:
        if (part / remote.name).is_file():
            (part / remote.name).replace(out / remote.name)
        elif not matches_etag(out / remote.name, remote.etag):  # of an earlier call; new ones are checked
            raise DataError(f"{out / remote.name}: not the published content; delete it and run again")
    splits = {split: count_published(out, split, dataset["stats"]) for split in ("train", "val")}
    manifest = {
        "name": dataset["name"],
        "vocab_size": len(load_tokenizer(out / TOKENIZER)),
        "splits": splits,
        "repo": repo,
        "commits": sorted({remote.commit for remote in remotes}),
    }
    write_manifest(out, manifest)
    log("fineweb", out=out, **flatten(splits))


def count_published(out: Path, split: str, stats: dict) -> dict[str, int]:
    """Counts of a split; a whole one is compared with what is published, and has its count of documents."""
    counts = count_tokens(find_shards(out, split))
    if counts["shards"] != stats[f"files_{split}"]:
        return counts  # published counts are of the whole split only
    check_equal(f"{out}: tokens in {split}", counts["tokens"], stats.get(f"tokens_{split}"))
    documents = stats.get(f"docs_{split}")
    return counts if documents is None else counts | {"documents": documents}


def count_tokens(shards: list[Path]) -> dict[str, int]:
    return {"shards": len(shards), "tokens": sum(len(read_shard(path)) for path in shards)}


# --- verify


def check_equal(what: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DataError(f"{what}: {found} where the manifest says {expected}; delete the folder and make it again")


def iterate_documents(paths: Iterable[Path], vocab_size: int, bos: int) -> Iterator[memoryview]:
    """The tokens of every document, as bytes, with those that run on from shard to shard put together."""
    rest = np.empty(0, np.uint16)
    for path in paths:
        tokens = np.concatenate([rest, read_shard(path, vocab_size)])
        if tokens[0] != bos:
            raise DataError(f"{path}: its first document does not start with BOS ({bos}); make the folder again")
        starts, content = np.flatnonzero(tokens == bos), memoryview(tokens.tobytes())
        yield from (content[start:end] for start, end in pairwise((2 * starts).tolist()))
        rest = tokens[starts[-1] :]
    yield memoryview(rest.tobytes())


def verify(out: Path) -> None:
    """Check a dataset folder against its manifest, its tokenizer and the rules of the format."""
    manifest, tokenizer = load_manifest(out), load_tokenizer(out / TOKENIZER)
    check_equal(f"{out}: vocabulary", len(tokenizer), manifest.get("vocab_size"))
    verify_files(out, manifest["files"])
    hashes = {}  # Python's own hash: equal documents are looked for within one process
    for split in ("val", "train"):
        shards = find_shards(out, split)
        progress = tqdm(shards, desc=split, disable=None)
        documents = iterate_documents(progress, len(tokenizer), tokenizer.bos_id())
        hashes[split] = np.fromiter(map(hash, documents), dtype=np.int64)
        counts = count_tokens(shards) | {"documents": len(hashes[split])}
        for key, expected in manifest.get("splits", {}).get(split, {}).items():
            check_equal(f"{out}: {key} in {split}", counts.get(key, expected), expected)
        log("verify", split=split, **counts)
    shared = int(np.isin(hashes["val"], hashes["train"]).sum())
    if shared > MAX_SHARED_FRACTION * len(hashes["val"]):
        raise DataError(f"{out}: {shared} validation documents are training documents too; make the folder again")
    log("verify", out=out, files=len(manifest["files"]), shared_documents=shared, state="good")


def verify_files(out: Path, files: dict) -> None:
    """Every file of the manifest is there with its size and content, and there is no other shard."""
    extra = sorted({path.name for path in out.glob("*.bin")} - files.keys())
    if extra:
        raise DataError(f"{out / extra[0]}: not in the manifest; delete it or make the folder again")
    for name, facts in tqdm(sorted(files.items()), desc="sha256", disable=None):
        path = out / name
        if not path.is_file():
            raise DataError(f"{path}: missing; make the folder again")
        if name.endswith(".bin"):
            read_shard(path)  # tells zero-byte, truncated and foreign files apart
        if compute_sha256(path) != facts["sha256"]:
            raise DataError(f"{path}: its sha256 is not the manifest's; delete it and make the folder again")


# --- command line


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m data.fineweb", description="Download the challenge's shards, or verify a folder.")
    parser.add_argument("command", nargs="?", choices=("download", "verify"), default="download")
    parser.add_argument("--variant", choices=sorted(REPOSITORIES), default="sp1024", help="vocabulary (sp1024)")
    parser.add_argument(
        "--train_shards",
        type=positive,
        metavar="N",
        help=f"how many training shards ({USUAL_TRAIN_SHARDS}, or all if there are fewer)",
    )
    parser.add_argument("--out", help="the dataset folder (data/fineweb_VARIANT)")
    parser.add_argument("--repo", help="dataset repository on the hub (the publisher's of the variant)")
    args = parser.parse_args(argv)
    out = Path(args.out or f"data/fineweb_{args.variant}")
    repo = args.repo or REPOSITORIES[args.variant]
    with tidy_when_terminated():
        if args.command == "verify":
            return run_program(verify, out)
        return run_program(download, args.variant, args.train_shards, out, repo)


if __name__ == "__main__":
    sys.exit(main())
