"""Which token can follow which: a tokenizer spells every text in one way only, and a model need not bet on the others.

    mask = CanonicalMask(tokenizer, bos_id, device)
    log_probs = mask(previous, log_probs)                (n,), (n, V): of the token after each previous one

What could never come next gets 2^-20 of the probability, shared evenly, so that a text that is spelled in another way
still has a code. The mask is a function of the tokenizer and the previous token: it costs no bytes of the artifact,
sees nothing of the future, and distributions still sum to 1. (Canonical token masking: modded-nanogpt #350; arXiv
2506.07956.)

BPE merges the best pair of neighbours until none is left, over a whole text. So `ab` is spelled a, b exactly if no
merge ever joins something that ends in `a` with something that begins `b`. On its way from characters to itself `a` has
one last node after another, each until a merge of some rank takes it, and `b` one first node after another. The pair is
impossible if two such nodes make a piece that ranks before the merges that would take them. (A piece is learned after
its parts, so the two are there when its rank comes.)

Example: `▁the` is a piece and better than any pair with `e` in it. So `▁th` is never followed by `e`, for the two would
have been merged.

Pieces that stand for bytes follow the rules of UTF-8, and marks of words theirs (words.py). All this holds for BPE
without pieces that a user defined: a unigram model chooses its pieces by other rules. `check_text` finds out before
anything is scored.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from loopgolf.errors import ConfigError
from loopgolf.words import ESCAPE, JOIN, SIGNS, TITLE, UPPER, has_marks

FLOOR = 2.0**-20  # what all impossible tokens have together
SPACE = "▁"
WORD_STARTS = [SPACE + letter for letter in ascii_lowercase]


class CanonicalMask:
    """Takes the probability of what could never come next, and gives it to the rest."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, bos_id: int, device: torch.device):
        if bos_id != tokenizer.bos_id():
            raise ConfigError(f"bos_id={bos_id}: the tokenizer's is {tokenizer.bos_id()}; canonical=1 needs that one")
        self.allowed = torch.from_numpy(find_allowed_pairs(tokenizer, bos_id)).to(device)

    def __call__(self, previous: Tensor, log_probs: Tensor) -> Tensor:
        return mask_log_probs(log_probs, self.allowed[previous.to(self.allowed.device)])

    def check_text(self, tokens: Tensor) -> None:
        """That the tokenizer could have written this text: else it is not BPE, or has pieces that a user defined."""
        tokens = tokens.long().to(self.allowed.device)
        n_wrong = int((~self.allowed[tokens[:-1], tokens[1:]]).sum())
        if n_wrong:
            what = f"{n_wrong} of {len(tokens) - 1} pairs of the text are none that its tokenizer should write"
            raise ConfigError(
                f"canonical=1: {what}; leave it out, or make the tokens with BPE and no pieces of your own"
            )


def mask_log_probs(log_probs: Tensor, allowed: Tensor) -> Tensor:
    """log_probs (n, V) of distributions, allowed (n, V). Where nothing is forbidden, or everything, they stay."""
    n_forbidden = (~allowed).sum(-1, keepdim=True)
    share = (FLOOR / n_forbidden.clamp(min=1)).to(log_probs.dtype).log()
    kept = log_probs.masked_fill(~allowed, -math.inf)
    kept = kept - kept.logsumexp(-1, keepdim=True) + math.log1p(-FLOOR)
    masked = torch.where(allowed, kept, share)
    has_both = (n_forbidden > 0) & allowed.any(-1, keepdim=True)
    return torch.where(has_both, masked, log_probs)


def find_allowed_pairs(tokenizer: sentencepiece.SentencePieceProcessor, bos_id: int) -> np.ndarray:
    """Entry (a, b): whether `b` may stand after `a`. Documents start with BOS."""
    merges = Merges(tokenizer)
    size = tokenizer.vocab_size()
    allowed = np.ones((size, size), dtype=bool)
    forbid_merged_pairs(allowed, merges)
    is_piece = np.isin(np.arange(size), list(merges.ids.values()))
    is_byte = np.array([tokenizer.is_byte(i) for i in range(size)])
    never = ~is_piece & ~is_byte
    if not is_byte.any():
        never[tokenizer.unk_id()] = False  # stands for what has no piece
    never[merges.unreachable] = True
    never[bos_id] = False
    forbid_broken_characters(allowed, tokenizer, is_byte)
    if has_marks(tokenizer):
        forbid_misplaced_marks(allowed, tokenizer, is_byte)
    allowed[bos_id] &= can_begin_document(tokenizer, is_byte)
    allowed[:, never] = False
    allowed[bos_id, bos_id] = True  # an empty document
    return allowed


class State(NamedTuple):
    """A piece on its way from characters to itself, between two merges."""

    first: int  # the node at its left end
    last: int  # and at its right end
    next_rank: float  # of the merge that comes next within the piece


