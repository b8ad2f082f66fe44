"""Bits for each role: the law has its optimum where tools.allocate puts it, and a run goes through it end to end.

pytest tests/test_allocate.py
"""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from helpers import TINY, train
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from loopgolf.artifact import unpack_artifact
from tools import allocate
from tools.allocate import Cost, Study
from tools.lib.finished import FinishedRun

ROLES = ["core", "edge", "embed", "table"]
LIMIT = 6500


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    shape = dict(plan="a(b)*2c", bigram_buckets=64, bigram_dim=8)
    place = tmp_path_factory.mktemp("allocate")
    return train(place, dataset, run_id="r", iterations=6, calibration_tokens=256, **shape)


def cost_of(role: str, k: float, weights: int, bend: float) -> Cost:
    """By the law: bend * k^2, and as many bytes as a fine grid has."""
    n_bytes = weights / 8 * math.log2(1000 / k)
    return Cost(role, role, k, k, weights, n_bytes, weights / 8 / math.log(2), bend * k * k, 0.0)


roles_of_any_kind = st.lists(
    st.tuples(st.floats(1, 100), st.integers(1_000, 1_000_000), st.floats(1e-3, 1e3)), min_size=4, max_size=4
)


@given(roles_of_any_kind, st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_slopes_become_equal_at_the_same_bytes_and_nothing_is_better(given_roles, moves):
    costs = [cost_of(role, *kind) for role, kind in zip(ROLES, given_roles)]
    n_bytes = sum(cost.bytes for cost in costs)

    def at(k: dict[str, float]) -> list[Cost]:
        return [cost_of(role, k[role], kind[1], kind[2]) for role, kind in zip(ROLES, given_roles)]

    for _ in range(40):
        costs = at(allocate.equalise(costs))
    assert allocate.common_slope(costs) == pytest.approx(costs[0].slope, rel=0.01)
    assert [cost.slope for cost in costs] == pytest.approx([costs[0].slope] * 4, rel=0.01)
    assert sum(cost.bytes for cost in costs) == pytest.approx(n_bytes, rel=0.005)  # k has four digits
    elsewhere = at(allocate.keep_bytes({cost.role: cost.k * 2**move for cost, move in zip(costs, moves)}, costs))
    assert sum(cost.mb for cost in elsewhere) >= 0.995 * sum(cost.mb for cost in costs)


def test_slope_is_the_derivative_of_loss_by_bytes():
    before, after = (cost_of("core", k, 80_000, 0.03) for k in (5.0, 5.001))
    saved_kb = (before.bytes - after.bytes) / 1000
    assert before.slope == pytest.approx((after.mb - before.mb) / saved_kb, rel=1e-3)


def test_a_role_that_costs_nothing_or_less_moves_by_a_factor_of_two_at_most():
    costs = [cost_of("core", 10.0, 8_000, bend) for bend in (-1.0, 1.0)]
    k = allocate.equalise([costs[0], replace(costs[1], name="edge", role="edge")])
    assert 1 < k["core"] / k["edge"] <= 4
    for bend in (0.0, 0.1):  # all roles together cost less than nothing
        k = allocate.equalise([costs[0], replace(costs[1], name="edge", role="edge", mb=bend)])
        assert 1 <= k["core"] / k["edge"] <= 4


def test_the_known_optimum_of_a_bowl_is_found(folder, monkeypatch):
    """A loss that is the square of the rounding errors, in standard deviations of their rows: errors spread evenly over
    a step, so their mean square is a twelfth of its square."""
    bends = dict(core=1.0, edge=4.0, embed=1.0, table=9.0)
    study = Study(folder, 2)
    study.run.curvatures.clear()  # rounding is to the nearest, of Gaussian weights
    generator = torch.Generator().manual_seed(1)
    for names in study.roles.values():
        for name in names:
            study.run.weights[name].normal_(generator=generator)

    def bowl(self: Study, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        total = 0.0
        for role, names in self.roles.items():
            for name in names:
                exact = self.run.weights[name]
                errors = (weights[name] - exact) / exact.square().mean(1, keepdim=True).sqrt()
                total += bends[role] * float(errors.square().sum())
        return torch.tensor([total, total], dtype=torch.float64)

    monkeypatch.setattr(Study, "losses", bowl)
    monkeypatch.setattr(allocate, "compare", lambda *_: [])
    found = allocate.allocate(study, LIMIT, {role: getattr(study.config, f"{role}_k") for role in study.roles})
    by_hand = [bends[cost.role] * cost.weights * cost.step**2 / 12 for cost in found.after]
    assert [cost.mb for cost in found.after] == pytest.approx(by_hand, rel=0.1)
    slopes = [2000 * mb / cost.saved for cost, mb in zip(found.after, by_hand)]
    assert slopes == pytest.approx([slopes[0]] * 4, rel=0.2)
    steps = {cost.role: cost.step for cost in found.after}
    for role, bend in bends.items():  # bytes of so few weights are no clean logarithm
        assert steps[role] / steps["core"] == pytest.approx(bend**-0.5, rel=0.25)


@pytest.mark.slow
def test_a_run_from_end_to_end(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(allocate, "ROUNDS", 1)
    reports = []
    show = allocate.format_report
    monkeypatch.setattr(allocate, "format_report", lambda report: reports.append(report) or show(report))
    picture = tmp_path / "allocation.png"
    assert allocate.main([str(folder), f"--limits={LIMIT}", "--batches=2", f"--out={picture}"]) == 0
    table = capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    study = Study(folder, 2)
    (report,) = reports
    (found,) = report.found
    assert sorted(cost.name for cost in report.tensors) == sorted(
        name for names in study.roles.values() for name in names
    )
    assert [cost.name for cost in found.before] == [cost.name for cost in found.after] == list(study.roles)
    assert [cost.k for cost in found.before] == [getattr(study.config, f"{role}_k") for role in study.roles]
    assert table.splitlines()[-1] == found.options == " ".join(f"--{c.name}_k {c.k:g}" for c in found.after)
    uniform, of_the_run, equalised, by_the_loss = found.files
    assert not by_the_loss.k
    assert of_the_run.k == {cost.name: cost.k for cost in found.before}
    assert equalised.k == {cost.name: cost.k for cost in found.after}
    same_step = [uniform.k[role] / (31 if role in ("core", "edge") else 127) for role in study.roles]
    assert same_step == pytest.approx([same_step[0]] * 4, rel=1e-3)
    for file in found.files:
        assert 0.9 * LIMIT < file.bytes + study.config.code_reserve <= LIMIT
        assert file.mb == pytest.approx(1000 * (file.bpb - uniform.bpb), abs=1e-6)
    content = study.run.fit(study.config_at(LIMIT, equalised.k))
    losses = study.losses(unpack_artifact(content, train_gpt.describe_stored).tensors)
    assert (len(content), float(losses.mean()) / 1000) == (equalised.bytes, pytest.approx(equalised.bpb))
    monkeypatch.setattr(allocate, "study_run", lambda *_: report)
    assert allocate.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(report)))


def test_the_loss_is_that_of_the_windows_that_come_next(folder):
    study = Study(folder, 2)
    consumed = int(json.loads((folder / "result.json").read_text())["result"]["tokens"])
    tokens = study.run.text.read(consumed, 2 * TINY["score_batch"], TINY["seq_len"])
    study.model.load_state_dict(study.run.weights)
    with torch.no_grad():
        log_probs = study.model(tokens[:, :-1]).log_softmax(-1)
    nats = -float(log_probs.gather(2, tokens[:, 1:, None]).double().sum())
    expected = 1000 * nats / math.log(2) / study.n_bytes
    assert float(study.losses(study.run.weights).mean()) == pytest.approx(expected, rel=1e-5)


def test_what_is_measured_is_what_the_file_holds(folder):
    study = Study(folder, 2)
    own = {role: getattr(study.config, f"{role}_k") for role in study.roles}
    formats = train_gpt.build_formats(study.config_at(LIMIT, own), study.model, study.solve(LIMIT, own))
    run = study.run
    content = train_gpt.encode_artifact(
        study.config, study.model, run.weights, formats, run.curvatures, run.tokenizer.identity
    )
    held = unpack_artifact(content, train_gpt.describe_stored).tensors
    for name, rounded in study.round(run.weights, formats).items():
        assert torch.equal(rounded, held[name]), name
    assert run.curvatures


def test_files_are_compared_at_equal_bytes(folder, monkeypatch):
    """The second file is as good as the first would be with the bytes that it has more."""
    study, k = Study(folder, 2), dict(core=8.0)
    costs = [cost_of("core", 8.0, 80_000, 0.03)]
    extra = 2000 / allocate.common_slope(costs)  # bytes that are worth 2 mb
    sizes, losses = iter((1000, 1000 + round(extra))), iter((50.0, 48.0))
    monkeypatch.setattr(FinishedRun, "fit", lambda *_: bytes(next(sizes)))
    monkeypatch.setattr(allocate, "unpack_artifact", lambda *_: type("File", (), dict(tensors={})))
    monkeypatch.setattr(study, "losses", lambda _: torch.full((2,), next(losses)))
    first, second = allocate.compare(study, LIMIT, dict(first=k, second=k), costs)
    assert first.mb == 0 and second.mb == -2
    assert second.mb_at_equal_bytes == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "given, code, words",
    [
        (["absent"], 2, "absent: not a finished run"),
        (["no_checkpoint"], 2, "checkpoint.pt"),
        (["damaged"], 2, "not a finished run"),
        (["other_width"], 2, "not a finished run"),
        (["r"], 2, "had no limit; give --limits"),
        (["r", "--limits=1500"], 3, "are needed"),
        (["r", "--limits=900000"], 2, "the finest grids need"),
        (["r", "--limits=many"], 2, "--limits"),
        (["r", "--limits=0"], 2, "--limits"),
        (["r", "--limits=6500", "--batches=1"], 2, "--batches"),
        (["r", "--limits=6500", "--out=picture.txt"], 2, "has to end in"),
        (["r", "--limit_s=6500"], 2, "--limit_s"),
    ],
)
def test_bad_input_is_one_line(given, code, words, folder, tmp_path, capsys):
    for name in ("no_checkpoint", "damaged", "other_width"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "no_checkpoint" / "checkpoint.pt").unlink()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"damaged")
    config = tmp_path / "other_width" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(model_dim=64)))
    place = folder if given[0] == "r" else tmp_path / given[0]
    try:
        found = allocate.main([str(place), *given[1:]])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == code and error.startswith("error: ") and error.count("\n") == 1 and words in error
