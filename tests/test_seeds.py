"""tools.seeds: every seed is trained once, an interrupted series goes on, and the table holds what the runs found."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, clean_environment, events, tiny_options, train

import train_gpt
from tools import seeds
from tools.submission.stats import sample_std

RATE = train_gpt.RECIPES["pocket"]["matrix_lr"]
RUN = SMALL | dict(iterations=4, also="trained", score_documents=5)


def arguments(dataset: Path, *numbers: int, name: str = "s", **changes) -> list[str]:
    return [f"--name={name}", "--seeds", *map(str, numbers), "--", *tiny_options(dataset, **(RUN | changes))]


def start(cwd: Path, argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.seeds", *argv]
    environ = clean_environment(PYTHONPATH=ROOT)
    return subprocess.Popen(command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while f"train step:{step} " not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, f"no step {step} in {log}"
        time.sleep(0.02)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def series(dataset, tmp_path_factory) -> Path:
    """The folder of two seeds that have finished, as the program itself would run them."""
    cwd = tmp_path_factory.mktemp("series")
    for number in (3, 11):
        train(cwd, dataset, **RUN, seed=number, run_id=f"s-seed{number}")
    return cwd


@pytest.mark.slow
def test_an_interrupted_series_goes_on(dataset, tmp_path, monkeypatch, capfd):
    """Ctrl-C in the middle of a run, then the same line again."""
    folder = tmp_path / "runs" / "s-seed3"
    argv = arguments(dataset, 3, iterations=100)
    first = start(tmp_path, argv)
    wait_for_step(folder / "log.txt", 5)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert "# seed 3: new" in err
    assert first.returncode == 1 and not out and err.endswith("the same command goes on where it stopped\n")
    before = (folder / "log.txt").read_text()
    stopped = int(events(before, "train")[-1]["step"])
    assert 5 <= stopped < 100 and not events(before, "result")

    monkeypatch.chdir(tmp_path)
    assert seeds.main(argv) == 0
    out, err = capfd.readouterr()
    assert "# seed 3: interrupted" in err
    assert [line.split()[0] for line in out.splitlines()] == ["seed", "3", "mean", "std"]
    text = (folder / "log.txt").read_text()
    assert text.startswith(before)
    assert events(text, "resume")[0]["step"] == str(stopped)  # the child had saved a checkpoint
    steps = [int(line["step"]) for line in events(text, "train")]
    assert steps == list(range(1, 101))  # none was made twice


def test_the_table_is_what_the_runs_found(series, dataset, monkeypatch, capsys):
    """What is finished is not trained again."""
    monkeypatch.chdir(series)
    before = snapshot(series)
    assert seeds.main(arguments(dataset, 3, 11)) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [f"# seed {n}: finished, in runs/s-seed{n}" for n in (3, 11)]
    assert snapshot(series) == before
    results = [json.loads((series / "runs" / f"s-seed{n}" / "result.json").read_text())["result"] for n in (3, 11)]
    scores = [float(result["val_bpb"]) for result in results]
    heading, *rows = [re.split(r"  +", line) for line in told.out.splitlines()]
    assert heading[:2] == ["seed", "trained"] and [row[0] for row in rows] == ["3", "11", "mean", "std"]
    column = heading.index("val_bpb")
    assert [row[column] for row in rows[:2]] == [f"{score:.5f}" for score in scores]
    assert rows[2][column] == f"{sum(scores) / 2:.5f}"
    assert rows[3][column] == f"{abs(scores[0] - scores[1]) / math.sqrt(2):.5f}" == f"{sample_std(scores):.5f}"
    assert [row[-1].replace(",", "") for row in rows[:2]] == [str(result["total_bytes"]) for result in results]
    assert [row[heading.index("skipped")] for row in rows] == ["0", "0", "0.0", "0.0"]


def test_json_holds_the_same(series, dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(series)
    assert seeds.main(["--json=-", *arguments(dataset, 3, 11)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in found["runs"]] == [3, 11]
    config, _ = train_gpt.parse_config(tiny_options(dataset, **RUN), {})
    assert found["code_sha256"] == train_gpt.hash_counted_code(config)
    scores = [row["val_bpb"] for row in found["runs"]]
    assert (found["mean"]["val_bpb"], found["std"]["val_bpb"]) == pytest.approx((sum(scores) / 2, sample_std(scores)))
    assert seeds.main([f"--json={tmp_path / 'one.json'}", *arguments(dataset, 3)]) == 0
    assert json.loads((tmp_path / "one.json").read_text())["std"]["val_bpb"] is None  # one seed has no deviation
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["std", "-"]


def test_folders_that_are_refused(series, dataset, tmp_path, monkeypatch, capsys):
    """Runs that are not the same, damaged configs: one line, and no seed is begun."""

    def other_code(folder: Path) -> None:
        log = (folder / "log.txt").read_text()
        (folder / "log.txt").write_text(re.sub(r"code_sha256:\w+", f"code_sha256:{'0' * 64}", log))

    def other_config(text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "config.json").write_text(text)

    for number, (plant, changes, message) in enumerate(
        (
            (None, dict(matrix_lr=0.5), f"holds a run with matrix_lr={RATE}, not 0.5; choose another --name"),
            (other_code, {}, "holds a run of other code"),
            (other_config("{}"), {}, "not a config of this version"),
            (other_config("[1]"), {}, "not a config of this version"),
            (other_config("{"), {}, "not a config of this version"),
        )
    ):
        cwd = tmp_path / str(number)
        folder = cwd / "runs" / "s-seed3"
        folder.mkdir(parents=True)
        for name in ("config.json", "log.txt", "result.json"):
            shutil.copyfile(series / "runs" / "s-seed3" / name, folder / name)
        if plant:
            plant(folder)
        monkeypatch.chdir(cwd)
        before = snapshot(cwd)
        assert seeds.main(arguments(dataset, 3, 11, **changes)) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and message in told.err and not told.out
        assert snapshot(cwd) == before


@pytest.mark.slow
def test_a_run_that_fails_ends_the_series_with_its_code(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert seeds.main(arguments(dataset, 3, 11, vocab_size=99)) == 2
    told = capfd.readouterr().err
    assert "vocab_size=99" in told and "error: seed 3 ended with exit code 2; see runs/s-seed3/log.txt" in told
    assert not (tmp_path / "runs").exists()


def test_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for own, given, message in (
        (["--seeds", "1", "1"], [], "each seed only once"),
        (["--seeds", "1"], ["--resume", "x"], "resume=x: config.json there is missing"),
        (["--seeds", "1"], ["--dry_run"], "--dry_run is not for a series of seeds"),
        (["--seeds", "1"], ["--iteration", "4"], "unknown option --iteration (did you mean --iterations?)"),
    ):
        assert seeds.main([*own, "--", *given]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
