"""Tokenizers are byte-exact document by document, and encoding gives the same shards however it is run.

The reference for bytes is the UTF-8 length of the text; the counting below restates the challenge's rule.

    python -m pytest tests/test_tokenizer.py
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from helpers import SameProcess
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer as program
from data.shards import find_shards, read_shard
from data.tokenizer import encode_document, load_tokenizer, read_texts, train_tokenizer
from loopgolf.errors import DataError
from loopgolf.words import JOIN, MARKS, decode_document, has_marks

ROOT = Path(__file__).resolve().parent.parent
PROSE = [
    f"Section {n}.\n\n    The value of  x{n} is returned as\ta list; see the notes.\n\n- one, {n * n}\n"
    for n in range(400)
]
ODD_TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  two  blanks  ",
    "\t",
    "\ttab",
    "\n",
    "\n\n  x\n",
    "\r\n",
    "a\n b",
    "naïve café",
    "Ελληνικά και кириллица",
    "日本語のテキスト",
    "العربية עברית",
    "👩‍👩‍👧 🇩🇪 😀",
    "a\u0301 e\u0308",
    "x\u00a0y",
    "\x00\x01\x7f",
    "\u2028\u2029\u3000",
    "\u2047 \ufffd \ufeff",
    "\U0010ffff",
    "\u2581",
    "\u2581\u2581 a\u2581b \u2581",
    " \u2581",
    "\ue000\u2581\ue001",
    "<s></s><unk><pad><0x41>",
    "The value of the list.",
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "marked"])
def marked(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, marked: bool) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(PROSE, path, 400, marked)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> sentencepiece.SentencePieceProcessor:
    return load_tokenizer(model)


def count_bytes(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> int:
    """The challenge's rule, one token at a time; marks stand for nothing."""
    total = 0
    for previous, token in itertools.pairwise(ids):
        tests = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused)
        is_boundary, piece = any(test(previous) for test in tests), tokenizer.id_to_piece(token)
        is_joined = has_marks(tokenizer) and tokenizer.id_to_piece(previous).endswith(JOIN)
        if tokenizer.is_byte(token):
            total += 1
            continue
        if has_marks(tokenizer):
            piece = "".join(char for char in piece if char not in MARKS)
        if piece.startswith("\u2581"):
            total += len(piece[1:].encode()) + (not is_boundary and not is_joined)
        else:
            total += len(piece.encode())
    return total


