"""The commands of README and docs, run from top to bottom in a folder that has what a reader has: the package, data and
finished runs, all of it tiny. What needs a network, GPUs or many minutes is named below, with the reason.

pytest tests/test_commands.py
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, TINY, train
from test_docs import find_commands

import train_gpt

NOT_RUN = {
    r"make ": "make run takes minutes, and the tests are make test",
    r"-m data\.fineweb": "needs a network, tested in test_fineweb.py",
    r"torchrun .*--nproc_per_node=8|--nproc 8": "needs eight GPUs",
    r"-m venv|bin/pip |^source |^cd |^export |^git |^ls |^head |^curl |^'\['": "the reader's shell",
    r"-m tools\.record": "a record of whole runs takes minutes, tested in test_record.py",
    r"-m tools\.audit": "hundreds of passes, tested in test_audit.py",
    r"-m tools\.(seeds|sweep)": "starts many programs, tested in test_seeds.py and test_depth.py",
    r"-m tools\.allocate": "limits that bind pocket are too large for a tiny run, tested in test_allocate.py",
    r"-m tools\.ablate": "makes runs of a commit, tested in test_ablate.py",
    r"-m kernels\.check": "needs a GPU, or the interpreter, tested in test_kernels.py",
    r"-m data\.localtext": "reads every installed package, tested in test_localtext.py",
    r"^python -c": "the reader's text, made below",
}
# what a reader's names stand for
NAMES = {"$STEPS": "3", "data/fineweb_sp8192": "data/local", "--vocab_size 8192": "--vocab_size 400"}
NAMES |= {f"runs/pocket-seed{seed}": f"runs/{name}" for seed, name in ((1337, "A"), (42, "B"), (2024, "C"))}
SETTINGS = TINY | dict(model_dim=16, num_heads=1, rope_dims=4, text_sha256="", eval_budget=100.0, iterations=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset, documents) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(dataset, folder / "data" / "local")
    data = Path("data/local")
    for name in ("A", "B", "C"):
        train(folder, data, run_id=name, iterations=3)
    train(
        folder,
        data,
        run_id="ID",
        plan="ab(^cd)*re",
        skips="none",
        sample_depth=1,
        max_r=4,
        ttt_freeze="a",
        iterations=3,
    )
    (folder / "README.md").write_text("A text to encode, one token at a time.\n")
    text = [json.dumps({"text": text}) for text in documents]
    (folder / "mine.jsonl").write_text("\n".join(text))
    return folder


@pytest.fixture
def place(tmp_path, finished) -> Path:
    """Each page begins anew: two pages may name their runs alike."""
    return shutil.copytree(finished, tmp_path / "reader")


def reason_not_to_run(line: str) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), "")


def run_command(words: list[str]) -> int:
    """In this process; programs that start others start them by themselves."""
    if words[1] == "-m":
        module = importlib.import_module(words[2])
        return module.main(words[3:])
    return train_gpt.main(words[2:], dict(os.environ))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/concepts.md", "docs/submit.md", "docs/tools.md", "docs/looped.md"])
def test_commands_run_as_they_stand(name, place, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    failed = []
    with contextlib.chdir(place):
        for _, words in find_commands((ROOT / name).read_text(encoding="utf-8")):
            line = shlex.join(words)
            if reason_not_to_run(line):
                continue
            for theirs, ours in NAMES.items():
                line = line.replace(theirs, ours)
            has_settings = "--resume" in line or "--score " in line
            try:
                with monkeypatch.context() as patch:
                    for setting, value in [] if has_settings else SETTINGS.items():
                        patch.setenv(setting.upper(), str(value))
                    code = run_command(shlex.split(line))
            except SystemExit as stop:
                code = stop.code
            output = capfd.readouterr()
            if code:
                failed.append(f"{line}: {code}: {output.err[-300:]}")
    assert not failed, "\n\n".join(failed)
