"""The offline corpus: what is taken, what is dropped, and that it is the same every time.

Built here from small trees and one small installed distribution, never from all that is installed.

    python -m pytest tests/test_localtext.py
"""

import argparse
import ast
import inspect
import itertools
import json
import logging
import marshal
import os
import py_compile
import random
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from helpers import SameProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from data import localtext, tokenizer
from data.fineweb import verify
from data.localtext import Document, Source, collect_documents, compute_shingles, drop_near_duplicates
from data.shards import find_shards, read_shard
from data.tokenizer import is_validation, load_tokenizer
from loopgolf.words import decode_document

ROOT = Path(__file__).resolve().parent.parent
WORDS = [a + b + c for a in ("ba", "ko", "mi", "tu") for b in ("ren", "sal", "tid") for c in ("", "do", "ly")]


def make_text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def make_documents(texts: list[str]) -> list[Document]:
    return [Document(text, "test", compute_shingles(text)) for text in texts]


def keep(texts: list[str]) -> set[str]:
    return {document.text for document in drop_near_duplicates(make_documents(texts))}


# --- what is taken


def test_documentation_of_all_kinds_is_found_and_nothing_runs(tmp_path: Path) -> None:
    texts = [make_text(seed) for seed in range(8)]
    (tmp_path / "source.py").write_text(
        f'"""{texts[0]}"""\nimport pathlib\npathlib.Path(__file__).with_name("ran").touch()\n'
        f'class A:\n    """{texts[1]}"""\n'
        f'    def f(self):\n        """{texts[2]}\n\n        a\n            b\n        """\n'
        f'async def g():\n    r"""{texts[3]}"""\n'
        f'torch.add_docstr(g, """\n{texts[4]}""")\nadd_newdoc("a", ("b", """{texts[5]}"""))\n'
        f'x = """{texts[6]}"""\nprint("""{texts[7]}""")\ndef short():\n    """{"s" * 200}"""\n'
    )
    found = localtext.parse_documents(tmp_path / "source.py")
    assert sorted(found) == sorted([*texts[:2], texts[2] + "\n\na\n    b", *texts[3:6]])
    assert not (tmp_path / "ran").exists()


def test_compiled_code_tells_the_same_as_the_source(tmp_path: Path) -> None:
    """From the cache, from a cache that is out of date, and without one; on real modules and on odd ones."""
    odd = (
        '"""A module."""\nx = lambda: "text"\ny = [(lambda z: z)(a) for a in ["text"]]\n'
        'def f():\n    "docs"\n    def g(): return "text"\n    class C:\n        """Docs of C."""\n        def h(self): """Docs of h."""\n'
        'class D:\n    x = "text"\nclass E:\n    "Docs of E."\nasync def i(): "Docs of i."\ndef j():\n    return "text"\n'
        'def k():\n    f"{1} text"\ndef l():\n    b"text"\ndef m():\n    yield "text"\n'
    )
    (tmp_path / "odd.py").write_text(odd)
    paths = [Path(module.__file__) for module in (ast, argparse, json, logging, typing)]
    for path in [*paths, tmp_path / "odd.py"]:
        content = path.read_bytes()
        expected = sorted(inspect.cleandoc(text) for text in localtext.find_in_tree(path, content) if text)
        found = localtext.find_in_code(localtext.load_code(path, content))  # from Python 3.13 on without indentation
        assert sorted(map(inspect.cleandoc, found)) == expected, path
        assert expected
    cached = Path(py_compile.compile(str(tmp_path / "odd.py")))
    assert marshal.loads(cached.read_bytes()[16:]) == localtext.load_code(tmp_path / "odd.py", odd.encode())
    (tmp_path / "odd.py").write_text("def f():\n    'New docs.'\n")
    content = (tmp_path / "odd.py").read_bytes()
    assert localtext.find_in_code(localtext.load_code(tmp_path / "odd.py", content)) == ["New docs."]
    cached.write_bytes(cached.read_bytes()[:40])
    assert localtext.find_in_code(localtext.load_code(tmp_path / "odd.py", content)) == ["New docs."]


