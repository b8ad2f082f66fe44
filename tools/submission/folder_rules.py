"""Rules about the files of a submission folder, its submission.json as a form, and its script."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tempfile

from loopgolf.errors import ConfigError
from tools.pack import PackError
from tools.submission import entry as layout
from tools.submission.entry import PER_SEED, Entry
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
    unpack_zip,
    unwrap,
)
from tools.submission.verdicts import BAD, OK, UNKNOWN, Found, Rule, has_kind, register

RULES: dict[str, Rule] = {}
rule = register(RULES)
KINDS = {"author": str, "github_id": str, "name": str, "blurb": str, "date": str, "track": str, "val_loss": float,
         "val_bpb": float, "val_loss_std": float, "val_bpb_std": float, "seeds": list | dict, "seed_results": dict,
         "bytes_total": int, "bytes_code": int, "hardware": str, "pytorch_version": str}  # fmt: skip
NEEDED = ("author", "github_id", "name", "date", "val_bpb")


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


@rule
def files(entry: Entry) -> Found:
    """Every required file is there under its name."""
    wanted = ["README.md", "submission.json", "train_gpt.py"]
    if entry.ours:
        wanted += ["requirements.txt", "train_gpt_human.py"]
    if entry.ours and entry.track and entry.track.ships_artifacts:
        wanted += ["tokenizer.model", *(f"artifact_seed{log.seed}.lg" for log in entry.logs)]
    missing = [name for name in wanted if not (entry.folder / name).is_file()]
    for name in missing:
        stand_in = entry.script if name == "train_gpt.py" else next(entry.folder.glob("submission*.json"), None)
        has = f" ({stand_in.name} is)" if stand_in and name in ("train_gpt.py", "submission.json") else ""
        yield BAD, f"{name} is not there{has}"
    if not entry.logs:
        yield BAD, "no training log is there"
    for name in wanted:
        path = entry.folder / name
        if path.is_file() and not path.stat().st_size:
            yield BAD, f"{name} is empty"
    yield OK, f"{len(wanted)} files and {len(entry.logs)} logs"


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
            open_field = value is None and name not in NEEDED and not entry.ours
            kind = getattr(KINDS[name], "__name__", "list or object").replace("float", "number")
            yield UNKNOWN if open_field else BAD, f"{name} is {type(value).__name__}, not {kind}"
    for name in ("author", "github_id", "name", *(("blurb",) if entry.ours else ())):
        if entry.get(name) == "":
            yield BAD, f"{name} is empty"
    if entry.ours:
        if not all(type(seed) is int for seed in entry.get("seeds") or []):
            yield BAD, "seeds are not all whole numbers"
        for seed, values in layout.claims(entry.data).items():
            for name in PER_SEED:
                kind = int if name in ("artifact_bytes", "steps") else float
                if not has_kind(values.get(name), kind):
                    yield BAD, f"seed_results {seed}: {name} is {type(values.get(name)).__name__}"
        for name in entry.data.keys() - KINDS.keys():
            yield UNKNOWN, f"{name} is a field that this check does not know"
    yield OK, f"{len(entry.data)} fields"


@rule
def date(entry: Entry) -> Found:
    """The date is one, and that of the folder's name."""
    text = entry.get("date")
    if not isinstance(text, str):
        yield BAD, "there is no date"
        return
    try:
        found = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).date()
    except ValueError:
        yield BAD, f"date {text!r} is not YYYY-MM-DD"
        return
    named = re.match(r"\d{4}-\d{2}-\d{2}", entry.folder.resolve().name)
    if named and named[0] != found.isoformat():
        yield BAD if entry.ours else UNKNOWN, f"date is {found}, the folder's name says {named[0]}"
    yield OK, str(found)


@rule
def track(entry: Entry) -> Found:
    """The track is one of those that exist, and the hardware in the logs is that of the track."""
    if not entry.track:
        yield BAD if entry.ours else UNKNOWN, f"track {entry.get('track')!r}: choose from {', '.join(layout.TRACKS)}"
        return
    around = entry.folder.resolve().parent.name
    if around.startswith("track_") and around != entry.track_name:
        yield BAD, f"track {entry.get('track')} lies in {around}"
    if not entry.get("track"):
        yield UNKNOWN, f"submission.json names no track, the folder lies in {around}"
    wanted = entry.track
    for log in entry.logs:
        seen = log.last("hardware") if log.ours else log.settings
        world, device, name = seen.get("world" if log.ours else "world_size"), seen.get("device"), seen.get("name")
        if wanted.world and world is not None and int(world) != wanted.world:
            yield BAD if entry.is_settled else UNKNOWN, f"{log.who}: {world} processes, the track has {wanted.world}"
        elif wanted.world and world is None:
            yield UNKNOWN, f"{log.who}: the log does not say on how many GPUs"
        if log.ours and wanted.device and device != wanted.device:
            yield BAD, f"{log.who}: ran on {device}, the track is for {wanted.device}"
        if log.ours and wanted.gpu and wanted.gpu not in (name or ""):
            yield BAD, f"{log.who}: ran on {name}, the track is for {wanted.gpu}"
        if not log.ours and wanted.gpu and wanted.gpu not in str(entry.get("hardware") or entry.get("gpu") or ""):
            yield UNKNOWN, f"neither log nor submission.json says that it ran on {wanted.gpu}s"
    yield OK, entry.track_name


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
            parse_source(unpack_zip(content))
            yield OK, "unzips to a module that compiles"
        else:
            _, wrapped = unwrap(content)
            yield OK, f"{entry.script.name} compiles{', unwrapped' if wrapped else ''}"
    except ScriptError as error:
        yield BAD, f"{entry.script.name}: {error}"
    except Unreadable as error:
        yield UNKNOWN, f"{entry.script.name}: {error}"


