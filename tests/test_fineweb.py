"""Download and verification: the real hub client against a small server on this machine, faults included.

python -m pytest tests/test_fineweb.py
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants

from data import fineweb
from data.folder import write_manifest
from data.shards import find_shards, read_shard, write_shard
from data.tokenizer import encode_document, load_tokenizer, train_tokenizer
from loopgolf.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
REPO = "somebody/some-export"
COMMIT = "c" * 40
SHARDS = "datasets/datasets/fineweb10B_sp1024/fineweb_"
LAST = f"{SHARDS}train_000002.bin"


class Hub:
    """What a published repository looks like to the client; `faults` says what goes wrong with a path."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.faults, self.sent = dict(files), {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.make_handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.content_url = f"http://localhost:{self.server.server_port}/content"  # by name another host
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def make_handler(hub) -> type[BaseHTTPRequestHandler]:  # inside, self is the handler
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_content=False)

            def do_GET(self) -> None:
                hub.answer(self, with_content=True)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, request: BaseHTTPRequestHandler, with_content: bool) -> None:
        """Shards are large files: the hub tells size and sha256 and redirects to where the content is."""
        prefix = f"/datasets/{REPO}/resolve/main/"
        path = request.path.removeprefix("/content/").removeprefix(prefix)
        content, fault = self.files.get(path), self.faults.get(path)
        is_stored = request.path.startswith("/content/")
        if not is_stored and not request.path.startswith(prefix):
            return self.reply(request, 404, {"X-Error-Code": "RepoNotFound"})
        if content is None:
            return self.reply(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if fault == "error" and with_content:
            return self.reply(request, 500, {})
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        if path.endswith(".bin") and not is_stored:
            return self.reply(request, 302, headers | {"Location": f"{self.content_url}/{path}"})
        sent = {"empty": b"", "cut": content[:-100], "flipped": content[:-1] + b"?"}.get(fault, content)
        if with_content:
            self.sent.append(path)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.reply(request, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{blob}"'}, sent, with_content)

    def reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes = b"",
        with_content: bool = False,
    ) -> None:
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            request.send_header(key, value)
        request.end_headers()
        if with_content:
            request.wfile.write(content)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One validation and three training shards, with documents that run on from shard to shard."""
    folder = tmp_path_factory.mktemp("published")
    documents = [f"Document {n} is about {n * n} things and {n % 7} others.\n" for n in range(120)]
    train_tokenizer(documents, folder / "model", vocab_size=330)
    tokenizer, files, stats = load_tokenizer(folder / "model"), {}, {}
    for split, part, shard_count in (("val", documents[:20], 1), ("train", documents[20:], 3)):
        tokens = [token for text in part for token in encode_document(tokenizer, text)]
        for index, piece in enumerate(np.array_split(tokens, shard_count)):
            write_shard(folder / "shard", piece)
            files[f"{SHARDS}{split}_{index:06d}.bin"] = (folder / "shard").read_bytes()
        stats |= {f"files_{split}": shard_count, f"docs_{split}": len(part), f"tokens_{split}": len(tokens)}
    manifest = {
        "datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024", "stats": stats}],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    return files | {
        "datasets/tokenizers/fineweb_1024_bpe.model": (folder / "model").read_bytes(),
        "datasets/manifest.json": json.dumps(manifest).encode(),
    }


@pytest.fixture
def hub(published: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(published)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def download_in_process_of_its_own(hub: Hub, out: Path) -> subprocess.CompletedProcess:
    """As a user would: the client reads the environment when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(out.parent / "cache"), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "data.fineweb", "--repo", REPO, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., SimpleNamespace]:
    """The program in this process, with the client that it loads set to the server here."""

    def download(out: Path, *arguments: str, url: str = hub.url, is_offline: bool = False) -> SimpleNamespace:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": is_offline}
        caches = {name: str(tmp_path / "cache" / name) for name in ("HF_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")}
        for name, value in (values | caches).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "*")
        capsys.readouterr()
        code = fineweb.main(["--repo", REPO, "--out", str(out), *arguments])
        told = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=told.out, stderr=told.err)

    return download