def assert_exact(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = encode_document(tokenizer, text)
    assert ids[0] == tokenizer.bos_id() and tokenizer.bos_id() not in ids[1:], ascii(text)
    assert count_bytes(tokenizer, ids) == len(text.encode()), ascii(text)
    assert decode_document(tokenizer, ids) == text


def test_bytes_of_odd_texts(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    for text in ODD_TEXTS:
        assert_exact(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(alphabet=st.characters(codec="utf-8")), st.text(alphabet=" \n\t\u2581ab\ue000.")))
def test_bytes_of_any_text(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    assert_exact(tokenizer, text)


def test_bytes_of_the_training_text(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    for text in PROSE:
        assert_exact(tokenizer, text)


def test_vocabulary_layout(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    pieces = [tokenizer.id_to_piece(token) for token in range(len(tokenizer))]
    assert len(pieces) == 400
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert pieces[4:260] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [piece for piece in pieces if "\u2581" in piece[1:]]  # it would be counted as three bytes
    assert any("\n" in piece for piece in pieces)  # training saw whole documents


def test_training_is_repeatable(model: Path, marked: bool, tmp_path: Path) -> None:
    train_tokenizer(iter(PROSE), tmp_path / "again.model", 400, marked)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_control_characters_are_no_marks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, text = tmp_path / "t.model", "the ab\x01cd\x02ef\x03gh\x04 _the " * 50
    train_tokenizer([f"The {text}"], path, vocab_size=285)
    assert not has_marks(load_tokenizer(path))
    assert_exact(load_tokenizer(path), "ab\x01cd The\x03 x")
    (tmp_path / "a.txt").write_text(text)
    assert program.main(["train", "--out", str(path), "--vocab_size=285", str(tmp_path / "a.txt")]) == 2
    assert "would pass for one with marks of words; add --mark_words" in capsys.readouterr().err


def test_long_documents_are_trained_on(tmp_path: Path) -> None:
    train_tokenizer(["b" * 70_000 + " zyxwvut" * 40_000], tmp_path / "long.model", vocab_size=280)
    assert len(encode_document(load_tokenizer(tmp_path / "long.model"), "zyxwvut")) == 2


def test_sampling_is_bounded_and_even() -> None:
    kept = program.sample_evenly((f"{n:04d}" for n in range(1000)), max_bytes=1000)
    assert kept == [f"{n:04d}" for n in range(0, 1000, 4)] and sum(map(len, kept)) <= 1000
    assert program.sample_evenly(["a", "b"], 10) == ["a", "b"]


# --- encode


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "started_pool", lambda *_: SameProcess())


def write_lines(path: Path, texts: list[str]) -> Path:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def decode_split(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([read_shard(path, len(tokenizer)) for path in find_shards(folder, split)])
    starts = np.flatnonzero(tokens == tokenizer.bos_id())
    assert starts[0] == 0
    return [decode_document(tokenizer, document.tolist()) for document in np.split(tokens, starts[1:])]


def encode(files: list[Path], model: Path, out: Path, **options: object) -> dict[str, bytes]:
    arguments = ["encode", "--tokenizer", str(model), "--out", str(out), *map(str, files)]
    arguments += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    assert program.main(arguments) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_encode_keeps_every_document_in_order(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "BATCH_CHARS", 1000)
    (tmp_path / "a.txt").write_text("One file, one document.\n\n\u2581", newline="")
    files = [
        tmp_path / "a.txt",
        write_lines(tmp_path / "b.jsonl", [*PROSE[:150], ""]),
        write_lines(tmp_path / "c.jsonl.zst", PROSE[150:]),
    ]
    texts = ["One file, one document.\n\n\u2581", *PROSE]
    second = encode(files, model, tmp_path / "two", workers=2, val_fraction=0.2, shard_tokens=999)
    monkeypatch.setattr(program, "started_pool", lambda *_: SameProcess())
    first = encode(files, model, tmp_path / "one", workers=1, val_fraction=0.2, shard_tokens=999)
    assert first == second and first["tokenizer.model"] == model.read_bytes()

    is_val = {text: program.is_validation(text, 0.2) for text in texts}
    assert 0.1 < np.mean(list(is_val.values())) < 0.3
    for split, wanted in (("train", False), ("val", True)):
        part = [text for text in texts if is_val[text] is wanted]
        assert decode_split(tmp_path / "one", split) == part
        counts = json.loads(first["manifest.json"])["splits"][split]
        sizes = [len(read_shard(path)) for path in find_shards(tmp_path / "one", split)]
        assert len(sizes) > 1 and set(sizes[:-1]) == {999} and 0 < sizes[-1] <= 999
        assert counts == {
            "documents": len(part),
            "tokens": sum(sizes),
            "shards": len(sizes),
            "text_bytes": sum(len(text.encode()) for text in part),
        }


@pytest.mark.usefixtures("no_workers")
def test_a_dataset_folder_is_encoded_anew(
    model: Path, marked: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From either kind of tokenizer to the other; shards cut documents, before and after."""
    write_lines(tmp_path / "a.jsonl", ["\u2581 The end\x01", *PROSE[:60]])
    encode([tmp_path / "a.jsonl"], model, tmp_path / "old", val_fraction=0.3, shard_tokens=300)
    assert len(find_shards(tmp_path / "old", "train")) > 2
    arguments = ["--out", str(tmp_path / "b.model"), "--vocab_size", "300", str(tmp_path / "old")]
    assert program.main(["train", *arguments, *([] if marked else ["--mark_words"])]) == 0
    assert has_marks(load_tokenizer(tmp_path / "b.model")) is not marked
    encode([tmp_path / "old"], tmp_path / "b.model", tmp_path / "new", shard_tokens=170)
    for split in ("train", "val"):
        assert decode_split(tmp_path / "new", split) == decode_split(tmp_path / "old", split)
    counts = [json.loads((tmp_path / name / "manifest.json").read_text())["splits"] for name in ("old", "new")]
    for split in ("train", "val"):
        for key in ("documents", "text_bytes"):
            assert counts[0][split][key] == counts[1][split][key]
    command = ["encode", "--tokenizer", str(model), "--out", str(tmp_path / "c"), str(tmp_path / "old")]
    for more in (str(tmp_path / "a.jsonl"), "--val_fraction=0.05"):
        assert program.main([*command, more]) == 2
        assert f"{tmp_path / 'old'}: a dataset folder keeps its split; encode it alone" in capsys.readouterr().err
    for path in find_shards(tmp_path / "old", "train"):
        path.unlink()
    encode([tmp_path / "old"], tmp_path / "b.model", tmp_path / "half")
    assert decode_split(tmp_path / "half", "val") == decode_split(tmp_path / "old", "val")
    assert [path.name for path in (tmp_path / "half").glob("*.bin")] == ["text_val_000000.bin"]


@pytest.mark.usefixtures("no_workers")
def test_one_split_alone(model: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", PROSE[:3])
    encode([tmp_path / "a.jsonl"], model, tmp_path / "out", val_fraction=1, name="mine")
    assert decode_split(tmp_path / "out", "val") == PROSE[:3]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "mine_val_000000.bin",
        "tokenizer.model",
    ]


BAD_FILES = {
    "absent.txt": (None, "no such file"),
    "a.pdf": (b"x", "unknown kind of file"),
    "bytes.txt": (b"ab\xff", "not valid UTF-8 at byte 2"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "key.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', 'line 2: no "text"'),
    "list.jsonl": (b'["text"]\n', 'line 1: no "text"'),
    "number.jsonl": (b'{"text": 5}\n', 'line 1: no "text"'),
    "utf.jsonl": (b'{"text": "a\xc3"}\n', "line 1: not valid UTF-8"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: not valid UTF-8"),
    "noise.jsonl.zst": (b"no zstd at all", "not a zstd file"),
    "cut.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 500)[:-5], "truncated zstd file"),
    "empty.txt": (b"", "empty input"),
    "empty.jsonl": (b"\n\n", "empty input"),
    "empty.jsonl.zst": (b"", "empty input"),
}


@pytest.mark.usefixtures("no_workers")
def test_bad_input_is_one_line_and_leaves_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, (content, fault) in BAD_FILES.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        before = sorted(tmp_path.iterdir())
        out = tmp_path / "out"
        code = program.main(["encode", "--tokenizer", str(model), "--out", str(out), str(tmp_path / name)])
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and fault in error, name
        assert fault == "empty input" or str(tmp_path / name) in error, name
        assert sorted(tmp_path.iterdir()) == before, name


def test_zstd_frames_and_lines_in_pieces(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(n)}).encode() for n in range(1000)]
    content = b"\n".join(lines)
    frames = [content[:5000], content[5000:5003], b"", content[5003:]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    assert list(read_texts([tmp_path / "a.jsonl.zst"])) == [str(n) for n in range(1000)]


def test_a_vocabulary_that_the_text_does_not_support(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("a few words only")
    for vocab_size, fault in ((5000, "too high"), (10, "smaller")):
        arguments = ["--out", str(tmp_path / "t.model"), f"--vocab_size={vocab_size}"]
        assert program.main(["train", *arguments, str(tmp_path / "a.txt")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{vocab_size} pieces" in error and fault in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    (tmp_path / "noise.model").write_bytes(b"noise")
    for name, fault in (("absent.model", "no such tokenizer"), ("noise.model", "not a SentencePiece model")):
        with pytest.raises(DataError, match=f"{name}: {fault}"):
            load_tokenizer(tmp_path / name)
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "__len__", lambda self: 65537)
    with pytest.raises(DataError, match="65537 pieces do not fit into uint16"):
        load_tokenizer(model)


def test_a_folder_that_is_there_is_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, text = tmp_path / "out", tmp_path / "a.txt"
    out.mkdir()
    (out / "precious").touch()
    text.write_text("text")
    code = program.main(["encode", "--tokenizer", str(model), "--out", str(out), str(text)])
    assert code == 2 and "already there" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", PROSE)
    model, out, text = tmp_path / "t.model", tmp_path / "out", tmp_path / "a.jsonl"
    assert program.main(["train", "--out", str(model), "--vocab-size", "300", "--mark-words", str(text)]) == 0
    assert has_marks(load_tokenizer(model))
    assert capsys.readouterr().out.startswith("tokenizer vocab_size:300 sha256:")
    command = [
        sys.executable,
        "-m",
        "data.tokenizer",
        "encode",
        "--tokenizer",
        model,
        "--out",
        out,
        "--workers=1",
        text,
    ]
    encoded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert encoded.returncode == 0 and encoded.stderr == "", encoded.stderr  # no progress bar off a terminal
    events = [dict(pair.split(":", 1) for pair in line.split()[1:]) for line in encoded.stdout.splitlines()]
    assert sum(int(event["documents"]) for event in events) == len(PROSE)
    with pytest.raises(SystemExit) as stopped:
        program.main(["encode", "--tokeniser", "x", "--out", str(tmp_path / "new"), str(text)])
    assert stopped.value.code == 2 and "--tokenizer" in capsys.readouterr().err.splitlines()[-1]
