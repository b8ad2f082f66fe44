"""Depth at test time and plans side by side: tools.depth and tools.sweep, on artifacts that take seconds to make."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import events, tiny_options, write_artifact

import train_gpt
from loopgolf.runtime import RunContext
from tools import depth, seeds, sweep
from tools.lib.exits import EarlyExit

LOOP = dict(plan="ab(^cd~)*re", skips="none", depth=3, max_r=4, xsa_passes="none", ve_passes="none")
DOCUMENTS, TOKENS = 5, 383  # the last window of 32 is not full


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer_bytes) -> Path:
    return write_artifact(tmp_path_factory.mktemp("depth"), tokenizer_bytes, **LOOP)


def score(artifact: Path, dataset: Path, *more: str) -> list[str]:
    return [str(artifact), f"--data_path={dataset}", f"--score_documents={DOCUMENTS}", *more]


@pytest.fixture(scope="module")
def report(artifact, dataset) -> depth.Report:
    options = [f"--data_path={dataset}", f"--score_documents={DOCUMENTS}"]
    return depth.study_depth(artifact, [3, 1, 6, 3], [0.0, 0.9, float("inf")], "plain", options)


def load(artifact: Path, dataset: Path, score_depth: int) -> tuple[train_gpt.LoopedGPT, RunContext]:
    """The model as a run would score it."""
    found = train_gpt.load_artifact(artifact)
    stored = train_gpt.config_from_stored(found.stored)
    here = dict(score_depth=score_depth, data_path=str(dataset), score_documents=DOCUMENTS, compile="none")
    config = replace(stored, **here)
    ctx = train_gpt.build_context(config, {})
    return train_gpt.load_eval_model(found, config, ctx), ctx


def by_exit(report: depth.Report) -> dict:
    return {point.exit: point for point in report.points if point.exit is not None}


def test_each_depth_is_scored_as_a_run_would_score_it(report, artifact, dataset):
    fixed = [point for point in report.points if point.exit is None]
    assert [point.r for point in fixed] == [1, 3, 6] and (report.default_r, report.trained_r) == (3, 4)
    for point in fixed:
        model, ctx = load(artifact, dataset, 0 if point.r == 3 else point.r)  # 0: the depth of the plan
        config = model.config
        found = train_gpt.evaluate("plain", model, config, ctx, train_gpt.load_validation(config, ctx)).score
        assert (point.val_bpb, report.tokens, report.bytes) == (found.bpb, TOKENS - 1, found.bytes)
        assert point.mean_depth == point.r and point.seconds > 0
    assert len({point.val_bpb for point in fixed}) == 3


def test_operations_are_linear_in_the_mean_depth(report):
    """Whatever leaves early: operations outside of the group are the same."""
    one, three, six = (point.flops_per_token for point in report.points[:3])
    assert six - three == pytest.approx(1.5 * (three - one), rel=1e-3)
    part = by_exit(report)[0.9]
    assert part.flops_per_token == pytest.approx(one + (part.mean_depth - 1) * (three - one) / 2, rel=1e-3)


def test_exits_span_from_two_repetitions_to_all(report, artifact, dataset):
    exits, full = by_exit(report), report.points[2]
    assert (exits[0.0].mean_depth, exits[0.0].val_bpb) == (6, full.val_bpb)
    assert 2 < exits[0.9].mean_depth < 6 and exits[0.9].seconds is None
    two = depth.study_depth(artifact, [2], [], "plain", [f"--data_path={dataset}", f"--score_documents={DOCUMENTS}"])
    assert (exits[float("inf")].mean_depth, exits[float("inf")].val_bpb) == (2, two.points[0].val_bpb)


def test_only_scored_positions_count(report, artifact, dataset):
    """The depths of a text are those of its tokens, one window after another, without what pads the last one."""
    model, ctx = load(artifact, dataset, 6)
    tokens, total = train_gpt.load_validation(model.config, ctx).tokens, 0
    for window in tokens[:-1].split(32):
        early = EarlyExit(0.9)
        with torch.no_grad():
            model.hidden(window[None], on_pass=early)
        total += int(early.depths.sum())
    assert by_exit(report)[0.9].mean_depth == pytest.approx(total / (TOKENS - 1))


@pytest.mark.slow
def test_json_table_and_picture(artifact, dataset, tmp_path, capsys):
    out = tmp_path / "d.png"
    assert depth.main(score(artifact, dataset, "--depths", "1", "6", "--exit", "0.5", "--json", f"--out={out}")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == LOOP["plan"] and found["artifact_sha256"] == train_gpt.load_artifact(artifact).sha256
    assert [(p["r"], p["exit"]) for p in found["points"]] == [(1, None), (6, None), (6, 0.5)]
    assert set(found["points"][0]) == {"r", "exit", "mean_depth", "val_bpb", "seconds", "flops_per_token"}
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size > 20_000
    assert depth.main(score(artifact, dataset, "--depths", "3", "--mode", "banded")) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and rows[2].split()[:2] == ["r=3*", "3.00"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--depths", "0"], "--depths 0: has to be 1 or more"),
        (["--depths", "300"], "score_depth=300: must lie between 0 and 256"),
        (["--depths", "256"], "has 515 passes, at most 512"),
        (["--exit", "nan"], "--exit nan: has to be 0 or more"),
        (["--exit", "0.1", "--mode", "lora"], "--exit with --mode lora"),
        (["--data_path", "nowhere"], "nowhere"),
        (["--out", "depth.txt"], "depth.txt: a picture has to end in"),
        (["--out", "nowhere/depth.png"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(more, message, artifact, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert depth.main(score(artifact, dataset, *more)) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and told.err.count("\n") == 1 and not told.out


def test_a_fixed_plan_and_a_damaged_artifact_are_refused(artifact, dataset, tokenizer_bytes, tmp_path, capsys):
    assert depth.main(score(write_artifact(tmp_path, tokenizer_bytes), dataset)) == 2
    error = capsys.readouterr().err
    assert "its plan abab has a fixed depth" in error and "*r" in error and error.count("\n") == 1
    (tmp_path / "cut.lg").write_bytes(artifact.read_bytes()[:-5])
    assert depth.main(score(tmp_path / "cut.lg", dataset)) == 4
    assert capsys.readouterr().err.startswith("error: ")


# Sweeps

RUN = dict(model_dim=16, iterations=2, bigram_buckets=0, ve_passes="none", seq_len=32, score_documents=1)
PLANS = ["ab", "a(b)*r --skips none --depth 2 --moe_experts 2 --moe_hidden 16 --moe_top 1"]


@pytest.fixture(scope="module")
def options(dataset) -> list[str]:
    return [word for word in tiny_options(dataset, **RUN) if not word.startswith("--plan=")]


@pytest.fixture(scope="module")
def swept(options, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        # not in a process for each run: that is tested with tools.seeds
        patch.setattr(seeds, "run_child", lambda command, environ: train_gpt.main(command[2:], {}))
        assert sweep.main([*PLANS, "--seeds", "3", "--", *options]) == 0
    return cwd


def count_params(folder: Path) -> int:
    return int(events((folder / "log.txt").read_text(), "model")[0]["params"])


@pytest.mark.slow
def test_the_second_time_nothing_is_trained(swept, options, monkeypatch, capfd):
    monkeypatch.chdir(swept)
    folders = sorted((swept / "runs").iterdir())
    assert len(folders) == 2 and folders[0].name.startswith("sweep-ab-") and folders[1].name.startswith("sweep-abr-")
    before = {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()}
    assert sweep.main([*PLANS, "--seeds=3", "--json", "--out=s.png", "--", *options]) == 0
    assert (swept / "s.png").read_bytes()[:4] == b"\x89PNG"
    (swept / "s.png").unlink()
    told = capfd.readouterr()
    assert [line.split(",")[0] for line in told.err.splitlines()] == ["# seed 3: finished"] * 2
    assert {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()} == before
    found = json.loads(told.out)
    assert [(row["plan"], row["options"]) for row in found["plans"]] == [("ab", ""), ("a(b)*r", PLANS[1][7:])]
    for row in found["plans"]:
        result = json.loads((swept / row["runs"][0] / "result.json").read_text())["result"]
        assert (row["val_bpb"], row["artifact_bytes"]) == (float(result["val_bpb"]), float(result["artifact_bytes"]))
        assert row["val_bpb_std"] is None and row["val_bpb_runs"] == [row["val_bpb"]] and row["steps"] == 2
        assert row["tokens_per_s"] == pytest.approx(float(result["tokens"]) / float(result["train_s"]))
        assert (train_gpt.load_artifact(swept / row["runs"][0] / "artifact.lg").stored["plan"]) == row["plan"]
        assert row["train_s"] == float(result["train_s"]) and row["params"] == count_params(swept / row["runs"][0])
        [head] = events((swept / row["runs"][0] / "log.txt").read_text(), "run")
        assert row["code_sha256"] == head["code_sha256"]  # with experts there is another module to count
    assert len({row["code_sha256"] for row in found["plans"]}) == 2
    assert found["plans"][1]["flops_per_token"] > found["plans"][0]["flops_per_token"]


@pytest.mark.slow
def test_names_do_not_cover_each_other(swept):
    """Four points as close as can be: names take different sides."""
    axes = sweep.import_pyplot().subplots()[1]
    points = [(1, 1), (1.02, 1), (1, 1.02), (3, 3)]
    axes.scatter(*zip(*points))
    sweep.name_points(axes, points, ["abcdabc", "a^b", "$x^", "last"])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["abcdabc", "a^b", "$x^", "last"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (["ab", "ab"], [], "PLAN: each only once"),
        (["ab", "--seeds", "1", "1"], [], "--seeds: each only once"),
        (["a(b"], [], "'a(b': plan 'a(b', character 4"),
        (["ab(c)*r"], [], "needs a plan without *r; use --skips none"),
        (["ab --dephts 2"], [], "unknown option --dephts (did you mean --depth?)"),
        ([""], [], "'': "),
        (["ab 'x"], [], "No closing quotation"),
        (["ab"], ["--plan=ab"], "plans are named before it"),
        (
            ["ab", "abab --score_documents 9"],
            ["--score_documents=4"],
            "'abab --score_documents 9' has score_documents=9, 'ab' has 4",
        ),
        (["ab"], ["--dry_run"], "--dry_run is not for a series of seeds"),
        (["ab", "--out", "x.jpeg"], [], "a picture has to end in"),
    ],
)
def test_a_sweep_that_cannot_work_begins_nothing(own, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*own, "--", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes, place", [((100, 100), [2.0, 3.0]), ((100, 150), [100.0, 150.0])])
def test_files_of_one_size_stand_by_their_work(sizes, place, tmp_path, monkeypatch):
    rows = [
        sweep.Row(plan, f"--iterations {n}", ["r"], "c", 1, flops, 1000.0 * size, 2.0, None, [2.0], n, 1.0, 1.0)
        for plan, flops, size, n in (("abc", 2_000_000, sizes[0], 5), ("abcd", 3_000_000, sizes[1], 4))
    ]
    drawn = {}
    monkeypatch.setattr(sweep, "save_picture", lambda figure, *given, **named: drawn.update(axes=figure.axes[0]))
    sweep.draw(rows, tmp_path / "s.png")
    assert [x for x, _ in drawn["axes"].collections[0].get_offsets()] == place
    assert sweep.name_rows(rows) == ["abc", "abcd"]
    assert sweep.name_rows([rows[0], replace(rows[0], options="--iterations 7")]) == [
        "abc\n--iterations 5",
        "abc\n--iterations 7",
    ]
