"""What `make run` ends with. CPU: pytest tests/test_summary.py"""

import json
import shutil

import pytest
from helpers import tiny_options

import train_gpt
from tools import summary


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_gpt.main(tiny_options(dataset, run_id="r", byte_limit=90_000, also="none"), {}) == 0
    return folder / "runs/r"


def test_six_lines_tell_what_was_made(finished, dataset, capsys):
    assert summary.main([str(finished)]) == 0
    model, file, score, sample, picture, following = capsys.readouterr().out.splitlines()
    result = json.loads((finished / "result.json").read_text())["result"]
    assert model.startswith("model     2 blocks, applied 4 times (abab): ") and "512 tokens in" in model
    assert f"{result['total_bytes']:,} bytes" in file and "90,000 are allowed" in file
    assert f"{float(result['val_bpb']):.4f} bits per byte; the same text takes" in score and "with bz2" in score
    assert sample.startswith(f"sample    {summary.PROMPT}")
    assert str(finished) in picture and f"python -m tools.sample {finished}/artifact.lg" in following


def test_the_other_compressors_get_the_text_that_was_scored(finished, dataset):
    config = train_gpt.Config(**json.loads((finished / "result.json").read_text())["config"])
    log = (finished / "log.txt").read_text()
    text = summary.read_scored_text(config)
    assert f" bytes:{len(text)} " in log
    ratio = len(summary.COMPRESSORS["xz"](text)) * 8 / len(text)
    assert f"{ratio:.2f} with xz" in summary.describe_score(config, dict(val_bpb="1.0"))


def test_without_the_text_the_rest_is_told(finished, tmp_path, capsys):
    moved = shutil.copytree(finished, tmp_path / "r")
    report = json.loads((moved / "result.json").read_text())
    report["config"]["data_path"] = "nowhere"
    (moved / "result.json").write_text(json.dumps(report))
    assert summary.main([str(moved)]) == 0
    assert "the text is gone" in capsys.readouterr().out.splitlines()[2]


def test_a_run_that_has_not_finished_is_one_line(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no result.json")
