"""Depth that each token chooses for itself: something that looks on at every pass of a forward.

    early = EarlyExit(0.1)
    states = model.hidden(tokens, Depth(16), on_pass=early)
    early.mean_depth        over all positions; of each one: early.depths

It only measures: positions that have left keep their state, and the others attend to it, but nothing is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopgolf.plan import Pass


class EarlyExit:
    """A position leaves the *r group of the plan once a repetition changes its state s by less than tau, relative to
    the norm of s. The first repetition has nothing to compare with, so at least two are run."""

    def __init__(self, tau: float):
        self.tau = tau
        self.state: Tensor | None = None
        self.depths = torch.zeros(0)  # repetitions of each position in the latest forward
        self.repetitions = 0
        self.positions = 0

    def __call__(self, p: Pass, x: Tensor) -> Tensor:
        if p.repetitions_left is None or not p.ends:
            return x
        if self.state is None:
            self.is_open = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            self.depths = torch.zeros_like(self.is_open, dtype=torch.long)
        else:
            x = torch.where(self.is_open[..., None], x, self.state)
        self.depths += self.is_open
        if self.state is not None:
            change = (x - self.state).float().norm(dim=-1) / x.float().norm(dim=-1)
            self.is_open &= change >= self.tau
        self.state = x if p.repetitions_left else None
        if not p.repetitions_left:
            self.repetitions += int(self.depths.sum())
            self.positions += x[..., 0].numel()
        return x

    @property
    def mean_depth(self) -> float:
        """Repetitions per position, over all forwards so far."""
        return float(self.repetitions) / max(self.positions, 1)
