"""Causal attention within a window and a document, and the rotation of queries and keys before it.

    y = attend(rotate(q, ...), rotate(k, ...), v, window, docs)      q (B, T, H, K); k, v (B, L, H/G, K) -> (B, T, HK)

A GPU has PyTorch's fused kernels. On a CPU plain products in blocks of queries, which skip the keys that no query of
the block may see, are several times faster than the library's kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, docs: Tensor | None) -> Tensor:
    """Causal attention over the last `window` positions, of the same document where docs (B, L) numbers them.
    q (B, T, H, K); k, v (B, L, H/G, K), L >= T: the queries are the last T of the L positions."""
    return (attend_in_blocks if q.device.type == "cpu" else attend_fused)(q, k, v, window, docs)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, window: int, docs: Tensor | None) -> Tensor:
    (B, T, H, K), (L, J) = q.shape, k.shape[1:3]
    past = L - T
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask: Tensor | None = None
    if past or window < L or docs is not None:
        lag = torch.arange(past, L, device=q.device)[:, None] - torch.arange(L, device=q.device)
        mask = (lag >= 0) & (lag < window)
        k, v = (t.repeat_interleave(H // J, 1) for t in (k, v))  # few of the kernels that take a mask share heads
    if docs is not None and mask is not None:
        mask = mask & (docs[:, None, past:, None] == docs[:, None, None])
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] != H)
    return y.transpose(1, 2).reshape(B, T, H * K)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, docs: Tensor | None) -> Tensor:
    (B, T, H, K), (L, J) = q.shape, k.shape[1:3]
    past = L - T
    # the query heads that share keys are rows of one product
    q = (q * K**-0.5).view(B, T, J, H // J, K).permute(0, 2, 3, 1, 4)
    k, v = (t.transpose(1, 2).reshape(B * J, L, K) for t in (k, v))
    out, block = [], 128  # scores of one product stay in the cache
    for start, rows in zip(range(0, T, block), q.split(block, 3)):
        stop = min(start + block, T)
        low, high = max(0, past + start - window + 1), past + stop
        rows = rows.reshape(B * J, H // J * (stop - start), K)
        scores = torch.bmm(rows, k[:, low:high].mT).view(B, J, H // J, stop - start, high - low)
        lag = torch.arange(past + start, past + stop, dtype=torch.int32)[:, None]  # int64 would halve the lanes
        lag = lag - torch.arange(low, high, dtype=torch.int32)
        hidden = (lag < 0) | (lag >= window)
        if docs is not None:
            other = docs[:, past + start : past + stop, None] != docs[:, None, low:high]
            hidden = hidden | other[:, None, None]
        # added, not filled in: the gradient then needs no mask, which a compiler would write out and read again
        scores = scores + torch.where(hidden, -math.inf, 0.0).to(scores.dtype)
        weights = scores.softmax(-1).view(B * J, -1, high - low)
        out.append(torch.bmm(weights, v[:, low:high]).view(B, J, H // J, stop - start, K))
    return torch.cat(out, 3).permute(0, 3, 1, 2, 4).reshape(B, T, H * K)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the first dimensions of each head. x (B, T, H, K); cos, sin (T, 1, half)."""
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)


def build_rotation(length: int, dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, 1, dims / 2), where and in what `like` is. The frequencies cover the whole range whatever
    part of a head rotates."""
    half = dims // 2
    speed = base ** -(torch.arange(half, device=like.device, dtype=torch.float32) / max(half, 1))
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), speed)[:, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
