"""Pictures of runs: what is drawn adds up to what was run, and bad input is one line: pytest tests/test_plot.py"""

import json
from pathlib import Path

import pytest
from helpers import train

from tools import plot


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("plot"), dataset, run_id="a", also="plain,banded,trained")


def test_what_is_drawn_is_what_was_run(folder):
    run = plot.load_run(folder, plot.COLORS[0])
    assert [step["step"] for step in run.steps] == [1, 2, 3, 4]
    assert sum(run.bytes_by_part.values()) == pytest.approx(int(run.result["total_bytes"]))
    assert all(size > 0 for size in run.bytes_by_part.values()) and run.bytes_by_part["code"] == 1000
    assert len(run.stream) == 4 and run.stream[0] > 0.5


def test_one_run_gets_its_report_and_several_a_picture(folder, tmp_path, capsys):
    assert plot.main([str(folder)]) == 0 and (folder / "report.png").stat().st_size > 20_000
    assert plot.main([str(folder), str(folder), "--out", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"
    assert plot.main([str(folder), str(folder)]) == 2 and "--out" in capsys.readouterr().err


def test_a_missing_dataset_only_leaves_one_panel_out(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    report = json.loads((copy / "result.json").read_text())
    report["config"]["data_path"] = str(tmp_path / "nowhere")
    (copy / "result.json").write_text(json.dumps(report))
    assert plot.load_run(copy, plot.COLORS[0]).stream == []
    assert plot.main([str(copy)]) == 0


@pytest.mark.parametrize("names, words", [(["nothing"], "no result.json"), (["a"] * 7, "at most 6")])
def test_bad_input_is_one_line(names, words, folder, tmp_path, capsys):
    runs = [str(folder.parent / name) for name in names]
    assert plot.main([*runs, "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and len(error.splitlines()) == 1
