"""tools.record: a folder that it builds is sound; every fault that is planted in one is found, by the right rule; what it
says of strangers' folders; and which of two records is better."""

import json
import math
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from helpers import train
from hypothesis import given, settings
from hypothesis import strategies as st

import tools.pack
import train_gpt
from tools import record
from tools.submission import stats
from tools.submission.entry import read_entry
from tools.submission.folder_rules import code
from tools.submission.rules import RULES, judge
from tools.submission.trainlog import read_train_log
from tools.submission.verdicts import BAD, OK, UNKNOWN

SEEDS = (42, 1337, 2024)
RUN = dict(iterations=4, byte_limit=16_000_000, code_reserve=24_000, score_tokens=0, also="trained,plain")
META = ["--author=A. Name", "--github_id=aname", "--name=Tiny loop", "--blurb=Four steps of a tiny model."]
GPUS = "hardware device:cuda name:NVIDIA%20H100%2080GB%20HBM3 world:8 threads:1 dtype:float32"


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> list[Path]:
    cwd = tmp_path_factory.mktemp("runs")
    return [train(cwd, dataset, **RUN, run_id=f"r{seed}", seed=seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def built(runs, tmp_path_factory) -> tuple[Path, list]:
    """A pocket record of real runs, and what its own check said of it."""
    out = tmp_path_factory.mktemp("built") / "track_pocket" / "2026-05-01_Tiny"
    out.parent.mkdir()
    meta = dict(author="A. Name", github_id="aname", name="Tiny loop", blurb="Four steps.", date="2026-05-01")
    return out, record.build(out, runs, meta | dict(track="track_pocket"))


@pytest.fixture(scope="module")
def folders(runs, built, tmp_path_factory) -> dict[str, Path]:
    """The pocket record; and one of the GPU track, whose logs claim the hardware that it asks for."""
    root = tmp_path_factory.mktemp("records")
    pocket, gpus = built[0], root / "track_10min_16mb" / "2026-05-01_Tiny"
    gpus.mkdir(parents=True)
    claimed = [shutil.copytree(run, root / "claimed" / run.name) for run in runs]
    for run in claimed:
        edit(run / "log.txt", r"^hardware .*$", GPUS)
    written = json.loads((pocket / "submission.json").read_text())
    meta = {name: written[name] for name in ("author", "github_id", "name", "blurb", "date")}
    record.write_folder(
        gpus, [record.read_run(run) for run in claimed], claimed, (pocket / "train_gpt.py").read_bytes(),
        meta | dict(track=gpus.parent.name),
    )  # fmt: skip
    return {pocket.parent.name: pocket, gpus.parent.name: gpus}


def edit(path: Path, pattern: str, new: str, count: int = 0) -> None:
    before = path.read_text(encoding="utf-8")
    after = re.sub(pattern, new, before, count=count, flags=re.MULTILINE)
    assert after != before, f"{pattern} is not in {path.name}"
    path.write_text(after, encoding="utf-8")


def edit_json(folder: Path, change) -> None:
    path = folder / "submission.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def violated(folder: Path) -> set[str]:
    return {v.rule for v in judge(read_entry(folder), static=True) if v.verdict == BAD}


# ----------------------------------------------------------------------------------------------------------------------
# A sound folder
# ----------------------------------------------------------------------------------------------------------------------


def test_what_is_built_is_sound(built, folders, capsys):
    verdicts = built[1]
    assert len(verdicts) == len(RULES) and {v.verdict for v in verdicts} == {OK}, [
        v for v in verdicts if v.verdict != OK
    ]
    capsys.readouterr()
    assert record.main(["check", str(folders["track_10min_16mb"]), "--static", "--json"]) == 0
    told = {v["rule"]: v["verdict"] for v in json.loads(capsys.readouterr().out)}
    # whose validation set it was, a log of an unknown tokenizer does not tell
    assert told.pop("validation") == UNKNOWN and set(told.values()) == {OK}


def test_the_folder_holds_what_the_design_says(folders):
    names = {"README.md", "submission.json", "train_gpt.py", "train_gpt_human.py", "requirements.txt"}
    names |= {f"train_seed{seed}.log" for seed in SEEDS}
    assert {path.name for path in folders["track_10min_16mb"].iterdir()} == names
    names |= {"tokenizer.model"} | {f"artifact_seed{seed}.lg" for seed in SEEDS}
    assert {path.name for path in folders["track_pocket"].iterdir()} == names
    assert list(folders["track_pocket"].parent.iterdir()) == [folders["track_pocket"]]  # nothing is left beside it


def test_the_numbers_are_those_of_the_runs(folders, runs):
    data = json.loads((folders["track_pocket"] / "submission.json").read_text())
    results = [json.loads((run / "result.json").read_text())["result"] for run in runs]
    scores = [float(result["val_bpb"]) for result in results]
    center = sum(scores) / 3
    assert data["val_bpb"] == pytest.approx(center, abs=1e-8)
    assert data["val_bpb_std"] == pytest.approx(math.sqrt(sum((s - center) ** 2 for s in scores) / 2), abs=1e-8)
    packed = (folders["track_pocket"] / "train_gpt.py").stat().st_size
    assert data["bytes_total"] == packed + max(result["artifact_bytes"] for result in results)
    row = data["seed_results"]["1337"]
    assert (row["val_bpb"], row["steps"]) == (scores[1], 4)
    readme = (folders["track_pocket"] / "README.md").read_text()
    assert f"| 1337 | {scores[1]:.5f} |" in readme and "for SEED in 42 1337 2024; do python train_gpt.py" in readme


def test_the_command_in_the_readme_repeats_the_config(folders, runs):
    readme = (folders["track_pocket"] / "README.md").read_text()
    words = re.search(r"python train_gpt\.py (.*) --seed=\$SEED; done", readme)[1].split()
    config, _ = train_gpt.parse_config([*words, "--seed=42", "--run_id=r42"], {})
    had, has = json.loads((runs[0] / "config.json").read_text()), vars(config)
    assert {name for name in had if had[name] != has[name]} == {"log_every", "checkpoint_every_s"}


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults
# ----------------------------------------------------------------------------------------------------------------------

FAULTS = {}


def fault(*rules: str, track: str = "track_10min_16mb"):
    """Registers a fault and exactly the rules that must find it."""

    def register(plant):
        FAULTS[plant.__name__] = (set(rules), track, plant)
        return plant

    return register


def log_of(folder: Path, seed: int | str = 42) -> Path:
    return folder / f"train_seed{seed}.log"


def restate(folder: Path, name: str, value: str, seed: int = 42) -> None:
    """Another number in the result line, and in the lines above it that say the same."""
    if name == "train_s":
        edit(log_of(folder, seed), r"^(clock what:stop used_s:)\S+", rf"\g<1>{value}")
    edit(log_of(folder, seed), rf"^(result .*\b{name}:)\S+", rf"\g<1>{value}")


@fault("means", "readme")
def wrong_mean(folder):
    edit_json(folder, lambda data: data.update(val_bpb=round(data["val_bpb"] - 1e-5, 8)))
    edit(folder / "README.md", r"\*\*val_bpb \d", "**val_bpb 0")


@fault("means")
def edited_bpb(folder):
    edit_json(folder, lambda data: data.update(val_bpb=round(data["val_bpb"] - 1e-8, 8)))


@fault("means")
def wrong_mean_loss(folder):
    edit_json(folder, lambda data: data.update(val_loss=data["val_loss"] + 0.001))


@fault("deviations")
def wrong_deviation(folder):
    edit_json(folder, lambda data: data.update(val_bpb_std=data["val_bpb_std"] * math.sqrt(2 / 3)))


@fault("readme")
def edited_bpb_in_the_readme(folder):
    edit(folder / "README.md", r"^(\| 1337 \| \d\.\d{4})\d", lambda m: m[1] + "x")


@fault("readme")
def edited_command(folder):
    edit(folder / "README.md", r"--iterations=4", "--iterations=5")


@fault("scores")
def a_seed_scored_better(folder):
    edit_json(folder, lambda data: data["seed_results"]["42"].update(val_bpb=1.0))


@fault("scores")
def a_seed_with_fewer_steps(folder):
    edit_json(folder, lambda data: data["seed_results"]["42"].update(steps=3))


@fault("scores")
def a_seed_faster(folder):
    edit_json(folder, lambda data: data["seed_results"]["42"].update(step_avg_ms=0.001))


@fault("submission_json", "scores")
def a_seed_without_its_time(folder):
    edit_json(folder, lambda data: data["seed_results"]["42"].pop("eval_time_s"))


@fault("sizes")
def wrong_total(folder):
    edit_json(folder, lambda data: data.update(bytes_total=data["bytes_total"] - 1))


@fault("sizes")
def wrong_code_size(folder):
    edit_json(folder, lambda data: data.update(bytes_code=data["bytes_code"] - 1))


@fault("code", "sizes", "readme")
def a_longer_script(folder):
    with open(folder / "train_gpt.py", "ab") as file:
        file.write(b"\n")


@fault("limit", "scores", "sizes", "readme")
def one_byte_too_many(folder):
    code = (folder / "train_gpt.py").stat().st_size
    restate(folder, "artifact_bytes", str(16_000_001 - code))
    restate(folder, "total_bytes", str(16_000_001 - code + 24_000))


@fault("limit", "same_run", "readme")
def another_limit(folder):
    edit(log_of(folder), r"^(config name:byte_limit value:)\d+", r"\g<1>17000000")
    restate(folder, "limit", "17000000")


@fault("train_time", "scores", "readme")
def training_a_second_too_long(folder):
    restate(folder, "train_s", "601.0000")


@fault("eval_time", "scores", "readme")
def scoring_a_second_too_long(folder):
    restate(folder, "eval_s", "601.0000")


@fault("log_sums", "scores", "readme")
def a_clock_that_says_otherwise(folder):
    edit(log_of(folder), r"^(result .*train_s:)\S+", r"\g<1>0.0100")


@fault("log_sums", "scores", "means", "deviations", "readme")
def a_result_line_that_was_edited(folder):
    restate(folder, "val_bpb", "1.00000000")


@fault("log_sums", "scores", "means", "deviations", "readme")
def a_score_line_edited_as_well(folder):
    restate(folder, "val_bpb", "1.00000000")
    edit(log_of(folder), r"^(score what:artifact .*val_bpb:)\S+", r"\g<1>1.00000000")


@fault("validation", "log_sums")
def tokens_left_out(folder):
    edit(log_of(folder), r"^(score what:artifact .* tokens:)(\d+)", lambda m: f"{m[1]}{int(m[2]) - 1}")


@fault("validation")
def a_prefix_scored(folder):
    edit(log_of(folder), r"^(data split:val .*tokens:)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}")


@fault("validation", "same_run", "readme")
def a_small_validation_set(folder):
    edit(log_of(folder), r"^(config name:vocab_size value:)\d+", r"\g<1>1024")


@fault("log_end")
def a_log_without_its_end(folder):
    edit(log_of(folder), r"^result .*\n", "")


@fault("log_end")
def a_log_cut_in_its_last_line(folder):
    path = log_of(folder)
    path.write_text(path.read_text()[:-100])


@fault("log_end")
def a_log_that_goes_on(folder):
    with open(log_of(folder), "a") as file:
        file.write("train step:5 train_loss:5.0\n")


@fault("seeds", "scores", "means", "deviations", "sizes", "readme")
def a_log_under_another_seeds_name(folder):
    rows = json.loads((folder / "submission.json").read_text())["seed_results"]
    largest, *_, smallest = sorted(rows, key=lambda seed: -rows[seed]["artifact_bytes"])
    log_of(folder, largest).write_text(log_of(folder, smallest).read_text())


@fault("same_run", "readme")
def a_log_of_another_configuration(folder):
    edit(log_of(folder), r"^(config name:matrix_lr value:)\S+", r"\g<1>0.5")


@fault("same_run", "code")
def a_log_of_other_code(folder):
    edit(log_of(folder), r"code_sha256:\w", "code_sha256:x")


@fault("same_run")
def a_log_of_other_data(folder):
    edit(log_of(folder), r"^(data split:train .*sha256:)\w", r"\g<1>x")


@fault("log_sums")
def a_config_of_another_seed(folder):
    edit(log_of(folder), r"^(config name:seed value:)\d+", r"\g<1>7")


@fault("seeds", "means", "deviations", "readme")
def two_seeds_only(folder):
    rows = json.loads((folder / "submission.json").read_text())["seed_results"]
    log_of(folder, min(rows, key=lambda seed: rows[seed]["artifact_bytes"])).unlink()


@fault("seeds")
def seeds_that_were_not_run(folder):
    edit_json(folder, lambda data: data.update(seeds=[42, 1337, 7]))


@fault("track", "environment", "readme")
def a_gpu_too_few(folder):
    for seed in SEEDS:
        edit(log_of(folder, seed), r" world:8 ", " world:4 ")


@fault("track", "environment", "same_run")
def another_gpu(folder):
    edit(log_of(folder), r"H100", "A100")


@fault("track")
def another_track(folder):
    edit_json(folder, lambda data: data.update(track="track_1gpu_16mb"))


@fault("track")
def no_such_track(folder):
    edit_json(folder, lambda data: data.update(track="track_5min"))
    folder.rename(folder.parent.parent / folder.name)
    return folder.parent.parent / folder.name


@fault("train_time", "readme", track="track_pocket")
def a_run_by_the_clock(folder):
    for seed in SEEDS:
        edit(log_of(folder, seed), r"^(config name:iterations value:)\d+", r"\g<1>0")


@fault("environment")
def other_versions(folder):
    edit_json(folder, lambda data: data.update(pytorch_version="1.0"))


@fault("date")
def a_date_that_is_none(folder):
    edit_json(folder, lambda data: data.update(date="1st of May"))


@fault("date")
def a_date_unlike_the_folders(folder):
    edit_json(folder, lambda data: data.update(date="2026-05-02"))


@fault("submission_json", "means")
def a_number_as_text(folder):
    edit_json(folder, lambda data: data.update(val_bpb=str(data["val_bpb"])))


@fault("submission_json")
def no_author(folder):
    edit_json(folder, lambda data: data.pop("author"))


@fault("submission_json")
def seeds_as_text(folder):
    edit_json(folder, lambda data: data.update(seeds="42, 1337, 2024"))


@fault("submission_json", "date", "seeds", "means", "deviations", "sizes", "environment")
def json_that_is_none(folder):
    edit(folder / "submission.json", r"\}\n*\Z", "")


@fault("files", "readme")
def no_readme(folder):
    (folder / "README.md").unlink()


@fault("files")
def no_requirements(folder):
    (folder / "requirements.txt").unlink()


@fault("files", "script")
def no_script(folder):
    (folder / "train_gpt.py").unlink()


@fault("files", "code")
def no_readable_source(folder):
    (folder / "train_gpt_human.py").unlink()


@fault("code")
def another_readable_source(folder):
    edit(folder / "train_gpt_human.py", r"learning rate", "learning speed", count=1)


@fault("script", "code", "sizes", "readme")
def a_script_that_does_not_compile(folder):
    (folder / "train_gpt.py").write_text("def main(:\n")


@fault("script", "code")
def a_script_that_does_not_unzip(folder):
    flip(folder / "train_gpt.py", (folder / "train_gpt.py").stat().st_size // 2)


@fault("artifacts", track="track_pocket")
def a_flipped_bit(folder):
    flip(folder / "artifact_seed42.lg", 2000)


@fault("artifacts", track="track_pocket")
def the_artifact_of_another_seed(folder):
    shutil.copyfile(folder / "artifact_seed1337.lg", folder / "artifact_seed42.lg")


@fault("files", track="track_pocket")
def an_artifact_missing(folder):
    (folder / "artifact_seed42.lg").unlink()


@fault("artifacts", track="track_pocket")
def an_artifact_too_many(folder):
    shutil.copyfile(folder / "artifact_seed42.lg", folder / "artifact_seed7.lg")


@fault("artifacts", track="track_pocket")
def another_tokenizer(folder):
    flip(folder / "tokenizer.model", 100)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_rules(name, folders, tmp_path):
    rules, track, plant = FAULTS[name]
    folder = shutil.copytree(folders[track], tmp_path / track / folders[track].name)
    folder = plant(folder) or folder
    assert violated(folder) == rules


def test_a_start_script_of_an_earlier_packer_is_no_fault(folders, tmp_path, monkeypatch):
    """What it starts cannot be read by this one, which is no reason to say that it is another program."""
    folder = shutil.copytree(folders["track_pocket"], tmp_path / "2026-05-01_Tiny")
    monkeypatch.setattr(tools.pack, "START", "import sys\n" + tools.pack.START)
    modules = tools.pack.load_counted()
    (folder / "train_gpt.py").write_bytes(tools.pack.pack(modules)[0])
    monkeypatch.undo()
    found = [*code(read_entry(folder))]
    assert (UNKNOWN, "train_gpt.py: a zip application with another start script") in found
    assert not any("was not packed from" in text for _, text in found)


def test_the_exit_code_tells(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["track_10min_16mb"], tmp_path / "2026-05-01_Tiny")
    edit_json(folder, lambda data: data.update(val_bpb=1.0))
    assert record.main(["check", str(folder), "--static"]) == 4
    assert re.search(r"^means +violated +val_bpb is 1.0, the logs make", capsys.readouterr().out, re.MULTILINE)
    assert record.main(["check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such folder\n"


@settings(max_examples=15)
@given(data=st.data())
def test_no_damage_is_a_crash(data, folders, tmp_path_factory):
    """Whatever happens to one file, the check ends with a verdict for every rule."""
    base = folders["track_10min_16mb"]
    folder = shutil.copytree(base, tmp_path_factory.mktemp("damage") / base.parent.name / base.name)
    names = [path.name for path in sorted(folder.iterdir()) if path.name != "train_gpt_human.py"]
    path = folder / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:at] + data.draw(st.binary(max_size=8)) + content[at + data.draw(st.integers(0, 40)) :])
    assert all(v.verdict in (OK, UNKNOWN, BAD) and v.detail for v in judge(read_entry(folder), static=True))
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def refused(capsys, out: Path, *made: Path) -> str:
    assert record.main(["build", str(out), "--track=track_pocket", *META, *map(str, made)]) == 2
    assert not out.exists() and not list(out.parent.glob(".*.part"))
    return capsys.readouterr().err


def test_runs_that_do_not_match_are_refused(runs, dataset, tmp_path, capsys):
    other = train(tmp_path, dataset, **RUN, run_id="other", seed=7, matrix_lr=0.5)
    capsys.readouterr()
    out = tmp_path / "2026-05-01_No"
    assert refused(capsys, out, *runs[:2], other) == (
        f"error: {other}: matrix_lr=0.5, but {runs[0]} has matrix_lr=0.02; only the seed may differ\n"
    )
    assert "a second run of seed 42" in refused(capsys, out, runs[0], runs[0], runs[1])
    foreign = shutil.copytree(runs[2], tmp_path / "foreign")
    edit(foreign / "log.txt", r"code_sha256:\w+", "code_sha256:00")
    assert "ran other code than is here now" in refused(capsys, out, *runs[:2], foreign)
    (foreign / "result.json").unlink()
    assert "has not finished" in refused(capsys, out, *runs[:2], foreign)


def test_two_seeds_are_not_enough(runs, tmp_path, capsys):
    assert "2 runs, and track_pocket asks for 3 seeds" in refused(capsys, tmp_path / "2026-05-01_Two", *runs[:2])


def test_what_breaks_a_rule_is_not_written(runs, tmp_path, capsys):
    """Runs on a CPU are no record of the GPU track; the half-built folder goes."""
    out = tmp_path / "track_1gpu_16mb" / "2026-05-01_Cpu"
    out.parent.mkdir()
    assert record.main(["build", str(out), *META, *map(str, runs)]) == 4
    assert "ran on cpu, the track is for cuda" in capsys.readouterr().out and not list(out.parent.iterdir())


def test_a_folder_is_not_overwritten(runs, folders, capsys):
    assert record.main(["build", str(folders["track_pocket"]), *META, *map(str, runs)]) == 2
    assert "exists already" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Strangers' folders
# ----------------------------------------------------------------------------------------------------------------------

STRANGE_LOG = """\
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
world_size:8 grad_accum_steps:1
seed:{seed}
step:7000/20000 val_loss:1.9300 val_bpb:1.1400 train_time:599990ms step_avg:85.71ms
stopping_early: wallclock_cap train_time:599990ms step:7000/20000
DIAGNOSTIC post_ema val_loss:1.9000 val_bpb:1.1000 eval_time:2000ms
Serialized model: 100000000 bytes
Code size: {code} bytes
Serialized model int6+lzma: 15900000 bytes
Total submission size int6+lzma: {total} bytes
final_int6_roundtrip val_loss:1.9200 val_bpb:1.1390 eval_time:7000ms
final_int6_sliding_window_exact val_loss:1.8900{seed} val_bpb:1.1200{seed}
final_int6_sliding_window val_loss:1.8900 val_bpb:1.1200 stride:64 eval_time:80000ms
"""


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder as they are published, with a script that must not be executed."""
    folder = tmp_path / "track_10min_16mb" / "2026-03-25_Theirs"
    folder.mkdir(parents=True)
    script = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (folder / "train_gpt.py").write_text(script)
    for seed in (1, 2, 3):
        text = STRANGE_LOG.format(seed=seed, code=len(script), total=15_900_000 + len(script))
        (folder / f"train_seed{seed}.log").write_text(text)
    results = {str(seed): dict(val_bpb=float(f"1.1200{seed}"), steps=7000) for seed in (1, 2, 3)}
    data = dict(author="B", github_id="b", name="Theirs", date="2026-03-25", track="10min_16mb", val_bpb=1.12002,
                val_bpb_std=0.00001, seeds=[1, 2, 3], seed_results=results, hardware="8xH100")  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(data))
    (folder / "README.md").write_text("| Seed | BPB |\n|---|---|\n| 1 | 1.12001 |\n| 2 | 1.12002 |\n| 3 | 1.12003 |\n")
    return folder


def test_a_strangers_sound_folder(stranger):
    verdicts = {v.rule: v for v in judge(read_entry(stranger))}
    assert {name for name, v in verdicts.items() if v.verdict != OK} == {"runs", "sizes", "environment"}
    assert all(v.verdict != BAD for v in verdicts.values())
    assert not (stranger.parent.parent / "executed").exists()


def test_their_log_is_read(stranger):
    log = read_train_log(stranger / "train_seed2.log")
    assert (log.seed, log.steps, log.train_s, log.eval_s, log.artifact_bytes) == (2, 7000, 599.99, 80.0, 15_900_000)
    assert [(s.label, s.bpb, s.digits) for s in log.scores] == [
        ("final_int6_roundtrip", 1.139, 4), ("final_int6_sliding_window", 1.12002, 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "verdict", "name", "pattern", "new"),
    [
        ("scores", BAD, "submission.json", "1.12001", "1.11001"),
        ("means", BAD, "submission.json", '"val_bpb": 1.12002, "val_bpb_std', '"val_bpb": 1.11902, "val_bpb_std'),
        ("means", UNKNOWN, "submission.json", '"val_bpb": 1.12002, "val_bpb_std', '"val_bpb": 1.139, "val_bpb_std'),
        ("deviations", BAD, "submission.json", '_std": 1e-05', '_std": 0.00009'),
        ("seeds", BAD, "train_seed2.log", "^seed:2", "seed:1"),
        ("train_time", UNKNOWN, "train_seed2.log", "train_time:599990ms step:", "train_time:600050ms step:"),
        ("train_time", BAD, "train_seed2.log", "train_time:599990ms step:", "train_time:601000ms step:"),
        ("eval_time", BAD, "train_seed2.log", "eval_time:80000ms", "eval_time:601000ms"),
        ("limit", UNKNOWN, "train_seed2.log", "^Total submission size int6.*", "Total submission size int6: 16000001 bytes"),
        ("validation", BAD, "train_seed2.log", "tokens:62021632", "tokens:9662464"),
        ("validation", UNKNOWN, "train_seed2.log", "_sp1024", "_sp7"),
        ("track", BAD, "train_seed2.log", "^world_size:8", "world_size:1"),
        ("log_end", UNKNOWN, "train_seed2.log", "^final_.*", ""),
        ("script", BAD, "train_gpt.py", "open", "open("),
        ("readme", BAD, "README.md", "1.12003", "1.11003"),
        ("date", BAD, "submission.json", "2026-03-25", "yesterday"),
        ("submission_json", BAD, "submission.json", '"b"', "7"),
    ],
)  # fmt: skip
def test_a_strangers_fault(rule, verdict, name, pattern, new, stranger):
    edit(stranger / name, pattern, new)
    assert {v.rule: v.verdict for v in judge(read_entry(stranger))}[rule] == verdict


def test_a_strangers_zip_is_not_run(stranger):
    """Not even when its logs claim the code of this repository."""
    with zipfile.ZipFile(stranger / "train_gpt.py", "w") as archive:
        archive.writestr("__main__.py", f"open({str(stranger.parent.parent / 'executed')!r}, 'w')")
    for path in stranger.glob("*.log"):
        path.write_text(
            f"run recipe:pocket seed:1 run_id:x code_sha256:{train_gpt.hash_counted_code()}\n" + path.read_text()
        )
    verdicts = {v.rule: v.verdict for v in judge(read_entry(stranger))}
    assert verdicts["runs"] == UNKNOWN and not (stranger.parent.parent / "executed").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),  # from printed tables of Student's distribution
    [(6.314, 1, 0.05), (31.82, 1, 0.01), (2.920, 2, 0.05), (6.965, 2, 0.01), (4.541, 3, 0.01), (1.812, 10, 0.05),
     (2.764, 10, 0.01), (2.457, 30, 0.01), (2.326, 1e7, 0.01), (0, 5, 0.5)],
)  # fmt: skip
def test_students_tail(t, freedom, tail):
    assert stats.student_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    assert stats.student_tail(-t, freedom) == pytest.approx(1 - tail, rel=2e-3)


@given(st.floats(-50, 50))
def test_students_tail_in_closed_form(t):
    assert stats.student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-13)
    assert stats.student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-13)


def test_welch_against_an_example_by_hand():
    """Variances 1 and 4 over 3 scores each: t = 4 / sqrt(5/3), (5/3)^2 / ((1/9 + 16/9) / 2) degrees."""
    found = stats.welch([4.0, 6.0, 8.0], [1.0, 2.0, 3.0])
    assert (found.difference, found.t, found.freedom) == pytest.approx((4, 4 / math.sqrt(5 / 3), 50 / 17))
    assert found.p == pytest.approx(integrate_tail(found.t, found.freedom), rel=1e-6)
    assert stats.welch([4.0, 6.0, 8.0], [1.0, 2.0, 3.0], margin=4).p == 0.5


def integrate_tail(t: float, freedom: float, n: int = 20_000) -> float:
    """The density of Student's distribution, summed by Simpson's rule from t on, in u = 1/x."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)

    def density(u: float) -> float:
        return scale * (1 + 1 / (u * u * freedom)) ** (-(freedom + 1) / 2) / (u * u) if u else 0.0

    width = 1 / t / n
    return width / 3 * sum((1 if i in (0, n) else 2 + 2 * (i % 2)) * density(i * width) for i in range(n + 1))


def test_welch_without_spread():
    assert stats.welch([2.0, 2.0], [1.0, 1.0], 0.5).p == 0.0
    assert stats.welch([2.0, 2.0], [1.0, 1.0], 1.5).p == 1.0
    with pytest.raises(ValueError, match="two scores"):
        stats.welch([1.0], [1.0, 2.0])


def restated(folder: Path, target: Path, shift: float) -> Path:
    """A copy in which every seed lost `shift` nats, and bits in proportion."""
    shutil.copytree(folder, target)
    for path in target.glob("*.log"):
        bpb, loss = (
            float(re.search(rf"^result .*{name}:(\S+)", path.read_text(), re.M)[1]) for name in ("val_bpb", "val_loss")
        )
        edit(
            path,
            r"^(result val_bpb:)\S+ val_loss:\S+",
            rf"\g<1>{bpb * (1 - shift / loss):.8f} val_loss:{loss - shift:.8f}",
        )
    return target


def test_compare_says_whether_it_is_a_record(folders, tmp_path, capsys):
    base = folders["track_pocket"]
    better = restated(base, tmp_path / "better", 1.0)
    assert record.main(["compare", str(better), str(base)]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "and beats it by at least 0.005 nats at p < 0.01" in text
    assert record.main(["compare", str(base), str(better)]) == 0
    assert "does not beat" in capsys.readouterr().out
    close = restated(base, tmp_path / "close", 0.004)
    assert record.main(["compare", str(close), str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["nats_difference"] == pytest.approx(0.004, abs=1e-6) and not found["beats"] and found["p_by_margin"] > 0.5
    )
    (tmp_path / "empty").mkdir()
    assert record.main(["compare", str(base), str(tmp_path / "empty")]) == 2
    assert "0 seeds with a score" in capsys.readouterr().err
