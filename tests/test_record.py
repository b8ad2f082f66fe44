"""tools.record: a folder that it builds is sound; every fault that is planted in one is found, by the right rule; what it
says of strangers' folders; and which of two records is better."""

import bz2
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config, tiny_context, train
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from data.shards import TokenStream, write_shard
from data.tokenizer import encode_document, load_tokenizer
from loopgolf.scoring import BpbMeter, ByteCounter, score_tokens
from tools import record
from tools.submission import folder_rules, rescore, stats
from tools.submission.entry import read_entry
from tools.submission.rescore import compare_score
from tools.submission.rules import RULES, judge
from tools.submission.script import counted_sources, join_sources
from tools.submission.summary import config_of
from tools.submission.tracks import TRACKS, Track
from tools.submission.trainlog import read_train_log
from tools.submission.verdicts import BAD, OK, UNKNOWN

RATE = train_gpt.RECIPES["pocket"]["matrix_lr"]
SEEDS = (42, 1337, 2024)
RUN = dict(iterations=4, byte_limit=16_000_000, code_reserve=40_000, score_documents=5, also="trained,plain")
META = ["--author=A. Name", "--github_id=aname", "--name=Tiny loop", "--blurb=Four steps of a tiny model."]
DESCRIPTION = dict(author="A. Name", github_id="aname", name="Tiny loop", blurb="Four steps.", date="2026-05-01")
GPUS = "hardware device:cuda name:NVIDIA%20H100%2080GB%20HBM3 world:8 threads:1 dtype:float32"
NAME = "2026-05-01_Tiny"
TEXT = ROOT / "tests/data/text.txt"


@pytest.fixture(scope="module", autouse=True)
def tiny_track(dataset) -> Iterator[None]:
    """A track for small runs, which fixes the text that they are scored on."""
    config = tiny_config(data_path=str(dataset), score_documents=5)
    tokenizer = train_gpt.load_run_tokenizer(config)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    scored = train_gpt.split_documents(stream.read(0, stream.total), config.bos_id)[:5]
    row = Track(
        device="cpu",
        processes=1,
        has_fixed_tokens=True,
        text_sha256=train_gpt.hash_text(scored, tokenizer),
        ships_artifacts=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRACKS, "track_tiny", row)
        yield