def assert_refused(result: SimpleNamespace, code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.slow
def test_download_makes_a_dataset_folder(
    hub: Hub, download: Callable, published: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "fineweb"
    result = download_in_process_of_its_own(hub, out)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert {path.name for path in out.iterdir()} == {
        "fineweb_val_000000.bin",
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
        "tokenizer.model",
        "manifest.json",
    }
    for split in ("train", "val"):
        for path in find_shards(out, split):
            assert path.read_bytes() == published[f"datasets/datasets/fineweb10B_sp1024/{path.name}"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["repo"], manifest["commits"], manifest["vocab_size"]) == (REPO, [COMMIT], 330)
    assert manifest["splits"]["train"]["documents"] == 100 and manifest["splits"]["val"]["shards"] == 1
    fineweb.verify(out)

    hub.sent.clear()  # everything is there: only the manifest is read again
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert download(out).returncode == 0 and hub.sent == ["datasets/manifest.json"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_a_broken_transfer_is_refused_and_resumed(hub: Hub, download: Callable, tmp_path: Path) -> None:
    refusals = {
        "error": "did not arrive",
        "empty": "did not arrive",
        "cut": "did not arrive",
        "flipped": "arrived damaged",
    }
    for fault, message in refusals.items():
        hub.faults[LAST] = fault
        code = 2 if fault == "flipped" else 1
        assert_refused(download(tmp_path / "out"), code, LAST, message, "run again")
        with pytest.raises(DataError, match="no shard"):  # nobody trains on half of the data
            find_shards(tmp_path / "out", "train")
    hub.faults.clear()
    hub.sent.clear()
    assert download(tmp_path / "out").returncode == 0
    assert hub.sent == ["datasets/manifest.json", LAST]
    fineweb.verify(tmp_path / "out")


@pytest.mark.slow
def test_a_shard_that_is_published_broken(
    hub: Hub, download: Callable, published: dict[str, bytes], tmp_path: Path
) -> None:
    good = published[LAST]
    for content, fault in ((b"", "zero-byte file"), (good[:-2], "truncated"), (b"<html>" + good, "wrong magic")):
        hub.files[LAST] = content
        assert_refused(download(tmp_path / "out"), 2, LAST, fault, "another --repo")
        assert not list((tmp_path / "out").rglob("*train_000002*")), fault


@pytest.mark.slow
def test_a_shard_that_is_missing(hub: Hub, download: Callable, tmp_path: Path) -> None:
    del hub.files[LAST]
    assert_refused(download(tmp_path / "out"), 2, LAST, "missing there", "--train_shards")
    assert not (tmp_path / "out").exists()
    assert download(tmp_path / "out", "--train-shards", "2").returncode == 0
    assert len(find_shards(tmp_path / "out", "train")) == 2
    fineweb.verify(tmp_path / "out")


REFUSED = [
    (["--variant", "sp8192"], ["fineweb10B_sp8192", "fineweb10B_sp1024", "--variant"]),
    (["--train_shards", "4"], ["3 training shards, not 4"]),
    (["--repo", "nobody/nothing"], ["nobody/nothing: no such public dataset repository"]),
    (["--repo", "not a name"], ["not a name: not the name of a repository"]),
]


@pytest.mark.slow
def test_requests_that_cannot_be_met(download: Callable, tmp_path: Path) -> None:
    for arguments, parts in REFUSED:
        assert_refused(download(tmp_path / "out", *arguments), 2, *parts)
        assert not (tmp_path / "out").exists(), arguments


def test_a_number_of_shards_that_makes_no_sense(capsys: pytest.CaptureFixture) -> None:
    for given in (["--train_shards", "0"], ["--train-shards=x"]):
        with pytest.raises(SystemExit) as raised:
            fineweb.main(given)
        assert raised.value.code == 2 and "--train_shards" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_without_a_network(download: Callable, tmp_path: Path) -> None:
    unreachable = {"url": "http://127.0.0.1:9"}
    for settings, part in (({"is_offline": True}, "unset HF_HUB_OFFLINE"), (unreachable, "did not arrive")):
        assert_refused(download(tmp_path / "out", **settings), 1, part)
        assert not (tmp_path / "out").exists(), part


# --- without the network


def choose_files(published: dict[str, bytes], **changes: object) -> tuple[dict, dict[str, str]]:
    manifest = json.loads(published["datasets/manifest.json"]) | changes
    return fineweb.choose_files(manifest, "sp1024", None, REPO)


def test_the_usual_number_of_shards(published: dict[str, bytes]) -> None:
    assert len(choose_files(published)[1]) == 1 + 1 + 3
    datasets = json.loads(published["datasets/manifest.json"])["datasets"]
    datasets[0]["stats"]["files_train"] = 195
    assert len(choose_files(published, datasets=datasets)[1]) == 1 + 1 + 80


GAPS = [
    {"datasets": []},
    {"datasets": None},
    {"tokenizers": [7]},
    {"tokenizers": [{"name": "sp_bpe_1024"}]},
    {"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024"}]},
]


def test_a_published_manifest_with_gaps(published: dict[str, bytes]) -> None:
    for changes in GAPS:
        with pytest.raises(DataError, match=f"^{REPO}: .*(another|or) --repo$"):
            choose_files(published, **changes)


def test_more_shards_than_asked_for_are_not_touched(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(5))
    with pytest.raises(DataError, match="train_000001.bin: not among the files asked for"):
        fineweb.check_folder(tmp_path, {"fineweb_train_000000.bin"})
    assert (tmp_path / "fineweb_train_000001.bin").exists()


def test_disk_space_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000_000))
    fineweb.check_disk(tmp_path, 3_000_000_000)
    with pytest.raises(DataError, match="3.10 GB to download but 3.00 GB free"):
        fineweb.check_disk(tmp_path, 3_100_000_000)


