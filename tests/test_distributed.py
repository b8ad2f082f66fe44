"""Two processes against one: the same global batch gives the same losses and the same score, and uneven work neither
hangs nor counts a token twice; every step draws its depth anew, the same one on all ranks.

torchrun with gloo on a CPU, float32: pytest tests/test_distributed.py
"""

import contextlib
import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, clean_environment, events, parse_log, tiny_options

import train_gpt

pytestmark = pytest.mark.slow  # processes, ranks, whole runs

# 382 targets: 12 plain windows, 45 sliding and 3 banded ones, so that the ranks never have equal work
RUN = SMALL | dict(
    seed=3, run_id="r", iterations=6, score_mode="plain", also="sliding,banded,sgd,lora", score_documents=5, average="swa",
    plan="(ab)*ra", skips="none", depth=2, max_r=4, sample_depth=True,
)  # fmt: skip
MODES = {"plain": "val_bpb"} | {mode: f"bpb_{mode}" for mode in ("sliding", "banded", "sgd", "lora")}

# Several commands in the same two processes, which take seconds to start: each has a process group of its own.
RANKS = """
import contextlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist, train_gpt

def count_threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

def destroy(end=dist.destroy_process_group):
    before = count_threads()
    end()
    ended.append(before - count_threads())

dist.destroy_process_group = destroy
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the launcher's store remembers the group before
for name, (port, *argv) in json.loads(sys.argv[2]).items():
    ended, os.environ["MASTER_PORT"] = [], port
    with open(f"{name}{os.environ['RANK']}.out", "w") as out, open(f"{name}{os.environ['RANK']}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_gpt.main(argv, dict(os.environ))
    with open(f"{name}{os.environ['RANK']}.json", "w") as file:
        json.dump([code, *ended], file)
"""


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind(("localhost", 0))
        return [str(one.getsockname()[1]) for one in bound]


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run in one process."""
    cwd, out = tmp_path_factory.mktemp("one"), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
        assert train_gpt.main(tiny_options(dataset, **RUN), {}) == 0
    return cwd / "runs" / "r", out.getvalue()


@pytest.fixture(scope="module")
def two(one, dataset, tmp_path_factory) -> Path:
    """Where two ranks refused a batch, made the run, and scored the file that one process had made."""
    cwd = tmp_path_factory.mktemp("two")
    commands = {
        "refused": tiny_options(dataset, batch_tokens=96),
        "run": tiny_options(dataset, **RUN),
        "scored": tiny_options(dataset, **RUN, score=one[0] / "artifact.lg"),
    }
    given = {name: [port, *argv] for (name, argv), port in zip(commands.items(), free_ports(len(commands)))}
    (cwd / "ranks.py").write_text(RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "ranks.py", str(ROOT), json.dumps(given)]
    done = subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return cwd


def losses_of(text: str) -> list[float]:
    return [float(pairs["train_loss"]) for pairs in events(text, "train")]


def test_losses_are_the_same(one, two):
    single, double = losses_of(one[1]), losses_of((two / "run0.out").read_text())
    assert len(single) == 6 and double == pytest.approx(single, abs=1e-3)
    assert single[-1] < single[0] - 0.1, "something was learnt"


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_the_same_and_no_token_counts_twice(one, two, mode):
    ours, theirs = ([p for p in events(text, "score") if p["mode"] == mode][-1]
                    for text in (one[1], (two / "run0.out").read_text()))  # fmt: skip
    assert ours["tokens"] == theirs["tokens"] == "382" and ours["bytes"] == theirs["bytes"]
    tolerance = 1e-2 if mode in ("sgd", "lora") else 1e-3
    assert float(theirs["val_bpb"]) == pytest.approx(float(ours["val_bpb"]), abs=tolerance)


def test_only_the_first_rank_speaks_and_writes(one, two):
    names = ["artifact.lg", "checkpoint.pt", "config.json", "log.txt", "result.json", "tokenizer.model"]
    assert sorted(p.name for p in one[0].iterdir()) == sorted(p.name for p in (two / "runs/r").iterdir()) == names
    text = (two / "run0.out").read_text()
    assert [event for event, _ in parse_log(text)].count("result") == 1
    assert events(text, "hardware")[0]["world"] == "2"
    for name in ("run", "scored"):
        assert [(two / f"{name}{end}").read_text() for end in ("0.err", "1.out", "1.err")] == ["", "", ""]


def test_two_ranks_score_a_file_as_one_does(one, two):
    """The same artifact, so that nothing but the sum over ranks can differ."""
    text = (two / "scored0.out").read_text()
    (_, result), (_, before) = parse_log(text)[-1], parse_log(one[1])[-1]
    digest = train_gpt.load_artifact(one[0] / "artifact.lg").sha256
    assert result["artifact_sha256"] == before["artifact_sha256"] == digest
    for mode, key in MODES.items():
        tolerance = 1e-4 if mode in ("sgd", "lora") else 1e-6
        assert float(result[key]) == pytest.approx(float(before[key]), abs=tolerance)
    assert all(pairs["tokens"] == "382" for pairs in events(text, "score"))


def test_a_batch_that_does_not_split_is_one_line_and_no_file(two):
    errors = [(two / f"refused{rank}.err").read_text() for rank in (0, 1)]
    assert errors == ["error: batch_tokens=96: 3 sequences do not split over 2 ranks\n", ""]
    assert [json.loads((two / f"refused{rank}.json").read_text())[0] for rank in (0, 1)] == [2, 2]
    assert [p.name for p in (two / "runs").iterdir()] == ["r"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize("name", ["run", "scored"])
def test_no_thread_of_the_process_group_outlives_it(name, two):
    """One that still frees a tensor when Python ends aborts a finished run: gloo has a loop and two workers, and the
    first rank's store one more."""
    assert [json.loads((two / f"{name}{rank}.json").read_text()) for rank in (0, 1)] == [[0, 4], [0, 3]]


def test_two_machines_meet_at_one_rendezvous(one, dataset, tmp_path):
    """What the Slurm script of docs/submit.md starts, with both nodes on this machine: one run, one log, the same losses."""
    (port,) = free_ports(1)
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
              "--rdzv_id=loopgolf", f"--rdzv_endpoint=localhost:{port}"]  # fmt: skip
    command = [sys.executable, *launch, str(ROOT / "train_gpt.py"), *tiny_options(dataset, **RUN | dict(also="none"))]
    nodes = [
        subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(out.count(b"\nresult ") for out, _ in outputs) == 1
    text = (tmp_path / "runs/r/log.txt").read_text()
    assert events(text, "hardware")[0]["world"] == "2"
    assert losses_of(text) == pytest.approx(losses_of(one[1]), abs=1e-3)
