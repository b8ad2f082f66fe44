"""Tens of thousands of damaged artifacts, half of them sealed again so that the parser behind the digest is reached:
each is an ArtifactError or loads within bounds. Never another exception, a hang, a large allocation or executed code.

`LOOPGOLF_FUZZ=20000 pytest tests/test_artifact_fuzz.py -s` runs the long version and prints its figures.
"""

import copy
import json
import os
import random
import resource
from collections import Counter

import pytest
from helpers import pack_weights, tiny_config, tiny_model
from test_artifact import TOKENIZER, seal, split

from loopgolf.artifact import unpack_artifact
from loopgolf.errors import ArtifactError
from train_gpt import describe_stored

MUTATIONS = int(os.environ.get("LOOPGOLF_FUZZ", "2000"))
ODD_VALUES = (
    None, True, -1, 0, 1, 3, 255, 65536, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "abc" * 50, [], {}, [1], "zstd",
    "rans", "(a)*256", "((((a)*9)*9)*9)*9", "blocks.a.mlp.up.weight", "..", "__import__('os')",
)  # fmt: skip


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    """A zstd stream of codes, and one of the coder of this project."""
    made = []
    for changes in (dict(model_dim=8, rope_dims=2), dict(model_dim=16, rope_dims=4, bigram_buckets=2048, bigram_dim=8)):
        config = tiny_config(plan="(ab)*2", num_heads=2, num_kv_heads=1, k_scale=0.8, **changes)
        model = tiny_model(config)
        made.append(pack_weights(config, model.state_dict(), TOKENIZER))
    return made


def places(value, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def damage_header(header: dict, draw: random.Random) -> dict:
    """One to three changes: a value replaced, nudged, removed or said twice."""
    header = copy.deepcopy(header)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(places(header)[1:])
        owner = header
        for key in path[:-1]:
            owner = owner[key]
        kind, old = draw.random(), owner[path[-1]]
        if kind < 0.4:
            owner[path[-1]] = draw.choice(ODD_VALUES)
        elif kind < 0.7 and isinstance(old, int | float):
            owner[path[-1]] = old + draw.choice((-1, 1, 0.5, old, 2**20))
        elif kind < 0.85 and isinstance(owner, list):
            owner.insert(path[-1], copy.deepcopy(old))
        else:
            del owner[path[-1]]
        if not isinstance(header, dict) or len(places(header)) < 2:
            break
    return header


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    raw, kind = bytearray(content), draw.random()
    if kind < 0.5:
        for _ in range(draw.choice((1, 1, 2, 8))):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind < 0.65:
        del raw[draw.randrange(len(raw)) :]
    elif kind < 0.75:
        raw += draw.randbytes(draw.randrange(1, 50))
    elif kind < 0.85:
        raw[8:16] = draw.randbytes(8)
    else:
        start = draw.randrange(len(raw))
        raw[start : start + draw.randrange(1, 40)] = draw.randbytes(draw.randrange(40))
    return bytes(raw)


def damage_streams(header: dict, streams: list[bytes], draw: random.Random) -> tuple[dict, list[bytes]]:
    header, streams = copy.deepcopy(header), list(streams)
    which = draw.randrange(len(streams))
    streams[which] = damage_bytes(streams[which], draw)
    header["streams"][which]["bytes"] = len(streams[which])
    return header, streams


@pytest.mark.slow
def test_damage_is_an_error_or_loads_within_bounds(contents):
    draw, counts = random.Random(20), Counter()
    parts = [split(content) for content in contents]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        which = int(number % 200 < 2)  # our own coder takes longer, so fewer go to it
        header, streams = parts[which]
        if number % 2:
            damaged = damage_bytes(contents[which], draw)
        elif draw.random() < 0.7:
            damaged = seal(damage_header(header, draw), streams)
        else:
            damaged = seal(*damage_streams(header, streams, draw))
        try:
            artifact = unpack_artifact(damaged, describe_stored)
        except ArtifactError as error:
            assert "\n" not in str(error)
            counts["refused, sealed" if number % 2 == 0 else "refused"] += 1
        else:
            assert sum(t.numel() for t in artifact.tensors.values()) < 100_000
            counts["loaded"] += 1
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\nfuzz mutations:{MUTATIONS} {json.dumps(counts)} memory_grown_mb:{grown_mb:.0f}")
    assert sum(counts.values()) == MUTATIONS and grown_mb < 500
    assert counts["refused, sealed"] > MUTATIONS // 4 and counts["loaded"] < MUTATIONS // 4
