"""The instrument for ablations: tables, pairing by seed, seeds that are added, verdicts, signs; and a real table with an
option and a patch, in a clone.

pytest tests/test_ablate.py
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, tiny_options

from tools import ablate
from tools.ablation import effects
from tools.ablation.effects import Effect, Row
from tools.ablation.ledger import Ledger, Run, Speed
from tools.ablation.table import Change, read_table
from tools.lib.runlog import RunError

TABLE = """
[baseline]
options = "--recipe pocket --iterations 100 --data_path DATA"
seeds = [1, 2, 3, 4, 5]
[[row]]
name = "louder"
options = "--softcap 20"
predict = "hurts"
class = "loss"
published_mb = 5.4
[[row]]
name = "wider"
options = "--mlp_mult 4"
published_mb = -1
"""


def write_table(folder: Path, text: str = TABLE) -> Path:
    path = folder / "table.toml"
    path.write_text(text.replace("DATA", str(folder)))
    return path


def test_a_table_is_read(tmp_path):
    table = read_table(write_table(tmp_path))
    louder, wider = table.changes
    assert (table.iterations, table.seeds) == (100, [1, 2, 3, 4, 5])
    assert (louder.kind, louder.predict, louder.published_mb) == ("loss", "hurts", 5.4)
    assert (wider.kind, wider.predict, wider.options) == ("", "", "--mlp_mult 4")
    assert Path(table.options[-1].removeprefix("--data_path=")).is_absolute(), "runs are made elsewhere"


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("[baseline]", "[base]", "not a table"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = [1]", "at least two seeds"),
        ("seeds = [1, 2, 3, 4, 5]", "seeds = [1, 1]", "each only once"),
        (" --iterations 100", "", "needs --iterations"),
        ('name = "wider"', 'name = "louder"', "a name of its own"),
        ('options = "--softcap 20"', "", "either options or a patch"),
        ('options = "--softcap 20"', 'patch = "gone.patch"', "gone.patch is not there"),
        ('predict = "hurts"', 'predict = "maybe"', "helps, hurts, neither"),
        ("--mlp_mult 4", "--mlp_mutl 4", "mlp_mult"),
        ("published_mb = -1", "publihsed = -1", "not a table"),
        ("[[row]]", "[[row", "not a table"),
        ('options = "--mlp_mult 4"', 'options = "--softcap 20"', "another row is the same change"),
        ('options = "--mlp_mult 4"', 'options = "--seed 4"', "--seed is not for a row"),
        ('options = "--mlp_mult 4"', "options = 5", "a text is needed"),
        ('options = "--mlp_mult 4"', 'options = "--mlp_mult \'4"', "No closing quotation"),
        ("published_mb = -1", 'published_mb = "much"', "not a table"),
        ("DATA", "gone", "no data set there"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path, capsys, old, new, fault):
    assert ablate.main([str(write_table(tmp_path, TABLE.replace(old, new, 1)))]) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1


def test_an_empty_patch_is_refused(tmp_path, capsys):
    """It would be the baseline again, and look like a change without an effect."""
    (tmp_path / "empty.patch").write_text("")
    text = TABLE.replace('options = "--softcap 20"', 'patch = "empty.patch"', 1)
    assert ablate.main([str(write_table(tmp_path, text))]) == 2
    assert "empty.patch is empty, so nothing would change" in capsys.readouterr().err


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(read_table(write_table(tmp_path)), "c0ffee", "a cpu")


def invent(ledger: Ledger, change: Change, seed: int, iterations: int, threads: int) -> Run:
    """A score that the seed moves by tenths, "louder" by exactly 4 mb and "wider" by nothing that can be told."""
    shift = {"louder": 0.004, "wider": 0.001 * (-1) ** seed}.get(change.name, 0.0)
    return make_run(ledger, change, seed, iterations, 2 + seed / 10 + shift + (iterations - 100) / 1000)


def make_run(ledger: Ledger, change: Change, seed: int, iterations: int, val_bpb: float) -> Run:
    digest = ledger.digest(change)
    return Run(change.name, digest, ledger.commit, ledger.cpu, seed, iterations, val_bpb, artifact_bytes=1, train_s=1.0)


def test_seeds_are_added_until_an_effect_is_resolved(ledger, monkeypatch):
    monkeypatch.setattr(ablate, "run_one", invent)
    monkeypatch.setattr(ablate, "prepare_tree", lambda *given: Path())
    table = ledger.table
    ablate.resolve(ledger, {"louder": 100, "wider": 100}, jobs=2)
    runs = {name: sorted(r.seed for r in ledger.runs if r.row == name) for name in ("baseline", "louder", "wider")}
    assert runs == {"baseline": [1, 2, 3, 4, 5], "louder": [1, 2, 3], "wider": [1, 2, 3, 4, 5]}
    louder, wider = effects.read_rows(ledger, table.changes)
    assert louder.at_steps.mb == pytest.approx(4.0) and louder.at_steps.verdict == "hurts", "paired, seeds cancel"
    assert wider.at_steps.verdict == "not resolved" and louder.at_time is None

    again = Ledger(table, "c0ffee", "a cpu")
    monkeypatch.setattr(ablate, "run_one", lambda *given: pytest.fail("nothing is run twice"))
    ablate.resolve(again, {"louder": 100, "wider": 100}, jobs=2)
    assert [r.val_bpb for r in again.runs] == [r.val_bpb for r in ledger.runs]


def test_equal_time_is_steps_times_the_ratio_of_speeds(ledger, monkeypatch):
    monkeypatch.setattr(ablate, "run_one", invent)
    monkeypatch.setattr(ablate, "prepare_tree", lambda *given: Path())
    louder = ledger.table.changes[0]
    ledger.add(Speed("louder", ledger.digest(louder), ledger.commit, ledger.cpu, 1.25, [1.2, 1.25, 1.3]))
    ablate.resolve(ledger, {"louder": effects.equal_time_steps(ledger.table, ledger.find_speed(louder))}, jobs=1)
    row = effects.read_rows(ledger, [louder])[0]
    assert row.at_steps is None and row.at_time.mb == pytest.approx(4 + 25)
    assert {r.iterations for r in ledger.runs if r.row == "louder"} == {125}
    assert Ledger(ledger.table, "c0ffee", "a cpu").find_speed(louder).turns == [1.2, 1.25, 1.3]
    assert not ablate.has_one_speed(ledger.table, Change("late", options="--plan a(b)*2c --loop_start 0.5"))


def test_what_has_finished_is_kept_when_another_run_fails(ledger, monkeypatch):
    def fail_one(ledger: Ledger, change: Change, seed: int, iterations: int, threads: int) -> Run:
        if seed == 1:
            raise RunError("seed 1 diverged")
        return invent(ledger, change, seed, iterations, threads)

    monkeypatch.setattr(ablate, "run_one", fail_one)
    monkeypatch.setattr(ablate, "prepare_tree", lambda *given: Path())
    with pytest.raises(RunError, match="seed 1 diverged"):
        ablate.resolve(ledger, {"louder": 100}, jobs=2)
    assert sorted((r.row, r.seed) for r in ledger.runs) == [(n, s) for n in ("baseline", "louder") for s in (2, 3)]


def test_other_commits_cpus_options_and_patches_are_never_paired(ledger, tmp_path):
    change = ledger.table.changes[0]
    ledger.add(make_run(ledger, change, 1, 100, 2.0))
    table = ledger.table
    assert Ledger(table, "c0ffee", "a cpu").find(change, 1, 100)
    assert not Ledger(table, "c0ffee", "another cpu").find(change, 1, 100)
    assert not Ledger(table, "decaf", "a cpu").find(change, 1, 100)
    for other in (replace(table, options=[*table.options, "--warmdown=1"]), replace(table, data_digest="other text")):
        assert not Ledger(other, "c0ffee", "a cpu").find(change, 1, 100)
    digests = set()
    for content in ("a", "b"):
        (tmp_path / "x.patch").write_text(content)
        digests.add(ledger.digest(Change("x", patch="x.patch")))
    assert len(digests) == 2


def test_a_broken_ledger_is_named(ledger, capsys):
    ledger.table.runs_path.write_text("{}\n")
    with pytest.raises(RunError, match="line 1: not a run"):
        Ledger(ledger.table, "c0ffee", "a cpu")


def test_verdicts_and_signs():
    found = {"hurts": Effect(3.0, 1.0, 3), "helps": Effect(-3.0, 1.0, 3), "not resolved": Effect(1.9, 1.0, 3)}
    assert all(effect.verdict == verdict for verdict, effect in found.items())
    rows = [
        Row(Change("a", kind="loss", published_mb=5), found["hurts"], None, None),
        Row(Change("b", kind="loss", published_mb=5), found["helps"], None, None),
        Row(Change("c", kind="rates", published_mb=-5), found["helps"], None, None),
        Row(Change("d", kind="rates", published_mb=-5), found["not resolved"], None, None),
        Row(Change("e"), found["helps"], None, None),
    ]
    lines = effects.format_signs(rows)
    assert lines[0].startswith("signs, all: balanced accuracy 0.75 over 3 rows")
    assert "signs, loss: balanced accuracy 0.50 over 2 rows" in lines[1] and "rates" in lines[2]
    assert "-3.0 ± 1.0 (3)" in effects.format_table(rows) and math.isclose(found["hurts"].mb, 3)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone, so there is no commit to make runs of")
def test_a_real_table_with_an_option_and_a_patch(tmp_path, dataset):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    script = clone / "train_gpt.py"
    text = script.read_text()
    script.write_text(text.replace("y = F.leaky_relu(y, self.slope).square()", "y = torch.sin(y).square()"))
    patch = subprocess.run(["git", "diff"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert patch
    script.write_text(text)
    options = " ".join(tiny_options(dataset, iterations=2, seq_len=16, batch_tokens=32))
    (tmp_path / "sin.patch").write_text(patch)
    (tmp_path / "t.toml").write_text(f"""
[baseline]
options = "{options}"
seeds = [1, 2]
[[row]]
name = "lower cap"
options = "--softcap 2"
[[row]]
name = "sine"
patch = "sin.patch"
""")
    command = [sys.executable, "-m", "tools.ablate", str(tmp_path / "t.toml"), "--steps_only", "--out"]
    command += [str(tmp_path / "effects.png"), "--json", "--jobs", "2"]
    done = subprocess.run(
        command, cwd=clone, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    cap, sine = json.loads(done.stdout)
    assert cap["at_steps"]["mb"] != 0 and sine["at_steps"]["mb"] != 0 and cap["at_steps"] != sine["at_steps"]
    assert (tmp_path / "effects.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "t.runs.jsonl").read_text().splitlines()) == 6
    again = subprocess.run(command, cwd=clone, env=clean_environment(), capture_output=True, text=True, check=False)
    assert again.stdout == done.stdout and "#" not in again.stderr, "nothing is run twice"

    (clone / "tools" / "bench.py").write_text("")
    dirty = subprocess.run(command, cwd=clone, env=clean_environment(), capture_output=True, text=True, check=False)
    assert dirty.returncode == 2 and "bench.py is not committed" in dirty.stderr