@pytest.fixture(scope="module", autouse=True)
def parse_once() -> Iterator[None]:
    """Most folders here hold the same script; to parse it takes as long as all other rules together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_rules, "parse_source", cache(folder_rules.parse_source))
        yield


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> list[Path]:
    cwd = tmp_path_factory.mktemp("runs")
    return [train(cwd, dataset, **RUN, run_id=f"r{seed}", seed=seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def folders(dataset, runs, tmp_path_factory) -> dict[str, Path]:
    """A record of the pocket track; and one of the GPU track, whose logs claim the hardware that it asks for and all
    of the validation text."""
    root = tmp_path_factory.mktemp("records")
    claimed = [shutil.copytree(run, root / "claimed" / run.name) for run in runs]
    for run in claimed:
        edit(run / "log.txt", r"^hardware .*$", GPUS)
        edit(run / "log.txt", r"^(data split:val .*tokens:)\d+", r"\g<1>383")
    return {
        "track_tiny": write_record(root / "track_tiny" / NAME, runs),
        "track_10min_16mb": write_record(root / "track_10min_16mb" / NAME, claimed),
    }


def write_record(folder: Path, runs: list[Path]) -> Path:
    """A submission as `record build` writes it, without its checks."""
    folder.mkdir(parents=True)
    logs = [record.read_run(run) for run in runs]
    human = join_sources(counted_sources(config_of(logs[0])))
    record.write_folder(folder, logs, runs, human, DESCRIPTION | dict(track=folder.parent.name))
    return folder


def copy_record(folders: dict[str, Path], track: str, root: Path) -> Path:
    return shutil.copytree(folders[track], root / track / NAME)


def edit(path: Path, pattern: str, new: str, count: int = 0) -> None:
    before = path.read_text(encoding="utf-8")
    after = re.sub(pattern, new, before, count=count, flags=re.MULTILINE)
    assert after != before, f"{pattern} is not in {path.name}"
    path.write_text(after, encoding="utf-8")


def read_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "submission.json").read_text())


def log_of(folder: Path, seed: int | str = 42) -> Path:
    return folder / f"train_seed{seed}.log"


def violated(folder: Path) -> set[str]:
    return {v.rule for v in judge(read_entry(folder), static=True) if v.verdict == BAD}


# ----------------------------------------------------------------------------------------------------------------------
# A sound folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_built_is_sound(runs, tmp_path, capsys):
    out = tmp_path / "track_tiny" / NAME
    out.parent.mkdir()
    assert record.main(["build", str(out), *META, *map(str, runs)]) == 0
    assert f"ok:{len(RULES)} cannot_tell:0 violated:0" in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]  # nothing else is left there


def test_the_checks_of_what_is_written(folders, capsys):
    told = {v.rule: v.verdict for v in judge(read_entry(folders["track_tiny"]), static=True)}
    assert set(told) == set(RULES) - {"runs"} and set(told.values()) == {OK}
    capsys.readouterr()
    assert record.main(["check", str(folders["track_10min_16mb"]), "--static", "--json"]) == 0
    told = {v["rule"]: v["verdict"] for v in json.loads(capsys.readouterr().out)}
    # a log of an unknown tokenizer does not tell whose validation set it was
    assert told.pop("validation") == UNKNOWN and set(told.values()) == {OK}


def test_the_folder_holds_what_the_design_says(folders):
    names = {"README.md", "submission.json", "train_gpt.py", "train_gpt_human.py", "requirements.txt"}
    names |= {f"train_seed{seed}.log" for seed in SEEDS}
    assert {path.name for path in folders["track_10min_16mb"].iterdir()} == names
    names |= {"tokenizer.model"} | {f"artifact_seed{seed}.lg" for seed in SEEDS}
    assert {path.name for path in folders["track_tiny"].iterdir()} == names


def test_the_numbers_are_those_of_the_runs(folders, runs):
    data = read_json(folders["track_tiny"])
    results = [json.loads((run / "result.json").read_text())["result"] for run in runs]
    scores = [float(result["val_bpb"]) for result in results]
    center = sum(scores) / 3
    assert data["val_bpb"] == pytest.approx(center, abs=1e-8)
    assert data["val_bpb_std"] == pytest.approx(math.sqrt(sum((s - center) ** 2 for s in scores) / 2), abs=1e-8)
    packed = (folders["track_tiny"] / "train_gpt.py").stat().st_size
    assert data["bytes_total"] == packed + max(result["artifact_bytes"] for result in results)
    row = data["seed_results"]["1337"]
    assert (row["val_bpb"], row["steps"]) == (scores[1], 4)
    readme = (folders["track_tiny"] / "README.md").read_text()
    assert f"| 1337 | {scores[1]:.5f} |" in readme and "for SEED in 42 1337 2024; do python train_gpt.py" in readme


def test_the_command_in_the_readme_repeats_the_config(folders, runs):
    readme = (folders["track_tiny"] / "README.md").read_text()
    words = re.search(r"python train_gpt\.py (.*) --seed=\$SEED; done", readme)[1].split()
    config, _ = train_gpt.parse_config([*words, "--seed=42", "--run_id=r42"], {})
    had, has = json.loads((runs[0] / "config.json").read_text()), vars(config)
    assert {name for name in had if had[name] != has[name]} == {"log_every", "checkpoint_every_s"}


@pytest.mark.slow
def test_a_track_is_a_row_of_the_table(dataset, tmp_path, monkeypatch, capsys):
    """Another byte limit, code that does not count, a number of tokens that the track sets."""
    row = replace(TRACKS["track_tiny"], byte_limit=20_000, counts_code=False, train_tokens=512, seeds=2)
    monkeypatch.setitem(TRACKS, "track_tiny", row)
    limits = dict(byte_limit=20_000, code_reserve=0)
    runs = [train(tmp_path, dataset, **RUN | limits, run_id=f"r{seed}", seed=seed) for seed in SEEDS[:2]]
    folder = write_record(tmp_path / "track_tiny" / NAME, runs)
    assert violated(folder) == set()
    assert read_json(folder)["bytes_total"] == max((run / "artifact.lg").stat().st_size for run in runs)
    assert "does not count the code" in (folder / "README.md").read_text()
    for change, rules in (
        (dict(counts_code=True), {"limit", "sizes", "readme"}),
        (dict(byte_limit=5_000), {"limit"}),
        (dict(train_tokens=513), {"train_tokens"}),
    ):
        monkeypatch.setitem(TRACKS, "track_tiny", replace(row, **change))
        assert violated(folder) == rules, change


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults: what is done to a sound folder, and exactly the rules that must find it
# ----------------------------------------------------------------------------------------------------------------------


def in_log(folder: Path, pattern: str, new: str, seeds: tuple[int, ...] = (42,)) -> None:
    for seed in seeds:
        edit(log_of(folder, seed), pattern, new)


def in_result(folder: Path, **values: str) -> None:
    """Other values in the result line, and in the lines above it that say the same."""
    for name, value in values.items():
        if name == "train_s":
            in_log(folder, r"^(clock what:stop used_s:)\S+", rf"\g<1>{value}")
        if name == "skipped":
            in_log(folder, r"^(score what:artifact .*skipped:)\S+", rf"\g<1>{value}")
        in_log(folder, rf"^(result .*\b{name}:)\S+", rf"\g<1>{value}")


def in_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = read_json(folder)
    change(data)
    (folder / "submission.json").write_text(json.dumps(data, indent=2))


def set_json(folder: Path, **values: Any) -> None:
    in_json(folder, lambda data: data.update(values))


def add_json(folder: Path, name: str, step: float) -> None:
    in_json(folder, lambda data: data.update({name: round(data[name] + step, 8)}))


def set_seed(folder: Path, **values: Any) -> None:
    in_json(folder, lambda data: data["seed_results"]["42"].update(values))


def in_file(folder: Path, name: str, pattern: str, new: str) -> None:
    edit(folder / name, pattern, new, count=1)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def append(folder: Path, name: str, text: str) -> None:
    with open(folder / name, "a") as file:
        file.write(text)


def flip_bit(folder: Path, name: str, at: int = 2000) -> None:
    content = bytearray((folder / name).read_bytes())
    content[at] ^= 1
    (folder / name).write_bytes(content)


def copy(folder: Path, name: str, target: str) -> None:
    shutil.copyfile(folder / name, folder / target)


def replace_script(folder: Path, text: str) -> None:
    (folder / "train_gpt.py").write_text(text)


def change_mean(folder: Path) -> None:
    add_json(folder, "val_bpb", -1e-5)
    in_file(folder, "README.md", r"\*\*val_bpb \d", "**val_bpb 0")


def change_score(folder: Path) -> None:
    in_result(folder, val_bpb="1.00000000")
    in_log(folder, r"^(score what:artifact .*val_bpb:)\S+", r"\g<1>1.00000000")


def change_limit(folder: Path) -> None:
    in_log(folder, r"^(config name:byte_limit value:)\d+", r"\g<1>17000000")
    in_result(folder, limit="17000000")


def one_byte_too_many(folder: Path) -> None:
    artifact = 16_000_001 - (folder / "train_gpt.py").stat().st_size
    in_result(folder, artifact_bytes=str(artifact), total_bytes=str(artifact + RUN["code_reserve"]))


def sort_by_size(folder: Path) -> list[str]:
    """The seeds, that with the smallest artifact first."""
    rows = read_json(folder)["seed_results"]
    return sorted(rows, key=lambda seed: rows[seed]["artifact_bytes"])


def copy_another_log(folder: Path) -> None:
    """The log of one seed under the name of another, which had the largest artifact."""
    smallest, *_, largest = sort_by_size(folder)
    copy(folder, f"train_seed{smallest}.log", f"train_seed{largest}.log")


def leave_two_seeds(folder: Path) -> None:
    log_of(folder, sort_by_size(folder)[0]).unlink()


CONFIG = "^(config name:{} value:)\\S+"
FAULTS = [
    # numbers in submission.json and README.md
    ("means readme", change_mean),
    ("means", add_json, "val_bpb", -1e-8),
    ("means", add_json, "val_loss", 0.001),
    ("deviations", add_json, "val_bpb_std", 0.001),
    ("readme", in_file, "README.md", r"^(\| 1337 \| \d\.\d{4})\d", r"\1x"),
    ("readme", in_file, "README.md", r"--iterations=4", "--iterations=5"),
    ("scores", set_seed, dict(val_bpb=1.0)),
    ("scores", set_seed, dict(steps=3)),
    ("scores", set_seed, dict(step_avg_ms=0.001)),
    ("submission_json scores", in_json, lambda data: data["seed_results"]["42"].pop("eval_time_s")),
    ("sizes", add_json, "bytes_total", -1),
    ("sizes", add_json, "bytes_code", -1),
    # limits
    ("limit scores sizes readme", one_byte_too_many),
    ("limit same_run readme", change_limit),
    ("train_time scores readme", in_result, dict(train_s="601.0000")),
    ("eval_time scores readme", in_result, dict(eval_s="601.0000")),
    ("updates", in_result, dict(skipped="3")),
    ("updates", in_result, dict(eval_fits="no")),
    # logs that say something twice, and not the same
    ("log_sums scores readme", in_log, r"^(result .*train_s:)\S+", r"\g<1>0.0100"),
    ("log_sums scores means deviations readme", in_result, dict(val_bpb="1.00000000")),
    ("log_sums scores means deviations readme", change_score),
    ("log_sums", in_log, r"^(score what:artifact .*skipped:)0", r"\g<1>1"),
    ("log_sums", in_log, CONFIG.format("seed"), r"\g<1>7"),
    ("validation log_sums", in_log, r"^(score what:artifact .* tokens:)(\d+)", r"\g<1>1\2"),
    ("validation", in_log, r"^(data split:val .*tokens:)(\d+)", r"\g<1>1\2"),
    # logs that are cut off, that go on, that are of other runs
    ("log_end", in_log, r"^result .*\n", ""),
    ("log_end", in_log, r"(?s).{100}\Z", ""),
    ("log_end", append, "train_seed42.log", "train step:5 train_loss:5.0\n"),
    ("seeds scores means deviations sizes readme", copy_another_log),
    ("seeds means deviations readme", leave_two_seeds),
    ("seeds", set_json, dict(seeds=[42, 1337, 7])),
    ("same_run validation", in_log, CONFIG.format("vocab_size"), r"\g<1>1024", (1337,)),
    ("same_run", in_log, CONFIG.format("matrix_lr"), r"\g<1>0.5"),
    ("same_run", in_log, r"^(data split:train .*sha256:)\w", r"\g<1>x"),
    ("same_run code", in_log, r"code_sha256:\w", "code_sha256:x"),
    # track
    ("track environment readme", in_log, r" world:8 ", " world:4 ", SEEDS),
    ("track environment same_run", in_log, r"H100", "A100"),
    ("track", set_json, dict(track="track_1gpu_16mb")),
    ("environment", set_json, dict(pytorch_version="1.0")),
    # submission.json as a form
    ("date", set_json, dict(date="1st of May")),
    ("date", set_json, dict(date="2026-05-02")),
    ("submission_json means", in_json, lambda data: data.update(val_bpb=str(data["val_bpb"]))),
    ("submission_json", in_json, lambda data: data.pop("author")),
    ("submission_json", set_json, dict(seeds="42, 1337, 2024")),
    ("submission_json date seeds means deviations sizes environment", in_file, "submission.json", r"\}\n*\Z", ""),
    # files
    ("files readme", remove, "README.md"),
    ("files", remove, "requirements.txt"),
    ("files script", remove, "train_gpt.py"),
    ("files code", remove, "train_gpt_human.py"),
    ("code sizes readme", append, "train_gpt.py", "\n"),
    ("code", in_file, "train_gpt_human.py", r"learning rate", "learning speed"),
    ("script code sizes readme", replace_script, "def main(:\n"),
    ("script code", flip_bit, "train_gpt.py", 10_000),
]
POCKET_FAULTS = [
    ("validation", in_log, r"^(data split:val .* text_sha256:)\w", r"\g<1>x"),
    ("train_tokens readme", in_log, CONFIG.format("iterations"), r"\g<1>0", SEEDS),
    ("log_sums train_tokens", in_log, r"^(result .* tokens:)\d+", r"\g<1>100"),
    ("artifacts", flip_bit, "artifact_seed42.lg"),
    ("artifacts", copy, "artifact_seed1337.lg", "artifact_seed42.lg"),
    ("artifacts", copy, "artifact_seed42.lg", "artifact_seed7.lg"),
    ("artifacts", flip_bit, "tokenizer.model", 100),
    ("files", remove, "artifact_seed42.lg"),
]


def plant(fault: tuple[Any, ...], folder: Path) -> None:
    """`fault` is what is done to a folder, and with what; a dict holds named arguments."""
    act, *given = fault
    named = given.pop() if given and isinstance(given[-1], dict) else {}
    act(folder, *given, **named)


@pytest.mark.slow
@pytest.mark.parametrize(("track", "faults"), [("track_10min_16mb", FAULTS), ("track_tiny", POCKET_FAULTS)])
def test_planted_faults_are_found_by_their_rules(track, faults, folders, tmp_path):
    wrong = []
    for number, (rules, *fault) in enumerate(faults):
        folder = copy_record(folders, track, tmp_path / str(number))
        plant(fault, folder)
        found = violated(folder)
        if found != set(rules.split()):
            wrong.append(f"{fault}: {' '.join(sorted(found))}, not {rules}")
        shutil.rmtree(folder)
    assert not wrong


def test_no_such_track(folders, tmp_path):
    folder = shutil.copytree(folders["track_10min_16mb"], tmp_path / NAME)
    set_json(folder, track="track_5min")
    assert violated(folder) == {"track"}


UPDATES = r" updates:\S+ skipped:\S+"


def test_what_logs_tell_of_updates(folders, tmp_path):
    """The verdict of `updates` for each state of a log; older ones have the fields where they score, or nowhere."""
    not_in_result = (in_log, rf"^(result .*){UPDATES}", r"\1")
    nowhere = (in_log, UPDATES, "")
    for number, (verdict, *faults) in enumerate(
        [
            (OK,),
            (OK, not_in_result),
            (BAD, (in_log, r"^(score .*skipped:)0", r"\g<1>5"), not_in_result),
            (OK, nowhere),  # plain
            (UNKNOWN, nowhere, (in_log, r"mode:plain", "mode:lora")),
            (UNKNOWN, nowhere, (in_log, r"mode:plain", "mode:of_the_future")),
            (UNKNOWN, (in_log, r"skipped:0", "skipped:x"), (in_log, r"mode:plain", "mode:lora")),
            (BAD, (in_result, dict(skipped="1"))),
            (BAD, (in_result, dict(eval_fits="no"))),
            (OK, (in_log, r" eval_fits:yes", "")),
        ]
    ):
        folder = copy_record(folders, "track_tiny", tmp_path / str(number))
        for fault in faults:
            plant(fault, folder)
        found = [level for level, _ in RULES["updates"](read_entry(folder))]
        assert max(found, key=[OK, UNKNOWN, BAD].index) == verdict, faults


def test_scripts_of_earlier_packers(folders, tmp_path, monkeypatch):
    """What they start cannot be read by this one, which is no reason to say that it is another program. A pair of
    script and source that was compared at the time is good, and no other one is."""
    folder = copy_record(folders, "track_tiny", tmp_path)
    with zipfile.ZipFile(folder / "train_gpt.py") as archive:
        main, content = archive.read("__main__.py"), bz2.decompress(archive.read("code"))
    with zipfile.ZipFile(folder / "train_gpt.py", "w") as archive:
        archive.writestr("__main__.py", main)
        archive.writestr("code", bz2.compress(b"import sys\n" + content))
    entry = read_entry(folder)
    found = [*folder_rules.code(entry)]
    assert (UNKNOWN, "train_gpt.py: a zip application with another start script") in found
    assert not any("was not packed from" in text for _, text in found)
    assert not folder_rules.is_from_here(entry, entry.script)
    digests = [folder_rules.hash_file(folder / name) for name in ("train_gpt.py", "train_gpt_human.py")]
    monkeypatch.setitem(folder_rules.EARLIER_SCRIPTS, *digests)
    assert {level for rule in ("script", "code") for level, _ in RULES[rule](entry)} == {OK}
    assert folder_rules.is_from_here(entry, entry.script)
    edit(folder / "train_gpt_human.py", r"learning rate", "learning speed", count=1)
    assert not folder_rules.is_from_here(entry, entry.script)


def test_the_exit_code_tells(folders, tmp_path, capsys):
    folder = copy_record(folders, "track_10min_16mb", tmp_path)
    set_json(folder, val_bpb=1.0)
    assert record.main(["check", str(folder), "--static"]) == 4
    assert re.search(r"^means +violated +val_bpb is 1.0, the logs make", capsys.readouterr().out, re.MULTILINE)
    assert record.main(["check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such folder\n"


@settings(max_examples=10)
@given(data=st.data())
def test_no_damage_is_a_crash(data, folders, tmp_path_factory):
    """Whatever happens to one file, the check ends with a verdict for every rule."""
    folder = copy_record(folders, "track_10min_16mb", tmp_path_factory.mktemp("damage"))
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


def test_refused_runs(runs, folders, tmp_path, capsys):
    """Each with one line, and nothing is left of the folder."""

    def changed(name: str, pattern: str, new: str) -> Path:
        folder = shutil.copytree(runs[2], tmp_path / name)
        edit(folder / "log.txt", pattern, new)
        return folder

    other_lr = changed("other_lr", r"^(config name:matrix_lr value:)\S+", r"\g<1>0.5")
    other_code = changed("other_code", r"code_sha256:\w+", "code_sha256:00")
    other_options = []
    for run in runs:  # by a version that had another option
        other_options.append(shutil.copytree(run, tmp_path / f"other_{run.name}"))
        edit(other_options[-1] / "log.txt", r"^(config name:)matrix_lr( value:\S+ source:)\w+", r"\1matrix_rate\2cli")
    cut = changed("cut", r"^result .*\n", "")
    skipped = changed("skipped", r"skipped:0", "skipped:49")
    unfinished = shutil.copytree(runs[2], tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    out = tmp_path / "track_tiny" / NAME
    out.parent.mkdir()
    for made, message in (
        ([*runs[:2], other_lr], f"matrix_lr=0.5, but {runs[0]} has matrix_lr={RATE}; only the seed may differ"),
        ([runs[0], runs[0], runs[1]], "a second run of seed 42"),
        ([*runs[:2], other_code], "ran other code than is here now"),
        (runs[:1], "1 runs, and track_tiny asks for 3 seeds"),
        (other_options, "ran other code than is here now"),
        ([*runs[:2], unfinished], "has not finished"),
        ([*runs[:2], cut], "does not end with a result line"),
        ([*runs[:2], skipped], "49 updates at test time were skipped for lack of time, and a record needs skipped:0"),
        (runs[:2], "2 runs, and track_tiny asks for 3 seeds"),
    ):
        assert record.main(["build", str(out), *META, *map(str, made)]) == 2
        told = capsys.readouterr()
        assert message in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1
        assert not told.out and not list(out.parent.iterdir())
    assert record.main(["build", str(folders["track_tiny"]), *META, *map(str, runs)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_breaks_a_rule_is_not_written(runs, tmp_path, capsys):
    """Runs on a CPU are no record of the GPU track; the half-built folder is removed."""
    out = tmp_path / "track_1gpu_16mb" / NAME
    out.parent.mkdir()
    assert record.main(["build", str(out), *META, *map(str, runs)]) == 4
    assert "ran on cpu, the track is for cuda" in capsys.readouterr().out and not list(out.parent.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Scored again
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_record(folders, tmp_path) -> Path:
    """A pocket record with the artifact of one seed."""
    folder = copy_record(folders, "track_tiny", tmp_path)
    for seed in SEEDS[1:]:
        (folder / f"artifact_seed{seed}.lg").unlink()
    return folder


def score_again(folder: Path, dataset: Path, capfd) -> tuple[int, str, str]:
    """The exit code of the check, its row, and stderr."""
    code = record.main(["check", str(folder), "--static", "--score", "--data_path", str(dataset), "--device=cpu"])
    told = capfd.readouterr()
    return code, "".join(row for row in told.out.splitlines() if row.startswith("score_again")), told.err


@pytest.mark.slow
def test_artifacts_are_scored_again(short_record, dataset, capfd, monkeypatch):
    monkeypatch.setenv("SCORE_MODE", "sliding")  # which must not matter
    monkeypatch.setitem(TRACKS, "track_tiny", replace(TRACKS["track_tiny"], ships_artifacts=False))
    bpb = read_json(short_record)["seed_results"]["42"]["val_bpb"]
    code, row, err = score_again(short_record, dataset, capfd)
    assert code == 0 and re.fullmatch(rf"score_again +ok +seed 42: \S+ \(log {bpb:.8f}\)", row)
    assert re.match(r"# scoring artifact_seed42.lg \(1 of 1\)\n# expected to take \S+ s\n", err)
    # the score of this file is known by now
    again = dict(val_bpb=re.search(r"seed 42: (\S+)", row)[1], skipped="0")
    monkeypatch.setattr(rescore, "score_artifact", lambda *_: again)
    in_result(short_record, val_bpb="1.00000000")
    code, row, _ = score_again(short_record, dataset, capfd)
    assert code == 4 and re.fullmatch(
        r"score_again +violated +seed 42: the file scores \S+, its log says 1.00000000", row
    )


@pytest.mark.slow
def test_another_validation_text_is_refused(short_record, dataset, tmp_path, capfd):
    other = shutil.copytree(dataset, tmp_path / "other")
    write_shard(other / "tiny_val_000000.bin", np.arange(3, 380, dtype=np.uint16).repeat(4))
    code, row, err = score_again(short_record, other, capfd)
    assert code == 2 and not row
    assert f"error: {other}: not the validation text that the record was scored on (sha256 " in err


def test_scores_are_compared(folders):
    """Within 0.001, and with no update skipped."""
    log = read_entry(folders["track_tiny"]).logs[0]
    bpb = log.final.bpb
    for again, skipped, verdict in (
        (bpb, 0, OK),
        (bpb + 0.0009, 0, OK),
        (bpb - 0.0011, 0, BAD),
        (math.nan, 0, BAD),
        (bpb, 2, BAD),
    ):
        found = list(compare_score(log, dict(val_bpb=f"{again:.8f}", skipped=str(skipped))))
        assert max((level for level, _ in found), key=[OK, BAD].index) == verdict, (again, skipped)
    log.lines.pop()  # the result
    assert [level for level, _ in compare_score(log, dict(val_bpb="1.0", skipped="0"))] == [UNKNOWN]


def test_what_cannot_be_scored_again(folders, tmp_path, capsys):
    pocket, gpus = folders["track_tiny"], folders["track_10min_16mb"]
    damaged = copy_record(folders, "track_tiny", tmp_path)
    for path in damaged.glob("*.lg"):
        flip_bit(damaged, path.name)
    for folder, options, code, message in (
        (pocket, ["--score"], 2, "--score needs --data_path"),
        (pocket, ["--data_path=x"], 2, "add --score"),
        (gpus, ["--score", "--data_path=x"], 2, "no artifacts"),
        (damaged, ["--score", "--data-path=x"], 4, "artifact_seed42.lg: its digest does not match"),
    ):
        capsys.readouterr()
        assert record.main(["check", str(folder), "--static", *options]) == code
        told = capsys.readouterr()
        assert message in told.err + told.out


# ----------------------------------------------------------------------------------------------------------------------
# The records of this repository
# ----------------------------------------------------------------------------------------------------------------------

# Bits per byte of tests/data/text.txt in mode plain, float32, for each seed.
TEXT_BPB = {
    "track_pocket/2026-12-01_Words": {"42": 1.86262, "1337": 1.85007, "2024": 1.86124},
}


@pytest.fixture(params=sorted((ROOT / "records").glob("track_*/*/")), ids=lambda path: path.name)
def committed(request) -> Path:
    return request.param


def test_the_pocket_track_is_what_the_recipe_pocket_runs():
    track, recipe = TRACKS["track_pocket"], train_gpt.RECIPES["pocket"]
    assert (track.text_sha256, track.byte_limit) == (recipe["text_sha256"], recipe["byte_limit"])
    assert track.counts_code == (recipe["code_reserve"] > 0)


@pytest.mark.slow
def test_committed_records_are_sound(committed):
    """By all rules, those that start the script of the record included."""
    assert {v.rule: v.detail for v in judge(read_entry(committed)) if v.verdict != OK} == {}


@pytest.mark.slow
def test_committed_artifacts_score_as_ever(committed):
    if not list(committed.glob("*.lg")):
        pytest.skip("its track ships no artifacts")
    tokenizer = load_tokenizer(committed / "tokenizer.model")
    tokens = torch.tensor(encode_document(tokenizer, TEXT.read_text(encoding="utf-8")))
    found = {}
    for seed in read_json(committed)["seed_results"]:
        artifact, ctx = train_gpt.load_artifact(committed / f"artifact_seed{seed}.lg"), tiny_context()
        config = train_gpt.config_from_stored(artifact.stored)
        model, meter = train_gpt.load_eval_model(artifact, config, ctx), BpbMeter(ByteCounter(tokenizer))
        mask = train_gpt.build_mask(tokenizer, config, ctx)
        score_tokens(train_gpt.build_scorer("plain", model, config, ctx, mask), tokens, meter)
        score = meter.total(ctx)
        assert (score.tokens, score.bytes) == (len(tokens) - 1, TEXT.stat().st_size)
        found[seed] = score.bpb
    assert found == pytest.approx(TEXT_BPB[f"{committed.parent.name}/{committed.name}"], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Other people's folders
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
    assert {name for name, v in verdicts.items() if v.verdict != OK} == {"runs", "sizes", "environment", "updates"}
    assert all(v.verdict != BAD for v in verdicts.values())
    assert not (stranger.parent.parent / "executed").exists()


def test_their_log_is_read(stranger):
    log = read_train_log(stranger / "train_seed2.log")
    assert (log.seed, log.steps, log.train_s, log.eval_s, log.artifact_bytes) == (2, 7000, 599.99, 80.0, 15_900_000)
    assert [(s.label, s.bpb, s.digits) for s in log.scores] == [
        ("final_int6_roundtrip", 1.139, 4), ("final_int6_sliding_window", 1.12002, 5)
    ]  # fmt: skip


def test_a_strangers_faults(stranger):
    json_name, log_name = "submission.json", "train_seed2.log"
    mean = r'("val_bpb": )1.12002(, "val_bpb_std)'
    for rule, verdict, name, pattern, new in (
        ("scores", BAD, json_name, "1.12001", "1.11001"),
        ("means", BAD, json_name, mean, r"\g<1>1.11902\2"),
        ("means", UNKNOWN, json_name, mean, r"\g<1>1.139\2"),
        ("deviations", BAD, json_name, '_std": 1e-05', '_std": 0.00009'),
        ("seeds", BAD, log_name, "^seed:2", "seed:1"),
        ("train_time", UNKNOWN, log_name, "train_time:599990ms step:", "train_time:600050ms step:"),
        ("train_time", BAD, log_name, "train_time:599990ms step:", "train_time:601000ms step:"),
        ("eval_time", BAD, log_name, "eval_time:80000ms", "eval_time:601000ms"),
        ("limit", UNKNOWN, log_name, "^Total submission size int6.*", "Total submission size int6: 16000001 bytes"),
        ("validation", BAD, log_name, "tokens:62021632", "tokens:9662464"),
        ("validation", UNKNOWN, log_name, "_sp1024", "_sp7"),
        ("track", BAD, log_name, "^world_size:8", "world_size:1"),
        ("log_end", UNKNOWN, log_name, "^final_.*", ""),
        ("script", BAD, "train_gpt.py", "open", "open("),
        ("readme", BAD, "README.md", "1.12003", "1.11003"),
        ("date", BAD, json_name, "2026-03-25", "yesterday"),
        ("submission_json", BAD, json_name, '"b"', "7"),
    ):
        before = (stranger / name).read_text()
        edit(stranger / name, pattern, new)
        assert {v.rule: v.verdict for v in judge(read_entry(stranger))}[rule] == verdict, (rule, new)
        (stranger / name).write_text(before)


def test_a_strangers_zip_is_not_run(stranger):
    """Not even when its logs claim the code of this repository."""
    executed = stranger.parent.parent / "executed"
    with zipfile.ZipFile(stranger / "train_gpt.py", "w") as archive:
        archive.writestr("__main__.py", f"open({str(executed)!r}, 'w')")
    config, _ = train_gpt.parse_config(["--recipe=pocket", "--score_mode=plain"], {})
    claim = f"run recipe:pocket seed:1 run_id:x code_sha256:{train_gpt.hash_counted_code(config)}\n"
    claim += "config name:recipe value:pocket source:cli\nconfig name:score_mode value:plain source:cli\n"
    for path in stranger.glob("*.log"):
        path.write_text(claim + path.read_text())
    verdicts = {v.rule: v.verdict for v in judge(read_entry(stranger))}
    assert verdicts["runs"] == UNKNOWN and not executed.exists()


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
    base = folders["track_tiny"]
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
