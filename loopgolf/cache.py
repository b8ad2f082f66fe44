"""What a stream of tokens carries from one forward to the next."""

from __future__ import annotations

from torch import Tensor

from loopgolf.plan import Depth, Plan

KeysValues = tuple[Tensor, Tensor]  # (B, L, heads, K) both


class Cache:
    """Tokens of the last window + 1 positions (smear and bigram look back on two), keys and values of the last window.
    Repetitions of the *r group up to `repetitions` have their own keys and values; deeper ones share those of the
    last, so that 1 keeps those of the final repetition only."""

    def __init__(self, window: int, repetitions: int = 256):
        self.window = window
        self.repetitions = repetitions
        self.tokens: Tensor | None = None
        self.kept: dict[int, KeysValues] = {}

    @property
    def length(self) -> int:
        return self.kept[0][0].shape[1] if self.kept else 0

    def slots(self, plan: Plan, depth: Depth) -> list[int]:
        """Where each pass finds its keys and values. Of several passes with one slot the last one writes it."""
        return [p.slot for p in plan.passes(depth, self.repetitions)]

    def keep(self, slot: int, pair: KeysValues) -> None:
        keys, values = pair
        start = max(0, keys.shape[1] - self.window)
        self.kept[slot] = (keys[:, start:], values[:, start:])
