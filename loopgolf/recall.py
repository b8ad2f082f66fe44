"""Predictions from memory: what came after similar states earlier in the document (a neural cache: Grave, Joulin and
Usunier 2016, arXiv:1612.04426).

    recall = Recall(share, sharpness, bos_id)              of a batch of windows
    recall.add(inputs, states)                             (rows, T), (rows, T, D): their next positions
    log_probs = recall.mix(log_probs, owners, places)      (n, V): of positions `places` in the windows `owners`

A small model hardly learns to repeat what stands above. Here the state of a position is compared with those before it
in its document, as far as its window goes, whose next tokens are known by then: each of these tokens gets a weight that
grows with the similarity, and `share` of the prediction goes by these weights. Both numbers are settings, fixed before
a text is seen. A distribution still depends on earlier tokens only and sums to 1, and nothing of it lies in the file.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Recall:
    def __init__(self, share: float, sharpness: float, bos_id: int):
        self.share = share
        self.sharpness = sharpness
        self.bos_id = bos_id
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
        """The first position of a document has nothing to recall and keeps its prediction."""
        mixed = log_probs.clone()
        for row in owners.unique().tolist():
            of_row = owners == row
            shares, is_known = self.recall(row, places[of_row], log_probs.shape[1])
            recalled = math.log(self.share) + shares.clamp_min(1e-30).log().to(log_probs.dtype)
            own = math.log1p(-self.share) + log_probs[of_row]
            mixed[of_row] = torch.where(is_known[:, None], torch.logaddexp(own, recalled), log_probs[of_row])
        return mixed

    def recall(self, row: int, places: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """What followed earlier states, by their similarity to those at `places` (n, V), and where there were some."""
        assert self.inputs is not None and self.directions is not None
        inputs, directions = self.inputs[row], self.directions[row]
        document = (inputs == self.bos_id).cumsum(0)
        earlier = torch.arange(len(inputs), device=inputs.device) < places[:, None]
        seen = (earlier & (document == document[places][:, None]))[:, :-1]  # nothing is known to follow the last state
        similar = self.sharpness * directions[places] @ directions[:-1].T
        weights = similar.masked_fill(~seen, -math.inf).softmax(-1)
        is_known = seen.any(-1)
        weights = weights.where(is_known[:, None], 0.0)  # a softmax over nothing is not a number
        shares = weights.new_zeros(len(places), vocab_size)
        return shares.scatter_add_(1, inputs[1:].expand(len(places), -1), weights), is_known
