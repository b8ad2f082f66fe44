"""The packed script is the source: the same plan, the same artifact, alone in a folder, under python and torchrun.

CPU: pytest tests/test_pack.py
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, clean_environment, tiny_options, train

import tools.pack
import train_gpt
from loopgolf.source import find_counted
from tools.submission import script

RESERVE = 38_000
QUICK = SMALL | dict(score_documents=2, lora_chunk=32)


def config_of(recipe: str) -> train_gpt.Config:
    return train_gpt.parse_config(["--recipe", recipe], {})[0]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """The scripts of all recipes, from a record's readable source, so that tools.pack itself has to agree with that."""
    folder, found = tmp_path_factory.mktemp("packed"), {}
    for recipe in train_gpt.RECIPES:
        found[recipe] = folder / f"renamed_{recipe}.py"
        human = script.join_sources(script.counted_sources(config_of(recipe)))
        found[recipe].write_bytes(script.pack_sources(human, recipe))
    return found


@pytest.fixture
def packed(scripts) -> Path:
    """The script of a recipe without experts that adapts."""
    return scripts["4b7l"]


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def start(program: Path, arguments: list[str], cwd: Path, ranks: int = 0) -> subprocess.Popen[str]:
    (cwd / "tmp").mkdir(parents=True, exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launch, str(program), *arguments],
        cwd=cwd,
        env=clean_environment(TMPDIR=cwd / "tmp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What it wrote, once it has ended as expected."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


@pytest.mark.slow
def test_every_recipe_fits_its_reserve(scripts):
    assert all(path.stat().st_size <= RESERVE for path in scripts.values())


def result_of(folder: Path) -> dict:
    return json.loads((folder / "runs/r/result.json").read_text())["result"]


RUN = QUICK | dict(recipe="4b7l", run_id="r", iterations=3, calibration_tokens=256, score_mode="lora")


@pytest.fixture(scope="module")
def source_run(dataset, tmp_path_factory) -> Path:
    """Where the source made a run."""
    cwd = tmp_path_factory.mktemp("source")
    train(cwd, dataset, **RUN)
    return cwd


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_it_makes_the_artifact_of_the_source(ranks, packed, source_run, dataset, tmp_path):
    """In an empty folder, where nothing of the repository is found; and it leaves nothing of itself behind."""
    end(start(packed, tiny_options(dataset, **RUN), tmp_path, ranks))
    mine, other = result_of(tmp_path), result_of(source_run)
    if ranks:  # the sum over ranks rounds in another order
        assert float(mine["val_bpb"]) == pytest.approx(float(other["val_bpb"]), abs=1e-3)
    else:
        assert mine["artifact_sha256"] == other["artifact_sha256"] and mine["val_bpb"] == other["val_bpb"]
    assert mine["code_bytes"] == packed.stat().st_size and other["code_bytes"] == 1000
    assert mine["total_bytes"] == mine["artifact_bytes"] + mine["code_bytes"]
    assert not list((tmp_path / "tmp").glob("loopgolf-*"))
    # logs prove what ran: the source, and the modules inside
    sources = script.counted_sources(config_of("4b7l"))
    assert f"code_sha256:{script.hash_sources(sources)}" in (source_run / "runs/r/log.txt").read_text()
    modules = script.unpack_modules(packed.read_bytes())
    assert f"code_sha256:{script.hash_sources(modules)}" in (tmp_path / "runs/r/log.txt").read_text()


@pytest.mark.slow
def test_the_same_code_gives_the_same_bytes(packed, tmp_path):
    """From the repository as from a readable source, whatever order the sets of a process have."""
    command = [sys.executable, "-m", "tools.pack", "--recipe=4b7l", f"--code-reserve={RESERVE}"]
    environment = clean_environment(PYTHONHASHSEED=7)
    subprocess.run([*command, f"--out={tmp_path / 'again.py'}"], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "again.py").read_bytes() == packed.read_bytes()


@pytest.mark.slow
def test_it_holds_what_the_recipe_uses(scripts, packed, tmp_path):
    mixed = scripts["osrt_v4"]
    inside, others = (set(script.unpack_modules(path.read_bytes())) for path in (mixed, packed))
    assert (inside - others, others - inside) == ({"loopgolf/moe.py"}, {"loopgolf/adapting.py"})
    assert "loopgolf/artifact_v2.py" not in inside | others
    options = ["--code_reserve", str(RESERVE), "--moe_experts", "3"]
    assert tools.pack.main(["--recipe", "baseline9", "--out", str(tmp_path / "p.py"), "--", *options]) == 0
    assert set(script.unpack_modules((tmp_path / "p.py").read_bytes())) == inside


@pytest.mark.slow
def test_what_is_not_packed_is_one_line(scripts, packed, tmp_path, capsys):
    arguments = ["--recipe", "osrt_v4", "--dry_run", "--device", "cpu"]
    mixed = start(scripts["osrt_v4"], arguments, tmp_path)
    without = start(packed, ["--recipe=4b7l", "--moe_experts=11", "--moe_hidden=64", "--dry_run"], tmp_path)
    other = start(packed, arguments, tmp_path)
    assert train_gpt.main(arguments, {}) == 0
    assert end(mixed) == tuple(capsys.readouterr())
    assert end(other, code=2) == ("", "error: recipe=osrt_v4: choose from 4b7l\n")
    out, err = end(without, code=2)
    assert (out, err) == (
        "",
        "error: moe_experts=11: this script was packed without loopgolf.moe; run the repository's\n",
    )


def test_a_damaged_script_does_not_start(packed, tmp_path):
    content = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as archive:
        content[archive.getinfo("code").header_offset + 400] ^= 1
    (tmp_path / "bad.py").write_bytes(content)
    end(start(tmp_path / "bad.py", ["--recipe", "4b7l", "--dry_run"], tmp_path), code=1)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--code_reserve", "9000"], 3, ("code_reserve=9,000", "pocket", "9,500 bytes")),
        (["--code_reserve", "9000", "--", "--code_reserve", "99000"], 3, ("code_reserve=9,000",)),
        (["--", "--code_reserve", "9001"], 3, ("code_reserve=9,001",)),
        (["--recipe", "packet"], 2, ("recipe=packet", "did you mean pocket")),
        (["--", "--modeldim", "3"], 2, ("--modeldim", "did you mean --model_dim")),
        (["--", "--model_dim", "1"], 2, ("model_dim=1",)),
    ],
)
def test_what_cannot_be_packed_is_one_line(arguments, code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tools.pack, "pack", lambda sources, recipe: bytes(9500))
    assert tools.pack.main(["--recipe", "pocket", "--out", str(tmp_path / "p.py"), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The rules
# ----------------------------------------------------------------------------------------------------------------------

FIELD = "from dataclasses import dataclass\n@dataclass\nclass A:"
SAME = ""  # packed as it is written here

RULES = {
    # 2. comments, docstrings, annotations
    "comments and docstrings": ('"""Text."""\ndef main():\n\t"""Text."""  # text\n\treturn 1', "def main():return 1"),
    "only a docstring": ('def main():\n\t"""Text."""', "def main():pass"),
    "other strings": ("def main():return'Text.',A\nclass A:text='Text.'", SAME),
    "annotations": (
        "x: int = 1\ny: str\ndef main(a: int, *b: int, c: int = x, **d: int) -> int: pass",
        "x=1\npass\ndef main(a,*b,c=x,**d):pass",
    ),
    "annotations inside": (
        "def main(self):\n\ta: int = 1\n\tself.b: int = a\n\tself.c: int",
        "def main(self):A=1;self.b=A;pass",
    ),
    "asserts": (
        "def main(x): assert isinstance(x, int); assert x is not None; assert x > 0; return x",
        "def main(x):assert x>0;return x",
    ),
    "imports for annotations": ("from a import T\ndef main(x: T) -> T: pass", "def main(x):pass"),
    "fields": (f"{FIELD} b: str; c: float = 1.5\ndef main(): A", f"{FIELD}b:int;c:int=1.5\ndef main():A"),
    "fields that tell": (
        f"from typing import ClassVar\n{FIELD} b: ClassVar[str] = 1\ndef main(): A",
        f"from typing import ClassVar\n{FIELD}b:ClassVar[str]=1\ndef main():A",
    ),
    "constexpr": (
        "import triton.language as tl\ndef main(x: int, SIZE: tl.constexpr): pass",
        "import triton.language as tl\ndef main(x:int,SIZE:tl.constexpr):pass",
    ),
    "custom_op": (
        "from torch import Tensor\nfrom torch.library import custom_op\n@custom_op('a::b')\ndef main(x: Tensor) -> Tensor: pass",
        "from torch import Tensor\nfrom torch.library import custom_op\n@custom_op('a::b')\ndef main(x:Tensor)->Tensor:pass",
    ),
    # 3. help
    "help": (
        "from a import option\nx = option(4, 'help', low=1, choices=('help',))\ndef main(): x, f(4, 'help')",
        "from a import option\nx=option(4,'',low=1,choices=('help',))\ndef main():x,f(4,'help')",
    ),
    # 4. what main() reaches
    "unreached": ("def f(): pass\nclass A: pass\nx = 1\ndef main(): pass", "def main():pass"),
    "reached through others": ("def f():g\ng=1\ndef main():f()", SAME),
    "reached as an attribute": ("def f():pass\ndef main(m):m.f", SAME),
    "reached as a word": ("def f():pass\ndef main(m):getattr(m,'f')", SAME),
    "reached in a path": ("def f():pass\ndef main(m):return'm.f'", SAME),
    "no word of a sentence": ("def f(): pass\ndef main(): return 'f of x'", "def main():return'f of x'"),
    "an if goes as a whole": ("if a:\n\tx = 1\n\tfor y in x: print(y)\ndef main(): pass", "def main():pass"),
    "an if stays as a whole": ("if a:\n\tx=1;y=2\n\tif b:z=3\ndef main():x", SAME),
    "a try goes as a whole": (
        "try: import triton\nexcept ImportError: triton = None\ndef main(): pass",
        "def main():pass",
    ),
    "what acts stays": ("def f():pass\nf()\nT['f']=1\nT|={}\nif a:f()\ndef main():pass", SAME),
    "decorators that act": ("def f(g):pass\n@f\ndef g():pass\ndef main():pass", SAME),
    "decorators that do not": (
        "import functools\n@functools.cache\ndef f(): pass\ndef main(): pass",
        "def main():pass",
    ),
    # 5. imports
    "imports": (
        "import os, a.b, c.d as e\nfrom f import g, h as i, k\ndef main(): a.b.x, i, k\ndef j(): os, e, g",
        "import a.b\nfrom f import h as i,k\ndef main():a.b.x,i,k",
    ),
    "imports for what they do": ("import a\nfrom b import c\ndef main():pass", SAME),
    "lazy imports": ("def main():\n\tfrom a import b as c\n\treturn c", "def main():from a import b as A;return A"),
    # 6. names
    "locals": (
        "def main(first, *rest, last=1, **others):\n\ttotal = first\n\treturn [row for row in rest], total, lambda key: key",
        "def main(first,*rest,last=1,**others):A=first;return[A for A in rest],A,lambda key:key",
    ),
    "public names": (
        "class Alpha:\n\tbeta=1\n\tdef gamma(self):self.delta=epsilon;return self.delta\nepsilon=2\ndef main():return Alpha,epsilon",
        SAME,
    ),
    "jit": ("@triton.jit\ndef main(first):total=first;other=total;return total,other", SAME),
    "one recipe": (
        "RECIPES:dict={'a':dict(x=1),'b':dict(x=2)}\ndef main():return RECIPES",
        "RECIPES={'b':dict(x=2)}\ndef main():return RECIPES",
    ),
    "what only a script does": (
        "import os\nif __name__=='__main__':os.x()\ndef main():return os\nif __name__=='__main__':main()",
        "import os\ndef main():return os",
    ),
    "builtins": ("def main():return len,len,len,len,len,'text','text','text',None,None,None", SAME),
}


@pytest.mark.parametrize("text, expected", RULES.values(), ids=RULES)
def test_rule(text, expected):
    found = tools.pack.shorten({"train_gpt.py": text}, "b")["train_gpt.py"]
    assert found.removesuffix("\n") == (expected or text)


@pytest.mark.parametrize(
    "sources, expected",
    [
        pytest.param(
            {
                "train_gpt.py": "from p.a import run as go\nimport p.b as b\ndef main():return go(),b.step(x=1)",
                "p/__init__.py": "",
                "p/a.py": "def run():return 1\ndef go():return 2",
                "p/b.py": "def step(*,x):return go(x)\ndef go(x):return x",
            },
            {},
            id="equal names, other names, keywords",
        ),
        pytest.param(
            {
                "train_gpt.py": "from p.a import f\ndef main():return f()",
                "p/__init__.py": "",
                "p/a.py": "from p.b import T\ndef f():return 1\ndef g() -> T:return 2",
                "p/b.py": "class T:pass\nprint('acts')",
            },
            {"p/a.py": "def f():return 1", "p/b.py": None},
            id="what is imported for an annotation",
        ),
        pytest.param(
            {
                "train_gpt.py": "import importlib\ndef main():return getattr(importlib.import_module('p.a'),'f')()",
                "p/__init__.py": "",
                "p/a.py": "from p.b import g\ndef f():return g()",
                "p/b.py": "def g():return 1\ndef h():return 2",
            },
            {"p/b.py": "def g():return 1"},
            id="lazy, with what it imports",
        ),
    ],
)
def test_modules(sources, expected):
    """`expected`: what differs from the sources; None for what goes."""
    found = {path: text.removesuffix("\n") for path, text in tools.pack.shorten(sources, "b").items()}
    assert found == {path: text for path, text in (sources | expected).items() if text is not None}


def test_modules_of_a_run(tmp_path):
    """The entry, what it imports, what these import, their packages, and the lazy ones that are named."""
    files = {
        "train_gpt.py": "import os\nfrom p import a\nfrom q.b import f\ndef g():\n import p.lazy, p.other",
        "p/__init__.py": "import p.first",
        "p/first.py": "",
        "p/a.py": "try: import q.c\nexcept ImportError: pass",
        "p/lazy.py": "import p.d",
        "p/d.py": "",
        "p/other.py": "",
        "q/__init__.py": "",
        "q/b.py": "import q.missing",
        "q/c.py": "",
        "q/d.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    own = ["p", "p.a", "p.first", "q", "q.b", "q.c", "train_gpt"]
    assert list(find_counted(tmp_path, [])) == own
    assert list(find_counted(tmp_path, ["p.lazy", "nowhere"])) == sorted([*own, "p.lazy", "p.d"])
    assert find_counted(tmp_path, [])["p"] == tmp_path / "p/__init__.py"