def test_help_topics_are_found(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    for path in (tmp_path / "pydoc_data" / "topics.py", tmp_path / "topics.py"):
        path.write_text(f"topics = {{'assert': {make_text(1)!r}, 'del': {'short'!r}}}\n")
    assert localtext.parse_documents(tmp_path / "pydoc_data" / "topics.py") == [make_text(1)]
    assert localtext.parse_documents(tmp_path / "topics.py") == []


def test_sources_that_cannot_be_used_are_passed_over(tmp_path: Path) -> None:
    for content in (b"def f(:", b"\0", b"# \xff", b"", b'"""' + b"a\\ud800 " * 99 + b'"""'):
        (tmp_path / "a.py").write_bytes(content)
        assert localtext.parse_documents(tmp_path / "a.py") == [], content
    assert localtext.parse_documents(tmp_path / "absent.py") == []


def install(site: Path, name: str, requires: list[str]) -> None:
    """A distribution as installers leave it, with one module."""
    info = site / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (site / f"{name}.py").write_text(f'"""{make_text(len(name))}"""\n')
    files = [f"{name}.py", f"../../bin/{name}.py", f"{info.name}/METADATA", f"{name}.txt"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_only_what_the_requirements_reach_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "lg-root", ["LG_leaf>=1", "lg-gone", "lg-extra; extra == 'all'", "lg-old; python_version < '3'"])
    install(tmp_path, "lg-leaf", ["lg-root"])
    for name in ("lg-extra", "lg-old", "lg-development"):
        install(tmp_path, name, [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "requirements.txt").write_text(
        "# pinned\n--index-url x\n\nlg.root==1.5  # why\nlg-nowhere; platform_system == 'Nowhere'\n"
    )
    requirements = localtext.read_requirements(tmp_path / "requirements.txt")
    assert requirements[0] == Requirement("lg.root==1.5")
    found, absent = localtext.find_distributions(requirements)
    assert (list(found), absent) == (["lg-leaf", "lg-root"], ["lg-gone"])
    python, *sources = localtext.build_sources(found)
    assert sources == [
        Source("lg-leaf", "1.5", (tmp_path / "lg-leaf.py",)),
        Source("lg-root", "1.5", (tmp_path / "lg-root.py",)),
    ]
    names = {path.name for path in python.files}
    assert {"topics.py", "argparse.py"} <= names
    assert not [path for path in python.files if "site-packages" in path.parts]


@pytest.mark.slow
def test_a_text_is_credited_to_its_first_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        code = f'"""{make_text(1)}"""\nclass A:\n    """{make_text(ord(name))}"""\n'
        (tmp_path / f"{name}.py").write_text(code)
    sources = [Source(name, "1", (tmp_path / f"{name}.py",)) for name in ("b", "a")]
    found = [(document.text, document.source) for document in collect_documents(sources, workers=2)]
    assert found == [(make_text(1), "b"), (make_text(ord("b")), "b"), (make_text(ord("a")), "a")]


# --- near duplicates


def test_near_duplicates_are_dropped() -> None:
    long, other = make_text(1, 200), make_text(2, 200)
    words = long.split()
    near = [
        " ".join(words[:199]),
        long.title()[:-5],
        " ".join(words[20:150]),
        ", ".join(words[:150]) + " 1",
        " ".join([*words[:90], "changed", *words[91:180]]),
        " ".join(words[:50] + other.split()[:49]),
        " ".join([*words[:60], make_text(9, 40)]),
    ]
    assert keep([*near, long, other]) == {long, other}


def test_texts_that_share_less_are_kept() -> None:
    one, two = make_text(1, 100).split(), make_text(2, 100).split()
    texts = [" ".join(one), " ".join(one[:40] + two[:60]), "short text", make_text(3)]
    assert keep(texts) == set(texts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS[:3]), min_size=1, max_size=40), max_size=25))
def test_no_kept_pair_is_near(texts: list[list[str]]) -> None:
    kept = keep(list({" ".join(words) for words in texts}))
    shingles = {text: set(compute_shingles(text).tolist()) for text in kept}
    for one, other in itertools.combinations(kept, 2):
        smaller = min(len(shingles[one]), len(shingles[other]))
        assert 2 * len(shingles[one] & shingles[other]) < smaller


