"""Whole runs through the command line, in folders of their own: what a run leaves, that it can be repeated, resumed
and stopped, and what bad input gets. Tiny models, CPU: pytest tests/test_run.py

Runs that are killed, or whose process matters, are processes; the others call main() with an environment of their own.
"""

import itertools
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers import (
    ROOT,
    SMALL,
    clean_environment,
    events,
    options,
    parse_log,
    run_cli,
    tiny_config,
    tiny_context,
    tiny_options,
)

import tools.artifact
import train_gpt
from loopgolf.errors import ConfigError
from loopgolf.runtime import format_value
from train_gpt import check_split, load_artifact, main

pytestmark = pytest.mark.slow  # processes, ranks, whole runs

RUN = SMALL | dict(
    seed=7, run_id="r", iterations=24, score_mode="sliding", also="trained,averaged,plain", byte_limit=400_000
)


def call(argv: list[str], cwd: Path, monkeypatch, **environ) -> int:
    """main() as `python train_gpt.py` would call it in `cwd`."""
    monkeypatch.chdir(cwd)
    with torch.random.fork_rng():
        return main([str(word) for word in argv], clean_environment(**environ))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    cwd = tmp_path_factory.mktemp("finished")
    done = run_cli(tiny_options(dataset, **RUN), cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "runs" / "r", done


def test_a_run_leaves_its_folder(finished, dataset):
    folder, done = finished
    names = ["artifact.lg", "checkpoint.pt", "config.json", "log.txt", "result.json", "tokenizer.model"]
    assert files(folder.parent.parent) == [f"runs/r/{name}" for name in names]
    assert (folder / "tokenizer.model").read_bytes() == (dataset / "tokenizer.model").read_bytes()
    assert json.loads((folder / "config.json").read_text())["seed"] == 7
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["position"]["step"] == 24
    assert done.stdout.endswith((folder / "log.txt").read_text()[-200:]) and done.stderr == ""


def test_the_last_line_is_the_result(finished):
    folder, done = finished
    event, fields = parse_log((folder / "log.txt").read_text())[-1]
    assert event == "result" and parse_log(done.stdout)[-1] == (event, fields)
    wanted = """val_bpb val_loss score_mode updates skipped bpb_trained bpb_averaged bpb_plain steps tokens train_s
                eval_s eval_fits artifact_bytes code_bytes total_bytes limit fits seed recipe artifact_sha256"""
    assert list(fields) == wanted.split()
    stored = json.loads((folder / "result.json").read_text())["result"]
    assert {key: format_value(value) for key, value in stored.items()} == fields
    artifact = load_artifact(folder / "artifact.lg")
    assert fields["artifact_sha256"] == artifact.sha256
    size = (folder / "artifact.lg").stat().st_size
    assert int(fields["artifact_bytes"]) == size and int(fields["total_bytes"]) == size + int(fields["code_bytes"])
    assert (fields["steps"], fields["tokens"], fields["seed"], fields["fits"]) == ("24", str(24 * 128), "7", "yes")
    assert (fields["limit"], fields["score_mode"], fields["recipe"]) == ("400000", "sliding", "pocket")
    assert 0 < float(fields["val_bpb"]) < 8 and float(fields["val_bpb"]) < float(fields["val_loss"]) / 0.6


def test_every_log_line_reads_back(finished):
    folder, done = finished
    text = (folder / "log.txt").read_text()
    found = parse_log(text)
    assert {"run", "versions", "hardware", "config", "data", "model", "forecast", "clock", "train", "score"} <= {
        event for event, _ in found
    }
    assert [pairs["split"] for pairs in events(text, "data")] == ["val", "train"]
    config = {pairs["name"]: pairs for pairs in events(text, "config")}
    assert (config["seed"]["value"], config["seed"]["source"]) == ("7", "cli")
    assert set(config) == set(json.loads((folder / "config.json").read_text()))
    assert [pairs["what"] for pairs in events(text, "clock")] == ["start", "stop"]
    train = events(text, "train")
    assert [int(pairs["step"]) for pairs in train] == list(range(1, 25))
    assert float(train[-1]["lr_scale"]) == 0.02 and float(train[-1]["train_loss"]) < float(train[0]["train_loss"])
    assert len(parse_log(done.stdout)) >= len(found)


def test_the_score_comes_from_the_file_alone(finished, dataset, tmp_path, monkeypatch, capsys):
    folder, _ = finished
    _, before = parse_log((folder / "log.txt").read_text())[-1]
    copy = shutil.copy(folder / "artifact.lg", tmp_path / "moved.lg")
    given = [
        "--score",
        copy,
        *options(data_path=dataset, score_documents=5, device="cpu", dtype="float32", compile="none"),
    ]
    assert call(given, tmp_path, monkeypatch) == 0
    _, after = parse_log(capsys.readouterr().out)[-1]
    for key in ("val_bpb", "val_loss", "score_mode", "bpb_plain", "artifact_bytes", "artifact_sha256"):
        assert after[key] == before[key], key
    assert files(tmp_path) == ["moved.lg"]


def test_the_seed_decides_the_artifact(finished, dataset, tmp_path, monkeypatch):
    folder, _ = finished
    ours = load_artifact(folder / "artifact.lg").sha256
    for name, changes, is_same in [("again", {}, True), ("other", dict(seed=8), False)]:
        argv = tiny_options(dataset, **RUN | dict(run_id=name, also="none", log_every=5) | changes)
        assert call(argv, tmp_path, monkeypatch) == 0
        assert (load_artifact(tmp_path / "runs" / name / "artifact.lg").sha256 == ours) is is_same


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt
owner, name, left = {owner}, {name!r}, {calls}
real = getattr(owner, name)
def strike(*given, **named):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(owner, name, strike)
sys.exit(train_gpt.main(sys.argv[1:], dict(os.environ)))
"""


def run_killed(argv: list[str], cwd: Path, owner: str, name: str, calls: int) -> subprocess.CompletedProcess:
    """A run in a process of its own that is killed at the given call of a function."""
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT), owner=owner, name=name, calls=calls), *argv]
    return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=120)


MOMENTS = {
    "in a step": ("train_gpt", "load_batch", 6, 5),
    "before a checkpoint gets its name": ("os", "replace", 9, 11),  # two replaces are of other files
    "after training": ("train_gpt", "score_artifact", 1, 24),
}


def test_a_killed_run_resumes_to_the_same_artifact(finished, dataset, tmp_path, monkeypatch):
    """Killed in a step, killed again when it was resumed, and once more."""
    given = tiny_options(dataset, **RUN, checkpoint_every_s=1e-6)
    for moment, (*place, step) in MOMENTS.items():
        done = run_killed(given, tmp_path, *place)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        assert read_step(tmp_path / "runs/r") == step, moment
        assert not (tmp_path / "runs/r/result.json").exists()
        given = ["--resume", "runs/r"]
    assert call(given, tmp_path, monkeypatch) == 0
    ours, theirs = load_artifact(tmp_path / "runs/r/artifact.lg"), load_artifact(finished[0] / "artifact.lg")
    assert ours.sha256 == theirs.sha256
    result = json.loads((tmp_path / "runs/r/result.json").read_text())["result"]
    assert (result["steps"], result["artifact_sha256"]) == (24, ours.sha256)


def read_step(folder: Path) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["position"]["step"]


def test_an_interrupted_run_saves_and_exits(finished, dataset, tmp_path, monkeypatch, capsys):
    """By SIGTERM, and by Ctrl-C after it was resumed."""
    given = tiny_options(dataset, **RUN)
    for step, number in ((6, signal.SIGTERM), (12, signal.SIGINT)):
        with monkeypatch.context() as patch:
            missed = raise_in_sixth_step(number, patch)
            assert call(given, tmp_path, monkeypatch) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "--resume runs/r" in line and not missed
        assert read_step(tmp_path / "runs/r") == step and not (tmp_path / "runs/r/artifact.lg").exists()
        given = ["--resume", "runs/r"]
    assert call(given, tmp_path, monkeypatch) == 0
    assert load_artifact(tmp_path / "runs/r/artifact.lg").sha256 == load_artifact(finished[0] / "artifact.lg").sha256


def raise_in_sixth_step(number: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the signal if the run does not take it."""
    calls, missed, load_batch = itertools.count(1), [], train_gpt.load_batch

    def load(*given):
        if next(calls) == 6:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                missed.append(number)
            else:
                signal.raise_signal(number)
        return load_batch(*given)

    patch.setattr(train_gpt, "load_batch", load)
    return missed


def test_a_loss_that_is_not_finite_stops_the_run_with_good_weights(dataset, tmp_path, monkeypatch, capsys):
    argv = tiny_options(dataset, **RUN | dict(matrix_lr=1e6, table_lr=1e6, vector_lr=1e6))
    assert call(argv, tmp_path, monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "loss nan at step" in line or "loss inf at step" in line
    state = torch.load(tmp_path / "runs/r/checkpoint.pt", weights_only=True)
    assert all(w.isfinite().all() for w in state["state"]["weights"].values())
    assert not (tmp_path / "runs/r/artifact.lg").exists()


def damage_shard(folder: Path, name: str, change) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


BAD = {  # options, words of the message; the changes to the dataset are made by test_bad_input
    "unknown option": (dict(modle_dim=64), ["modle_dim", "did you mean --model_dim"]),
    "wrong type": (dict(iterations="many"), ["iterations=many"]),
    "impossible plan": (dict(plan="ab)"), ["character 3"]),
    "plan of two lines": (dict(plan="a\nb"), ["character 2"]),
    "heads": (dict(num_heads=3), ["model_dim=32", "num_heads=3"]),
    "missing data": (dict(data_path="nowhere"), ["nowhere", "python -m data.localtext"]),
    "vocabulary of the tokenizer": (dict(vocab_size=400), ["400", "384", "tokenizer.model"]),
    "truncated shard": ({}, ["tiny_train_000001.bin", "truncated"]),
    "empty shard": ({}, ["tiny_train_000000.bin", "zero-byte"]),
    "wrong magic": ({}, ["tiny_val_000000.bin", "magic"]),
    "token range": ({}, ["60000", "384"]),
    "no tokenizer": ({}, ["tokenizer.model"]),
    "tokenizer is no model": ({}, ["tokenizer.model"]),
    "no validation": ({}, ["_val_"]),
    "validation shorter than a window": (dict(score_documents=1, seq_len=128), ["validation tokens", "128"]),
    "micro batch": (dict(micro_batch=3), ["micro_batch=3", "4"]),
    "resume of nothing": (dict(resume="runs/none"), ["runs/none"]),
    "recipe": (dict(recipe="pockett"), ["did you mean pocket"]),
}


def break_dataset(case: str, folder: Path) -> None:
    if case == "truncated shard":
        damage_shard(folder, "tiny_train_000001.bin", lambda c: c[:-10])
    elif case == "empty shard":
        (folder / "tiny_train_000000.bin").write_bytes(b"")
    elif case == "wrong magic":
        damage_shard(folder, "tiny_val_000000.bin", lambda c: b"xxxx" + c[4:])
    elif case == "token range":
        damage_shard(folder, "tiny_val_000000.bin", lambda c: c[:1030] + struct.pack("<H", 60000) + c[1032:])
    elif case == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    elif case == "tokenizer is no model":
        (folder / "tokenizer.model").write_bytes(b"words\n" * 100)
    elif case == "no validation":
        (folder / "tiny_val_000000.bin").unlink()


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, dataset, tmp_path, monkeypatch, capfd):
    changes, words = BAD[case]
    data = shutil.copytree(dataset, tmp_path / "data")
    break_dataset(case, data)
    before = files(tmp_path)
    assert call(tiny_options(data, **changes), tmp_path, monkeypatch) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert files(tmp_path) == before and not (tmp_path / "runs").exists(), "nothing is left behind"


def test_bad_input_ends_the_process_with_its_code(tmp_path):
    done = run_cli(["--sede", "1"], tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and "--seed" in done.stderr
    assert files(tmp_path) == []


def test_a_world_that_cannot_split_the_batch():
    for world, is_good in [(1, True), (2, True), (3, False), (4, True), (8, False)]:
        if is_good:
            check_split(tiny_config(), tiny_context(0, world))
        else:
            with pytest.raises(ConfigError, match=f"4 sequences .*{world} ranks"):
                check_split(tiny_config(), tiny_context(0, world))


def test_a_run_id_is_used_once(finished, dataset, monkeypatch, capsys):
    folder, _ = finished
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert call(tiny_options(dataset, **RUN), folder.parent.parent, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run_id=r" in line and "--resume" in line
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_resume_with_another_setting_changes_nothing(finished, monkeypatch, capsys):
    folder, _ = finished
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    assert call(["--resume", "runs/r", "--seed=9"], folder.parent.parent, monkeypatch) == 2
    assert "seed=9" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_damaged_checkpoint_is_one_line(finished, dataset, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0], tmp_path / "runs" / "r")
    path = tmp_path / "runs/r/checkpoint.pt"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"not a checkpoint" * 100):
        path.write_bytes(damaged)
        assert call(["--resume", "runs/r"], tmp_path, monkeypatch) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "checkpoint.pt" in line


@pytest.mark.parametrize("flags", [[], ["--dry_run"]])
def test_a_hopeless_byte_limit_exits_3(flags, dataset, tmp_path, monkeypatch, capsys):
    assert call([*tiny_options(dataset, byte_limit=6000), *flags], tmp_path, monkeypatch) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "byte_limit=6,000" in line and files(tmp_path) == []


def test_a_file_over_the_limit_is_refused_and_the_checkpoint_kept(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "forecast_bytes", lambda *_: 10)
    assert call(tiny_options(dataset, run_id="r", byte_limit=4000, **SMALL), tmp_path, monkeypatch) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "byte_limit=4,000" in line and (tmp_path / "runs/r/checkpoint.pt").exists()
    assert not (tmp_path / "runs/r/artifact.lg").exists() and not (tmp_path / "runs/r/result.json").exists()


@pytest.mark.parametrize("case", ["flipped", "empty", "absent"])
def test_a_corrupt_artifact_exits_4(case, finished, dataset, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.lg"
    if case != "absent":
        content = bytearray((finished[0] / "artifact.lg").read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if case == "flipped" else b"")
    assert call(["--score", path, *options(data_path=dataset, compile="none")], tmp_path, monkeypatch) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.lg" in line


@pytest.mark.parametrize("changes", [dict(mlp_mult=3.5), dict(plan="ab"), dict(plan="abcabc")])
def test_an_artifact_is_not_scored_as_another_model(changes, finished, dataset, tmp_path, monkeypatch, capsys):
    given = options(score=finished[0] / "artifact.lg", data_path=dataset, device="cpu", compile="none", **changes)
    assert call(given, tmp_path, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: score=") and "leave the model's out" in line


def test_an_artifact_of_another_tokenizer_is_refused(finished, dataset, documents, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(dataset, tmp_path / "data")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents[::2]), model_prefix=str(data / "tokenizer"), model_type="bpe", vocab_size=384,
        byte_fallback=True, normalization_rule_name="identity", pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    argv = ["--score", finished[0] / "artifact.lg", *options(data_path=data, device="cpu", compile="none")]
    assert call(argv, tmp_path, monkeypatch) == 2
    assert "tokenizer" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["checkpoint.pt", "artifact.lg"])
def test_a_full_disk_is_one_line_and_keeps_what_is_there(name, dataset, tmp_path, monkeypatch, capsys):
    real, seen = os.replace, []

    def replace(source, target):
        seen.append(Path(target).name)
        if Path(target).name == name and seen.count(name) > (name == "checkpoint.pt"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert call(tiny_options(dataset, run_id="r", checkpoint_every_s=1e-4, **SMALL), tmp_path, monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert torch.load(tmp_path / "runs/r/checkpoint.pt", weights_only=True)["position"]["step"] >= 1
    assert not [f for f in files(tmp_path) if f.endswith(".part")]


def test_a_dry_run_prints_the_parameters_first_and_writes_nothing(tmp_path, monkeypatch, capsys):
    assert call(["--recipe", "4b7l", "--dry_run", "--compile=none"], tmp_path, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if "params:" in line)
    assert first == "params:29950082"
    parts = [parse_log(line)[0][1] for line in lines if line.startswith("part ")]
    assert sum(int(part["params"]) for part in parts) == 29950082
    forecast = [pairs for line in lines if line.startswith("forecast ") for pairs in [parse_log(line)[0][1]]]
    keys = {key for pairs in forecast for key in pairs}
    assert {"flops_per_token", "artifact_bytes", "memory_mb", "step_ms", "k_scale"} <= keys
    flops = int(next(pairs["flops_per_token"] for pairs in forecast if "flops_per_token" in pairs))
    assert 0.3e9 < flops < 0.6e9 and files(tmp_path) == []


IMPORT = """
import os, random, signal, sys, threading
import numpy, sentencepiece, torch, torch.distributed, zstandard, tqdm
sys.path.insert(0, ROOT)
before = (dict(os.environ), list(sys.argv), torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(),
          torch.get_default_dtype(), torch.is_grad_enabled(), signal.getsignal(signal.SIGTERM),
          signal.getsignal(signal.SIGINT), threading.active_count(), os.getcwd())
events = []
def hook(event, args):
    if event == "open" and (args[1] and set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        events.append((event, args))
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove", "os.putenv", "os.system")):
        events.append((event, args))
sys.addaudithook(hook)
import train_gpt
after = (dict(os.environ), list(sys.argv), torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(),
         torch.get_default_dtype(), torch.is_grad_enabled(), signal.getsignal(signal.SIGTERM),
         signal.getsignal(signal.SIGINT), threading.active_count(), os.getcwd())
assert before == after, [pair for pair in zip(before, after) if pair[0] != pair[1]]
assert not events, events
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert "train_gpt" in sys.modules and "data.tokenizer" not in sys.modules
"""


def test_importing_does_nothing(tmp_path):
    hostile = clean_environment(RANK="3", WORLD_SIZE="8", SEED="x", RECIPE="none", MODEL_DIM="-1")
    command = [sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{IMPORT}", "--unknown", "--seed=x"]
    done = subprocess.run(command, cwd=tmp_path, env=hostile, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and files(tmp_path) == []


def test_help_explains_itself(tmp_path, monkeypatch, capsys):
    assert call(["--help"], tmp_path, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "--plan" in out and "--byte_limit" in out and "pocket" in out


def test_the_artifact_ends_just_below_a_limit_that_binds(dataset, tmp_path, monkeypatch):
    """Through a run, and again, much smaller, from its checkpoint through tools.artifact."""
    shape = dict(model_dim=32, bigram_buckets=512, bigram_dim=32, calibration_tokens=1024, iterations=2)
    assert call(tiny_options(dataset, run_id="r", byte_limit=34_000, **shape), tmp_path, monkeypatch) == 0
    assert 0.995 * 33_000 <= (tmp_path / "runs/r/artifact.lg").stat().st_size <= 33_000
    assert tools.artifact.main(["fit", "runs/r", "--byte_limit=25000", "--out", "small.lg"]) == 0
    assert 0.995 * 24_000 <= (tmp_path / "small.lg").stat().st_size <= 24_000
    assert tools.artifact.main(["verify", "small.lg"]) == 0
    assert tools.artifact.main(["size", "small.lg", "--code", "packed.py"]) == 2  # nobody wrote it
    assert tools.artifact.main(["fit", "runs/r", "--byte_limit=5000", "--out", "none.lg"]) == 3
    assert not (tmp_path / "none.lg").exists()


FAULTS = """
import resource, torch, train_gpt

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(1 << 20) for _ in range(32)]  # 128 MiB, used once and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

train_gpt.build_context(train_gpt.Config(device="cpu", compile="none"), {})
count_faults()
print(count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other habits")
def test_memory_that_was_used_once_is_there_for_the_next_step():
    """By itself each of the 128 tensors costs 1,024 page faults."""
    found = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True)
    assert int(found.stdout) < 4096, found.stderr[-2000:]
