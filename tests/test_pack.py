"""The packed script is the source: the same plan, the same artifact, alone in a folder, under python and torchrun.

CPU: pytest tests/test_pack.py
"""

import ast
import bz2
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, tiny_options

import tools.pack
import tools.submission.script
import train_gpt


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "renamed.py"
    assert tools.pack.main(["--out", str(path)]) == 0
    return path


def run_script(script: Path, arguments: list[str], cwd: Path, ranks: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launch, str(script), *arguments], cwd=cwd, env=clean_environment(TMPDIR=cwd / "tmp"),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def run_in_empty_folder(script: Path, arguments: list[str], folder: Path, ranks: int = 0) -> str:
    (folder / "tmp").mkdir(parents=True)
    done = run_script(script, arguments, folder, ranks)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (folder / "tmp").iterdir() if path.name.startswith("loopgolf-")], "left something behind"
    return done.stdout


def test_the_same_code_gives_the_same_bytes(packed, tmp_path):
    assert tools.pack.main(["--out", str(tmp_path / "again.py")]) == 0
    assert (tmp_path / "again.py").read_bytes() == packed.read_bytes()
    assert packed.stat().st_size < train_gpt.Config().code_reserve


def read_module(packed: Path) -> str:
    """What the start script writes, by the format's description alone."""
    with zipfile.ZipFile(packed) as archive:
        return bz2.decompress(archive.read("code")).decode().split("\0")[1]


def test_what_main_never_reaches_stays_out(packed):
    """Going by texts of messages and names of attributes: other names are shortened."""
    text = read_module(packed)
    for message in ("value_scales", "zero-byte file", "codes end too early"):  # of all three modules
        assert message in text
    lazy = "from loopgolf.moe import"  # by a block with experts, which then asks for the module
    assert lazy in text
    assert not re.search(r"(from|import) (data|kernels|tools|triton)\b", text.replace(lazy, ""))
    assert "do not fit into uint16" in (ROOT / "data/shards.py").read_text()
    assert "do not fit into uint16" not in text, "write_shard is for those who make data"


def parse_modules(**texts: str) -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in texts.items()}


def test_modules_become_one():
    """The entry last, whatever it is called; what several import is imported once; no module imports another."""
    tree = tools.pack.fuse(parse_modules(
        train_gpt="from b import f\nimport os\nfrom torch import Tensor, nn\ndef main(): from c import g; return f, g",
        b="import os\nfrom torch import Tensor\nf = os.sep", c="def g(): pass", zz="z = 1",
    ))  # fmt: skip
    assert ast.unparse(tree).splitlines() == [
        "import os", "from torch import Tensor", "from torch import nn", "f = os.sep", "", "def g():", "    pass",
        "z = 1", "", "def main():", "    pass", "    return (f, g)",
    ]  # fmt: skip


def test_a_module_stands_behind_those_that_it_imports():
    """Or a class would come before the one that it is made from."""
    tree = tools.pack.fuse(parse_modules(
        a="from train import Loss\nclass Large(Loss): pass", train="from z import Stop\nclass Loss(Stop): pass",
        train_gpt="from a import Large\ndef main(): return Large()", z="class Stop(Exception): pass",
    ))  # fmt: skip
    names = [line.name for line in tree.body]
    assert names == ["Stop", "Loss", "Large", "main"]
    space = {}
    exec(compile(ast.unparse(tree), "fused", "exec"), space)
    assert isinstance(space["main"](), space["Stop"])


def test_what_only_annotations_name_is_not_imported(tmp_path):
    texts = parse_modules(train_gpt="import sys\nfrom collections.abc import Callable, Iterator\nfrom b import T\n"
                          "def main(argv: Callable) -> T:\n    n: T = isinstance(sys.argv, Iterator)\n    return n", b="class T: pass")  # fmt: skip
    (tmp_path / "p.py").write_bytes(tools.pack.pack(texts)[0])
    text = read_module(tmp_path / "p.py")
    assert "sys" in text and "Iterator" in text and "Callable" not in text and "class" not in text


@pytest.mark.parametrize("code", [
    "def f(kept, free): pass\nf(kept=1)\nlibrary.call(free=2)",
    "def f(free): pass\nlog(free=1)\nclass A:\n    def g(self, kept): f(2)\na.g(kept=1)",
    "def f(kept): pass\nfunctools.partial(f, kept=1)",
    "def f(kept): pass\ng = f\ng(kept=1)",
    "def f(kept): pass\ndict(a=f)['a'](kept=1)",
    "class A:\n    def open(self, kept): pass\na.open(kept=1)",
    "def f(kept, free): pass\nf(kept=1)\ng = dict(f=f, free=1)",
    "class A:\n    def f(self, kept): pass\ng = A().f\ng(kept=1)",
    "class A:\n    def __init__(self, kept): pass\nA(kept=1)",
    "class A:\n    def __init__(self, kept): pass\nkinds = [A]\nkinds[0](kept=1)",
    "class A:\n    def __init__(self, *, kept): pass\nclass B(A):\n    pass\nB(kept=1)",
    "class A:\n    def forward(self, kept): pass\nmodel(kept=1)",
    "g = lambda kept: 0\ng(kept=1)",
])  # fmt: skip
def test_parameters_that_may_be_given_by_keyword_keep_their_names(code):
    assert tools.pack.keywords_in(ast.parse(code)) == {"kept"}


