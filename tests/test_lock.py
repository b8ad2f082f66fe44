"""requirements.lock holds exact versions of everything that the two requirements files install, and agrees with them.

python -m pytest tests/test_lock.py
"""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
GPU_ONLY = ("nvidia-", "cuda-")  # asked for by the builds of torch for GPUs, pinned by them
LINE = re.compile(r'[A-Za-z0-9._-]+==[0-9][0-9a-z.]*(; platform_system == "Linux" and platform_machine == "x86_64")?')


def read_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def load(name: str) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, read_lines(name))}


def test_every_line_of_the_lock_is_one_exact_version():
    lines = read_lines("requirements.lock")
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert len(load("requirements.lock")) == len(lines), "a package twice"


def test_the_pins_agree_with_the_lock():
    lock = load("requirements.lock")
    pins = load("requirements.txt") | load("requirements-dev.txt")
    for name, pin in pins.items():
        assert name in lock, f"{name} is not locked: make lock"
        assert lock[name].specifier == pin.specifier, f"{name}: {pin.specifier} is wanted: make lock"
        assert str(lock[name].marker) == str(pin.marker), f"{name}: another marker: make lock"


def test_the_lock_names_what_its_packages_ask_for():
    """By what is installed here: a package that a new version of another one needs is missed otherwise."""
    lock = load("requirements.lock")
    for name, pin in lock.items():
        try:
            wanted = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            assert pin.marker is not None and not pin.marker.evaluate(), f"{name} is locked, but not installed"
            continue
        for want in wanted:
            key = canonicalize_name(want.name)
            if want.marker is not None and not want.marker.evaluate({"extra": ""}):
                continue
            if not key.startswith(GPU_ONLY):
                assert key in lock, f"{name} asks for {key}, which is not locked: make lock"
                assert next(iter(lock[key].specifier)).version in want.specifier, f"{name} asks for {want}"
