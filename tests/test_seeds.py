"""tools.seeds: every seed is trained once, an interrupted series goes on, and the table holds what the runs found."""

import io
import json
import math
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, clean_environment, events, tiny_options

import train_gpt
from tools import seeds
from tools.submission.stats import sample_std

RUN = SMALL | dict(iterations=200, also="trained", score_tokens=400)


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
def series(dataset, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, str]:
    """Two seeds; Ctrl-C in the middle of the first, then the same line again."""
    cwd = tmp_path_factory.mktemp("series")
    log = cwd / "runs" / "s-seed3" / "log.txt"
    first = start(cwd, arguments(dataset, 3, 11))
    wait_for_step(log, 5)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1 and not out and err.endswith("the same command goes on where it stopped\n")
    before = log.read_text()
    with pytest.MonkeyPatch.context() as patch, open(cwd / "err", "w+") as err, redirect_stdout(io.StringIO()) as out:
        patch.chdir(cwd)
        patch.setattr(sys, "stderr", err)
        for name, value in clean_environment(PYTHONPATH=ROOT).items():
            patch.setenv(name, value)
        code = seeds.main(again := arguments(dataset, 3, 11))
        err.seek(0)
        return cwd, subprocess.CompletedProcess(again, code, out.getvalue(), err.read()), before


def test_an_interrupted_series_goes_on(series):
    cwd, done, before = series
    assert done.returncode == 0, done.stderr
    stopped = int(events(before, "train")[-1]["step"])
    assert 5 <= stopped < 200 and not events(before, "result")
    text = (cwd / "runs" / "s-seed3" / "log.txt").read_text()
    assert text.startswith(before)
    assert events(text, "resume")[0]["step"] == str(stopped)  # the child had saved a checkpoint
    steps = [int(line["step"]) for line in events(text, "train")]
    assert steps == list(range(1, 201))  # none was made twice
    assert "# seed 3: interrupted" in done.stderr and "# seed 11: new" in done.stderr


def test_the_table_is_what_the_runs_found(series):
    cwd, done, _ = series
    results = [json.loads((cwd / "runs" / f"s-seed{n}" / "result.json").read_text())["result"] for n in (3, 11)]
    scores = [float(result["val_bpb"]) for result in results]
    heading, *rows = [line.split() for line in done.stdout.splitlines()]
    assert heading[:2] == ["seed", "trained"] and [row[0] for row in rows] == ["3", "11", "mean", "std"]
    column = 3  # seed, trained, plain, val_bpb
    assert [row[column] for row in rows[:2]] == [f"{score:.5f}" for score in scores]
    assert rows[2][column] == f"{sum(scores) / 2:.5f}"
    assert rows[3][column] == f"{abs(scores[0] - scores[1]) / math.sqrt(2):.5f}" == f"{sample_std(scores):.5f}"
    assert [row[-1].replace(",", "") for row in rows[:2]] == [str(result["total_bytes"]) for result in results]


def test_the_second_time_nothing_is_trained(series, dataset, monkeypatch, capsys):
    cwd, done, _ = series
    monkeypatch.chdir(cwd)
    before = snapshot(cwd)
    assert seeds.main(arguments(dataset, 3, 11)) == 0
    told = capsys.readouterr()
    assert told.out == done.stdout
    assert told.err.splitlines() == [f"# seed {n}: finished, in runs/s-seed{n}" for n in (3, 11)]
    assert snapshot(cwd) == before


def test_json_holds_the_same(series, dataset, monkeypatch, capsys, tmp_path):
    cwd, *_ = series
    monkeypatch.chdir(cwd)
    assert seeds.main(["--json=-", *arguments(dataset, 3, 11)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in found["runs"]] == [3, 11]
    assert found["code_sha256"] == train_gpt.hash_counted_code(train_gpt.Config())
    scores = [row["val_bpb"] for row in found["runs"]]
    assert (found["mean"]["val_bpb"], found["std"]["val_bpb"]) == pytest.approx((sum(scores) / 2, sample_std(scores)))
    assert seeds.main([f"--json={tmp_path / 'one.json'}", *arguments(dataset, 3)]) == 0
    assert json.loads((tmp_path / "one.json").read_text())["std"]["val_bpb"] is None  # one seed has no deviation
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["std", "-"]


@pytest.mark.parametrize("kind", ["settings", "code", "config"])
def test_a_run_that_is_not_the_same_is_refused(kind, series, dataset, tmp_path, monkeypatch, capsys):
    cwd, *_ = series
    folder = tmp_path / "runs" / "s-seed3"
    folder.mkdir(parents=True)
    for name in ("config.json", "log.txt", "result.json"):
        (folder / name).write_bytes((cwd / "runs" / "s-seed3" / name).read_bytes())
    changes, message = {}, "holds a run of other code"
    if kind == "settings":
        changes, message = dict(matrix_lr=0.5), "holds a run with matrix_lr=0.02, not 0.5; choose another --name"
    elif kind == "code":
        log = (folder / "log.txt").read_text()
        (folder / "log.txt").write_text(log.replace(train_gpt.hash_counted_code(train_gpt.Config()), "0" * 64))
    else:
        (folder / "config.json").write_text("{}")
        message = "not a config of this version"
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert seeds.main(arguments(dataset, 3, 11, **changes)) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and not told.out
    assert snapshot(tmp_path) == before  # seed 11 was not begun either


def test_a_run_that_fails_ends_the_series_with_its_code(dataset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert seeds.main(arguments(dataset, 3, 11, vocab_size=99)) == 2
    told = capfd.readouterr().err
    assert "vocab_size=99" in told and "error: seed 3 ended with exit code 2; see runs/s-seed3/log.txt" in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (["--seeds", "1", "1"], [], "each seed only once"),
        (["--seeds", "1"], ["--resume", "x"], "resume=x: config.json there is missing"),
        (["--seeds", "1"], ["--dry_run"], "--dry_run is not for a series of seeds"),
        (["--seeds", "1"], ["--iteration", "4"], "unknown option --iteration (did you mean --iterations?)"),
    ],
)
def test_bad_input(own, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert seeds.main([*own, "--", *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