def test_a_missing_client_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    assert fineweb.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- verify


@pytest.fixture
def dataset(published: dict[str, bytes], tmp_path: Path) -> Path:
    return make_dataset(published, tmp_path / "dataset")


def make_dataset(published: dict[str, bytes], out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path, content in published.items():
        (out / Path(path).name).write_bytes(content)
    (out / "fineweb_1024_bpe.model").rename(out / "tokenizer.model")
    write_counts(out)
    return out


def write_counts(out: Path, **changes: int) -> None:
    """A manifest that agrees with whatever is in the folder, but for the changes."""
    splits = {
        "train": fineweb.count_tokens(find_shards(out, "train")) | {"documents": 100},
        "val": fineweb.count_tokens(find_shards(out, "val")) | {"documents": 20},
    }
    splits["train"] |= changes
    write_manifest(out, {"vocab_size": 330, "splits": splits})


def change_tokens(out: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    write_shard(out / name, change(np.array(read_shard(out / name))))
    write_counts(out)


def overwrite(position: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda tokens: np.concatenate([tokens[:position], [value], tokens[position + 1 :]])


def first_documents(tokens: np.ndarray, count: int) -> np.ndarray:
    return tokens[: np.flatnonzero(tokens == 1)[count]]


def copy_documents(out: Path) -> None:
    """Two training documents become validation documents."""
    taken = first_documents(np.array(read_shard(out / "fineweb_train_000000.bin")), 2)
    change_tokens(
        out, "fineweb_val_000000.bin", lambda tokens: np.concatenate([taken, tokens[len(first_documents(tokens, 2)) :]])
    )


TRAIN = "fineweb_train_000001.bin"
FAULTS = {
    "zero-byte file": lambda out: (out / TRAIN).write_bytes(b""),
    "truncated": lambda out: os.truncate(out / TRAIN, (out / TRAIN).stat().st_size - 2),
    "wrong magic": lambda out: (out / TRAIN).write_bytes(b"?" + (out / TRAIN).read_bytes()[1:]),
    "missing": lambda out: (out / TRAIN).unlink(),
    "sha256": lambda out: (out / TRAIN).write_bytes((out / TRAIN).read_bytes()[:-2] + b"\1\1"),
    "not in the manifest": lambda out: shutil.copy(out / TRAIN, out / "fineweb_train_000009.bin"),
    "manifest.json: missing": lambda out: (out / "manifest.json").unlink(),
    "manifest.json: not JSON": lambda out: (out / "manifest.json").write_text("{"),
    "no such tokenizer": lambda out: (out / "tokenizer.model").unlink(),
    "vocabulary: 330 where": lambda out: write_manifest(out, {"vocab_size": 512}),
    "outside the vocabulary of 330": lambda out: change_tokens(out, TRAIN, overwrite(7, 330)),
    "does not start with BOS": lambda out: change_tokens(out, "fineweb_train_000000.bin", overwrite(0, 300)),
    "documents in train: 101": lambda out: change_tokens(out, TRAIN, overwrite(7, 1)),
    "documents in train: 99": lambda out: change_tokens(
        out, TRAIN, lambda tokens: overwrite(int(np.flatnonzero(tokens == 1)[0]), 300)(tokens)
    ),
    "tokens in train": lambda out: write_counts(out, tokens=5),
    "2 validation documents are training documents too": copy_documents,
}


def test_verify_accepts_a_good_folder(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    assert fineweb.main(["verify", "--out", str(dataset)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"verify out:{dataset} files:5 shared_documents:0 state:good"
    assert lines[1].startswith("verify split:train shards:3 ") and lines[1].endswith(" documents:100")


def test_verify_names_each_fault(published: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for fault, harm in FAULTS.items():
        dataset = make_dataset(published, tmp_path / "dataset")
        harm(dataset)
        assert fineweb.main(["verify", "--out", str(dataset)]) == 2, fault
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and fault in error and str(dataset) in error, fault


def test_documents_that_run_over_several_shards(tmp_path: Path) -> None:
    parts = [[1, 5, 6], [7, 8], [9, 1, 2], [1, 3]]
    for index, tokens in enumerate(parts):
        write_shard(tmp_path / f"t_train_{index:06d}.bin", np.array(tokens))
    documents = list(fineweb.iterate_documents(find_shards(tmp_path, "train"), 10, bos=1))
    assert [np.frombuffer(content, np.uint16).tolist() for content in documents] == [[1, 5, 6, 7, 8, 9], [1, 2], [1, 3]]
