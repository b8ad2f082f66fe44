"""Predictions from memory: what came after similar states earlier in the window (a neural cache: Grave, Joulin and
Usunier 2016, arXiv:1612.04426).

    recall = Recall(share, sharpness)                      of a batch of windows
    recall.add(inputs, states)                             (rows, T), (rows, T, D): their next positions
    log_probs = recall.mix(log_probs, owners, places)      (n, V): of positions `places` in the windows `owners`

A small model hardly learns to repeat what stands above. Here the state of a position is compared with those before it
in its window, whose next tokens are known by then: each of these tokens gets a weight that grows with the similarity,
and `share` of the prediction goes by these weights. Both numbers are settings, fixed before a text is seen. A
distribution still depends on earlier tokens only and sums to 1, and nothing of it lies in the file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Recall:
    def __init__(self, share: float, sharpness: float):
        self.share = share
        self.sharpness = sharpness
        self.inputs: Tensor | None = None  # (rows, L)
        self.directions: Tensor | None = None  # (rows, L, D): states of length 1

    @torch.no_grad()
    def add(self, inputs: Tensor, states: Tensor) -> None:
        directions = F.normalize(states.float(), dim=-1)
        if self.inputs is not None and self.directions is not None:
            inputs = torch.cat((self.inputs, inputs), 1)
            directions = torch.cat((self.directions, directions), 1)
        self.inputs, self.directions = inputs, directions

    def mix(self, log_probs: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        """The first position of a window has nothing to recall and keeps its prediction."""
        mixed = log_probs.clone()
        for row in owners.unique().tolist():
            chosen = (owners == row) & (places > 0)
            recalled = self.recall(row, places[chosen], log_probs.shape[1]).clamp_min(1e-30).log()
            own = math.log1p(-self.share) + log_probs[chosen]
            mixed[chosen] = torch.logaddexp(own, math.log(self.share) + recalled.to(log_probs.dtype))
        return mixed

    def recall(self, row: int, places: Tensor, vocab_size: int) -> Tensor:
        """(n, V): what followed earlier states of a window, by their similarity to those at `places`."""
        assert self.inputs is not None and self.directions is not None
        known, directions = self.inputs[row, 1:], self.directions[row]
        similar = self.sharpness * directions[places] @ directions[:-1].T
        is_later = torch.arange(len(known), device=known.device) >= places[:, None]
        weights = similar.masked_fill(is_later, -math.inf).softmax(-1)
        shares = weights.new_zeros(len(places), vocab_size)
        return shares.scatter_add_(1, known.expand(len(places), -1), weights)
