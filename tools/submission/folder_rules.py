"""Rules about the files of a submission folder, its submission.json as a form, and its script."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import UnionType

from loopgolf.errors import ConfigError
from tools.pack import PackError
from tools.submission.entry import Entry, claims_by_seed
from tools.submission.script import (
    ScriptError,
    Unreadable,
    counted_sources,
    hash_sources,
    helper_files,
    join_sources,
    pack_sources,
    parse_source,
    split_sources,
    unpack_modules,
    unwrap,
)
from tools.submission.summary import SEED_FIELDS, config_of, options_of
from tools.submission.tracks import TRACKS
from tools.submission.trainlog import TrainLog
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Rule, has_kind, register

RULES: dict[str, Rule] = {}
rule = register(RULES)
KINDS: dict[str, type | UnionType] = {
    "author": str,
    "github_id": str,
    "name": str,
    "blurb": str,
    "date": str,
    "track": str,
    "val_loss": float,
    "val_bpb": float,
    "val_loss_std": float,
    "val_bpb_std": float,
    "seeds": list | dict,
    "seed_results": dict,
    "bytes_total": int,
    "bytes_code": int,
    "hardware": str,
    "pytorch_version": str,
}
NEEDED = ("author", "github_id", "name", "date", "val_bpb")
WHOLE_NUMBERS = ("artifact_bytes", "steps")
# Scripts in records/, which a later packer may make differently. They were compared with their readable source when
# they were made: sha256 of train_gpt.py to sha256 of train_gpt_human.py.
EARLIER_SCRIPTS = {
    # records/track_pocket/2026-12-01_Words
    "ce045689931acf57d470e54aecfe0eb8ababfff9a1f015b653a3a0c8037d0f25": (
        "5c50ed88ae468ff767583605f88b18e430a78a2c7f171ffa92e2cd375a2ff7d6"
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


@rule
def files(entry: Entry) -> Found:
    """Every required file is there under its name."""
    wanted = ["README.md", "submission.json", "train_gpt.py"]
    if entry.ours:
        wanted += ["requirements.txt", "train_gpt_human.py"]
    if entry.ours and entry.track_or_any.ships_artifacts:
        wanted += ["tokenizer.model", *(f"artifact_seed{log.seed}.lg" for log in entry.logs)]
    for name in wanted:
        path = entry.folder / name
        if not path.is_file():
            yield BAD, f"{name} is missing{name_replacement(entry, name)}"
        elif not path.stat().st_size:
            yield BAD, f"{name} is empty"
    if not entry.logs:
        yield BAD, "there is no training log"
    yield OK, f"{len(wanted)} files and {len(entry.logs)} logs"


def name_replacement(entry: Entry, missing: str) -> str:
    """The file that older folders have instead, in brackets."""
    replacement = None
    if missing == "train_gpt.py":
        replacement = entry.script
    elif missing == "submission.json":
        replacement = next(entry.folder.glob("submission*.json"), None)
    return f" (there is {replacement.name})" if replacement else ""


@rule
def submission_json(entry: Entry) -> Found:
    """submission.json holds an object with the required fields, each of its type."""
    if entry.data is None:
        yield BAD, entry.fault
        return
    for name in KINDS if entry.ours else NEEDED:
        if name not in entry.data:
            yield BAD, f"{name} is missing"
    for name, value in entry.data.items():
        if name in KINDS and not has_kind(value, KINDS[name]):
            is_open = value is None and name not in NEEDED and not entry.ours
            kind = getattr(KINDS[name], "__name__", "list or object").replace("float", "number")
            yield UNKNOWN if is_open else BAD, f"{name} is {type(value).__name__}, not {kind}"
    for name in ("author", "github_id", "name"):
        if entry.get(name) == "":
            yield BAD, f"{name} is empty"
    if entry.ours:
        yield from our_fields(entry)
    yield OK, f"{len(entry.data)} fields"


def our_fields(entry: Entry) -> Found:
    """What only our own submission.json must hold."""
    if entry.get("blurb") == "":
        yield BAD, "blurb is empty"
    if not all(type(seed) is int for seed in entry.get("seeds") or []):
        yield BAD, "seeds are not all whole numbers"
    for seed, values in claims_by_seed(entry.data).items():
        for name in SEED_FIELDS:
            kind = int if name in WHOLE_NUMBERS else float
            if not has_kind(values.get(name), kind):
                yield BAD, f"seed_results {seed}: {name} is {type(values.get(name)).__name__}"
    for name in entry.data or {}:
        if name not in KINDS:
            yield UNKNOWN, f"{name} is a field that this check does not know"


@rule
def date(entry: Entry) -> Found:
    """The date is one, and is that of the folder's name."""
    text = entry.get("date")
    if not isinstance(text, str):
        yield BAD, "there is no date"
        return
    try:
        stated = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).date()
    except ValueError:
        yield BAD, f"date {text!r} is not YYYY-MM-DD"
        return
    named = re.match(r"\d{4}-\d{2}-\d{2}", entry.folder.resolve().name)
    if named and named[0] != stated.isoformat():
        yield BAD if entry.ours else UNKNOWN, f"date is {stated}, the folder's name says {named[0]}"
    yield OK, str(stated)