def test_order_of_sources_does_not_matter() -> None:
    texts = [make_text(seed % 7, 50 + seed) for seed in range(30)]
    orders = [drop_near_duplicates(make_documents(order)) for order in (texts, texts[::-1])]
    assert [d.text for d in orders[0]] == [d.text for d in orders[1]]
    assert 0 < len(orders[0]) <= 7
    assert drop_near_duplicates([]) == []


# --- the folder


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    work_here(monkeypatch)


def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (localtext, tokenizer):
        monkeypatch.setattr(module, "started_pool", lambda *_: SameProcess())


def read_one_small_distribution(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """Set the program up so; returns where it shall write."""
    (root / "requirements.txt").write_text("packaging\nlg-gone\n")
    monkeypatch.setattr(localtext, "ROOT", root)
    everything = localtext.build_sources
    monkeypatch.setattr(localtext, "build_sources", lambda found: everything(found)[1:])
    return root / "local"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return read_one_small_distribution(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        work_here(monkeypatch)
        out = read_one_small_distribution(monkeypatch, tmp_path_factory.mktemp("built"))
        assert make(out) == 0
    return out


@pytest.fixture
def ready(small: Path, built_once: Path) -> Path:
    """A valid folder of the same set-up."""
    return Path(shutil.copytree(built_once, small))


def read_folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def make(out: Path, *arguments: str) -> int:
    return localtext.main(["--out", str(out), "--vocab-size", "400", *arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("no_workers")
def test_the_folder_is_whole_and_is_not_built_twice(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert make(small) == 0
    built, lines = read_folder(small), capsys.readouterr().out.splitlines()
    shards = {"local_train_000000.bin", "local_val_000000.bin"}
    assert set(built) == shards | {"tokenizer.model", "manifest.json"}
    assert lines[-1].startswith("localtext state:built ") and " absent:lg-gone" in lines[0]
    verify(small)
    capsys.readouterr()
    assert make(small) == 0
    assert capsys.readouterr().out.startswith("localtext state:ready ") and read_folder(small) == built
    assert make(small, "--force") == 0
    assert " state:built " in capsys.readouterr().out and read_folder(small) == built

    manifest = json.loads(built["manifest.json"])
    (source,) = manifest["sources"]
    assert (source["distribution"], source["version"]) == ("packaging", distribution("packaging").version)
    assert manifest["key"]["absent"] == ["lg-gone"]
    for key in ("documents", "text_bytes"):
        assert source[key] == sum(split[key] for split in manifest["splits"].values())


def decode_texts(folder: Path) -> dict[str, list[str]]:
    model, texts = load_tokenizer(folder / "tokenizer.model"), {}
    for split in ("train", "val"):
        tokens = np.concatenate([read_shard(path) for path in find_shards(folder, split)])
        parts = np.split(tokens, np.flatnonzero(tokens == model.bos_id())[1:])
        texts[split] = [decode_document(model, part.tolist()) for part in parts]
    return texts


@pytest.mark.slow
def test_held_out_documents_are_training_documents(built_once: Path, tmp_path: Path) -> None:
    key = {"vocab_size": 400, "held_out": True}
    found, _ = localtext.find_distributions([localtext.Requirement("packaging")])
    localtext.build_corpus(tmp_path / "held", localtext.build_sources(found)[1:], key)
    usual, held = decode_texts(built_once), decode_texts(tmp_path / "held")
    assert held["val"] and set(held["train"] + held["val"]) == set(usual["train"])
    assert not set(held["val"]) & set(held["train"])


@pytest.mark.slow
def test_the_split_is_clean_and_the_order_fixed(built_once: Path) -> None:
    texts = decode_texts(built_once)
    for split in ("train", "val"):
        assert all(is_validation(text, 0.05) is (split == "val") for text in texts[split])
        documents = make_documents(texts[split])
        assert documents == sorted(documents, key=localtext.content_hash)
    assert len(keep(texts["train"] + texts["val"])) == len(texts["train"]) + len(texts["val"])


HARMS: dict[str, Callable[[Path], object]] = {
    "no folder": lambda out: shutil.rmtree(out),
    "no tokenizer": lambda out: (out / "tokenizer.model").unlink(),
    "a cut shard": lambda out: os.truncate(out / "local_val_000000.bin", 1500),
    "no manifest": lambda out: (out / "manifest.json").unlink(),
    "a cut manifest": lambda out: (out / "manifest.json").write_text("{"),
    "a list": lambda out: (out / "manifest.json").write_text("[]"),
    "another key": lambda out: (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace("lg-gone", "lg")
    ),
}


@pytest.mark.slow
def test_a_folder_with_a_fault_is_not_valid(built_once: Path, tmp_path: Path) -> None:
    key = json.loads((built_once / "manifest.json").read_text())["key"]
    for name, harm in HARMS.items():
        folder = Path(shutil.copytree(built_once, tmp_path / name))
        assert localtext.is_valid(folder, key)
        harm(folder)
        assert not localtext.is_valid(folder, key), name


@pytest.mark.slow
@pytest.mark.usefixtures("no_workers")
def test_a_folder_with_another_key_is_replaced(ready: Path, capsys: pytest.CaptureFixture) -> None:
    assert localtext.main(["--out", str(ready), "--vocab_size", "420"]) == 0
    assert " state:built " in capsys.readouterr().out
    assert len(load_tokenizer(ready / "tokenizer.model")) == 420
    assert {path.name for path in ready.parent.iterdir()} == {"requirements.txt", "local"}


FAILURES = {"stop": KeyboardInterrupt(), "full": OSError(28, "No space left on device")}


@pytest.mark.slow
@pytest.mark.usefixtures("no_workers")
def test_an_interrupted_build_changes_nothing(
    small: Path, built_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for state, failure in itertools.product(("absent", "ready"), FAILURES):
        if state == "ready":
            shutil.copytree(built_once, small, dirs_exist_ok=True)
        before = read_folder(small) if small.exists() else {}

        def fail(*_: object, failure: str = failure) -> None:
            raise FAILURES[failure]

        monkeypatch.setattr(localtext, "compute_sha256", fail)
        assert make(small, "--force") == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert {path.name for path in small.parent.iterdir()} - {"local"} == {"requirements.txt"}, (state, failure)
        assert (read_folder(small) if small.exists() else {}) == before, (state, failure)


@pytest.mark.usefixtures("no_workers")
def test_something_else_is_never_replaced(small: Path, capsys: pytest.CaptureFixture) -> None:
    small.mkdir()
    (small / "thesis.txt").write_text("years of work")
    assert make(small, "--force") == 2
    assert "already there" in capsys.readouterr().err
    assert read_folder(small) == {"thesis.txt": b"years of work"}


@pytest.mark.slow
def test_bytes_do_not_depend_on_hash_seed_or_workers(built_once: Path, tmp_path: Path) -> None:
    """By workers in a process with another hash seed, and by this one alone."""
    script = (
        "import sys; from pathlib import Path; from data import localtext as l\n"
        "if __name__ == '__main__':\n"
        "    found, absent = l.find_distributions([l.Requirement('packaging')])\n"
        "    l.build_corpus(Path(sys.argv[1]), l.build_sources(found)[1:], {'vocab_size': 400, 'held_out': False})\n"
    )
    (tmp_path / "script.py").write_text(script)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "local")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    there, here = read_folder(tmp_path / "local"), read_folder(built_once)
    assert there.keys() == here.keys()
    assert all(there[name] == here[name] for name in here if name != "manifest.json")  # that names the requirements


@pytest.mark.slow
def test_a_terminated_build_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.localtext", "--out", str(tmp_path / "local")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("sources ")
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and error == "error: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_bad_options_are_named(capsys: pytest.CaptureFixture) -> None:
    for arguments, fault in ((["--vocab-size=-3"], "-3"), (["--vocab_size", "x"], "x"), (["--nonsense"], "--nonsense")):
        with pytest.raises(SystemExit) as raised:
            localtext.main(arguments)
        assert raised.value.code == 2 and fault in capsys.readouterr().err.splitlines()[-1]
