"""The layers that a model is made of, each declaring its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopgolf.params import DeclaringModule, Start, matrix, start_at, table, vector

Adapter = tuple[Tensor, Tensor]  # (B, fan_in, R) and (B, R, fan_out): for each row of the batch its own


class Linear(DeclaringModule):
    """A matrix without bias. `parts` counts the rows of each projection that it fuses."""

    weight: nn.Parameter

    def __init__(self, fan_in: int, parts: tuple[int, ...], dtype: torch.dtype, grid: str, start: Start):
        super().__init__()
        self.parts = parts
        self.declare("weight", (sum(parts), fan_in), matrix(grid, parts, start), dtype=dtype)

    def forward(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        y = F.linear(x, self.weight)
        if adapter is None:
            return y
        down, up = adapter
        return y + x @ down.to(x.dtype) @ up.to(x.dtype)


class Table(DeclaringModule):
    """A row for each id."""

    weight: nn.Parameter

    def __init__(self, rows: int, width: int, dtype: torch.dtype, grid: str, start: Start):
        super().__init__()
        self.declare("weight", (rows, width), table(grid, start), dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps=1e-6)


class Norms(DeclaringModule):
    """Root mean square norms over the last axis, by name, each with a learned weight per channel or all without."""

    def __init__(self, names: Sequence[str], width: int, has_weights: bool):
        super().__init__()
        for name in names:
            self.declare(name, (width,), vector(start_at(1.0)), when=has_weights)

    def forward(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, getattr(self, name))