@rule
def track(entry: Entry) -> Found:
    """The track exists, and the hardware in the logs is that of the track."""
    if not entry.track:
        known = ", ".join(TRACKS)
        yield BAD if entry.ours else UNKNOWN, f"track {entry.get('track')!r}: choose from {known}"
        return
    parent = entry.folder.resolve().parent.name
    if parent.startswith("track_") and parent != entry.track_name:
        yield BAD, f"track {entry.get('track')} is in the folder {parent}"
    if not entry.get("track"):
        yield UNKNOWN, f"submission.json names no track, the folder is in {parent}"
    for log in entry.logs:
        yield from hardware_of(entry, log)
    yield OK, entry.track_name


def hardware_of(entry: Entry, log: TrainLog) -> Found:
    """Whether a log ran on the hardware of the track."""
    wanted = entry.track_or_any
    hardware = log.last("hardware")
    processes = hardware.get("world") if log.ours else log.settings.get("world_size")
    if wanted.processes and processes is None:
        yield UNKNOWN, f"{log.who}: the log does not say on how many GPUs it ran"
    elif wanted.processes and processes != str(wanted.processes):
        level = BAD if entry.is_settled else UNKNOWN
        yield level, f"{log.who}: {processes} processes, the track has {wanted.processes}"
    if log.ours:
        device, name = hardware.get("device"), hardware.get("name", "?")
        if wanted.device and device != wanted.device:
            yield BAD, f"{log.who}: ran on {device}, the track is for {wanted.device}"
        if wanted.gpu and wanted.gpu not in name:
            yield BAD, f"{log.who}: ran on {name}, the track is for {wanted.gpu}"
    elif wanted.gpu and wanted.gpu not in str(entry.get("hardware") or entry.get("gpu") or ""):
        yield UNKNOWN, f"neither log nor submission.json says that it ran on {wanted.gpu}"


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


@rule
def script(entry: Entry) -> Found:
    """The script compiles, or unzips and decompresses to something that does."""
    if not entry.script:
        yield BAD, "there is no script"
        return
    content = entry.script.read_bytes()
    try:
        if content[:2] == b"PK":
            modules = unpack_modules(content)
            for text in modules.values():
                parse_source(text)
            yield OK, f"unzips to {len(modules)} modules that compile"
        else:
            _, is_wrapped = unwrap(content)
            yield OK, f"{entry.script.name} compiles{', unwrapped' if is_wrapped else ''}"
    except ScriptError as error:
        yield BAD, f"{entry.script.name}: {error}"
    except Unreadable as error:
        if is_earlier(entry):
            yield OK, f"{entry.script.name} is one that an earlier version of tools.pack made"
        else:
            yield UNKNOWN, f"{entry.script.name}: {error}"


def read_human(entry: Entry) -> str:
    path = entry.folder / "train_gpt_human.py"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def is_earlier(entry: Entry) -> bool:
    """Whether script and readable source are a pair that an earlier packer of this repository made."""
    human = entry.folder / "train_gpt_human.py"
    if not entry.script or not human.is_file():
        return False
    return EARLIER_SCRIPTS.get(hash_file(entry.script)) == hash_file(human)


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@rule
def code(entry: Entry) -> Found:
    """All code is in the script, and it is the code that the logs ran."""
    if not entry.script:
        return
    if not entry.ours:
        yield from code_of_others(entry, entry.script)
        return
    human = read_human(entry)
    sources = split_sources(human)
    if not sources:
        yield BAD, "train_gpt_human.py does not hold the files that train_gpt.py was packed from"
        return
    known = {hash_sources(sources)}
    if is_earlier(entry):
        yield OK, "packed from train_gpt_human.py by an earlier version of tools.pack; it is what the logs ran"
    else:
        try:
            known.add(hash_sources(unpack_modules(entry.script.read_bytes())))
        except ScriptError as error:
            yield BAD, f"train_gpt.py was not packed from train_gpt_human.py: {error}"
        except Unreadable as error:
            yield UNKNOWN, f"train_gpt.py: {error}"
        yield from packed_from(entry, human)
    for log in entry.logs:
        if log.last("run").get("code_sha256") not in known:
            yield BAD, f"{log.who} ran other code than train_gpt_human.py holds (code_sha256 in its log)"


