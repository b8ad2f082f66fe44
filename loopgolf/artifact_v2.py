"""Reads what version 2 of the artifact wrote.

A file of version 2 stores every setting and a table of its tensors. The same parameters had other names, and the norms
and the gates of a block were rows of one tensor.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from loopgolf.artifact import STREAMS, Describe, Layout, Stream, read_header, read_streams, require
from loopgolf.errors import ArtifactError
from loopgolf.quantize import RowGrid, StoredTensor

STACKED = {  # rows of one tensor of a block, in their order, as far as the block has them
    "norms": ("norms.attention", "norms.mlp", "norms.attention_out", "norms.mlp_out", "norms.moe"),
    "gates": ("moe.mlp_gate", "moe.moe_gate"),
}
OldTable = dict[str, tuple[tuple[int, ...], int]]  # shape and bits of every stored tensor, in the order of the file


def read_v2(
    header: bytes, payload: bytes, describe: Describe
) -> tuple[dict[str, Any], dict[str, Any], Layout, list[Stream], dict[str, Tensor]]:
    """What read_header, describe and read_streams give for a file of today."""
    stored, tokenizer, streams = read_header(header)
    old_table = read_table(header)
    layout = with_bits_of(old_table, describe(stored))
    old_tensors = translate(layout)
    is_ours = {name: shape for name, (shape, _) in old_table.items()} == {n: t.shape for n, t in old_tensors.items()}
    require(is_ours, "its table of tensors does not fit its config")
    tables = [[(name, old_tensors[name]) for name in old_table if old_tensors[name].dtype == d] for d in STREAMS]
    old_raw = read_streams(payload, streams, tables)
    return stored, tokenizer, layout, streams, rename(old_raw, layout)


def read_table(header: bytes) -> OldTable:
    try:
        entries = json.loads(header)["tensors"]
        table = {entry["name"]: (tuple(entry["shape"]), entry["bits"]) for entry in entries}
        are_numbers = all(type(n) is int and n >= 0 for shape, bits in table.values() for n in (*shape, bits))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"its header cannot be read ({error.__class__.__name__})") from None
    require(are_numbers and len(table) == len(entries), "its header holds values of another kind")
    return table


def old_name(name: str) -> tuple[str, str]:
    """The name of a parameter in version 2, and which row of it this is (empty: all of it)."""
    if name.startswith("passes."):
        return name.removeprefix("passes."), ""
    if not name.startswith("blocks."):
        return name, ""
    _, letter, own = name.split(".", 2)
    for stack, rows in STACKED.items():
        if own in rows:
            return f"blocks.{letter}.{stack}", own
    return f"blocks.{letter}.{own.removeprefix('attention.').removeprefix('mlp.')}", ""


def with_bits_of(old_table: OldTable, layout: Layout) -> Layout:
    """Settings of version 2 tell no bits; its table does."""
    found = {}
    for name, described in layout.items():
        if isinstance(described.format, RowGrid):
            _, bits = old_table.get(old_name(name)[0], ((), 0))
            require(2 <= bits <= 8, f"tensor {name} has {bits} bits, 2 to 8 are possible")
            described = described._replace(format=RowGrid(bits))
        found[name] = described
    return found


def translate(layout: Layout) -> dict[str, StoredTensor]:
    """The stored tensors under their old names, rows of one tensor put together."""
    old: dict[str, StoredTensor] = {}
    for name, described in layout.items():
        owner, row = old_name(name)
        for tensor in described.format.layout(described.shape):
            stacked = f"{owner}{tensor.suffix}"
            if not row:
                old[stacked] = tensor
            else:
                rows = old[stacked].shape[0] if stacked in old else 0
                is_norm = owner.endswith("norms")  # a row of the width; a gate is one number
                shape = (rows + 1, *tensor.shape) if is_norm else (rows + 1,)
                old[stacked] = tensor._replace(shape=shape)
    return old


def rename(old_raw: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The stored tensors under the names of today, rows taken apart."""
    raw = {}
    next_row: dict[str, int] = {}
    for name, described in layout.items():
        owner, row = old_name(name)
        for tensor in described.format.layout(described.shape):
            old = old_raw[f"{owner}{tensor.suffix}"]
            if row:
                index = next_row.get(owner, 0)
                next_row[owner] = index + 1
                old = old[index]
            raw[f"{name}{tensor.suffix}"] = old.reshape(tensor.shape)
    return raw
