"""Pictures of runs: what is drawn adds up to what was run, and bad input is one line: pytest tests/test_plot.py"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import events, train

import train_gpt
from data.shards import TokenStream
from tools import plot


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("plot"), dataset, run_id="a", also="plain,banded,trained")


def test_what_is_drawn_is_what_was_run(folder, dataset):
    run = plot.load_run(folder, plot.COLORS[0])
    assert [step["step"] for step in run.steps] == [1, 2, 3, 4]
    assert sum(run.bytes_by_part.values()) == pytest.approx(int(run.result["total_bytes"]))
    assert all(size > 0 for size in run.bytes_by_part.values()) and run.bytes_by_part["code"] == 1000
    artifact, states = train_gpt.load_artifact(folder / "artifact.lg"), []
    model = train_gpt.LoopedGPT(train_gpt.config_from_stored(artifact.stored))
    model.load_state_dict(artifact.tensors)
    tokens = torch.from_numpy(TokenStream(str(dataset), "val", 384).read(0, 4 * 32))
    with torch.no_grad():
        model.hidden(tokens.view(4, 32), on_pass=lambda _, x: states.append(x.numpy()) or x)
    assert run.stream == pytest.approx([np.sqrt(np.mean(x**2)) for x in states], rel=1e-5) and len(states) == 4


def test_bytes_are_shared_out_by_what_the_codes_say(folder):
    artifact, found = train_gpt.load_artifact(folder / "artifact.lg"), plot.load_run(folder, plot.GREY).bytes_by_part
    codes, others = (stream.bytes for stream in artifact.streams)
    bits = Counter()
    for name, described in artifact.layout.items():
        if described.format.scheme == "int":
            counts = np.unique(artifact.raw[name], return_counts=True)[1]
            part = "token embedding" if name == "embed.weight" else "rest"
            bits[part] -= counts @ np.log2(counts / counts.sum())
    assert found["token embedding"] == pytest.approx(codes * bits["token embedding"] / bits.total())
    assert found["vectors, steps"] == pytest.approx(others)
    assert found["header"] == pytest.approx(artifact.size - codes - others)


def test_panels_show_the_numbers_of_the_log(folder):
    run, pyplot = plot.load_run(folder, plot.COLORS[0]), plot.import_pyplot()
    lines, result = events((folder / "log.txt").read_text(), "train"), json.loads((folder / "result.json").read_text())
    loss, rate = ([float(line[name]) for line in lines] for name in ("train_loss", "lr_scale"))
    figure, (losses, stages, sizes, stream) = pyplot.subplots(1, 4)
    plot.plot_loss(losses, [run], "tokens", "tokens", unit=1e6)
    raw, smooth = losses.lines
    assert raw.get_xdata() == pytest.approx([128e-6, 256e-6, 384e-6, 512e-6]) and raw.get_ydata() == pytest.approx(loss)
    assert smooth.get_ydata() == pytest.approx([np.mean(loss[:3]), np.mean(loss), np.mean(loss), np.mean(loss[1:])])
    assert figure.axes[-1].lines[0].get_ydata() == pytest.approx(rate)
    plot.plot_stages(stages, [run])
    names = [label.get_text() for label in stages.get_yticklabels()]
    shown = {names[round(y)]: x for x, y in stages.collections[0].get_offsets()}
    fields = {"last weights": "trained", "plain": "plain", "banded": "banded"}
    assert shown == {name: pytest.approx(float(result["result"][f"bpb_{field}"])) for name, field in fields.items()}
    plot.plot_bytes(sizes, [run])
    parts = [label.get_text() for label in sizes.get_yticklabels()]
    widths = [1000 * bar.get_width() for bar in sizes.patches]
    assert dict(zip(parts, widths)) == {part: pytest.approx(size) for part, size in run.bytes_by_part.items()}
    plot.plot_stream(stream, [run])
    assert list(stream.lines[0].get_ydata()) == run.stream
    pyplot.close(figure)


def test_tokens_come_from_the_log_or_from_the_steps():
    assert plot.read_step(dict(step="3", tokens="1000"), 128)["tokens"] == 1000
    assert plot.read_step(dict(step="3"), 128)["tokens"] == 384


@pytest.mark.slow
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