@pytest.mark.parametrize("texts, words", [
    (dict(train_gpt="def main(): pass\ndef f(): pass", b="f = 1"), ("train_gpt", "b", "f")),
    (dict(train_gpt="from b import f as h\ndef main(): h()", b="def f(): pass"), ("b", "f", "another name")),
])  # fmt: skip
def test_what_one_module_would_change_is_refused(texts, words):
    with pytest.raises(tools.pack.PackError) as caught:
        tools.pack.fuse(parse_modules(**texts))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("recipe", ["4b7l", "pocket"])
def test_it_plans_as_the_source_does(recipe, packed, tmp_path):
    arguments = ["--recipe", recipe, "--dry_run", "--device", "cpu"]
    source = run_in_empty_folder(ROOT / "train_gpt.py", arguments, tmp_path / "source")
    assert run_in_empty_folder(packed, arguments, tmp_path / "packed") == source
    assert source.startswith("params:")


@pytest.mark.parametrize("ranks", [0, 2])
def test_it_makes_the_artifact_of_the_source(ranks, packed, dataset, tmp_path):
    results = []
    for name, script in (("source", ROOT / "train_gpt.py"), ("packed", packed)):
        arguments = tiny_options(dataset, run_id="r", iterations=3, calibration_tokens=256)
        run_in_empty_folder(script, arguments, tmp_path / name, ranks)
        results.append(json.loads((tmp_path / name / "runs/r/result.json").read_text())["result"])
    source, ours = results
    assert ours["artifact_sha256"] == source["artifact_sha256"] and ours["val_bpb"] == source["val_bpb"]
    assert ours["code_bytes"] == packed.stat().st_size and source["code_bytes"] == 1000
    assert ours["total_bytes"] == ours["artifact_bytes"] + ours["code_bytes"]


def test_bad_input_is_one_line(packed, tmp_path):
    done = run_script(packed, ["--modeldim", "3"], tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: unknown option --modeldim (did you mean --model_dim?); see --help"
    ]


def test_a_damaged_script_does_not_start(packed, tmp_path):
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as archive:
        at = archive.getinfo("code").header_offset + 400
    content[at] ^= 1
    (tmp_path / "bad.py").write_bytes(content)
    assert run_script(tmp_path / "bad.py", ["--recipe", "4b7l", "--dry_run"], tmp_path).returncode != 0


def test_a_lazy_import_is_packed_where_it_is_asked_for(packed, tmp_path, capsys):
    """Experts stay out of a script whose recipe has none; there they end in one line, not in a traceback."""
    assert "grouped_mm" not in read_module(packed)
    arguments = ["--recipe", "osrt_v4", "--dry_run", "--device", "cpu"]
    done = run_script(packed, arguments, tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "moe_experts=11" in done.stderr and "--with loopgolf.moe" in done.stderr
    path = tmp_path / "mixed.py"
    assert tools.pack.main(["--out", str(path), "--with", "loopgolf.moe", "--code_reserve", "25000"]) == 0
    sources = tools.submission.script.counted_sources(11)
    assert list(sources)[-1] == "kernels/moe.py"
    assert tools.submission.script.pack_sources(tools.submission.script.join_sources(sources)) == path.read_bytes()
    assert tools.submission.script.hash_sources(sources) == train_gpt.hash_counted_code(11) != train_gpt.hash_counted_code()
    assert run_in_empty_folder(path, arguments, tmp_path / "mixed").startswith("params:356497926\n")
    capsys.readouterr()
    assert tools.pack.main(["--out", str(tmp_path / "p.py"), "--with", "kernels.more"]) == 2
    assert "kernels.more" in capsys.readouterr().err


def test_a_packed_mixture_makes_the_artifact_of_the_source(dataset, tmp_path):
    assert tools.pack.main(["--out", str(tmp_path / "p.py"), "--with", "loopgolf.moe", "--code_reserve", "25000"]) == 0
    found = []
    for name, script in (("source", ROOT / "train_gpt.py"), ("packed", tmp_path / "p.py")):
        arguments = tiny_options(dataset, run_id="r", iterations=2, moe_experts=3, moe_hidden=8, checkpoint_passes=1)
        run_in_empty_folder(script, arguments, tmp_path / name)
        found.append(json.loads((tmp_path / name / "runs/r/result.json").read_text())["result"]["artifact_sha256"])
    assert found[0] == found[1]


def test_code_over_the_reserve_is_refused(tmp_path, capsys):
    assert tools.pack.main(["--out", str(tmp_path / "p.py"), "--code_reserve", "9000"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "code_reserve=9000" in line and "characters" in line and not list(tmp_path.iterdir())
