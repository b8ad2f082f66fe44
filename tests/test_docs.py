"""The documentation: its commands name programs and targets that exist, with options that their own parsers take (none is
run); its links lead somewhere; programs and results are explained."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT
from torch.distributed.run import get_args_parser

import train_gpt
from loopgolf.errors import Stop
from loopgolf.options import parse_command_line

PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "data/README.md", "kernels/README.md", "records/*/README.md")
OTHERS = {"pip", "git", "curl", "cd", "ls", "source", "export", "head", "["}  # programs that need only be known
SCRIPTS = {"train_gpt.py", "packed.py"}  # packed.py: what tools.pack makes of the other
OTHER_MODULES = {"venv", "pip", "pytest", "ruff", "mypy"}
BEFORE = {"srun", "if", "then", "else", "fi", "do", "done"}  # words before a command
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Command(NamedTuple):
    line: int
    words: list[str]


class Parsed(Exception):
    """Raised in the place of whatever a program would do with its arguments."""


def find_commands(text: str) -> Iterator[Command]:
    """Those of fenced blocks. In a block that is not marked as a shell's, only what starts like one of ours; in one of
    a console, what stands behind a prompt."""
    kind, started, line = None, 0, ""
    for number, row in enumerate(text.splitlines(), 1):
        if row.startswith("```"):
            kind = row[3:].strip() if kind is None else None
        elif kind is not None:
            if not line:
                started = number
            line += row.removesuffix("\\")
            if row.endswith("\\"):
                continue
            prompt = line.startswith("$ ")
            line = line.removeprefix("$ ")
            is_ours = re.match(r"(\S+=\S+ )*(\S*/)?(python3?|torchrun|make)\b", line)
            if prompt or (kind != "console" and (is_ours or kind in ("sh", "bash"))):
                yield from (Command(started, words) for words in split_line(line))
            line = ""
        else:  # in prose, targets only
            yield from (Command(number, found.split()) for found in re.findall(r"`(make [^`]+)`", row))


def split_line(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";|&"):
            words.append(word)
            continue
        while words and (words[0] in BEFORE or re.match(r"\w+=", words[0])):
            words.pop(0)
        if words:
            yield words
        words = []


def check(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """What is wrong with a command; empty if nothing is."""
    program, *given = [word for word in words if not word.startswith("$")]  # an unknown number of words
    program = Path(program).name
    if program == "make":
        wrong = [word for word in given if word not in TARGETS and "=" not in word]
        return f"no target {wrong[0]} in the Makefile" if wrong else ""
    try:
        if program == "torchrun":
            launch = get_args_parser().parse_args(given)
            return check(["python", launch.training_script, *launch.training_script_args], capsys)
        if program in ("python", "python3"):
            return check_python(given)
    except Stop as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err.strip()
    return "" if program in OTHERS else f"{program} is not known here"


def check_python(given: list[str]) -> str:
    if given[0] == "-c":
        compile(given[1], "-c", "exec")
    elif given[0] != "-m":
        if given[0] not in SCRIPTS:
            return f"no program {given[0]}"
        check_settings(given[1:])
    elif given[1].split(".")[0] not in OTHER_MODULES:
        if not (ROOT / f"{given[1].replace('.', '/')}.py").is_file():
            return f"no module {given[1]}"
        check_module(given[1], given[2:])
    return ""


def check_settings(argv: list[str]) -> None:
    """Settings of train_gpt.py; those of a run or file that does not exist here by name and type only."""
    argv = [word for word in argv if "$" not in word]
    given = parse_command_line(argv, {f.name: f.default for f in fields(train_gpt.Config)})
    if not given.keys() & {"resume", "score"}:
        train_gpt.parse_config(argv, {})


def check_module(name: str, argv: list[str]) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, settings = argv[:cut], argv[cut + 1 :]
    redirected = next((at for at, word in enumerate(argv) if word in ("<", ">", ">>")), cut)
    try:
        importlib.import_module(name).main(argv[:redirected])
    except Parsed as parsed:
        (args,) = parsed.args
    check_settings(settings)
    check_settings(settings + (getattr(args, "against", None) or []))
    for plan, *own in map(shlex.split, getattr(args, "plans", [])):
        check_settings([*settings, f"--plan={plan}", *own])


@pytest.fixture
def judge(monkeypatch, capsys):
    """Programs parse what they are given, and stop there."""

    def parse_only(self, args=None, namespace=None, real=argparse.ArgumentParser.parse_args):
        raise Parsed(real(self, args, namespace))

    def judge(words: list[str]) -> str:
        with monkeypatch.context() as patch:
            if words[0] != "torchrun":
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            return check(words, capsys)

    return judge


AT_LEAST = {"README.md": 10, "docs/tools.md": 25, "docs/submit.md": 12}  # commands
DOCS = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in ROOT.glob(place))


@pytest.mark.parametrize("name", DOCS)
def test_commands_are_taken_by_their_programs(name, judge):
    found = list(find_commands((ROOT / name).read_text(encoding="utf-8")))
    faults = [f"{name}:{line}: {shlex.join(words)}: {fault}" for line, words in found if (fault := judge(words))]
    assert not faults, "\n".join(faults)
    assert len(found) >= AT_LEAST.get(name, 0), "most commands were not found"


def anchor_of(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def find_broken_links(path: Path) -> list[str]:
    """Links to files that do not exist here, or to headings that they do not have."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        to = path.parent / name if name else path
        headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        if not to.exists() or (anchor and anchor not in map(anchor_of, headings)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    assert find_broken_links(ROOT / name) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## The `*r` group\n[a](page.md) [b](other.md) [c](#the-r-group) [d](#group) [e](https://x.org)")
    assert find_broken_links(page) == ["other.md", "#group"]


def test_every_program_has_a_section():
    programs = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs/tools.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert programs == set(sections)


def test_keys_of_results_and_recipes_are_explained():
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    wanted = [*train_gpt.result_order(), *train_gpt.RECIPES, *train_gpt.SCORERS]
    assert [name for name in wanted if f"`{name}`" not in text] == []


WRONG = """
```sh
python -m tools.plot runs/a --outt x.png
python -m tools.seeds --seeds 1 2 -- --recipe pocket --iteration 5
python -m tools.sweep 'ab(c' -- --recipe pocket
python -m tools.bench --against '--num_head 8' -- --recipe pocket
python -m tools.plots runs/a && python -m data.localtext --vocab-size few
MASTER=x srun torchrun --nproc_per_node=8 train_gpt.py --recipe pockett $WHAT
torchrun --nproc_per_nodes=8 train_gpt.py
python train_gpt.py --resume runs/a \\
    --sede 3
rsync a b
```
```
lines of output python -m tools.plot --nothing
python -m kernels.check --nothing
```
```console
$ make tests
make of output
```
Then `make rum` it.
"""
FAULTS = (
    (3, "unrecognized arguments: --outt x.png"), (4, "did you mean --iterations?"), (5, "character 5"),
    (6, "did you mean --num_heads?"), (7, "no module tools.plots"), (7, "invalid positive value: 'few'"),
    (8, "did you mean pocket?"), (9, "unrecognized"), (10, "did you mean --seed?"), (12, "rsync is not known"),
    (16, "--nothing"), (19, "no target tests"), (22, "no target rum"),
)  # fmt: skip


def test_what_is_wrong_is_found(judge):
    found = [(line, judge(words)) for line, words in find_commands(WRONG)]
    assert [line for line, _ in found] == [line for line, _ in FAULTS]
    for (line, fault), (_, expected) in zip(found, FAULTS):
        assert expected in fault, (line, fault)
