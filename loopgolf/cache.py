"""What a stream of tokens carries from one forward to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from loopgolf.plan import Depth, Plan

KeysValues = tuple[Tensor, Tensor]  # (B, L, heads, K) both


class Kept(NamedTuple):
    """What a pass leaves for the positions after it."""

    keys_values: KeysValues
    read: Tensor | None  # (B, n, D): what it read at the last n positions, if later ones look at that


class Cache:
    """Tokens of the last window + 1 positions (smear and bigram look back on two), keys and values of the last window.
    Repetitions of the *r group up to `repetitions` have their own keys and values; deeper ones share those of the
    last, so that 1 keeps those of the final repetition only."""

    def __init__(self, window: int, repetitions: int = 256):
        self.window = window
        self.repetitions = repetitions
        self.tokens: Tensor | None = None
        self.kept: dict[int, Kept] = {}

    @property
    def length(self) -> int:
        return self.kept[0].keys_values[0].shape[1] if self.kept else 0

    def slots(self, plan: Plan, depth: Depth) -> list[int]:
        """Where each pass finds its keys and values. Of several passes with one slot the last one writes it."""
        return [p.slot for p in plan.passes(depth, self.repetitions)]

    def keep(self, slot: int, kept: Kept) -> None:
        keys, values = kept.keys_values
        start = max(0, keys.shape[1] - self.window)
        self.kept[slot] = kept._replace(keys_values=(keys[:, start:], values[:, start:]))