def packed_from(entry: Entry, human: str) -> Found:
    """Whether tools.pack makes the script from the readable source."""
    try:
        is_equal = entry.script is not None and pack_sources(human, entry.recipe) == entry.script.read_bytes()
    except PackError as error:
        yield UNKNOWN, f"train_gpt_human.py cannot be packed: {error}"
        return
    except SyntaxError as error:
        yield BAD, f"train_gpt_human.py cannot be packed: {error}"
        return
    if is_equal:
        yield OK, "packed from train_gpt_human.py, which is what the logs ran"
    elif split_sources(human) == repository_sources(entry) and python_of(entry) == sys.version_info[:2]:
        yield BAD, "tools.pack makes another script from train_gpt_human.py"
    else:
        # another minor version of Python writes the same program in other words
        why = "the version of tools.pack or of Python is another one"
        yield UNKNOWN, f"tools.pack makes another script from train_gpt_human.py, or {why}"


def repository_sources(entry: Entry) -> dict[str, str]:
    """What this repository would pack for the run of the first log; nothing if it has no such run."""
    try:
        return counted_sources(config_of(entry.logs[0]))
    except (IndexError, KeyError, ConfigError):
        return {}


def python_of(entry: Entry) -> tuple[int, ...]:
    """Major and minor version of the Python that the logs ran in."""
    words = entry.logs[0].last("versions").get("python", "").split(".")[:2]
    return tuple(int(word) for word in words if word.isdigit())


def code_of_others(entry: Entry, script: Path) -> Found:
    try:
        tree, _ = unwrap(script.read_bytes())
    except (ScriptError, Unreadable):
        yield UNKNOWN, "the script cannot be read without running it"
        return
    helpers = helper_files(script, tree)
    if helpers:
        yield UNKNOWN, f"the script also uses {', '.join(path.name for path in helpers)}, which is code as well"
    size = entry.code_bytes
    for log in entry.logs:
        if log.code_bytes and log.code_bytes != size:
            yield UNKNOWN, f"the script has {size:,} bytes, that of {log.who} had {log.code_bytes:,}"
    yield OK, f"{size:,} bytes, as in the logs"


@rule
def runs(entry: Entry) -> Found:
    """The script starts: --dry_run ends well. Only what this repository packed itself is ever executed."""
    if not entry.ours or not entry.script:
        yield UNKNOWN, "somebody else's script is not executed"
        return
    if not is_from_here(entry, entry.script):
        yield UNKNOWN, "not executed: train_gpt.py is not what tools.pack makes of this repository"
        return
    log = entry.logs[0]
    try:
        options = options_of(log)
    except KeyError:
        yield BAD, f"{log.who}: its log has no settings"
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(entry.script.resolve()), *options, "--device=cpu", "--dry_run"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    params = log.last("model").get("params")
    if done.returncode:
        yield BAD, f"--dry_run ends with {done.returncode}: {done.stderr.strip()[-200:]}"
    elif f"params:{params}\n" not in done.stdout:
        yield BAD, f"--dry_run counts other parameters than the log of {log.who}"
    else:
        yield OK, f"--dry_run counts {params} parameters, as the log does"


def is_from_here(entry: Entry, script: Path) -> bool:
    """Whether the script is byte by byte what this repository packs, or did for one of its records."""
    if is_earlier(entry):
        return True
    sources = repository_sources(entry)
    try:
        return bool(sources) and script.read_bytes() == pack_sources(join_sources(sources), entry.recipe)
    except PackError:
        return False


def count_code_bytes(entry: Entry) -> int:
    """Bytes of the script in the folder, and of the helpers that somebody else's script uses."""
    if not entry.script:
        return 0
    helpers: list[Path] = []
    if not entry.ours:
        try:
            tree, _ = unwrap(entry.script.read_bytes())
            helpers = helper_files(entry.script, tree)
        except (ScriptError, Unreadable):
            pass
    return sum(path.stat().st_size for path in [entry.script, *helpers])
