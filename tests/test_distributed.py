"""Two processes against one: the same global batch gives the same losses and the same score, and uneven work neither
hangs nor counts a token twice; every step draws its depth anew, the same one on all ranks.

torchrun with gloo on a CPU, float32: pytest tests/test_distributed.py
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, events, parse_log, run_cli, tiny_options

from train_gpt import load_artifact

pytestmark = pytest.mark.slow  # processes, ranks, whole runs

# 395 targets: 13 plain windows, 47 sliding and 3 banded ones, so that the ranks never have equal work
RUN = dict(
    seed=3, run_id="r", iterations=6, score_mode="plain", also="sliding,banded,sgd,lora", score_documents=5, average="swa",
    plan="(ab)*ra", skips="none", depth=2, max_r=6, sample_depth=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory) -> dict[int, tuple[Path, str]]:
    found = {}
    for ranks in (1, 2):
        cwd = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = run_cli(tiny_options(dataset, **RUN), cwd, ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr
        found[ranks] = cwd / "runs" / "r", done.stdout
    return found


def test_losses_are_the_same(runs):
    losses = {n: [float(pairs["train_loss"]) for pairs in events(text, "train")] for n, (_, text) in runs.items()}
    assert len(losses[1]) == 6 and losses[2] == pytest.approx(losses[1], abs=1e-3)
    assert losses[1][-1] < losses[1][0] - 0.1, "something was learnt"


@pytest.mark.parametrize(
    "mode, tolerance", [("plain", 1e-3), ("sliding", 1e-3), ("banded", 1e-3), ("sgd", 1e-2), ("lora", 1e-2)]
)
def test_scores_are_the_same_and_no_token_counts_twice(runs, mode, tolerance):
    one, two = ([p for p in events(text, "score") if p["mode"] == mode][-1] for _, text in (runs[1], runs[2]))
    assert one["tokens"] == two["tokens"] == "395" and one["bytes"] == two["bytes"]
    assert float(two["val_bpb"]) == pytest.approx(float(one["val_bpb"]), abs=tolerance)


def test_only_the_first_rank_speaks_and_writes(runs):
    for folder, text in runs.values():
        assert [event for event, _ in parse_log(text)].count("result") == 1
        names = ["artifact.lg", "checkpoint.pt", "config.json", "log.txt", "result.json", "tokenizer.model"]
        assert sorted(p.name for p in folder.iterdir()) == names
    assert events(runs[2][1], "hardware")[0]["world"] == "2"


def test_two_ranks_score_a_file_as_one_does(runs, dataset, tmp_path):
    """The same artifact, so that nothing but the sum over ranks can differ."""
    path = runs[1][0] / "artifact.lg"
    done = run_cli(tiny_options(dataset, **RUN, score=path), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    _, result = parse_log(done.stdout)[-1]
    _, before = parse_log(runs[1][1])[-1]
    assert result["artifact_sha256"] == before["artifact_sha256"] == load_artifact(path).sha256
    for key in ("val_bpb", "bpb_sliding", "bpb_banded", "bpb_sgd", "bpb_lora"):
        tolerance = 1e-4 if key in ("bpb_sgd", "bpb_lora") else 1e-6
        assert float(result[key]) == pytest.approx(float(before[key]), abs=tolerance)
    assert all(pairs["tokens"] == "395" for pairs in events(done.stdout, "score"))


def test_two_machines_meet_at_one_rendezvous(dataset, tmp_path, runs):
    """What the Slurm script of the README starts, with both nodes on this machine: one run, one log, the same losses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
              "--rdzv_id=loopgolf", f"--rdzv_endpoint=localhost:{port}"]  # fmt: skip
    command = [sys.executable, *launch, str(ROOT / "train_gpt.py"), *tiny_options(dataset, **RUN | dict(also="plain"))]
    nodes = [
        subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(out.count(b"\nresult ") for out, _ in outputs) == 1
    text = (tmp_path / "runs/r/log.txt").read_text()
    losses, single = ([float(p["train_loss"]) for p in events(log, "train")] for log in (text, runs[1][1]))
    assert events(text, "hardware")[0]["world"] == "2" and losses == pytest.approx(single, abs=1e-3)


def test_a_batch_that_does_not_split_is_one_line_and_no_file(dataset, tmp_path):
    done = run_cli(tiny_options(dataset, batch_tokens=96), tmp_path, ranks=2)
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: batch_tokens=96: 3 sequences do not split over 2 ranks"
    ]


ENDING = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch.distributed as dist, train_gpt

def count_threads():
    return len(os.listdir("/proc/self/task"))

def destroy(end=dist.destroy_process_group):
    counts.append(count_threads())
    end()
    counts.append(count_threads())

counts, dist.destroy_process_group = [], destroy
code = train_gpt.main(sys.argv[1:], dict(os.environ))
os.write(2, f"threads:{code},{counts[0] - counts[1]}\\n".encode())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_no_thread_of_the_process_group_outlives_it(dataset, tmp_path):
    """One that still frees a tensor when Python ends aborts a finished run: gloo has a loop and two workers."""
    (tmp_path / "ending.py").write_text(ENDING)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ending.py", str(ROOT)]
    command = [sys.executable, *launch, *tiny_options(dataset, run_id="r", iterations=2, also="none")]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if line.startswith("threads:")] == ["threads:0,3"] * 2, (
        done.stderr
    )
