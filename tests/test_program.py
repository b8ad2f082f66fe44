"""How the programs of tools/ end: the laws of run_program, which every main() returns: pytest tests/test_program.py"""

import subprocess
import sys

import pytest
from helpers import ROOT, clean_environment

from loopgolf.errors import ArtifactError, ConfigError, DataError, DoesNotFit, Interrupted
from loopgolf.runtime import run_program
from tools.audit import AuditError
from tools.lib.predictor import InputError
from tools.lib.runlog import RunError
from tools.pack import PackError


def fail_with(error: BaseException):
    def program():
        raise error

    return program


@pytest.mark.parametrize("given, code", [(None, 0), (0, 0), (1, 1), (3, 3), (4, 4)])
def test_a_program_that_ends_gives_its_own_code(given, code, capsys):
    assert run_program(lambda: given) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunError, 2), (AuditError, 2), (PackError, 2), (InputError, 2), (DataError, 2), (ConfigError, 2),
     (DoesNotFit, 3), (ArtifactError, 4), (Interrupted, 1), (OSError, 1)],
)  # fmt: skip
def test_an_error_is_one_line_and_its_code(error, code, capsys):
    assert run_program(fail_with(error("a.lg: no such\n  file;\tmake it"))) == code
    assert capsys.readouterr() == ("", "error: a.lg: no such file; make it\n")


def test_an_interruption_is_one_line(capsys):
    assert run_program(fail_with(KeyboardInterrupt())) == 1
    assert capsys.readouterr() == ("", "error: interrupted\n")


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, KeyError, RuntimeError])
def test_a_bug_is_not_swallowed(error):
    with pytest.raises(error):
        run_program(fail_with(error("a bug")))


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_traceback():
    """So little is printed that the pipe breaks only when it is flushed."""
    command = "import sys; from loopgolf.runtime import run_program; sys.exit(run_program(lambda: print(input())))"
    process = subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, env=clean_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.write("a row\n")
    process.stdin.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (1, "")