class Merges:
    """What the tokenizer merges, best first, and how it comes to each piece."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.ids: dict[str, int] = {}
        for i in range(tokenizer.vocab_size()):
            is_other = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
            if not is_other and not tokenizer.is_byte(i):
                self.ids[tokenizer.id_to_piece(i)] = i
        self.ranks = {piece: -tokenizer.get_score(i) for piece, i in self.ids.items()}
        self.states: dict[int, list[State]] = {}
        self.unreachable: list[int] = []
        for piece, i in self.ids.items():
            states = self.replay(piece)
            if states:
                self.states[i] = states
            else:
                self.unreachable.append(i)

    def replay(self, piece: str) -> list[State]:
        """The states of a piece from its characters to itself; none if it is spelled with other pieces."""
        nodes = list(piece)
        if any(node not in self.ids for node in nodes):
            return []
        steps = [(nodes[0], nodes[-1])]
        ranks: list[float] = []
        while len(nodes) > 1:
            joined = [left + right for left, right in itertools.pairwise(nodes)]
            best = min(range(len(joined)), key=lambda at: self.ranks.get(joined[at], math.inf))
            if joined[best] not in self.ids:
                return []
            nodes[best : best + 2] = [joined[best]]
            ranks.append(self.ranks[joined[best]])
            steps.append((nodes[0], nodes[-1]))
        return [
            State(self.ids[first], self.ids[last], next_rank)
            for (first, last), next_rank in zip(steps, [*ranks, math.inf])
        ]


def forbid_merged_pairs(allowed: np.ndarray, merges: Merges) -> None:
    lasts: dict[int, dict[int, float]] = defaultdict(dict)  # by node, then piece: the worst rank that finds it there
    firsts: dict[int, dict[int, float]] = defaultdict(dict)
    for piece, states in merges.states.items():
        for state in states:
            lasts[state.last][piece] = max(state.next_rank, lasts[state.last].get(piece, -math.inf))
            firsts[state.first][piece] = max(state.next_rank, firsts[state.first].get(piece, -math.inf))
    for joined, rank in merges.ranks.items():
        for at in range(1, len(joined)):
            left_node, right_node = merges.ids.get(joined[:at]), merges.ids.get(joined[at:])
            if left_node in lasts and right_node in firsts:
                # of two merges of one rank the left comes first
                left = [piece for piece, until in lasts[left_node].items() if until > rank]
                right = [piece for piece, until in firsts[right_node].items() if until >= rank]
                allowed[np.ix_(left, right)] = False


def forbid_broken_characters(
    allowed: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor, is_byte: np.ndarray
) -> None:
    """A first byte of a character is followed by another byte of it, and such a byte follows nothing else."""
    size = len(is_byte)
    value = np.full(size, -1)
    for i in np.flatnonzero(is_byte):
        value[i] = int(tokenizer.id_to_piece(int(i))[3:5], 16)
    is_first = value >= 0xC0
    is_later = (value >= 0x80) & (value < 0xC0)
    allowed[np.ix_(is_first, ~is_later)] = False
    allowed[np.ix_(~is_first & ~is_later, is_later)] = False
    # no character begins with these, and ASCII that has a piece is never spelled as a byte
    has_piece = [0 <= v < 0x80 and tokenizer.piece_to_id(chr(v)) != tokenizer.unk_id() for v in value]
    allowed[:, np.isin(value, [0xC0, 0xC1, *range(0xF5, 0x100)]) | np.array(has_piece)] = False


def forbid_misplaced_marks(
    allowed: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor, is_byte: np.ndarray
) -> None:
    """What mark_words never writes: capitals, marks in another order, and a small letter right behind what is neither
    letter nor digit."""
    size = len(is_byte)
    is_special = np.array([tokenizer.is_control(i) or tokenizer.is_unknown(i) for i in range(size)])
    texts = ["" if is_special[i] else tokenizer.id_to_piece(i) for i in range(size)]
    for i in np.flatnonzero(is_byte):
        texts[i] = chr(int(texts[i][3:5], 16))
    first = np.array([text[:1] for text in texts])
    last = np.array([text[-1:] for text in texts])
    is_letter = np.isin(first, list(ascii_lowercase))
    begins_word = np.array([text == SPACE or text[:2] in WORD_STARTS for text in texts])
    is_alnum = np.array([char.isalnum() for char in last])
    is_open = is_special | (is_byte & (last > "\x7f"))  # whether the text has a letter there, nobody knows
    is_case = np.isin(last, [TITLE, UPPER])
    allowed[:, np.isin(first, list(ascii_uppercase))] = False
    allowed[np.ix_(last == JOIN, ~begins_word)] = False
    allowed[np.ix_(is_case, ~begins_word & (first != JOIN))] = False
    allowed[np.ix_(last == ESCAPE, ~np.isin(first, list(SIGNS)))] = False
    allowed[np.ix_(~is_alnum & ~is_open & (last != SPACE), is_letter)] = False
    allowed[np.ix_(is_alnum & ~is_open, first == JOIN)] = False
    allowed[np.ix_(last == SPACE, first == JOIN)] = False


def can_begin_document(tokenizer: sentencepiece.SentencePieceProcessor, is_byte: np.ndarray) -> np.ndarray:
    """Where the tokenizer puts a space in front of every text, only pieces that begin with one come first."""
    if not tokenizer.encode("a", out_type=str)[0].startswith(SPACE):
        return np.ones(len(is_byte), dtype=bool)
    return np.array([tokenizer.id_to_piece(i).startswith(SPACE) for i in range(len(is_byte))])