@rule
def code(entry: Entry) -> Found:
    """All code is in the script, and it is the code that the logs ran."""
    if not entry.script:
        return
    if not entry.ours:
        yield from code_of_strangers(entry)
        return
    human = entry.folder / "train_gpt_human.py"
    text = human.read_text(encoding="utf-8") if human.is_file() else ""
    sources = split_sources(text)
    if not sources:
        yield BAD, "train_gpt_human.py does not hold the files that train_gpt.py was packed from"
        return
    known = {hash_sources(sources)}
    try:
        known.add(hash_sources({"train_gpt.py": unpack_zip(entry.script.read_bytes())}))
    except ScriptError as error:
        yield BAD, f"train_gpt.py was not packed from train_gpt_human.py: {error}"
    except Unreadable as error:
        yield UNKNOWN, f"train_gpt.py: {error}"
    for log in entry.logs:
        if log.last("run").get("code_sha256") not in known:
            yield BAD, f"{log.who} ran other code than train_gpt_human.py holds (code_sha256 in its log)"
    try:
        if pack_sources(text) != entry.script.read_bytes():
            # another minor version of Python writes the same program in other words
            python = entry.logs[0].last("versions").get("python", "").rpartition(".")[0]
            ours = counted_sources(entry.logs[0].moe_experts)
            can_tell = sources == ours and python == "{}.{}".format(*sys.version_info)
            why = "" if can_tell else ", or does so in this version of it or of Python"
            yield BAD if can_tell else UNKNOWN, f"tools.pack makes another script from train_gpt_human.py{why}"
    except (PackError, SyntaxError) as error:
        yield UNKNOWN if isinstance(error, PackError) else BAD, f"train_gpt_human.py cannot be packed: {error}"
    yield OK, "packed from train_gpt_human.py, which is what the logs ran"


def code_of_strangers(entry: Entry) -> Found:
    try:
        tree, _ = unwrap(entry.script.read_bytes())
    except (ScriptError, Unreadable):
        yield UNKNOWN, "the script cannot be looked into"
        return
    if helpers := helper_files(entry.script, tree):
        yield UNKNOWN, f"the script also uses {', '.join(path.name for path in helpers)}, which is code as well"
    size = entry.script.stat().st_size
    for log in entry.logs:
        if log.code_bytes and log.code_bytes != size:
            yield UNKNOWN, f"the script has {size:,} bytes, that of {log.who} had {log.code_bytes:,}"
    yield OK, f"{size:,} bytes, as in the logs"


@rule
def runs(entry: Entry) -> Found:
    """The script starts: --dry_run ends well. Only for what is byte by byte the code of this repository."""
    if not entry.ours:
        yield UNKNOWN, "a stranger's script is not executed"
        return
    human = join_sources(counted_sources(entry.logs[0].moe_experts))
    try:
        if entry.script.read_bytes() != pack_sources(human):
            yield UNKNOWN, "not executed: train_gpt.py is not what tools.pack makes of this repository"
            return
    except (PackError, OSError, AttributeError) as error:
        yield UNKNOWN, f"not executed: {error}"
        return
    log = entry.logs[0]
    try:
        options = layout.options_of(log)
    except (KeyError, ConfigError) as error:
        yield BAD, f"{log.who}: its log has no config that runs ({error})"
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(entry.script.resolve()), *options, "--device=cpu", "--dry_run"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        yield BAD, f"--dry_run ends with {done.returncode}: {done.stderr.strip()[-200:]}"
    elif f"params:{log.last('model').get('params')}\n" not in done.stdout:
        yield BAD, f"--dry_run counts other parameters than the log of {log.who}"
    else:
        yield OK, f"--dry_run counts {log.last('model').get('params')} parameters, as the log does"


def code_size(entry: Entry) -> int:
    """Bytes of the script that is here, and of the helpers that a stranger's script uses."""
    if not entry.script:
        return 0
    helpers = []
    if not entry.ours:
        try:
            helpers = helper_files(entry.script, unwrap(entry.script.read_bytes())[0])
        except (ScriptError, Unreadable):
            pass
    return sum(path.stat().st_size for path in [entry.script, *helpers])
