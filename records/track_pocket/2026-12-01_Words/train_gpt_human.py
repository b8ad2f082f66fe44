# The readable source of the packed train_gpt.py beside it: the files that it was packed from, unchanged,
# one below the other. To read, not to run.
# ==== data/__init__.py ====
"""Text in, dataset folders out: shards, tokenizers, the offline corpus, the challenge's download."""
# ==== data/shards.py ====
"""The shard format: 256 little-endian int32 header words (magic, version, token count, zeros), uint16 tokens; and the
shards of a split as one stream of tokens.

It is the challenge's own format, so published shards drop in unchanged. This module ships inside the counted code; what
a training run does not use is not packed. It needs numpy, and torch by way of loopgolf.runtime, which writes its files.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np

from loopgolf.errors import DataError, TokenError
from loopgolf.runtime import write_atomic

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
CHECK_TOKENS = 1 << 22  # tokens per step of the range check, so that a shard never fills the memory
MAKE_DATA = "make it with `python -m data.localtext` (offline) or `python -m data.fineweb` (the challenge's)"
REPLACE = "delete it and build or download it again"


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards of one split of a dataset folder, in the order of their names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such dataset folder; {MAKE_DATA}")
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise DataError(f"{folder}: no shard *_{split}_*.bin in it; {MAKE_DATA}")
    return paths


def read_token_count(path: Path) -> int:
    """The token count that the header promises, checked against the size of the file."""
    if not path.is_file():
        raise DataError(f"{path}: no such shard; {MAKE_DATA}")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: zero-byte file; {REPLACE}")
    if size < HEADER_BYTES:
        raise DataError(f"{path}: truncated header, {size} of {HEADER_BYTES} bytes; {REPLACE}")
    magic, version, count = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise DataError(f"{path}: wrong magic {magic}, a shard starts with {SHARD_MAGIC}; {REPLACE}")
    if version != SHARD_VERSION:
        raise DataError(f"{path}: wrong version {version}, this program reads {SHARD_VERSION}; {REPLACE}")
    if count <= 0:
        raise DataError(f"{path}: the header counts {count} tokens; {REPLACE}")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        fault = "truncated" if size < expected else "trailing bytes"
        raise DataError(f"{path}: {fault}, {size} bytes where {count} tokens need {expected}; {REPLACE}")
    return count


def read_shard(path: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a shard, memory-mapped, read-only; with `vocab_size` every token id must be below it."""
    path = Path(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(read_token_count(path),))
    if vocab_size is not None:
        for start in range(0, len(tokens), CHECK_TOKENS):
            check_range(tokens[start : start + CHECK_TOKENS], vocab_size, path)
    return tokens


def check_range(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Every token id must be below `vocab_size`."""
    highest = int(tokens.max())
    if highest >= vocab_size:
        why = f"token {highest} is outside the vocabulary of {vocab_size}"
        raise TokenError(f"{path}: {why}; set --vocab_size, or use the tokenizer that the shard was made with")


class TokenStream:
    """The shards of one split as one long row of tokens that repeats after its end."""

    def __init__(self, folder: str, split: str, vocab_size: int):
        self.vocab_size = vocab_size
        self.paths = find_shards(folder, split)
        self.shards = [read_shard(path) for path in self.paths]
        for path, shard in zip(self.paths, self.shards):
            check_range(shard[: 1 << 20], vocab_size, path)  # the start of every shard now, the rest as it is read
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.total = int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        pieces = [np.empty(0, np.int64)]
        while count:
            start %= self.total
            index = np.searchsorted(self.starts, start, side="right") - 1
            piece = self.shards[index][start - self.starts[index] :][:count]
            check_range(piece, self.vocab_size, self.paths[index])
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(windows, length): the tokens from each start on."""
        return np.stack([self.read(start, length) for start in starts.tolist()])

    def fingerprint(self) -> str:
        """sha256 over the counts and the first tokens of every shard: tells data apart without reading all of it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(struct.pack("<q", len(shard)) + shard[: 1 << 20].tobytes())
        return digest.hexdigest()


class WindowOrder:
    """Where the training windows of a run begin: a function of the seed and of the number of tokens consumed.

    The text is cut into blocks as long as the longest context of the run. An epoch reads all of them in a random order.
    Windows that are shorter are cut from the blocks. A round of blocks gives the first window of each, then the second
    of each and so on, so that neighbours in a document are never in one step. Batch and context may change between
    rounds; then every window is still read once per epoch."""

    def __init__(self, n_tokens: int, longest: int, round_tokens: int, seed: int):
        self.longest = longest
        self.round_tokens = round_tokens
        self.n_blocks = (n_tokens - 1) // longest  # the target of a block's last token is the token after it
        if self.n_blocks == 0:
            raise DataError(f"{n_tokens} training tokens are fewer than one window of {longest} needs")
        self.seed = seed % 2**64
        self.epochs: dict[int, np.ndarray] = {}  # a step reads from two at most

    def starts(self, consumed: int, count: int, length: int) -> np.ndarray:
        """The next windows after so many tokens, as positions in the text."""
        position = consumed + length * np.arange(count)
        blocks_each = self.round_tokens // self.longest
        index = position % self.round_tokens // length
        block = position // self.round_tokens * blocks_each + index % blocks_each
        epoch = block // self.n_blocks
        starts = index // blocks_each * length
        for number in np.unique(epoch).tolist():
            within = epoch == number
            blocks = self.order(number)[block[within] % self.n_blocks].astype(np.int64)  # a text may have 2**32 tokens
            starts[within] += self.longest * blocks
        return starts

    def order(self, epoch: int) -> np.ndarray:
        """The blocks in the order in which an epoch reads them."""
        if epoch not in self.epochs:
            for other in [number for number in self.epochs if abs(number - epoch) > 1]:
                del self.epochs[other]
            order = np.arange(self.n_blocks, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch, 1)).shuffle(order)
            self.epochs[epoch] = order
        return self.epochs[epoch]


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write a shard under a temporary name and rename it, so that a broken write leaves no file behind."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 0 < tokens.size < 1 << 31:
        raise DataError(
            f"{path}: a shard takes a row of 1 to 2**31 - 1 integers, not {tokens.dtype} of shape {tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() > 0xFFFF:
        raise DataError(
            f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit into uint16; "
            "use a vocabulary of at most 65536"
        )
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    write_atomic(path, header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())
# ==== kernels/__init__.py ====
"""Heavy operations, one per file: each next to its plain PyTorch form, so that everything runs without a GPU."""
# ==== kernels/attention.py ====
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
# ==== kernels/head.py ====
"""The head: logits, squashed into plus or minus `cap` unless that is 0, and their mean cross entropy.

    logits = softcap_logits(x, weight, cap)       x (..., D), weight (V, D)
    loss = head_loss(x, weight, targets, cap)     targets (...): tokens below V; cap above 0

Three products of cuBLAS and one pass over the logits: a row of them fits in registers, so the kernel computes its loss
and, in place, its gradient. Nothing in float32 of that size exists, nothing is recomputed, and the backward pass has
only products left. README.md says why this beats one kernel for everything.

A CPU does the same in blocks of rows: 28 ms instead of 45 for 2,048 tokens and 2,048 pieces on two AVX2 cores. With
many more tokens a block leaves the cache, and what is saved is the second pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


def softcap_logits(x: Tensor, weight: Tensor, cap: float) -> Tensor:
    return softcap(F.linear(x, weight).float(), cap)


def softcap(logits: Tensor, cap: float) -> Tensor:
    return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits  # cap * tanh(logits / cap), faster


def head_loss_ref(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return F.cross_entropy(softcap_logits(x, weight, cap).flatten(0, -2), targets.flatten())


class LossInBlocks(torch.autograd.Function):
    """The mean loss of (N, D) states. Its gradient is computed on the way, while the logits of a block are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        block = max(512, math.ceil(len(x) / 4))  # a compiler unrolls the loop
        x_grads, losses = [], []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for rows, wanted in zip(x.split(block), targets[:, None].split(block)):
            logits = softcap_logits(rows, weight, cap)
            losses.append(logits.logsumexp(-1, keepdim=True) - logits.gather(-1, wanted))
            slopes = logits.softmax(-1) - (torch.arange(len(weight), device=x.device) == wanted).float()
            if cap:
                slopes = slopes * (1 - (logits * (1 / cap)).square())  # of the softcap
            slopes = (slopes * (1 / len(x))).to(x.dtype)
            x_grads.append(slopes @ weight)
            weight_grad = weight_grad + slopes.mT @ rows
        ctx.save_for_backward(torch.cat(x_grads), weight_grad)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad, (weight_grad * grad).to(x_grad.dtype), None, None


def head_loss_in_blocks(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    loss: Tensor = LossInBlocks.apply(x.flatten(0, -2), weight, targets.flatten(), cap)
    return loss


def head_loss_torch(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """What PyTorch alone does best, compiled or not."""
    in_blocks = x.device.type == "cpu" and torch.is_grad_enabled()
    return (head_loss_in_blocks if in_blocks else head_loss_ref)(x, weight, targets, cap)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return (head_loss_triton if triton and x.is_cuda else head_loss_torch)(x, weight, targets, cap)


if triton:

    @triton.jit
    def head_kernel(logits, targets, losses, vocab, cap, share, BLOCK: tl.constexpr):
        """A row: its loss, and in place of the logits `share` times the gradient of the loss with respect to them."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < vocab
        at = logits + row * vocab + columns
        z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        squashed = 1 - 2 / (tl.exp(2 * z / cap) + 1)  # tanh; right at both ends, where exp is 0 or infinite
        capped = tl.where(inside, cap * squashed, float("-inf"))
        top = tl.max(capped, 0)
        shares = tl.exp(capped - top)
        total = tl.sum(shares, 0)
        is_target = columns == tl.load(targets + row)
        # a target outside the vocabulary is nowhere in the row: the loss is infinite, and the run stops
        tl.store(losses + row, top + tl.log(total) - tl.max(tl.where(is_target, capped, float("-inf")), 0))
        slopes = (shares / total - is_target.to(tl.float32)) * (1 - squashed * squashed) * share
        tl.store(at, slopes.to(logits.dtype.element_ty), mask=inside)

    # opaque to torch.compile, which then needs no graph break; the schema is written out because packing strips hints
    @torch.library.custom_op(
        "loopgolf::head",
        mutates_args=(),
        schema="(Tensor x, Tensor weight, Tensor targets, float cap) -> (Tensor, Tensor)",
    )
    def head_op(x, weight, targets, cap):
        """Mean loss of (N, D) states, and its gradient with respect to the (N, V) products of x and weight."""
        slopes = x @ weight.mT
        rows, vocab = slopes.shape
        losses = torch.empty(rows, device=x.device)
        block = triton.next_power_of_2(vocab)
        head_kernel[(rows,)](
            slopes, targets, losses, vocab, cap, 1 / rows, BLOCK=block, num_warps=min(max(block // 256, 1), 16)
        )
        return losses.mean(), slopes

    @head_op.register_fake
    def head_shapes(x, weight, targets, cap):
        return x.new_empty((), dtype=torch.float32), x.new_empty(len(x), len(weight))

    def keep_slopes(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # or zeros as large as the slopes would stand for their own gradient
        ctx.save_for_backward(*inputs[:2], output[1])

    def head_backward(ctx, grad, _):
        x, weight, slopes = ctx.saved_tensors
        # the incoming gradient goes into the small factor: scaling the slopes would be one more pass over them
        return slopes @ (weight * grad), slopes.mT @ x * grad, None, None

    head_op.register_autograd(head_backward, setup_context=keep_slopes)

    def head_loss_triton(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        return head_op(x.flatten(0, -2), weight, targets.flatten(), cap)[0]
# ==== kernels/newton_schulz.py ====
"""Orthogonalisation for Muon: five Newton-Schulz iterations on a batch of matrices of one shape.

    update = orthogonalize(batch, dtype)     (n, rows, columns) in any dtype; the update has the given dtype

Two of the three products of an iteration are symmetric. The kernel computes their lower tiles and writes each twice,
which is 3/10 to 1/3 of all operations less; what is added to a product is added before the only rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


Coefficients = tuple[tuple[float, float, float], ...]  # of x, x^3 and x^5 of the singular values, for each iteration

COEFFICIENTS: dict[str, Coefficients] = {
    "jordan": ((3.4445, -4.775, 2.0315),) * 5,  # github.com/KellerJordan/Muon
    "polar_express": (  # the best polynomial after those before it: arXiv:2505.16932, parameter-golf #1344
        (8.157, -22.483, 15.879),
        (4.043, -2.809, 0.500),
        (3.892, -2.772, 0.506),
        (3.286, -2.368, 0.464),
        (2.347, -1.710, 0.423),
    ),
}


def orthogonalize(batch: Tensor, dtype: torch.dtype, coefficients: Coefficients = COEFFICIENTS["jordan"]) -> Tensor:
    """In float32 cuBLAS is faster than a kernel without tensor cores."""
    suits = triton and batch.is_cuda and dtype.itemsize == 2
    return orthogonalize_ref(batch, dtype, coefficients, advance_triton if suits else advance_ref)


def advance_ref(x: Tensor, first: float, third: float, fifth: float) -> Tensor:
    gram = x @ x.mT
    return first * x + torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth) @ x


def orthogonalize_ref(
    batch: Tensor,
    dtype: torch.dtype,
    coefficients: Coefficients = COEFFICIENTS["jordan"],
    advance: Callable[[Tensor, float, float, float], Tensor] = advance_ref,
) -> Tensor:
    """Singular values end between about 0.7 and 1.2 (jordan), 0.86 and 1.14 (polar_express). The Frobenius norm bounds
    the spectral norm, so the iteration starts with singular values of at most 1, which both need."""
    x = batch.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
    for first, third, fifth in coefficients:
        x = advance(x, first, third, fifth)
    return x.mT if tall else x


if triton:

    @triton.jit
    def symmetric_kernel(
        x,
        out,
        rows,
        columns,
        batch_stride,
        row_stride,
        column_stride,
        alpha,
        beta,
        SIZE: tl.constexpr,
        DEPTH: tl.constexpr,
        HAS_ADDEND: tl.constexpr,
    ):
        """One tile of alpha x x^T + beta x, and its mirror image."""
        if tl.program_id(1) > tl.program_id(0):
            return
        x += tl.program_id(2).to(tl.int64) * batch_stride
        out += tl.program_id(2).to(tl.int64) * rows * rows
        i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        j = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros((SIZE, SIZE), tl.float32)
        for start in range(0, columns, DEPTH):
            k = start + tl.arange(0, DEPTH)
            inside = (k < columns)[None, :]
            at = x + k[None, :] * column_stride
            left = tl.load(at + i[:, None] * row_stride, mask=inside & (i < rows)[:, None], other=0.0)
            right = tl.load(at + j[:, None] * row_stride, mask=inside & (j < rows)[:, None], other=0.0)
            total = tl.dot(left, right.T, total, input_precision="ieee")
        total *= alpha
        inside = (i < rows)[:, None] & (j < rows)[None, :]
        if HAS_ADDEND:
            at = x + i[:, None] * row_stride + j[None, :] * column_stride
            total += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tile = total.to(out.dtype.element_ty)
        tl.store(out + i[:, None] * rows + j[None, :], tile, mask=inside)
        if tl.program_id(1) < tl.program_id(0):
            tl.store(out + j[:, None] * rows + i[None, :], tile.T, mask=inside.T)

    def symmetric_product(x: Tensor, alpha: float, beta: float = 0.0) -> Tensor:
        """alpha x x^T + beta x for a batch (n, rows, columns); with beta, x has to be square and symmetric."""
        n, rows, columns = x.shape
        out = x.new_empty(n, rows, rows)
        # large tiles move fewer bytes, small ones fill the device when there are few matrices
        size = 128 if n * (rows // 128) ** 2 >= 256 else 64
        tiles = triton.cdiv(rows, size)
        symmetric_kernel[(tiles, tiles, n)](
            x,
            out,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta,
            SIZE=size,
            DEPTH=64,
            HAS_ADDEND=beta != 0,
            num_warps=size // 16,
            num_stages=3,
        )
        return out

    def advance_triton(x: Tensor, first: float, third: float, fifth: float) -> Tensor:
        polynomial = symmetric_product(symmetric_product(x, 1.0), fifth, third)
        return torch.baddbmm(x, polynomial, x, beta=first)
# ==== kernels/rounding.py ====
"""Rounding of a weight matrix to the grid that it is stored on, there and back.

    step = find_steps(weight, largest, k, step_bits)    weight (rows, columns): one fp16 step per row
    codes = quantize_rows(weight, step, largest)        int8
    weight = dequantize_rows(codes, step)
    round_to_grid(weight, out, largest, k, step_bits)   all in one, written to `out`

The step of a row is k standard deviations over the largest code, without a floor. With fewer `step_bits` than fp16 has,
the mantissa of a step is so long: rows are a little finer or coarser than others, and their steps take fewer bytes. All
weights are rounded in every step of training: the kernel reads a row once and writes it once, where PyTorch makes a
dozen passes.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


STEP_BITS = 10  # the mantissa of fp16


def quantize_rows(weight: Tensor, step: Tensor, largest: int) -> Tensor:
    return round_rows(weight, step, largest).to(torch.int8)


def dequantize_rows(codes: Tensor, step: Tensor) -> Tensor:
    return codes.float() * step.float()[:, None]


def find_steps(weight: Tensor, largest: int, k: float, step_bits: int) -> Tensor:
    step = (find_spread(weight) * (k / largest)).clamp(max=65504).half()
    return shorten_mantissa(step, step_bits)


def find_spread(weight: Tensor) -> Tensor:
    """Of each row, around zero, as the grid is."""
    return weight.float().square().mean(1).sqrt()


def round_rows(weight: Tensor, step: Tensor, largest: int) -> Tensor:
    """Codes, still as floats: to int8 and back would be two passes more."""
    codes = weight.float() / torch.where(step > 0, step, torch.inf).float()[:, None]
    return codes.round_().clamp_(-largest, largest)


def shorten_mantissa(step: Tensor, bits: int) -> Tensor:
    """The nearest fp16 numbers that need only the first bits of the mantissa; of positive ones. Below 6e-5, where fp16
    has fewer bits itself, a step may become zero, and its row with it."""
    dropped = STEP_BITS - bits
    whole = step.view(torch.int16) + ((1 << dropped) >> 1)
    return (whole >> dropped << dropped).view(torch.float16).clamp(max=65504)


def round_to_grid_ref(weight: Tensor, out: Tensor, largest: int, k: float, step_bits: int = STEP_BITS) -> None:
    step = find_steps(weight, largest, k, step_bits)
    out.copy_(round_rows(weight, step, largest).mul_(step.float()[:, None]))


def round_to_grid(weight: Tensor, out: Tensor, largest: int, k: float, step_bits: int = STEP_BITS) -> None:
    if triton and weight.is_cuda:
        round_to_grid_triton(weight, out, largest, k, step_bits)
    else:
        round_to_grid_ref(weight, out, largest, k, step_bits)


if triton:

    @triton.jit
    def round_kernel(weight, out, columns, largest, scale, DROPPED: tl.constexpr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        inside = offsets < columns
        offsets += tl.program_id(0).to(tl.int64) * columns
        w = tl.load(weight + offsets, mask=inside, other=0.0)
        spread = tl.sqrt_rn(tl.div_rn(tl.sum(w * w, 0), columns.to(tl.float32)))
        step = tl.minimum(spread * scale, 65504.0).to(tl.float16)
        whole = step.to(tl.int16, bitcast=True).to(tl.int32) + ((1 << DROPPED) >> 1)
        step = (whole >> DROPPED << DROPPED).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        step = tl.minimum(step, 65504.0)
        # exact division: an approximate quotient would send ties to another code than the exporter's
        # a row of zeros is divided by 1, not by its step of 0: maximum(0 / 0, x) depends on Triton's version
        codes = tl.div_rn(w, tl.where(step > 0, step, 1.0) + tl.zeros_like(w))
        codes = tl.minimum(tl.maximum(codes, -largest), largest)
        codes = codes + 12582912.0 - 12582912.0  # to the nearest integer, ties to even: 1.5 * 2^23 leaves no fraction
        tl.store(out + offsets, (codes * step).to(out.dtype.element_ty), mask=inside)

    def round_to_grid_triton(weight: Tensor, out: Tensor, largest: int, k: float, step_bits: int = STEP_BITS) -> None:
        block = triton.next_power_of_2(weight.shape[1])
        warps = min(max(block // 256, 1), 16)
        round_kernel[(len(weight),)](
            weight,
            out,
            weight.shape[1],
            float(largest),
            k / largest,
            DROPPED=STEP_BITS - step_bits,
            BLOCK=block,
            num_warps=warps,
        )
# ==== loopgolf/__init__.py ====
"""What others rely on, and a run stands on: a file for each."""
# ==== loopgolf/artifact.py ====
"""The artifact: the one file that is scored.

    8 bytes  magic "LOOPGOLF"    u32 version    u32 header length    header: UTF-8 JSON
    payload: two compressed streams, integer codes and fp16    last 32 bytes: sha256 of all before
    header = {config: the settings that differ from the defaults, tokenizer: {sha256, vocab},
              streams: [{codec, bytes, raw_bytes}]}

The tensors of a file, their order, shapes and formats follow from its config, so no table of them is stored: `describe`
tells them, a function of the stored settings. A setting that is missing has its default, so files outlive new options;
one that is unknown is refused by name. Nothing in a file is executed, and nothing in it is believed before it was
checked. Files of version 2, which stored all settings and a table of tensors, are read by artifact_v2.py.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor

from loopgolf.coder import decode_matrices, decode_rows, encode_rows
from loopgolf.errors import ArtifactError
from loopgolf.quantize import Format, StoredTensor

MAGIC = b"LOOPGOLF"
VERSION = 3
PREFIX_BYTES = 16  # magic, version, header length
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_RAW_BYTES = 1 << 30
STREAMS = (torch.int8, torch.float16)  # what lies in each stream, in the order of the file
MATRIX_CODECS = {
    "rans_classes": decode_rows,
    "rans": decode_matrices,  # of files from before equal rows were stored once, with classes of columns only
}


class Described(NamedTuple):
    """A parameter as the settings of a file imply it."""

    shape: tuple[int, ...]
    format: Format

    def stored(self, name: str) -> dict[str, StoredTensor]:
        return {f"{name}{tensor.suffix}": tensor for tensor in self.format.layout(self.shape)}


Layout = dict[str, Described]
Describe = Callable[[dict[str, Any]], Layout]


@dataclass(frozen=True)
class Stream:
    """One compressed stream of a file."""

    codec: str
    bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the settings that it stores, what tells its tokenizer apart, its tensors as they lie in the
    file (codes, steps, fp16) and as the model uses them, size and digest of the whole file."""

    version: int
    stored: dict[str, Any]
    tokenizer: dict[str, Any]
    layout: Layout
    streams: list[Stream]
    raw: dict[str, Tensor]
    tensors: dict[str, Tensor]
    size: int
    sha256: str


def require(is_good: bool, otherwise: str) -> None:
    if not is_good:
        raise ArtifactError(otherwise)


# --- writing


def pack_artifact(
    stored: dict[str, Any], layout: Layout, raw: Mapping[str, Tensor], tokenizer: dict[str, Any]
) -> bytes:
    """`raw`: the stored tensors by name. The same tensors always give the same bytes: no time, host or user in it."""
    streams: list[Stream] = []
    payload = b""
    for dtype in STREAMS:
        tensors = [raw[name].cpu().contiguous() for name, _ in stored_tensors(layout, dtype)]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        codec, packed = compress(content, tensors if dtype == torch.int8 else [])
        streams.append(Stream(codec, len(packed), len(content)))
        payload += packed
    fields = dict(config=stored, tokenizer=tokenizer, streams=[vars(stream) for stream in streams])
    header = json.dumps(fields, separators=(",", ":")).encode()
    body = MAGIC + struct.pack("<II", VERSION, len(header)) + header + payload
    return body + hashlib.sha256(body).digest()


def stored_tensors(layout: Layout, dtype: torch.dtype) -> Iterable[tuple[str, StoredTensor]]:
    """Name and description of everything in the stream of a dtype, in the order of the file."""
    for name, described in layout.items():
        for stored_name, tensor in described.stored(name).items():
            if tensor.dtype == dtype:
                yield stored_name, tensor


def compress(content: bytes, matrices: list[Tensor]) -> tuple[str, bytes]:
    """The codec that makes a stream smallest, and its bytes. zstd-22 takes half a minute for millions of codes and
    loses on them, so there it is only tried where a quick level wins already."""
    choices = {"rans_classes": encode_rows(matrices)} if matrices else {}
    if not matrices or len(zstandard.compress(content, 3)) < len(choices["rans_classes"]):
        choices["zstd"] = zstandard.compress(content, 22)
    if not matrices:
        # first bytes are alike, second ones are noise: parameter-golf #1089
        choices["zstd_split"] = zstandard.compress(content[0::2] + content[1::2], 22)
    codec = min(choices, key=lambda name: len(choices[name]))
    return codec, choices[codec]


# --- reading


def unpack_artifact(content: bytes, describe: Describe) -> Artifact:
    """Checks everything before it allocates anything that the file asks for."""
    least = PREFIX_BYTES + DIGEST_BYTES
    require(len(content) >= least and content[:8] == MAGIC, "it is too short or does not start like an artifact")
    version, header_bytes = struct.unpack("<II", content[8:PREFIX_BYTES])
    require(version in (2, VERSION), f"it has version {version}, this script reads 2 and {VERSION}")
    room = min(MAX_HEADER_BYTES, len(content) - least)
    require(header_bytes <= room, f"its header claims {header_bytes} bytes, more than it can hold")
    is_whole = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
    require(is_whole, "its digest does not match: truncated or changed")
    header = content[PREFIX_BYTES : PREFIX_BYTES + header_bytes]
    payload = content[PREFIX_BYTES + header_bytes : -DIGEST_BYTES]
    if version == 2:
        stored, tokenizer, layout, streams, raw = import_v2()(header, payload, describe)
    else:
        stored, tokenizer, streams = read_header(header)
        layout = describe(stored)
        raw = read_streams(payload, streams, [list(stored_tensors(layout, dtype)) for dtype in STREAMS])
    tensors = dequantize_all(layout, raw)
    return Artifact(
        version=version,
        stored=stored,
        tokenizer=tokenizer,
        layout=layout,
        streams=streams,
        raw=raw,
        tensors=tensors,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def import_v2() -> Any:
    """The reader of old files, which packed scripts leave out."""
    try:
        from loopgolf.artifact_v2 import read_v2
    except ModuleNotFoundError:
        raise ArtifactError("it has version 2, which packed scripts do not read; use the repository's script") from None
    return read_v2


def read_header(header: bytes) -> tuple[dict[str, Any], dict[str, Any], list[Stream]]:
    """Settings, tokenizer and streams, each of the right kind."""
    try:
        content = json.loads(header.decode("utf-8"))
        stored, tokenizer = content["config"], content["tokenizer"]
        streams = [Stream(entry["codec"], entry["bytes"], entry["raw_bytes"]) for entry in content["streams"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"its header cannot be read ({error.__class__.__name__})") from None
    sizes = [size for stream in streams for size in (stream.bytes, stream.raw_bytes)]
    are_sizes = all(type(size) is int and size >= 0 for size in sizes) and len(streams) == len(STREAMS)
    have_names = all(isinstance(stream.codec, str) for stream in streams)
    is_known = isinstance(stored, dict) and isinstance(tokenizer, dict) and set(tokenizer) == {"sha256", "vocab"}
    require(are_sizes and have_names and is_known, "its header holds values of another kind")
    return stored, tokenizer, streams


def read_streams(
    payload: bytes, streams: list[Stream], tables: list[list[tuple[str, StoredTensor]]]
) -> dict[str, Tensor]:
    """The tensors of all streams, once their sizes are those that the tables need."""
    needed = [sum(tensor.n_bytes for _, tensor in table) for table in tables]
    are_sized = [stream.raw_bytes for stream in streams] == needed and sum(needed) <= MAX_RAW_BYTES
    is_filled = sum(stream.bytes for stream in streams) == len(payload)
    require(are_sized and is_filled, "its streams do not fit its config and its size")
    raw: dict[str, Tensor] = {}
    start = 0
    for stream, table in zip(streams, tables):
        packed = payload[start : start + stream.bytes]
        start += stream.bytes
        shapes = [tensor.shape for _, tensor in table if tensor.dtype == torch.int8]
        raw |= split_stream(decompress(stream, packed, shapes), table)
    return raw


def decompress(stream: Stream, packed: bytes, shapes: list[tuple[int, ...]]) -> bytes:
    """`shapes`: of the matrices of codes in this stream."""
    try:
        if stream.codec in MATRIX_CODECS and shapes:
            decode = MATRIX_CODECS[stream.codec]
            matrices = [(rows, columns) for rows, columns in shapes]
            return b"".join(codes.numpy().tobytes() for codes in decode(packed, matrices))
        is_known = stream.codec in ("zstd", "zstd_split")
        require(is_known, f"a stream has the codec {stream.codec!r}, unknown to this version")
        is_sized = zstandard.frame_content_size(packed) == stream.raw_bytes
        require(is_sized, "a stream has not the size that it promises")
        if not stream.raw_bytes:
            return b""
        content = zstandard.ZstdDecompressor().decompress(packed, max_output_size=stream.raw_bytes)
        if stream.codec == "zstd_split":
            content = join_bytes(content)
    except (ValueError, zstandard.ZstdError) as error:
        raise ArtifactError(f"a stream does not decode: {error}") from None
    require(len(content) == stream.raw_bytes, "a stream has not the size that it promises")
    return content


def join_bytes(content: bytes) -> bytes:
    """Numbers of two bytes, from all their first and then all their second bytes."""
    whole = bytearray(len(content))
    half = (len(content) + 1) // 2
    whole[0::2], whole[1::2] = content[:half], content[half:]
    return bytes(whole)


def split_stream(content: bytes, table: list[tuple[str, StoredTensor]]) -> dict[str, Tensor]:
    tensors = {}
    start = 0
    for name, described in table:
        piece = bytearray(content[start : start + described.n_bytes])
        start += described.n_bytes
        flat = torch.frombuffer(piece, dtype=described.dtype) if piece else torch.empty(0, dtype=described.dtype)
        tensors[name] = flat.view(described.shape)
    return tensors


def dequantize_all(layout: Layout, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the model computes with, once the stored ones are known to be good."""
    weights = {}
    for name, described in layout.items():
        stored = [raw[stored_name] for stored_name in described.stored(name)]
        is_valid = described.format.is_valid(stored)
        require(is_valid, f"tensor {name} holds codes beyond its bits or values that are not finite")
        weights[name] = described.format.dequantize(stored)
    return weights
# ==== loopgolf/cache.py ====
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
# ==== loopgolf/canonical.py ====
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
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from loopgolf.errors import ConfigError
from loopgolf.words import ESCAPE, JOIN, SIGNS, TITLE, UPPER, has_marks

FLOOR = 2.0**-20  # what all impossible tokens have together
SPACE = "▁"


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
    """What mark_words never writes: capitals, marks in another order, and a letter right behind what is no letter."""
    texts = [tokenizer.id_to_piece(i) for i in range(len(is_byte))]
    for i in np.flatnonzero(is_byte):
        texts[i] = chr(int(texts[i][3:5], 16))
    last = np.array([text[-1] for text in texts])
    first = np.array([text[0] for text in texts])
    is_letter = np.array(["a" <= char <= "z" for char in first])
    begins_word = np.array([text == SPACE or (text[0] == SPACE and text[1].islower()) for text in texts])
    is_alnum = np.array([char.isalnum() for char in last])
    is_partial = is_byte & (last > "\x7f")  # of a character that may be anything
    is_case = np.isin(last, [TITLE, UPPER])
    allowed[:, [text[0].isascii() and text[0].isupper() for text in texts]] = False
    allowed[np.ix_(last == JOIN, ~begins_word)] = False
    allowed[np.ix_(is_case, ~begins_word & (first != JOIN))] = False
    allowed[np.ix_(last == ESCAPE, ~np.isin(first, list(SIGNS)))] = False
    allowed[np.ix_(~is_alnum & ~is_partial & (last != SPACE), is_letter)] = False
    allowed[np.ix_(is_alnum & ~is_partial, first == JOIN)] = False
    allowed[np.ix_(last == SPACE, first == JOIN)] = False


def can_begin_document(tokenizer: sentencepiece.SentencePieceProcessor, is_byte: np.ndarray) -> np.ndarray:
    """Where the tokenizer puts a space in front of every text, only pieces that begin with one come first."""
    if not tokenizer.encode("a", out_type=str)[0].startswith(SPACE):
        return np.ones(len(is_byte), dtype=bool)
    return np.array([tokenizer.id_to_piece(i).startswith(SPACE) for i in range(len(is_byte))])
# ==== loopgolf/coder.py ====
"""A lossless entropy coder for the int8 codes of quantized weight matrices: interleaved rANS over many lanes at once.

    content = encode_rows([codes, ...])                        2-D int8 tensors
    codes = decode_rows(content, [(rows, columns), ...])       the same tensors, or ValueError
    codes = decode_matrices(data, [(rows, columns), ...])      of the part `data` alone, which older files are made of

The columns of a matrix fall into 1 to 16 classes that compress best together (a hidden unit that died has small
weights), or its rows do (a rare token has coarse codes), whichever takes fewer bytes: such a matrix is turned. Every
class has its own frequency table. All matrices, class after class, column after column, form one row of symbols; lane
j of L codes symbols j, L + j, 2L + j, ... so one step is a few tensor operations on L states. A state lives in
[2^16, 2^32) and moves 16-bit words. No float decides what is decoded, so every machine agrees.

    content := u32 crc of the labels | u32 label bytes | labels | data
    labels := LZMA of u8 per matrix: 1 if it is turned in `data`, 0 if not; u16 per row: 0, or a label of equal rows
    data := u32 crc of the rest | u32 side bytes | side | u32 state per lane | u16 words    (little endian)
    side := LZMA of, per matrix: class count, lowest and highest symbol, class of each column, one table per class

Rows of tokens that never occur in training become equal, and are stored once.
"""

import lzma
import struct
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_BITS = 14  # the frequencies of a table sum to 2^14
LOWEST = 1 << 16  # a state starts at this value in the encoder, so it has to end there in the decoder
LANE_SYMBOLS = 1 << 14  # per lane: a state costs 3 bytes more than it carries, 0.03% of its symbols
MOST_LABELS = (1 << 16) - 1
FILTERS = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "lc": 0, "lp": 0, "pb": 0}]


class Classes(NamedTuple):
    """Of the columns of a matrix, and the bytes that it takes with them."""

    n_bytes: float
    side: bytes
    labels: Tensor
    roots: Tensor  # (classes, 256)


def encode_rows(matrices: list[Tensor]) -> bytes:
    if any(codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel() for codes in matrices):
        raise ValueError("only 2-D int8 tensors with at least one code can be encoded")
    labels = [label_rows(codes) for codes in matrices]
    turned, classified = [], []
    for codes, label in zip(matrices, labels):
        kept = codes[find_kept(label)[0]]
        of_columns, of_rows = classify_columns(kept), classify_columns(kept.T)
        is_turned = of_rows.n_bytes < of_columns.n_bytes
        turned.append(is_turned)
        classified.append((kept.T, of_rows) if is_turned else (kept, of_columns))
    side = bytes(turned) + b"".join(label.numpy().astype("<u2").tobytes() for label in labels)
    packed = compress_side(side)
    return struct.pack("<II", zlib.crc32(packed), len(packed)) + packed + encode_matrices(classified)


def decode_rows(data: bytes, shapes: list[tuple[int, int]]) -> list[Tensor]:
    checksum, size = struct.unpack("<II", data[:8]) if len(data) >= 8 else (0, 0)
    packed = data[8 : 8 + size]
    if not packed or zlib.crc32(packed) != checksum:
        raise ValueError("labels are truncated or changed")
    n_rows = [rows for rows, _ in shapes]
    n_bytes = len(shapes) + 2 * sum(n_rows)
    content = decompress_side(packed, n_bytes, "labels")
    if len(content) != n_bytes:
        raise ValueError("labels are of another number of rows")
    turned = [flag != 0 for flag in content[: len(shapes)]]
    labels = torch.from_numpy(np.frombuffer(content[len(shapes) :], "<u2").astype(np.int32)).split(n_rows)
    found = [find_kept(label) for label in labels]
    coded_shapes = []
    for (rows, _), (_, columns), is_turned in zip(found, shapes, turned):
        coded_shapes.append((columns, len(rows)) if is_turned else (len(rows), columns))
    coded = decode_matrices(data[8 + size :], coded_shapes)
    kept = [codes.T if is_turned else codes for codes, is_turned in zip(coded, turned)]
    return [codes[places] for codes, (_, places) in zip(kept, found)]


def label_rows(codes: Tensor) -> Tensor:
    """0 for a row unlike all others, else the label of its group of equal rows."""
    contents = [row.tobytes() for row in codes.numpy()]
    counts = Counter(contents)
    repeated = [content for content, count in counts.items() if count > 1][:MOST_LABELS]
    names = {content: label for label, content in enumerate(repeated, 1)}
    return torch.tensor([names.get(content, 0) for content in contents])


def find_kept(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are kept, the first of each group and those unlike all others; and for each row its place there."""
    rows = torch.arange(len(labels))
    first = torch.full((MOST_LABELS + 1,), len(labels)).scatter_reduce(0, labels.long(), rows, "amin")
    kept, places = torch.where(labels == 0, rows, first[labels]).unique(return_inverse=True)
    return kept, places


def encode_matrices(matrices: list[tuple[Tensor, Classes]]) -> bytes:
    sides, symbols, tables, sizes = [], [], [], []
    for codes, (_, side, labels, roots) in matrices:
        sides.append(side)
        symbols.append((codes.T[labels.argsort(stable=True)].int() + 128).flatten())
        tables.append(build_frequencies(roots))
        sizes.append(labels.bincount() * len(codes))
    if not matrices:
        return b""
    freqs, index = torch.cat(tables), torch.cat(symbols) + find_tables(torch.cat(sizes)).mul_(256)
    starts = (freqs.cumsum(1) - freqs).flatten()
    states = torch.full((count_lanes(len(index)),), LOWEST)
    words = []
    for piece in reversed(index.split(len(states))):  # last symbol first: the decoder runs the other way
        x, f = states[: len(piece)], freqs.take(piece.long())
        full = x >= (f << (32 - TABLE_BITS))
        words.append(x[full].to(torch.int16))
        x = torch.where(full, x >> 16, x)
        states[: len(piece)] = ((x // f) << TABLE_BITS) + x % f + starts.take(piece.long())
    side = compress_side(b"".join(sides))
    states = torch.where(states < (1 << 31), states, states - (1 << 32)).int()  # the same 32 bits, signed
    rest = struct.pack("<I", len(side)) + side + states.numpy().tobytes() + torch.cat(words[::-1]).numpy().tobytes()
    return struct.pack("<I", zlib.crc32(rest)) + rest


def decode_matrices(data: bytes, shapes: list[tuple[int, int]]) -> list[Tensor]:
    if not shapes:
        if data:
            raise ValueError("bytes after the last matrix")
        return []
    total = sum(rows * columns for rows, columns in shapes)
    lanes = count_lanes(total)
    if len(data) < 8 + 4 * lanes or struct.unpack("<I", data[:4])[0] != zlib.crc32(data[4:]):
        raise ValueError("codes are truncated or changed")
    side_end = 8 + struct.unpack("<I", data[4:8])[0]
    words_at = side_end + 4 * lanes
    if words_at > len(data):
        raise ValueError("states are cut short")
    labels, freqs, sizes = read_side(data[8:side_end], shapes)
    states = torch.frombuffer(bytearray(data[side_end:words_at]), dtype=torch.int32).long() & 0xFFFFFFFF
    # a step reads at most one word per lane, so with this much room after them no step reads past the end;
    # half a word is refused by frombuffer with the ValueError that is wanted here
    words = torch.frombuffer(bytearray(data[words_at:]) + bytes(2 * lanes), dtype=torch.int16)
    lookup = build_lookup(freqs)
    symbols = torch.empty(total, dtype=torch.int8)
    mask = (1 << TABLE_BITS) - 1
    at = 0  # the next word
    for out, which in zip(symbols.split(lanes), find_tables(sizes).split(lanes)):
        x = states[: len(out)]  # a view: the in-place operations below move the states themselves
        found = lookup.index_select(0, (x & mask) + (which.long() << TABLE_BITS))
        out.copy_(found)  # the lowest byte, into `symbols`, of which this is a view too
        x.bitwise_right_shift_(TABLE_BITS).mul_(found >> 32).add_((found >> 8) & mask)
        low = (x < LOWEST).nonzero().flatten()
        fresh = words[at : at + len(low)].long() & 0xFFFF
        x.index_copy_(0, low, (x.index_select(0, low) << 16) | fresh)
        at += len(low)
        if at > len(words) - lanes:
            raise ValueError("codes end too early")
    if at != len(words) - lanes or not (states == LOWEST).all():
        raise ValueError("codes do not decode to the end of their stream")
    matrices = []
    for (rows, columns), label, flat in zip(shapes, labels, symbols.split([r * c for r, c in shapes])):
        codes = torch.empty(columns, rows, dtype=torch.int8)
        codes[label.argsort(stable=True)] = flat.view(columns, rows)
        matrices.append(codes.T.contiguous())
    return matrices


def count_lanes(n_symbols: int) -> int:
    return max(1, n_symbols // LANE_SYMBOLS)


def count_classes(rows: int, columns: int) -> int:
    """Most classes: a table has to serve 8192 codes, which also bounds what a hostile stream can make us allocate."""
    return min(16, columns, max(1, (rows * columns) >> 13))


def find_tables(sizes: Tensor) -> Tensor:
    """The table of every symbol, from the number of symbols of every table."""
    return torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), sizes)


def build_lookup(freqs: Tensor) -> Tensor:
    """Per table and low bits of a state: frequency << 32 | (bits - start of the symbol) << 8 | symbol as a byte."""
    owner = torch.repeat_interleave(torch.arange(freqs.numel()), freqs.flatten())
    starts = (freqs.cumsum(1) - freqs).flatten()
    bits = torch.arange(len(owner)) & ((1 << TABLE_BITS) - 1)
    return (freqs.take(owner) << 32) | ((bits - starts[owner]) << 8) | ((owner - 128) & 255)


def build_frequencies(roots: Tensor) -> Tensor:
    """(tables, symbols) square roots of frequencies, 0 to 255, to integer frequencies that sum to 2^14."""
    weights = roots.long().square()
    present, total = (weights > 0).long(), weights.sum(1, keepdim=True)
    freqs = present + weights * ((1 << TABLE_BITS) - present.sum(1, keepdim=True)) // total
    freqs[torch.arange(len(freqs)), freqs.argmax(1)] += (1 << TABLE_BITS) - freqs.sum(1)
    return freqs


def compute_roots(counts: Tensor) -> Tensor:
    """Square roots are as exact for rare symbols as for common ones; in a byte they are finer than their noise."""
    share = counts / counts.sum(1, keepdim=True)
    return torch.where(counts > 0, (share.sqrt() * 256).round().clamp(1, 255), 0).to(torch.uint8)


def read_side(packed: bytes, shapes: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Class of each column per matrix, frequencies of all tables, number of symbols of each table."""
    most = sum(3 + columns + 256 * count_classes(rows, columns) for rows, columns in shapes)
    side = decompress_side(packed, most, "tables")
    labels, roots, sizes, at = [], [], [], 0
    for rows, columns in shapes:
        count, low, high = side[at : at + 3] if len(side) >= at + 3 else (0, 0, 0)
        width, body = high + 1 - low, at + 3 + columns
        at = body + count * width
        if not 0 < count <= count_classes(rows, columns) or width < 1 or at > len(side):
            raise ValueError("tables are cut short or impossible")
        label = torch.frombuffer(side, dtype=torch.uint8, count=columns, offset=body - columns).long()
        deltas = torch.frombuffer(side, dtype=torch.uint8, count=count * width, offset=body).view(count, width)
        table = torch.zeros(count, 256, dtype=torch.uint8)
        table[:, low : high + 1] = deltas.cumsum(1)
        if label.max() >= count or not table.any(1).all():
            raise ValueError("a column has no table")
        labels.append(label)
        roots.append(table)
        sizes.append(label.bincount(minlength=count) * rows)
    if at != len(side):
        raise ValueError("tables do not end where they should")
    return labels, build_frequencies(torch.cat(roots)), torch.cat(sizes)


def classify_columns(codes: Tensor) -> Classes:
    """The number of classes that costs the fewest bytes."""
    columns, low, high = codes.shape[1], int(codes.min()) + 128, int(codes.max()) + 128
    index = (codes.long() + 128 + 256 * torch.arange(columns)).flatten()
    counts = index.bincount(minlength=256 * columns).view(columns, 256)[:, low : high + 1].double()
    by_size = (counts @ (torch.arange(low, high + 1).double() - 128).square()).argsort(stable=True)
    best: Classes | None = None
    for n_classes in (1, 2, 4, 8, 16):
        if n_classes > count_classes(*codes.shape):
            break
        wanted = torch.empty(columns, dtype=torch.long)
        wanted[by_size] = torch.arange(columns) * n_classes // columns
        for _ in range(0 if n_classes == 1 else 5):  # k-means, with the price for a distance
            _, _, prices = price_classes(counts, drop_empty(wanted))
            wanted = (counts @ prices.T).argmin(1)
        labels = drop_empty(wanted)
        sums, roots, prices = price_classes(counts, labels)
        deltas = torch.cat([roots[:, :1], roots.diff(dim=1)], 1)
        side = bytes([len(roots), low, high, *labels.tolist(), *deltas.flatten().tolist()])
        n_bytes = len(compress_side(side)) + float((sums * prices).sum()) / 2048
        if best is None or n_bytes < best.n_bytes:
            best = Classes(n_bytes, side, labels, F.pad(roots, (low, 255 - high)))
    assert best is not None
    return best


def drop_empty(labels: Tensor) -> Tensor:
    """The same classes, counted from 0 without the ones that no column is in."""
    renamed: Tensor = labels.unique(return_inverse=True)[1]
    return renamed


def price_classes(counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per class: how often each symbol occurs, its table, and the price of each symbol in whole 1/256 bits."""
    sums = torch.stack([counts[labels == label].sum(0) for label in range(int(labels.max()) + 1)])
    roots = compute_roots(sums)
    prices = (256 * (TABLE_BITS - build_frequencies(roots).double().clamp_min(2**-40).log2())).round()
    return sums, roots, prices


def compress_side(side: bytes) -> bytes:
    return lzma.compress(side, lzma.FORMAT_RAW, filters=FILTERS)


def decompress_side(packed: bytes, most: int, what: str) -> bytearray:
    """At most so many bytes: a hostile stream cannot make us allocate more."""
    reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    try:
        side = bytearray(reader.decompress(packed, most + 1))
    except lzma.LZMAError:
        raise ValueError(f"{what} do not decompress") from None
    if not reader.eof or reader.unused_data:
        raise ValueError(f"{what} do not end where they should")
    return side
# ==== loopgolf/curvature.py ====
"""How sensitive the loss is to rounding: the empirical Fisher information of matrices and tables, on training text.

    meter = CurvatureMeter(model)                    hooks on every layer and table
    meter.watch_head(name, states, logits)           the head is a product with a table
    loss.backward()                                  of the sum over tokens; as often as there is text
    curvatures = meter.totals(ctx.sum)               by name of the parameter
    steps = choose_steps(weights, grids, curvatures)

The information of a matrix has as many numbers as the matrix squared. Two sums of it are kept: over its rows, how much
an error in a row costs by direction, which steers GPTQ (GuidedQuant, Kim et al. 2025, arXiv:2505.07004); and over its
columns, how much errors in a row cost at all. A shared block sums over its passes. A table is read one row at a time:
the row of a frequent token matters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.rounding import find_spread
from loopgolf.layers import Linear, Table
from loopgolf.quantize import RowGrid

LEAST_CURVATURE = 0.1  # of the mean of a matrix: what is left of a row that the text hardly uses


class Curvature(NamedTuple):
    """An error e in row i raises the loss in proportion to rows[i] * (e @ columns @ e) / columns.trace()."""

    columns: Tensor  # (columns, columns)
    rows: Tensor  # (rows,)


def find_hessian(curvatures: Mapping[str, Curvature], name: str) -> Tensor | None:
    """What steers GPTQ, for parameters that have a curvature."""
    return curvatures[name].columns if name in curvatures else None


class CurvatureMeter:
    """Sums what the gradients of backward passes tell."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Curvature] = {}
        for name, module in model.named_modules():
            if isinstance(module, Linear | Table):
                rows, columns = module.weight.shape
                device = module.weight.device
                total = Curvature(torch.zeros(columns, columns, device=device), torch.zeros(rows, device=device))
                self.sums[f"{name}.weight"] = total
                watch = watch_layer if isinstance(module, Linear) else watch_table
                module.register_forward_hook(functools.partial(watch, total))
            if isinstance(module, Linear):
                module.weight.requires_grad_(False)  # only the gradients of outputs are wanted; tables start the graph

    def watch_head(self, name: str, states: Tensor, logits: Tensor) -> None:
        """`logits`: the products of the states with the rows of a table."""
        add_product(self.sums[name], states, logits)

    def totals(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Curvature]:
        """Those of all ranks. What was not used as a layer or table has none: experts are multiplied in groups."""
        reduced = {name: Curvature(*map(reduce, total)) for name, total in self.sums.items()}
        return {name: total for name, total in reduced.items() if total.rows.any()}


def watch_layer(total: Curvature, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    add_product(total, inputs[0], output)


def add_product(total: Curvature, x: Tensor, y: Tensor) -> None:
    """Of a matrix in y = x @ matrix.T, as soon as the gradient of y is known."""
    x = x.detach().flatten(0, -2)

    def add(gradient: Tensor) -> None:
        energy = gradient.flatten(0, -2).float().square()
        weighted = x.float() * energy.sum(1, keepdim=True).sqrt()
        total.columns.addmm_(weighted.T, weighted)
        total.rows.addmv_(energy.T, x.float().square().sum(1))

    y.register_hook(add)


def watch_table(total: Curvature, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ids = inputs[0].flatten()

    def add(gradient: Tensor) -> None:
        gradient = gradient.flatten(0, -2).float()
        total.columns.addmm_(gradient.T, gradient)
        total.rows.index_put_((ids,), gradient.square().sum(1), accumulate=True)  # in a fixed order on a GPU, too

    output.register_hook(add)


class Rows(NamedTuple):
    """The rows of a matrix. Their steps stay above `least`, where the largest weight has the largest code, and below
    `most`, beyond which a row would hardly be more than zeros."""

    columns: int
    spread: Tensor
    usual: Tensor  # steps, those of training
    wanted: Tensor  # steps, up to a factor that all matrices share
    least: Tensor
    most: Tensor

    def steps_at(self, scale: float) -> Tensor:
        return (scale * self.wanted).minimum(self.most).maximum(self.least)

    def count_bits(self, step: Tensor) -> float:
        """Of the codes of Gaussian rows, to within some percent: log2(4.13 / ratio) each at fine steps, 0 at coarse.
        Rows too small for a step in fp16 have no codes but zero."""
        ratio = (step / self.spread)[self.usual > 0].double()
        return self.columns * float((1 + 2 * math.pi * math.e / ratio.square()).log2().sum()) / 2


def describe_rows(weight: Tensor, grid: RowGrid, curvature: Curvature) -> Rows:
    weight = weight.float()
    spread = find_spread(weight)
    usual = grid.find_steps(weight).float()
    return Rows(
        columns=weight.shape[1],
        spread=spread,
        usual=usual,
        wanted=(curvature.rows + LEAST_CURVATURE * curvature.rows.mean()).div(weight.shape[1]).rsqrt(),
        least=weight.abs().amax(1) / grid.largest,
        most=spread.maximum(usual),
    )


def choose_steps(
    weights: Mapping[str, Tensor], grids: Mapping[str, RowGrid], curvatures: Mapping[str, Curvature]
) -> dict[str, Tensor]:
    """The fp16 step of each row at which a bit buys the same everywhere, with as many bits in all as the k's of the
    grids ask for. Rounding costs curvature * step^2 and saves log2(step) bits per weight, so steps go by 1 /
    sqrt(curvature). Within a matrix and damped, this is in parameter-golf #1412."""
    all_rows = {name: describe_rows(weights[name], grids[name], curvatures[name]) for name in curvatures}
    asked = sum(rows.count_bits(rows.usual) for rows in all_rows.values())
    low, high = 1e-12, 1e12  # curvatures of any loss lie in between
    while high > 1.0001 * low:
        scale = math.sqrt(low * high)
        if sum(rows.count_bits(rows.steps_at(scale)) for rows in all_rows.values()) > asked:
            low = scale
        else:
            high = scale
    return {name: grids[name].store_steps(rows.steps_at(high)) for name, rows in all_rows.items()}
# ==== loopgolf/errors.py ====
"""What ends a run before its time: one line for whoever reads it, and an exit code for whatever started it.

0 good    1 crash or non-finite loss    2 bad input    3 does not fit    4 corrupt artifact, or a rule violated
"""


class Stop(Exception):
    """Ends the run with one line that names what is wrong and how to fix it."""

    exit_code = 2


class ConfigError(Stop):
    """A setting that cannot work."""


class DataError(Stop):
    """Data that cannot be used: the file, what is wrong with it and how to fix it."""


class TokenError(DataError):
    """A token that is not in the vocabulary."""


class DoesNotFit(Stop):
    """The model cannot be stored within the byte limit."""

    exit_code = 3


class ArtifactError(Stop):
    """An artifact that cannot be used."""

    exit_code = 4


class NonFiniteLoss(Stop):
    """Stops a run on all ranks, after a checkpoint is saved."""

    exit_code = 1


class Interrupted(Stop):
    """SIGTERM or Ctrl-C, after a checkpoint is saved."""

    exit_code = 1
# ==== loopgolf/layers.py ====
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
# ==== loopgolf/options.py ====
"""Options: fields of a config that know their help and limits, and one way to write options for every program.

    @dataclass(frozen=True)
    class Config:
        depth: int = option(4, "repetitions of the *r group", low=1, high=256)

    python train_gpt.py --depth 8        --depth=8        DEPTH=8 in the environment
    python -m data.tokenizer --vocab-size 512        dashes and underscores are the same in every program

What cannot work stops with the nearest right name.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn

from loopgolf.errors import ConfigError

MOST = 2**40
TRUTH = {"0": False, "false": False, "1": True, "true": True}


def option(default: Any, help: str, *, low: float = 0, high: float = MOST, choices: tuple[str, ...] = ()) -> Any:
    """A field of a config. The limits hold for numbers, the choices for words."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


def check_limits(config: Any) -> None:
    """Every number within its limits, every word one of its choices. A config can come from a stranger's file."""
    for f in fields(config):
        value, known = getattr(config, f.name), f.metadata
        if isinstance(value, str):
            if known["choices"]:
                check_choice(f.name, value, known["choices"])
        elif not known["low"] <= value <= known["high"]:
            raise ConfigError(f"{f.name}={value}: must lie between {known['low']} and {known['high']}")


def check_choice(name: str, word: str, choices: Iterable[str]) -> None:
    choices = list(choices)
    if word not in choices:
        raise ConfigError(f"{name}={word}: choose from {', '.join(choices)}{did_you_mean(word, choices)}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def cast_option(name: str, text: str, default: Any) -> Any:
    """Text to the type of the default; booleans are 0, 1, true or false and nothing else."""
    kind = type(default)
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "0, 1, true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text}: expected {expected}, like {default}") from None


def parse_environment(environ: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`NAME=value`: every option has its name in upper case."""
    given = {name: environ[name.upper()] for name in defaults if name.upper() in environ}
    return {name: cast_option(name, text, defaults[name]) for name, text in given.items()}


def parse_command_line(argv: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`--name value`, `--name=value`, and a bare `--dry_run` for booleans."""
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in defaults:
            near = did_you_mean(f"--{name}", [f"--{known}" for known in defaults])
            raise ConfigError(f"unknown option {word.split('=')[0]}{near}; see --help")
        if not has_value:
            is_bare = not words or words[0].startswith("--")
            if not is_bare:
                text = words.pop(0)
            elif isinstance(defaults[name], bool):
                text = "1"
            else:
                raise ConfigError(f"option {word} needs a value")
        given[name] = cast_option(name, text, defaults[name])
    return given


def find_wrong_fields(values: Any, config: type) -> str:
    """Why values read from JSON cannot be settings of this config; empty if they can. Some may be missing."""
    if not isinstance(values, dict):
        return "not a table of settings"
    known = {f.name: f for f in fields(config)}
    for name, value in values.items():
        if name not in known:
            return f"unknown setting {name}{did_you_mean(name, known)}"
        if type(value) is not type(known[name].default):
            return f"{name}={value!r} is not of the kind of {known[name].default!r}"
    return ""


def describe_option(f: Field[Any], choices: Iterable[str] = ()) -> str:
    """The line of --help for a field."""
    words = ", ".join(choices or f.metadata["choices"])
    default = "" if f.default is MISSING else f" [{f.default}]"
    return f"  --{f.name:<22} {f.metadata['help']}{f': {words}' if words else ''}{default}"


class Parser(argparse.ArgumentParser):
    """The parser of every program but train_gpt.py: options are declared with underscores, and may be written with
    dashes. What stands after a lone -- belongs to another program and is left alone."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = list(sys.argv[1:] if args is None else args)
        own = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(write_with_underscores, words[:own]), *words[own:]], namespace)


def write_with_underscores(word: str) -> str:
    """An option with its dashes replaced; its value, and any other word, as it is."""
    found = re.fullmatch(r"--([\w-]+)(=.*)?", word, re.DOTALL)
    return f"--{found[1].replace('-', '_')}{found[2] or ''}" if found else word


def split_options(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a program is told itself, and the options of train_gpt.py that stand after --."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]
# ==== loopgolf/params.py ====
"""What a parameter declares, once, where it is made: its grid, its optimizer, whether it decays, how it starts.

    class Gate(DeclaringModule):
        weight: nn.Parameter

        def __init__(self, width):
            super().__init__()
            self.declare("weight", (width,), vector(start_at(1.0)))

Quantizer, optimizers, artifact, forecast and pictures go by these declarations; a parameter without one is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Start = Callable[[Tensor, torch.Generator], None]  # fills a tensor of zeros


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter."""

    group: str  # its optimizer and learning rate: matrix, table or vector
    # its grid, in training and in the file: core (matrices that the plan repeats), edge (other matrices), embed (token
    # embedding) or table (other tables); None: fp16
    grid: str | None
    decays: bool
    start: Start
    parts: tuple[int, ...] = ()  # rows of each projection that a matrix fuses

    @property
    def role(self) -> str:
        """What counts and pictures call it."""
        return self.grid or self.group


def matrix(grid: str, parts: tuple[int, ...], start: Start) -> ParamSpec:
    return ParamSpec("matrix", grid, decays=True, start=start, parts=parts)


def table(grid: str, start: Start) -> ParamSpec:
    return ParamSpec("table", grid, decays=True, start=start)


def vector(start: Start) -> ParamSpec:
    """Gains, scales, mixes, gates, skips: float32 whatever the matrices are, never decayed."""
    return ParamSpec("vector", None, decays=False, start=start)


class DeclaringModule(nn.Module):
    """A module whose parameters are made with what they declare."""

    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, ParamSpec] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        spec: ParamSpec,
        *,
        dtype: torch.dtype = torch.float32,
        when: bool = True,
    ) -> None:
        """Makes the attribute `name`: a parameter, or None unless `when`."""
        if not when:
            self.register_parameter(name, None)
            return
        self.declared[name] = spec
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


def collect_specs(model: nn.Module) -> dict[str, ParamSpec]:
    """The declaration of every parameter, in the order of named_parameters()."""
    specs = {}
    for name, _ in model.named_parameters():
        owner_name, _, own_name = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        declared = owner.declared if isinstance(owner, DeclaringModule) else {}
        if own_name not in declared:
            raise TypeError(f"parameter {name} was made without declare(): nothing knows its grid, optimizer or start")
        specs[name] = declared[own_name]
    return specs


@torch.no_grad()
def start_weights(model: nn.Module, seed: int) -> None:
    """Fresh weights, drawn on the CPU, so that every device and rank starts from the same ones."""
    generator = torch.Generator().manual_seed(seed)
    specs = collect_specs(model)
    for name, parameter in model.named_parameters():
        fresh = torch.zeros(parameter.shape)
        specs[name].start(fresh, generator)
        parameter.copy_(fresh)


def start_at(value: float) -> Start:
    def fill(fresh: Tensor, generator: torch.Generator) -> None:
        fresh.fill_(value)

    return fill


def start_normal(std: float) -> Start:
    def fill(fresh: Tensor, generator: torch.Generator) -> None:
        fresh.normal_(std=std, generator=generator)

    return fill


def start_orthogonal(parts: tuple[int, ...], scale: float = 1.0) -> Start:
    """Each fused projection orthogonal by itself."""

    def fill(fresh: Tensor, generator: torch.Generator) -> None:
        for part in fresh.split(parts):
            nn.init.orthogonal_(part, generator=generator)
        if scale != 1.0:
            fresh.mul_(scale)

    return fill


def start_stacked(first: Start, second: Start) -> Start:
    """For tensors (n, 2, ...): two parts that start differently."""

    def fill(fresh: Tensor, generator: torch.Generator) -> None:
        first(fresh[:, 0], generator)
        second(fresh[:, 1], generator)

    return fill


def start_identity(fresh: Tensor, generator: torch.Generator) -> None:
    """A matrix on two streams that takes the first one and nothing of the second."""
    rows = fresh.shape[0]
    fresh[:, :rows] = torch.eye(rows)
# ==== loopgolf/plan.py ====
"""The loop plan: which physical blocks a forward applies, in which order, with what in between.

    plan  := item+            item := block | group
    group := '(' '^'? item+ '~'* ')' '*' count      block := one letter       count := integer | 'r'

A letter is a block, allocated at its first appearance; each appearance is one pass. Everything that depends on depth
is derived from the parsed plan.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from loopgolf.errors import ConfigError

LONGEST_TEXT = 1000
DEEPEST_NESTING = 16
HIGHEST_COUNT = 256


@dataclass(frozen=True)
class Depth:
    """How deep one forward is: repetitions of the *r group, and whether groups repeat at all."""

    r: int = 1
    loops: bool = True


ONCE = Depth(1, loops=False)  # every group runs once, with the parameters of its first repetition


@dataclass
class Pass:
    """One application of a physical block."""

    block: int
    slot: int  # row of the per-pass tables
    visit: int = 0  # rows of the tables before this one that belong to the same block
    enter: tuple[int, ...] = ()  # groups whose incoming stream is kept before this pass
    inject: tuple[int, ...] = ()  # groups whose kept stream is mixed in before this pass
    norm: bool = False  # a norm follows this pass
    ends: bool = False  # a repetition of a group ends with this pass
    repetitions_left: int | None = None  # of the *r group that this pass belongs to, if it does


@dataclass(frozen=True)
class Group:
    """`(items)*count` of a plan."""

    items: tuple[int | Group, ...]  # blocks are numbers
    count: int | None = 1  # None stands for r
    inject: tuple[int, ...] = ()  # the group's own number where ^ asks for its input
    norm_between: bool = False  # ~: a norm between two repetitions
    norm_last: bool = False  # ~~: a norm after the last one, too

    def count_passes(self, r: int) -> int:
        repetitions = r if self.count is None else self.count
        return repetitions * self.count_body(r)

    def count_body(self, r: int) -> int:
        """Passes of one repetition."""
        return sum(item.count_passes(r) if isinstance(item, Group) else 1 for item in self.items)

    def expand(self, depth: Depth, covered: int, first_slot: int) -> list[Pass]:
        """The passes, the first one at this row of the per-pass tables. The tables cover so many repetitions of the *r
        group; deeper ones reuse the last row."""
        rows = covered if self.count is None else self.count
        repetitions = depth.r if self.count is None else self.count
        if not depth.loops:
            repetitions = 1
        passes: list[Pass] = []
        for repetition in range(repetitions):
            is_last = repetition == repetitions - 1
            row = min(repetition, rows - 1)
            body = self.expand_body(depth, covered, first_slot + row * self.count_body(covered))
            body[0].inject = self.inject + body[0].inject
            if repetition == 0:
                body[0].enter = self.inject + body[0].enter
            if self.norm_last if is_last else self.norm_between:
                body[-1].norm = True
            if self.count != 1:
                body[-1].ends = True
            if self.count is None:
                for p in body:
                    p.repetitions_left = repetitions - 1 - repetition
            passes += body
        return passes

    def expand_body(self, depth: Depth, covered: int, slot: int) -> list[Pass]:
        """One repetition."""
        passes: list[Pass] = []
        for item in self.items:
            if isinstance(item, Group):
                passes += item.expand(depth, covered, slot)
                slot += item.count_passes(covered)
            else:
                passes.append(Pass(item, slot))
                slot += 1
        return passes

    def find_groups(self) -> list[Group]:
        """The groups within, at any depth."""
        groups = []
        for item in self.items:
            if isinstance(item, Group):
                groups += [item, *item.find_groups()]
        return groups


@dataclass(frozen=True)
class Plan:
    """A parsed loop plan."""

    body: Group  # all of it, once
    names: str  # letters of the blocks in order of first appearance
    injected: tuple[int, ...]  # numbers of the groups that re-inject their input

    def passes(self, depth: Depth, covered: int) -> list[Pass]:
        """The passes of a forward; `covered` repetitions of the *r group have rows in the per-pass tables."""
        owners = self.slot_owners(covered)
        passes = self.body.expand(depth, covered, 0)
        for p in passes:
            p.visit = owners[: p.slot].count(p.block)
        return passes

    def count_passes(self, r: int) -> int:
        return self.body.count_passes(r)

    def slot_owners(self, covered: int) -> list[int]:
        """The block that each row of the per-pass tables belongs to."""
        return [p.block for p in self.body.expand(Depth(covered), covered, 0)]

    @property
    def has_groups(self) -> bool:
        return bool(self.body.find_groups())

    @property
    def is_variable(self) -> bool:
        """Whether one group repeats r times."""
        return any(group.count is None for group in self.body.find_groups())

    @property
    def injects_into_variable_group(self) -> bool:
        """Whether every repetition of the *r group sees the stream that entered it."""
        return any(group.count is None and group.inject for group in self.body.find_groups())


@functools.lru_cache
def parse_plan(text: str) -> Plan:
    """The plan that a text stands for; errors point at the character."""
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"plan of {len(text)} characters: at most {LONGEST_TEXT} are read")
    return PlanParser(text).parse()


class PlanParser:
    """Recursive descent over the text of a plan."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.names: dict[str, int] = {}  # letter -> block number
        self.groups = 0  # opened so far
        self.injected: list[int] = []
        self.is_variable = False

    def parse(self) -> Plan:
        items = self.parse_items(nesting=0)
        if self.position < len(self.text):
            self.fail(self.expected_item())
        return Plan(Group(items), "".join(self.names), tuple(self.injected))

    def parse_items(self, nesting: int) -> tuple[int | Group, ...]:
        items: list[int | Group] = []
        while not items or self.sees("[a-zA-Z(]"):
            if self.sees("[a-zA-Z]"):
                letter = self.take("[a-zA-Z]")
                items.append(self.names.setdefault(letter, len(self.names)))
            elif self.sees(r"\(") and nesting < DEEPEST_NESTING:
                items.append(self.parse_group(nesting + 1))
            else:
                self.fail(self.expected_item())
        return tuple(items)

    def parse_group(self, nesting: int) -> Group:
        opened_at = self.position + 1
        number = self.groups
        self.groups += 1
        self.take(r"\(")
        inject: tuple[int, ...] = ()
        if self.sees(r"\^"):
            self.take(r"\^")
            inject = (number,)
            self.injected.append(number)
        items = self.parse_items(nesting)
        marks = self.take("~{0,2}")
        self.take(r"\)", f"a letter, at most two '~', or ')' for the '(' at character {opened_at}")
        self.take(r"\*", "'*' and a count, as in (ab)*3")
        return Group(items, self.parse_count(), inject, norm_between=marks != "", norm_last=marks == "~~")

    def parse_count(self) -> int | None:
        expected = f"a count from 1 to {HIGHEST_COUNT}, or r in one group only"
        if self.sees("r(?![0-9])") and not self.is_variable:
            self.take("r")
            self.is_variable = True
            return None
        if not self.sees("[1-9][0-9]{0,2}(?![0-9])"):
            self.fail(expected)
        start = self.position
        count = int(self.take("[0-9]+"))
        if count > HIGHEST_COUNT:
            self.position = start
            self.fail(expected)
        return count

    def sees(self, pattern: str) -> bool:
        return re.compile(pattern).match(self.text, self.position) is not None

    def take(self, pattern: str, expected: str = "") -> str:
        found = re.compile(pattern).match(self.text, self.position)
        if not found:
            self.fail(expected)
        self.position = found.end()
        return found[0]

    def expected_item(self) -> str:
        return f"a block letter or '(' (nested at most {DEEPEST_NESTING} deep)"

    def fail(self, expected: str) -> NoReturn:
        character = self.text[self.position : self.position + 1] or "end"
        raise ConfigError(f"plan {self.text!r}, character {self.position + 1} ({character}): expected {expected}")


def parse_pass_set(name: str, text: str, n_passes: int) -> frozenset[int]:
    """`none`, `all`, `last4` or `3,5,6` as a set of pass numbers, counted from 0."""
    if text == "none":
        return frozenset()
    passes = range(n_passes)
    problem = f"{name}={text}: expected none, all, last4 or numbers like 3,5,6 from 0 to {n_passes - 1}"
    try:
        if text == "all":
            chosen: Sequence[int] = passes
        elif text.startswith("last"):
            chosen = range(n_passes - int(text[4:]), n_passes)
        else:
            chosen = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(problem) from None
    if not all(number in passes for number in chosen):
        raise ConfigError(problem)
    return frozenset(chosen)
# ==== loopgolf/quantize.py ====
"""How a parameter is stored: one quantizer for training and for export.

A format turns a weight into the tensors that lie in the file, and back. Training rounds with the same format, so the
file holds what was trained. `RowGrid` puts every row of a matrix on a grid of integer codes; `Half` is fp16.

    stored = fmt.quantize(weight)                   the tensors that `fmt.layout(shape)` describes
    stored = fmt.quantize(weight, hessian)          the same grid, other points of it (GPTQ)
    stored = fmt.quantize(weight, hessian, step)    another grid as well
    weight = fmt.dequantize(stored)
    fmt.write_rounded(weight, out)                  there and back
    fmt.expected_bytes(shape)                       in the file, before there are weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.rounding import (
    STEP_BITS,
    dequantize_rows,
    find_steps,
    quantize_rows,
    round_to_grid_ref,
    shorten_mantissa,
)

CODER_SHARE = 0.997  # file bytes over the order-0 entropy of codes: classes of columns bring it below 1
HALF_BYTES = 1.7  # of an fp16 number in the file, compressed a little
EXPONENT_BITS = 1.4  # of a row's step in the file: steps of one matrix are alike
SAMPLED_ROWS = 256  # are enough to measure the entropy of a matrix


class StoredTensor(NamedTuple):
    """One tensor of a parameter in the file."""

    suffix: str  # its name is the parameter's followed by this
    shape: tuple[int, ...]
    dtype: torch.dtype  # int8: codes for the entropy coder; float16: for the other stream

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Format(Protocol):
    """How a parameter is stored."""

    @property
    def scheme(self) -> str:
        """What tables call it."""

    @property
    def bits(self) -> int:
        """The most that one number takes before entropy coding."""

    def layout(self, shape: tuple[int, ...]) -> list[StoredTensor]:
        """What lies in the file for a parameter of this shape."""

    def quantize(self, weight: Tensor, hessian: Tensor | None = None, step: Tensor | None = None) -> list[Tensor]:
        """What is stored. `hessian` (columns, columns): what errors in a row cost by direction, where it is known.
        `step`: of each row, where the grid is not that of training."""

    def dequantize(self, stored: Sequence[Tensor]) -> Tensor:
        """The weight that the model computes with."""

    def write_rounded(self, weight: Tensor, out: Tensor) -> None:
        """The weight as it will be stored, into the tensor that the model computes with."""

    def expected_bytes(self, shape: tuple[int, ...], weight: Tensor | None = None) -> float:
        """Bytes in the file: of this weight, or of a Gaussian one."""

    def is_valid(self, stored: Sequence[Tensor]) -> bool:
        """Whether tensors read from a file can be this parameter."""


@dataclass(frozen=True)
class RowGrid:
    """Integer codes times one fp16 step per row, for matrices (rows, columns). The step is k standard deviations over
    the largest code, without a floor: then bits per weight depend on k alone. A reader needs no k."""

    bits: int
    k: float = 1.0
    step_bits: int = STEP_BITS  # that the mantissa of a step keeps

    @property
    def scheme(self) -> str:
        return "int"

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def layout(self, shape: tuple[int, ...]) -> list[StoredTensor]:
        return [StoredTensor("", shape, torch.int8), StoredTensor(".step", shape[:1], torch.float16)]

    def quantize(self, weight: Tensor, hessian: Tensor | None = None, step: Tensor | None = None) -> list[Tensor]:
        step = self.find_steps(weight) if step is None else step
        if hessian is not None:
            return [round_with_feedback(weight, step, self.largest, hessian), step]
        return [quantize_rows(weight, step, self.largest), step]

    def find_steps(self, weight: Tensor) -> Tensor:
        """The steps of training."""
        return find_steps(weight, self.largest, self.k, self.step_bits)

    def store_steps(self, step: Tensor) -> Tensor:
        """Other steps, as they can be stored."""
        return shorten_mantissa(step.clamp(max=65504).half(), self.step_bits)

    def dequantize(self, stored: Sequence[Tensor]) -> Tensor:
        codes, step = stored
        return dequantize_rows(codes, step)

    def write_rounded(self, weight: Tensor, out: Tensor) -> None:
        round_to_grid_ref(weight, out, self.largest, self.k, self.step_bits)

    def expected_bytes(self, shape: tuple[int, ...], weight: Tensor | None = None) -> float:
        bits = self.gaussian_bits() if weight is None else self.measure_bits(weight)
        return CODER_SHARE * bits * math.prod(shape) / 8 + (EXPONENT_BITS + self.step_bits) * shape[0] / 8

    def is_valid(self, stored: Sequence[Tensor]) -> bool:
        codes, step = stored
        return bool((codes.short().abs() <= self.largest).all() and step.isfinite().all())

    def gaussian_bits(self) -> float:
        """Entropy of a code in bits when weights are Gaussian: no distribution of the same spread needs more."""
        edges = (torch.arange(-self.largest, self.largest, dtype=torch.float64) + 0.5) * (self.k / self.largest)
        return compute_bits(torch.special.ndtr(edges).diff(prepend=torch.zeros(1), append=torch.ones(1)))

    def measure_bits(self, weight: Tensor) -> float:
        """Entropy of the codes of some hundred rows of a weight."""
        rows = weight[:: 1 + len(weight) // SAMPLED_ROWS]
        return compute_entropy(self.quantize(rows)[0])


@dataclass(frozen=True)
class Half:
    """Plain fp16."""

    @property
    def scheme(self) -> str:
        return "fp16"

    @property
    def bits(self) -> int:
        return 16

    def layout(self, shape: tuple[int, ...]) -> list[StoredTensor]:
        return [StoredTensor("", shape, torch.float16)]

    def quantize(self, weight: Tensor, hessian: Tensor | None = None, step: Tensor | None = None) -> list[Tensor]:
        return [weight.half()]

    def dequantize(self, stored: Sequence[Tensor]) -> Tensor:
        return stored[0]

    def write_rounded(self, weight: Tensor, out: Tensor) -> None:
        """Vectors are few, and train in float32: only the file rounds them."""
        out.copy_(weight)

    def expected_bytes(self, shape: tuple[int, ...], weight: Tensor | None = None) -> float:
        return HALF_BYTES * math.prod(shape)

    def is_valid(self, stored: Sequence[Tensor]) -> bool:
        return bool(stored[0].isfinite().all())


def compute_entropy(codes: Tensor) -> float:
    """Bits per code of an order-0 coder for these int8 codes."""
    return compute_bits(torch.bincount(codes.flatten().long() + 128, minlength=256).double())


def compute_bits(weights: Tensor) -> float:
    """Bits per symbol of an order-0 code for symbols that occur in these proportions."""
    shares = weights[weights > 0] / weights.sum()
    return -(shares * shares.log2()).sum().item()


def round_with_feedback(weight: Tensor, step: Tensor, largest: int, hessian: Tensor) -> Tensor:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): each column's rounding error moves the columns that are still open
    so that the outputs change least. Columns go by falling energy."""
    order = hessian.diagonal().argsort(descending=True)
    open_weight = weight.float()[:, order]
    hessian = hessian[order][:, order].float()
    energy = hessian.diagonal().mean() + 1e-12
    eye = torch.eye(len(order), device=hessian.device)
    for damping in (0.01, 0.1, 1.0, 10.0):  # rank-deficient inputs need more than 1% of the mean energy
        root, failed = torch.linalg.cholesky_ex(hessian + damping * energy * eye)
        if not failed:
            break
    spread = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    inverse_step = torch.where(step > 0, step, torch.inf).float().reciprocal()
    codes = torch.zeros_like(open_weight)
    for start in range(0, len(order), 128):
        stop = min(start + 128, len(order))
        errors = torch.zeros_like(open_weight[:, start:stop])
        for i in range(start, stop):
            codes[:, i] = (open_weight[:, i] * inverse_step).round().clamp(-largest, largest)
            errors[:, i - start] = (open_weight[:, i] - codes[:, i] * step.float()) / spread[i, i]
            open_weight[:, i:stop] -= errors[:, i - start, None] * spread[i, i:stop]
        open_weight[:, stop:] -= errors @ spread[start:stop, stop:]
    return torch.zeros_like(codes).index_copy(1, order, codes).to(torch.int8)
# ==== loopgolf/recall.py ====
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
# ==== loopgolf/runtime.py ====
"""One process of a run: its rank, where and in what it computes, its log, its clock, its files, the signals that it
gets, what its machine needs, and how it ends. The ranks of a run only ever agree through the methods of RunContext.

Log lines are `event key:value key:value …`, blanks in values percent-encoded: `dict(pair.split(":", 1) for pair in
line.split()[1:])` reads one back. Free text stands on lines that start with #.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from loopgolf.errors import Stop


class Log:
    """Lines to the terminal and to a file; progress to a terminal only."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.file: TextIO = io.StringIO()  # until there is a file, lines wait in memory

    def open(self, path: Path) -> None:
        if self.quiet:
            return
        early = self.file
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (until the end)
        if isinstance(early, io.StringIO):
            self.file.write(early.getvalue())

    def line(self, text: str) -> None:
        if self.quiet:
            return
        tqdm.write(text)
        sys.stdout.flush()
        print(text, file=self.file, flush=True)

    def __call__(self, event: str, **pairs: object) -> None:
        self.line(" ".join([event, *(f"{key}:{format_value(value)}" for key, value in pairs.items())]))

    def progress_bar(self, total: float, name: str) -> tqdm:
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        # disable=None hides it where there is no terminal
        return tqdm(total=total, desc=name, leave=False, disable=self.quiet or None, bar_format=form)


def format_value(value: object) -> str:
    """One word: floats with 4 decimals (text keeps its own), blanks percent-encoded so that a blank splits the line."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return re.sub(r"[%\s]", lambda blank: quote(blank[0]), text) or "-"


def write_atomic(path: Path, content: bytes) -> None:
    """The whole file or none: written under another name, flushed to disk, renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunContext:
    """One process among `world` of them. `compile`: none, block or full; `code_bytes`: what the code takes;
    `host_group`: where ranks exchange what their processors know, so that no device is waited for (None: the group
    of the devices is that of the processors)."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: str
    log: Log
    code_bytes: int = 0
    host_group: dist.ProcessGroup | None = None

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """The tensor of every rank, in the order of ranks."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return parts

    def wait_for_all(self) -> None:
        """Returns once every rank is here."""
        self.gather_numbers(0.0)

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """For each number its values on all ranks. Only processors take part."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        return torch.stack(self.gather(mine, self.host_group), 1).tolist()

    def mean_loss(self, loss: Tensor) -> float:
        """Over all ranks. The device is waited for here, once a step."""
        losses: list[float] = torch.stack(self.gather(loss.double())).tolist()  # sync
        return sum(losses) / self.world


class Clock:
    """Seconds of training: runs from start() to stop(), continues from what a checkpoint had used. Ranks agree on the
    slowest one's. It does not wait for the device: whoever reads it has just fetched what a step computed."""

    def __init__(self, ctx: RunContext, used_s: float = 0.0):
        self.ctx = ctx
        self.used_s = used_s
        self.started_at = 0.0

    def start(self) -> None:
        self.ctx.sync()
        self.ctx.log("clock", what="start", used_s=self.used_s)
        self.started_at = time.perf_counter()

    def read(self) -> float:
        """Seconds used, on this rank."""
        return self.used_s + time.perf_counter() - self.started_at

    def read_slowest(self) -> float:
        return max(self.ctx.gather_numbers(self.read())[0])

    def stop(self) -> float:
        self.ctx.sync()
        total = self.read_slowest()
        self.ctx.log("clock", what="stop", used_s=total)
        return total


class StopSignals:
    """SIGTERM and Ctrl-C ask the run to stop after the step at hand; a second one acts as it did before."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> StopSignals:
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(number, self.before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_program(program: Callable[..., int | None], *given: Any) -> int:
    """The exit code of a program that may end with one line instead of a result."""
    try:
        code = program(*given) or 0
        sys.stdout.flush()  # or what cannot be printed would show when nobody catches it any more
        return code
    except BrokenPipeError:
        sys.stdout = None  # whoever read it has seen enough; nothing is left to flush
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except (Stop, OSError) as error:
        print_error(error)
        return getattr(error, "exit_code", 1)


def print_error(error: BaseException) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def keep_freed_memory() -> None:
    """What a step frees is there for the next one. By itself glibc gives it back to the system, and every page of it
    costs a fault when it comes again: 8% of a step."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie unused at the top of the heap
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: from which size on a piece is mapped by itself


def find_compiler_fault(device: torch.device) -> str:
    """Why torch.compile cannot work here, in a line: mostly no C++ compiler, or one without OpenMP."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"torch.compile failed ({str(error).strip().splitlines()[0][:100]})"
    return ""
# ==== loopgolf/scoring.py ====
"""What a score means: bits per byte of text that the model has not seen.

    val_bpb = (sum of nats over scored tokens / ln 2) / UTF-8 bytes of these tokens

A scorer gives log-probabilities over the whole vocabulary for tokens that it has not seen, from tokens before them
only, and may adapt to tokens once they are scored. One loop drives every scorer, from left to right, every token
once; BpbMeter alone counts nats, tokens and bytes. Scorers that adapt are in adapting.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

from loopgolf.cache import Cache
from loopgolf.layers import Adapter, Linear
from loopgolf.options import option
from loopgolf.plan import Depth, Pass
from loopgolf.runtime import RunContext
from loopgolf.words import JOIN, drop_marks, has_marks

OnPass = Callable[[Pass, Tensor], Tensor]  # sees a pass and the stream after it, returns the stream that goes on
Lora = Mapping[str, Mapping[str, Adapter]]  # adapters by block and layer
Track = list[list["Window"]]  # chunks of windows


@dataclass(frozen=True)
class Scoring:
    """How a model is scored. An artifact stores it: it is fixed before the model is trained."""

    vocab_size: int = option(1024, "size of the tokenizer's vocabulary", low=2, high=65536)
    bos_id: int = option(1, "token that starts every document")
    seq_len: int = option(2048, "tokens in a training sequence and in a scoring window", low=2, high=2**20)
    score_mode: str = option("sgd", "how val_bpb is computed")
    score_batch: int = option(32, "windows in one forward pass of a rank while scoring", low=1, high=65536)
    canonical: bool = option(False, "what the tokenizer could never write next gets almost no probability")
    recall_share: float = option(0.0, "part of a prediction that repeats what followed similar states", high=0.9)
    recall_sharpness: float = option(16.0, "how similar those have to be, by the cosine of two states")
    stride: int = option(64, "sliding: tokens that a window scores", low=1)
    band: int = option(0, "banded and lora: positions that a position attends to (0 = seq_len)")
    ttt_chunk: int = option(32768, "sgd: tokens that are scored before the weights adapt to them", low=1)
    ttt_lr: float = option(0.002, "sgd: learning rate at the first chunk, falling to 0 as a cosine")
    ttt_momentum: float = option(0.9, "sgd: momentum", high=1)
    ttt_epochs: int = option(3, "sgd: passes over each chunk", high=1000)
    ttt_batch: int = option(16, "sgd: sequences of a chunk in one update, over all ranks", low=1, high=65536)
    ttt_clip: float = option(1.0, "sgd: largest gradient norm")
    ttt_freeze: str = option("a", "sgd: letters of the blocks that stay as they are")
    lora_rank: int = option(8, "lora: rank of the adapters that each document gets", low=1, high=65536)
    lora_chunk: int = option(256, "lora: tokens of a document that are scored before its adapters learn", low=1)
    lora_lr: float = option(0.01, "lora: learning rate of the adapters (Adam)")


class Model(Protocol):
    """What a scorer asks of a model. Called with tokens and targets it gives the loss."""

    is_compiled: bool

    def hidden(
        self,
        tokens: Tensor,
        depth: Depth | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> Tensor:
        """(B, T) tokens to normalised states (B, T, D). With a cache the tokens continue its stream."""

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) to (..., V)."""

    def linears(self) -> dict[str, dict[str, Linear]]:
        """By block and layer, the linear layers that an adapter can be put on."""

    def parameters_of_block(self, letter: str) -> list[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def __call__(self, tokens: Tensor, targets: Tensor) -> Any: ...


class Mask(Protocol):
    """What a tokenizer rules out."""

    def __call__(self, previous: Tensor, log_probs: Tensor) -> Tensor:
        """Log-probabilities (n, V) after tokens `previous` (n,), without what can never come next."""

    def check_text(self, tokens: Tensor) -> None:
        """Refuses a text in which something stands that the mask rules out."""


class Memory(Protocol):
    """What stands above in a batch of windows, and what it says of the next tokens."""

    def add(self, inputs: Tensor, states: Tensor) -> None:
        """The next positions of the windows: inputs (rows, T) and their states (rows, T, D)."""

    def mix(self, log_probs: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        """log_probs (n, V), with what the windows `owners` (n,) hold before and at their positions `places` (n,)."""


class Meter(Protocol):
    """What is told every distribution."""

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        """log_probs (n, V): what was predicted for tokens[positions]."""


class ByteCounter:
    """UTF-8 bytes that tokens stand for: a piece's own bytes, plus one for its leading space unless the previous token
    is a boundary (a control, unknown or unused id). Marks of words count nothing, nor does a space behind JOIN."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        ids = range(tokenizer.vocab_size())
        is_special = [tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids]
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        is_marked = has_marks(tokenizer)
        contents = [drop_marks(piece) if is_marked else piece for piece in pieces]
        own = [1 if tokenizer.is_byte(i) else len(contents[i].removeprefix("▁").encode()) for i in ids]
        self.own_bytes = np.where(is_special, 0, own)
        self.is_boundary = np.array(is_special)
        self.has_space = np.array([piece.startswith("▁") for piece in pieces]) & ~self.is_boundary
        self.is_joint = np.array([is_marked and piece.endswith(JOIN) for piece in pieces])

    def count(self, previous: np.ndarray, targets: np.ndarray) -> int:
        spaces = self.has_space[targets] & ~self.is_boundary[previous] & ~self.is_joint[previous]
        return int(self.own_bytes[targets].sum() + spaces.sum())


class Window(NamedTuple):
    """Targets tokens[first:stop] are scored from inputs that begin at tokens[start]."""

    start: int
    first: int
    stop: int


class Scored(NamedTuple):
    """States that predict targets."""

    positions: Tensor  # (n,): of the targets in the text
    states: Tensor  # (n, D)
    owners: Tensor  # (n,): the window of each, by its place in the batch
    places: Tensor  # (n,): of each state in its window
    memory: Memory | None


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


class BpbMeter:
    """Sums of this rank; total() adds the ranks up."""

    def __init__(self, counter: ByteCounter):
        self.counter = counter
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, tokens: Tensor, positions: Tensor, log_probs: Tensor) -> None:
        targets, previous = tokens[positions], tokens[positions - 1]
        nats = -log_probs.gather(1, targets.to(log_probs.device)[:, None]).double().sum().item()  # sync
        n_bytes = self.counter.count(previous.numpy(), targets.numpy())
        self.sums += torch.tensor([nats, len(targets), n_bytes], dtype=torch.float64)

    def total(self, ctx: RunContext) -> Score:
        nats, tokens, n_bytes = ctx.sum(self.sums.clone().to(ctx.device)).tolist()
        return Score(nats, round(tokens), round(n_bytes))


class WindowShape(NamedTuple):
    """Windows of `length` inputs that score their last `stride` targets, the first window all its targets; a position
    attends to the last `band` ones."""

    length: int
    stride: int
    band: int


def banded_shape(config: Scoring, stretch: int) -> WindowShape:
    """Windows `stretch` times as long as in training, in which a position attends to the last `band` ones only; they
    stream through a cache."""
    length, band = stretch * config.seq_len, config.band or config.seq_len
    return WindowShape(length, length - band, band)


class MadeUpTimes(NamedTuple):
    """What a made-up text took."""

    scoring_s: float
    observing_s: float
    observed: int  # targets of the chunk


class WindowScorer:
    """Scores windows, and never adapts.

    A pass over the tokens consists of tracks that do not know of each other, a track of chunks: the windows of a chunk
    are scored, then the scorer may observe them and adapt before the next chunk. Ranks share the windows of a chunk,
    or, with is_per_document, the tracks."""

    is_per_document = False
    adapts = False

    def __init__(self, model: Model, config: Scoring, ctx: RunContext, shape: WindowShape):
        self.model = model
        self.config = config
        self.ctx = ctx
        self.length, self.stride, self.band = shape
        self.rows = config.score_batch  # windows in a forward pass
        self.lora: dict[str, dict[str, Adapter]] = {}
        self.on_pass: OnPass | None = None
        self.mask: Mask | None = None
        self.build_memory: Callable[[], Memory] | None = None
        self.updates = 0  # adaptation: updates made
        self.skipped = 0  # and updates that the time did not allow
        self.update_s = 0.0  # seconds of the slowest update
        self.forwarded = 0  # tokens that went through the model, padding included
        model.eval()

    @staticmethod
    def small_settings(config: Scoring) -> dict[str, int]:
        """Settings with which a short text, as an audit scores it, has many batches and chunks."""
        return dict(score_batch=2)

    def windows(self, n_tokens: int) -> list[Window]:
        firsts = [1, *range(1 + self.length, n_tokens, self.stride)] if n_tokens > 1 else []
        stops = [*firsts[1:], n_tokens]
        lead = self.length - self.stride
        return [Window(max(0, first - 1 - lead), first, stop) for first, stop in zip(firsts, stops)]

    def tracks(self, tokens: Tensor) -> list[Track]:
        return [[self.windows(len(tokens))]]

    def scored_states(self, tokens: Tensor, windows: list[Window]) -> Iterator[Scored]:
        """The states that predict the targets of the windows, in blocks of seq_len inputs. The windows, at most `rows`
        of them, are padded to one shape if that saves compilation: what stands after a token, or in another row, cannot
        change its states."""
        block = self.config.seq_len
        rows = self.rows if self.model.is_compiled else len(windows)
        inputs = torch.full((rows, self.length), self.config.bos_id)
        for row, w in zip(inputs, windows):
            row[: w.stop - 1 - w.start] = tokens[w.start : w.stop - 1]
        inputs = inputs.to(self.ctx.device)
        lora = self.first_rows_of_lora(rows)
        has_past = self.length > block or self.band < block
        cache = Cache(self.band) if has_past else None
        memory = self.start_memory()
        for at in range(0, max(w.stop - 1 - w.start for w in windows), block):
            piece = inputs[:, at : at + block]
            self.forwarded += piece.numel()
            states = self.model.hidden(piece, cache=cache, lora=lora, on_pass=self.on_pass)
            if memory:
                memory.add(piece, states)
            positions: list[int] = []
            scored: list[Tensor] = []
            owners: list[int] = []
            places: list[int] = []
            for row, (w, row_states) in enumerate(zip(windows, states)):
                begin = w.start + at
                first, stop = max(w.first - 1, begin), min(w.stop - 1, begin + block)  # inputs that predict a target
                if first < stop:
                    positions += range(first + 1, stop + 1)
                    scored.append(row_states[first - begin : stop - begin])
                    owners += [row] * (stop - first)
                    places += range(first - w.start, stop - w.start)
            if positions:
                device = self.ctx.device
                yield Scored(
                    positions=torch.tensor(positions),
                    states=torch.cat(scored),
                    owners=torch.tensor(owners).to(device),
                    places=torch.tensor(places).to(device),
                    memory=memory,
                )

    def start_memory(self) -> Memory | None:
        """Of a batch of windows, with nothing in it yet."""
        return self.build_memory() if self.build_memory else None

    def first_rows_of_lora(self, rows: int) -> Lora:
        return {
            block: {layer: (down[:rows], up[:rows]) for layer, (down, up) in layers.items()}
            for block, layers in self.lora.items()
        }

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, windows: list[Window]) -> Iterator[tuple[Tensor, Tensor]]:
        """Every target of the windows once: positions (n,), and log-probabilities (n, V) over the whole vocabulary."""
        for scored in self.scored_states(tokens, windows):
            yield scored.positions, self.distribution(tokens[scored.positions - 1], scored)

    def distribution(self, previous: Tensor, scored: Scored) -> Tensor:
        """Log-probabilities (n, V) of what comes after `previous` (n,), as they are scored and coded."""
        log_probs = self.predict(scored.states, scored.owners)
        if scored.memory:
            log_probs = scored.memory.mix(log_probs, scored.owners, scored.places)
        return self.mask(previous, log_probs) if self.mask else log_probs

    def predict(self, states: Tensor, owners: Tensor) -> Tensor:
        """States (n, D) to log-probabilities (n, V). `owners`: the window of each, by its place in the batch."""
        return self.model.logits(states).log_softmax(-1)

    def learned(self) -> list[Tensor]:
        """What observations change, besides the weights of the model."""
        return [t for layers in self.lora.values() for adapter in layers.values() for t in adapter]

    def observe(self, tokens: Tensor, chunk: list[Window], done: float, until: float) -> None:
        """Adapts to a chunk, now that all of it is scored, but not beyond the time `until`. `done`: share of the
        track that is scored."""

    def reset(self) -> None:
        """Forgets what was observed: the model is as it was."""

    def warm_up(self) -> None:
        """Compiles on made-up tokens what a pass needs, and leaves no trace."""
        self.score_made_up(self.rows)

    def estimate_seconds(self, n_tokens: int) -> float:
        """How long a pass over so many tokens takes, from a batch of made-up ones."""
        n_windows = self.rows if self.model.is_compiled else min(self.rows, 8)  # compiled, all rows cost the same
        self.score_made_up(n_windows)  # the first forward pays for what later ones find done
        took = self.score_made_up(n_windows)
        scoring_s = took.scoring_s / n_windows * n_tokens / self.stride / self.ctx.world
        observing_s = took.observing_s / took.observed * n_tokens
        if self.is_per_document:
            observing_s /= self.ctx.world
        return scoring_s + observing_s

    def made_up_length(self, n_windows: int) -> int:
        """Tokens of a text that has so many windows and a whole chunk."""
        return n_windows * self.length

    def score_made_up(self, n_windows: int) -> MadeUpTimes:
        """Scores so many windows and observes a chunk, of which nothing is left afterwards."""
        generator = torch.Generator().manual_seed(0)
        other_id = 0 if self.config.bos_id else 1
        tokens = torch.randint(self.config.vocab_size, (1 + self.made_up_length(n_windows),), generator=generator)
        tokens[tokens == self.config.bos_id] = other_id
        tokens[:: self.length] = self.config.bos_id
        chunk = self.tracks(tokens)[0][0]
        started = time.perf_counter()
        for _ in self.log_probs(tokens, chunk[:n_windows]):
            pass
        self.ctx.sync()
        scored = time.perf_counter()
        self.observe(tokens, chunk, 0.0, math.inf)
        self.ctx.sync()
        observed = time.perf_counter()
        self.reset()
        self.updates = self.skipped = self.forwarded = 0
        self.update_s = 0.0
        return MadeUpTimes(scored - started, observed - scored, sum(w.stop - w.first for w in chunk))

    def is_late(self, until: float) -> bool:
        """Whether an update would end after `until` on any rank; counts it as made or skipped."""
        late = torch.tensor(float(time.perf_counter() + 1.5 * self.update_s > until), device=self.ctx.device)
        if not self.is_per_document:
            late = self.ctx.sum(late)
        is_late = late.item() > 0  # sync
        if is_late:
            self.skipped += 1
        else:
            self.updates += 1
        return is_late


class PlainScorer(WindowScorer):
    """Windows that do not overlap."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, WindowShape(config.seq_len, config.seq_len, config.seq_len))


class SlidingScorer(WindowScorer):
    """Short strides, so that every target sees a long context, at many times the work."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, WindowShape(config.seq_len, config.stride, config.seq_len))


class BandedScorer(WindowScorer):
    """Every target sees a long context at about the price of plain."""

    def __init__(self, model: Model, config: Scoring, ctx: RunContext):
        super().__init__(model, config, ctx, banded_shape(config, stretch=5))


def score_tokens(
    scorer: WindowScorer, tokens: Tensor, meter: Meter, name: str = "", deadline: float = math.inf
) -> None:
    """One pass from left to right: score a chunk, shared over ranks, then let the scorer see it. Adaptation stops when
    the rest, scored without it, would just be done by the deadline."""
    ctx = scorer.ctx
    tracks = scorer.tracks(tokens)
    share = slice(ctx.rank, None, ctx.world)
    if scorer.is_per_document:
        tracks = tracks[share]
        share = slice(None)
    left = sum(len(chunk[share]) for track in tracks for chunk in track)  # windows
    done, spent_s = 0, 0.0
    with ctx.log.progress_bar(left, f"scoring {name}") as bar:
        for track in tracks:
            for index, chunk in enumerate(track):
                mine = chunk[share]
                for at in range(0, len(mine), scorer.rows):
                    batch = mine[at : at + scorer.rows]
                    started = time.perf_counter()
                    for positions, log_probs in scorer.log_probs(tokens, batch):
                        meter.add(tokens, positions, log_probs)
                    spent_s += time.perf_counter() - started
                    done += len(batch)
                    left -= len(batch)
                    bar.update(len(batch))
                if index + 1 < len(track):
                    rest_s = 1.2 * left * spent_s / max(done, 1)
                    scorer.observe(tokens, chunk, index / len(track), deadline - rest_s)
            scorer.reset()
# ==== loopgolf/source.py ====
"""Which files a run is made of: the script and the modules of this repository that it imports.

An import inside a function is lazy: it counts only for the runs that use it, which name it. Imports name the whole way
(`from loopgolf.plan import Plan`), never relative to the importing file.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

ENTRY = "train_gpt"


def find_counted(root: Path, lazy: Iterable[str]) -> dict[str, Path]:
    """The entry, all that it imports from the repository outside of functions, directly or not, and the lazy modules
    with what these import; each with the packages that it lies in. Dotted name to file, in the order of names."""
    found: dict[str, Path] = {}

    def read(name: str) -> ast.Module | None:
        path = find_module(root, name)
        if path is None:
            return None
        found[name] = path
        return ast.parse(path.read_text(encoding="utf-8"))

    return {name: found[name] for name in follow_imports(read, lazy)}


def follow_imports(read: Callable[[str], ast.Module | None], lazy: Iterable[str]) -> list[str]:
    """Names of the entry, the lazy modules and all that they import, as far as `read` knows them."""
    found: set[str] = set()
    wanted = [ENTRY, *lazy]
    while wanted:
        name = wanted.pop()
        tree = None if name in found else read(name)
        if tree is not None:
            found.add(name)
            wanted += [*list_packages(name), *list_imports(tree)]
    return sorted(found)


def find_module(root: Path, name: str) -> Path | None:
    """The file of a module or package of this repository."""
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def list_packages(name: str) -> list[str]:
    """a and a.b for a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def list_imports(node: ast.AST) -> list[str]:
    """Names of modules, and of what may be modules, that are imported outside of functions."""
    names: list[str] = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return names
    if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for child in ast.iter_child_nodes(node):
        names += list_imports(child)
    return names


def hash_files(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
# ==== loopgolf/state.py ====
"""The state of training, with one owner: master weights, gradients, optimizers, the average, and the checkpoint.

The model computes with its own parameters: on the grid they are stored on, in the compute dtype. What learns are
float32 master weights. A shared weight is quantized once per step, when it is written to the model, and gradients pass
straight through. Early in a run the model may have them unrounded.

    state = TrainState(MasterWeights(parameters, formats), optimizers, average)
    loss.backward(); state.accumulate()        for every micro batch
    norm = state.reduce(ctx.sum, share, clip)
    state.step(lr_scale, momentum)
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopgolf.errors import DataError
from loopgolf.quantize import Format, Half
from loopgolf.runtime import write_atomic


class MasterWeights:
    """float32 weights that learn, with one flat gradient that ranks reduce at once."""

    def __init__(self, parameters: dict[str, nn.Parameter], formats: dict[str, Format] | None = None):
        self.parameters = parameters
        self.formats = formats or dict.fromkeys(parameters, Half())
        self.weights = {name: p.detach().float().clone().requires_grad_() for name, p in parameters.items()}
        sizes = [weight.numel() for weight in self.weights.values()]
        self.flat_grad = next(iter(self.weights.values())).new_zeros(sum(sizes))
        for weight, view in zip(self.weights.values(), self.flat_grad.split(sizes)):
            weight.grad = view.view_as(weight)
        # weights of one format and width are rounded as one matrix: small ones cost calls, not arithmetic
        self.alike: dict[tuple[Format, torch.Size, torch.dtype], list[str]] = {}
        for name, parameter in parameters.items():
            key = (self.formats[name], parameter.shape[1:], parameter.dtype)
            self.alike.setdefault(key, []).append(name)

    def accumulate(self) -> None:
        """Moves the gradients of the model into the float32 sum: a bf16 sum would drop small terms."""
        sums, terms = [], []
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                sums.append(self.grad(name))
                terms.append(parameter.grad)
                parameter.grad = None
        if terms:
            torch._foreach_add_(sums, terms)

    def grad(self, name: str) -> Tensor:
        """The piece of the flat gradient that belongs to a weight."""
        grad = self.weights[name].grad
        assert grad is not None
        return grad

    @torch.no_grad()
    def write(self, is_rounded: bool) -> None:
        """Writes the weights to the model, rounded as they will be stored or as they are."""
        if not is_rounded:
            torch._foreach_copy_(list(self.parameters.values()), list(self.weights.values()))
            return
        for (form, _, dtype), names in self.alike.items():
            rows = torch.cat([self.weights[name] for name in names])
            rounded = torch.empty_like(rows, dtype=dtype)
            form.write_rounded(rows, rounded)
            parameters: list[Tensor] = [self.parameters[name] for name in names]
            torch._foreach_copy_(parameters, rounded.split([len(p) for p in parameters]))

    def detached(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.weights.items()}


class WeightAverage:
    """Mean of the master weights over the last part of a run: equal (swa) or decaying (ema). None: the last weights."""

    def __init__(self, kind: str = "none", start: float = 0.0, every: int = 1, decay: float = 0.0):
        self.kind = kind
        self.start = start  # fraction of the budget
        self.every = every  # steps
        self.decay = decay
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], step: int, progress: float) -> None:
        if self.kind == "none" or progress < self.start or step % self.every:
            return
        self.count += 1
        share = 1.0 / self.count if self.kind == "swa" else 1.0 - self.decay
        for name, weight in weights.items():
            if self.count == 1:
                self.mean[name] = weight.detach().clone()
            else:
                self.mean[name].lerp_(weight, share)

    def result(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.mean or weights


class TrainState:
    """Everything that an update changes. `optimizers` hold the master weights; their groups may have a `peak` learning
    rate, which a step scales, and a `momentum`, which it sets."""

    def __init__(
        self,
        master: MasterWeights,
        optimizers: dict[str, torch.optim.Optimizer],
        average: WeightAverage | None = None,
        is_rounded: bool = True,
    ):
        self.master = master
        self.optimizers = optimizers
        self.average = average or WeightAverage()
        self.is_rounded = is_rounded  # what the model computes with
        master.write(is_rounded)

    def accumulate(self) -> None:
        self.master.accumulate()

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor], share: float, clip: float) -> Tensor:
        """Sums the gradient over ranks, scales it by `share`, clips its norm (0: no clipping) and returns the norm. A
        gradient that is not finite becomes zero, so that a run which stops at such a norm has weights that are good."""
        grad = sum_over_ranks(self.master.flat_grad).mul_(share)
        norm: Tensor = grad.norm()
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones_like(norm)
        grad.copy_(torch.where(norm.isfinite(), grad * factor, 0.0))
        return norm

    def step(self, lr_scale: float, momentum: float, is_rounded: bool = True) -> None:
        """One update of all weights, which the model then has rounded or not; the gradient is zero again."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_scale
                if "momentum" in group:
                    group["momentum"] = momentum
            optimizer.step()
        self.master.flat_grad.zero_()
        self.is_rounded = is_rounded
        self.master.write(is_rounded)

    def update_average(self, step: int, progress: float) -> None:
        self.average.update(self.master.weights, step, progress)

    def averaged_weights(self) -> dict[str, Tensor]:
        return self.average.result(self.master.detached())

    def state_dict(self) -> dict[str, Any]:
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        average = dict(mean=self.average.mean, count=self.average.count)
        return dict(weights=self.master.detached(), optimizers=optimizers, average=average, is_rounded=self.is_rounded)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self.master.weights.items():
            weight.copy_(state["weights"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.average.mean = state["average"]["mean"]
        self.average.count = state["average"]["count"]
        self.master.flat_grad.zero_()
        self.is_rounded = state["is_rounded"]
        self.master.write(self.is_rounded)


def save_checkpoint(path: Path, state: TrainState, position: dict[str, Any]) -> None:
    """Everything that the next step depends on. `position`: where the run stands, plain values."""
    content = dict(state=state.state_dict(), position=position, random=torch.get_rng_state())
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, state: TrainState, device: torch.device) -> dict[str, Any]:
    """Puts the state back and returns the position."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        state.load_state_dict(content["state"])
        torch.set_rng_state(content["random"].cpu())
        return dict(content["position"])
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        why = f"not a checkpoint of this run ({error.__class__.__name__})"
        raise DataError(f"{path}: {why}; delete it to start over") from None
# ==== loopgolf/words.py ====
"""One form for every word: `the`, `The`, `THE` and the end of `_the` are one word, and marks say what it looked like.

A plain tokenizer has to learn each of them anew, and a small model too. In marked text a word is lower case behind a
blank, and before the blank stands what was different: TITLE or UPPER, and JOIN where the text has no blank. So
"a DataFrame" becomes "a", TITLE, " data", TITLE, JOIN, " frame". Only ASCII letters make words. A mark in the text
itself, a control character that hardly ever occurs, becomes ESCAPE and a sign. Marks stand for no bytes, nor does a
blank behind JOIN.

A tokenizer that was trained on marked text has all the marks among its pieces: that is how everybody knows.

(Marks for case: CaseOps, parameter-golf #1729; marks for joints too: case_markup and joiner_annotate of OpenNMT's
Tokenizer.)
"""

from __future__ import annotations

import re

import sentencepiece

TITLE, UPPER, JOIN, ESCAPE = MARKS = "\x01\x02\x03\x04"
SIGNS = "!#$%"  # one for each mark, of one byte as it, and no part of a word either
WORD = re.compile(f"[{MARKS}]|(?P<blank> ?)(?P<word>[A-Z]{{2,}}(?![a-z])|[A-Z][a-z]*|[a-z]+)")


def has_marks(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    return all(tokenizer.piece_to_id(mark) != tokenizer.unk_id() for mark in MARKS)


def drop_marks(piece: str) -> str:
    return piece.translate(dict.fromkeys(map(ord, MARKS)))


def mark_words(text: str) -> str:
    return WORD.sub(mark_word, text)


def mark_word(found: re.Match[str]) -> str:
    word = found["word"]
    if word is None:
        return ESCAPE + SIGNS[MARKS.index(found[0])]
    lower = word.lower()
    case = ""
    if word != lower:
        case = UPPER if len(word) > 1 and word.isupper() else TITLE
    if found["blank"]:
        return f"{case} {lower}"
    at = found.start()
    goes_on = at == 0 or found.string[at - 1].isalnum()  # a document's first blank is the tokenizer's; `nd` of `2nd`
    if goes_on and not case:
        return lower
    return f"{case}{JOIN} {lower}"


def unmark_words(text: str) -> str:
    return Unmarker().feed(text.encode()).decode()


def decode_tokens(tokenizer: sentencepiece.SentencePieceProcessor, tokens: list[int]) -> str:
    """The text of a document."""
    text = tokenizer.decode(tokens)
    return unmark_words(text) if has_marks(tokenizer) else text


class Unmarker:
    """Marked bytes to those of the text, in any pieces."""

    def __init__(self) -> None:
        self.case = ""  # TITLE or UPPER while it holds
        self.is_inside = False  # a word in upper case has begun
        self.is_joined = False
        self.is_escaped = False

    def feed(self, content: bytes) -> bytes:
        return b"".join(self.read(content[at : at + 1]) for at in range(len(content)))

    def read(self, byte: bytes) -> bytes:
        if self.is_escaped:
            self.is_escaped = False
            return self.read_escaped(byte)
        is_letter = b"a" <= byte <= b"z"
        if self.is_inside and not is_letter:
            self.case = ""
            self.is_inside = False
        if is_letter:
            return self.read_letter(byte)
        if byte == b" ":
            blank = b"" if self.is_joined else byte
            self.is_joined = False
            return blank
        return self.read_other(byte)

    def read_letter(self, byte: bytes) -> bytes:
        letter = byte.upper() if self.case else byte
        if self.case == TITLE:
            self.case = ""
        self.is_inside = self.case == UPPER
        self.is_joined = False
        return letter

    def read_other(self, byte: bytes) -> bytes:
        char = chr(byte[0])
        if char in (TITLE, UPPER):
            self.case = char
            return b""
        if char == JOIN:
            self.is_joined = True
            return b""
        self.case = ""
        self.is_joined = False
        if char == ESCAPE:
            self.is_escaped = True
            return b""
        return byte

    def read_escaped(self, byte: bytes) -> bytes:
        sign = chr(byte[0])
        return MARKS[SIGNS.index(sign)].encode() if sign in SIGNS else byte
# ==== train_gpt.py ====
"""loopgolf: train a looped language model for a fixed time, put it in a file, prove how well that file predicts text.

A few physical blocks are applied many times in the order that a *loop plan* gives ("abcdabc"). Weights are trained on
the integer grid that they are stored in, compressed into an artifact that has to fit 16,000,000 bytes together with
this code, and the score (bits per byte) is computed from that file, reloaded.

    python train_gpt.py                                          the recipe for this machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py        the same on eight GPUs
    python train_gpt.py --score runs/ID/artifact.lg              score a finished file

This script tells the run from top to bottom: 1 config and recipes, 2 data, 3 schedules, 4 model, 5 optimizers,
6 training, 7 file, 8 score, 9 main. What it stands on is in loopgolf/, a subject per file; heavy operations are in
kernels/. Dimension letters: B batch, T tokens, D width, H heads, K head width, V vocabulary, P passes, R adapter rank,
L tokens that a query can look at.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # before torch is loaded: threads wait awake for a moment only, then other programs get the cores
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.shards import TokenStream, WindowOrder, find_shards
from kernels.attention import attend, build_rotation, rotate
from kernels.head import head_loss_torch, softcap, softcap_logits
from kernels.newton_schulz import COEFFICIENTS, Coefficients, orthogonalize_ref
from loopgolf.artifact import Artifact, Described, Layout, pack_artifact, unpack_artifact
from loopgolf.cache import Cache, Kept, KeysValues
from loopgolf.curvature import Curvature, CurvatureMeter, choose_steps, find_hessian
from loopgolf.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DoesNotFit,
    Interrupted,
    NonFiniteLoss,
    Stop,
    TokenError,
)
from loopgolf.layers import Adapter, Linear, Norms, Table, rms_norm
from loopgolf.options import (
    MOST,
    check_choice,
    check_limits,
    describe_option,
    find_wrong_fields,
    option,
    parse_command_line,
    parse_environment,
)
from loopgolf.params import (
    DeclaringModule,
    collect_specs,
    start_at,
    start_identity,
    start_normal,
    start_orthogonal,
    start_stacked,
    start_weights,
    vector,
)
from loopgolf.plan import ONCE, Depth, Pass, Plan, parse_pass_set, parse_plan
from loopgolf.quantize import Format, Half, RowGrid
from loopgolf.runtime import (
    Clock,
    Log,
    RunContext,
    StopSignals,
    find_compiler_fault,
    keep_freed_memory,
    print_error,
    write_atomic,
)
from loopgolf.scoring import BpbMeter, ByteCounter, Lora, Mask, OnPass, Score, Scoring, WindowScorer, score_tokens
from loopgolf.source import find_counted, hash_files
from loopgolf.state import MasterWeights, TrainState, WeightAverage, load_checkpoint, save_checkpoint
from loopgolf.words import decode_tokens

# ----------------------------------------------------------------------------------------------------------------------
# 1. Config and recipes
# ----------------------------------------------------------------------------------------------------------------------
# One frozen value holds every setting: recipe, then environment, then command line. What travels in the artifact is
# Stored; the defaults of its fields are what a missing field of a file means, so they never change.


@dataclass(frozen=True)
class Architecture:
    """The model."""

    plan: str = option("abcdabc", "order in which the physical blocks are applied")
    depth: int = option(4, "repetitions of the group marked *r in the plan; their mean when sampled", low=1, high=256)
    max_r: int = option(0, "most repetitions that are sampled and have rows in the tables, if above depth", high=256)
    bptt: int = option(0, "gradients flow through this many last repetitions of the *r group (0 = all)")
    score_depth: int = option(0, "repetitions while scoring (0 = depth)", high=256)
    skips: str = option("unet", "the first half of the passes feeds the second in reverse", choices=("none", "unet"))
    skip_gates: bool = option(False, "with skips: gates per channel blend what the first half left with the stream")
    parallel_passes: str = option("none", "passes whose MLP reads what their attention reads: none, all, last4 or 3,5")
    look_back: int = option(0, "positions before its own that attention reads too, weighed by channel", high=64)
    depth_scale: bool = option(False, "what attention and MLP read shrinks with the root of the pass's number")
    model_dim: int = option(1024, "width of the residual stream", low=2, high=65536)
    inject: str = option("concat", "how ^ mixes the kept stream in: a matrix on both, or", choices=("concat", "add"))
    block_norm: str = option("pre", "norms before attention and MLP, or also after", choices=("pre", "sandwich"))
    norm_weights: bool = option(False, "norms of the stream have a learned weight per channel")
    embed_norm: bool = option(True, "norm the embeddings")
    pass_scales: bool = option(True, "every pass mixes the embedding in and scales what its block adds, per channel")
    adapter_rank: int = option(0, "rank of an adapter that every pass has before its attention (0 = none)", high=65536)
    windows: str = option("", "reach of each block's attention in turn: L the context, S half of it (empty = L)")
    tied: bool = option(True, "the head is the token embedding")
    mlp: str = option("relu2", "squared ReLU, or a projection gates the hidden layer", choices=("relu2", "swiglu"))
    mlp_slope: float = option(0.0, "slope of the squared ReLU below zero, before the square", high=1)
    moe_experts: int = option(0, "SwiGLU experts that tokens are sent to, besides the MLP (0 = none)", high=65536)
    moe_hidden: int = option(1024, "hidden width of an expert", low=1, high=65536)
    moe_top: int = option(2, "experts that each token is sent to", low=1, high=65536)
    num_heads: int = option(32, "query heads", low=1, high=65536)
    num_kv_heads: int = option(8, "key-value heads, shared by equal groups of query heads", low=1, high=65536)
    head_dim: int = option(0, "width of a head (0 = model_dim / num_heads)", high=65536)
    mlp_mult: float = option(2.0, "hidden width of the MLP over model_dim", low=0.01, high=64)
    rope_dims: int = option(16, "dimensions of each head that rotate with position")
    rope_base: float = option(10000.0, "slowest wavelength of the rotation, in tokens over 2 pi", low=1)
    qk_norm: bool = option(True, "norm queries and keys")
    q_gain: float = option(1.5, "initial gain on the queries of a head (0 = no gain)")
    head_gate: int = option(0, "first channels of the stream that decide how open each head is (0 = all are)")
    xsa_passes: str = option("all", "passes with exclusive self attention: none, all, last4 or 3,5,6")
    ve_passes: str = option("last2", "passes whose values get a token's value embedding (same forms)")
    ve_dim: int = option(128, "width of the value embedding table", low=1, high=65536)
    smear: bool = option(True, "mix each embedding with the previous token's, per channel")
    bigram_buckets: int = option(10240, "rows of the hashed bigram table (0 = none)", high=2**24)
    bigram_dim: int = option(128, "width of the bigram table", low=1, high=65536)
    softcap: float = option(30.0, "logits are squashed into plus or minus this (0 = they are not)")
    doc_attention: bool = option(False, "attention stops at document boundaries")


@dataclass(frozen=True)
class Bits:
    """The bits of stored codes."""

    core_bits: int = option(6, "bits of a code in the matrices of blocks that the plan repeats", low=2, high=8)
    edge_bits: int = option(6, "bits of a code in all other matrices", low=2, high=8)
    embed_bits: int = option(8, "bits of a code in the token embedding", low=2, high=8)
    table_bits: int = option(8, "bits of a code in the bigram and value tables", low=2, high=8)


@dataclass(frozen=True)
class Stored(Scoring, Bits, Architecture):
    """What travels in the artifact: the model, its bits, and how the run said that it would be scored."""


@dataclass(frozen=True)
class Size:
    """Quantization and size."""

    core_k: float = option(12.85, "step of a row's grid: k_scale * k * std(row) / largest code", low=0.1)
    edge_k: float = option(12.85, "the same for all other matrices", low=0.1)
    embed_k: float = option(20.0, "the same for the token embedding", low=0.1)
    table_k: float = option(20.0, "the same for the bigram and value tables", low=0.1)
    step_bits: int = option(10, "bits that the mantissa of a row's step keeps: fewer take fewer bytes", high=10)
    row_steps: str = option("spread", "steps in the file: as in training, or by their cost", choices=("spread", "loss"))
    qat_start: float = option(0.0, "fraction of the budget before which weights are not rounded", high=1)
    k_scale: float = option(0.0, "coarseness of all grids (0 = the finest that is useful, or as byte_limit needs)")
    calibration_tokens: int = option(131072, "training tokens that steer the rounding if byte_limit binds (0 = plain)")
    export_reserve: float = option(0.01, "fraction of a time budget kept for that; then time decides", high=0.5)
    byte_limit: int = option(16_000_000, "largest code + artifact in bytes (0 = no limit)")
    code_reserve: int = option(38_000, "bytes that a run sets aside for the code (0 = code does not count)")


@dataclass(frozen=True)
class Training:
    """Training."""

    iterations: int = option(0, "train this many steps instead of for a time (0 = use the time budget)")
    max_wallclock_seconds: float = option(600.0, "training budget in seconds", low=0.1)
    loop_start: float = option(0.0, "fraction of the budget before which every group of the plan runs once", high=1)
    sample_depth: bool = option(False, "draw r for every step: 1 + Poisson(LogNormal of mean depth), at most max_r")
    optimizer: str = option("muon", "of the matrices, with Adam for the rest; or of everything")
    batch_tokens: int = option(524288, "tokens in one optimizer step, over all ranks", low=1)
    contexts: str = option("", "shorter contexts at first, each to a fraction of the budget: 512:0.1,1024:0.3")
    micro_batch: int = option(0, "sequences in one forward pass of a rank; more are accumulated (0 = all)")
    checkpoint_passes: bool = option(False, "keep only the input of every pass and compute it again for the gradient")
    matrix_lr: float = option(0.02, "learning rate of the matrices (Muon)")
    table_lr: float = option(0.02, "learning rate of the embedding tables (Adam)")
    vector_lr: float = option(0.01, "learning rate of gains, scales, mixes, gates and skips (Adam)")
    momentum: float = option(0.99, "Muon: momentum", high=1)
    momentum_start: float = option(0.85, "Muon: momentum at the first step", high=1)
    momentum_warmup: float = option(0.084, "fraction of the budget over which the momentum rises", high=1)
    row_norm: bool = option(False, "Muon: rows of the momentum get one norm before it is orthogonalized")
    newton_schulz: str = option("jordan", "Muon: coefficients of its five iterations")
    weight_decay: float = option(0.04, "decay of matrices and tables, times the learning rate")
    beta1: float = option(0.9, "Adam: memory of the gradient", high=0.9999)
    beta2: float = option(0.95, "Adam: memory of the squared gradient", high=0.9999)
    grad_clip: float = option(0.3, "largest norm of the whole gradient (0 = no clipping)")
    warmdown: float = option(0.59, "last fraction of the budget over which the learning rate falls", high=1)
    final_lr: float = option(0.0, "learning rate at the end, as a fraction of the peak", high=1)
    average: str = option("swa", "weights to export: the last, equal or decaying mean", choices=("none", "swa", "ema"))
    average_start: float = option(0.88, "fraction of the budget after which weights are averaged", high=1)
    average_every: int = option(50, "steps between two weights in the average", low=1)
    ema_decay: float = option(0.9, "what the decaying mean keeps of itself each time", high=1)


@dataclass(frozen=True)
class Run:
    """The run and its machine."""

    recipe: str = option("4b7l", "named set of settings that the others change; golf with a GPU, else pocket, or")
    seed: int = option(1337, "seed of the initial weights", low=-MOST)
    data_path: str = option("data/fineweb_sp1024", "dataset folder: *_train_*.bin, *_val_*.bin, tokenizer.model")
    tokenizer_path: str = option("", "SentencePiece model (empty = tokenizer.model in data_path)")
    run_id: str = option("", "name of the folder under runs/ (empty = date and time)")
    resume: str = option("", "continue the run in this folder from its checkpoint")
    score: str = option("", "score this artifact instead of training, without a time budget")
    also: str = option("trained,averaged,plain", "diagnostics besides the score, of")
    score_documents: int = option(0, "score only the first so many validation documents (0 = all)")
    text_sha256: str = option("", "sha256 of the text to score; a run on another one says so (empty = any)")
    eval_budget: float = option(600.0, "seconds for val_bpb: adaptation stops in time to score the rest without it")
    dry_run: bool = option(False, "print sizes and forecasts, then stop")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "what the passes compute in", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "each block once, or the whole graph", choices=("auto", "none", "block", "full"))
    checkpoint_every_s: float = option(300.0, "seconds between checkpoints (0 = only when interrupted)")
    log_every: int = option(10, "steps between two train lines", low=1)


SECTIONS = {"run": Run, "training": Training, "model": Architecture, "bits": Bits, "size": Size, "scoring": Scoring}


@dataclass(frozen=True)
class Config(Run, Size, Training, Stored):
    """Every setting of a run. The defaults are those of recipe 4b7l."""

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("optimizer", "newton_schulz", "score_mode"):
            check_choice(name, getattr(self, name), list_choices(name))
        for word in self.also.split(","):
            check_choice("also", word, list_choices("also"))
        self.check_shapes()
        self.check_plan()

    def require(self, name: str, is_good: bool, why: str) -> None:
        if not is_good:
            raise ConfigError(f"{name}={getattr(self, name)}: {why}")

    def check_shapes(self) -> None:
        has_even_heads = self.head_dim > 0 or self.model_dim % self.num_heads == 0
        self.require("model_dim", has_even_heads, f"must be divisible by num_heads={self.num_heads}")
        has_even_groups = self.num_heads % self.num_kv_heads == 0
        self.require("num_heads", has_even_groups, f"must be divisible by num_kv_heads={self.num_kv_heads}")
        if self.moe_experts:
            self.require("model_dim", self.model_dim % 8 == 0, "must be divisible by 8")
            self.require("moe_top", self.moe_top <= self.moe_experts, f"must be at most moe_experts={self.moe_experts}")
            self.require("moe_hidden", self.moe_hidden % 8 == 0, "must be divisible by 8")
        for batch_tokens, seq_len in list_shapes(self):
            self.require("contexts", 2 <= seq_len <= self.seq_len, f"must be between 2 and seq_len={self.seq_len}")
            name = "batch_tokens" if seq_len == self.seq_len else "contexts"
            is_whole = batch_tokens % seq_len == 0
            self.require(name, is_whole, f"{batch_tokens} tokens are no whole sequences of seq_len={seq_len}")
        self.require("head_gate", self.head_gate <= self.model_dim, f"must be at most model_dim={self.model_dim}")
        reach = self.band or self.seq_len
        self.require("look_back", self.look_back <= reach, f"must be at most {reach}, what attention sees")
        self.require("mlp_slope", self.mlp == "relu2" or not self.mlp_slope, "needs --mlp relu2")
        self.require("rope_dims", self.rope_dims % 2 == 0, "must be even")
        fits_head = self.rope_dims <= self.head_width
        self.require("rope_dims", fits_head, f"must be at most {self.head_width}, the width of a head")
        for name in ("stride", "band"):
            self.require(name, getattr(self, name) <= self.seq_len, f"must be at most seq_len={self.seq_len}")
        self.require("bos_id", self.bos_id < self.vocab_size, f"must be below vocab_size={self.vocab_size}")
        self.require("windows", set(self.windows) <= set("LS"), "is made of the letters L and S")
        if self.row_steps == "loss":
            self.require(
                "row_steps", self.qat_start == 1, "training rounds to others; add --qat_start 1, or take spread"
            )
            self.require("row_steps", self.calibration_tokens > 0, "needs --calibration_tokens, or take spread")

    def check_plan(self) -> None:
        plan = parse_plan(self.plan)
        has_fixed_skips = self.skips == "none" or not plan.is_variable
        self.require("skips", has_fixed_skips, "needs a plan without *r; use --skips none")
        most = plan.count_passes(max(self.table_repetitions, self.score_depth))
        self.require("plan", most <= 512, f"has {most} passes, at most 512 are built")
        self.require("sample_depth", plan.is_variable or not self.sample_depth, "needs a plan with *r")
        keeps_gradient = self.bptt == 0 or plan.injects_into_variable_group
        self.require("bptt", keeps_gradient, "needs ^ in the *r group, or nothing before the group would learn")
        is_known = set(self.ttt_freeze) <= set(plan.names)
        self.require("ttt_freeze", is_known, f"the plan has only the blocks {plan.names}")
        has_one_norm = self.parallel_passes == "none" or not self.norm_weights
        self.require("parallel_passes", has_one_norm, "needs norms without weights, for both read through one")
        for name in ("xsa_passes", "ve_passes", "parallel_passes"):
            parse_pass_set(name, getattr(self, name), plan.count_passes(self.table_repetitions))

    @property
    def head_width(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def table_repetitions(self) -> int:
        """Repetitions of the *r group that have rows of their own in the per-pass tables."""
        return max(self.depth, self.max_r)

    @property
    def scoring_depth(self) -> Depth:
        return Depth(self.score_depth or self.depth)

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_path) / "tokenizer.model")

    @property
    def diagnostics(self) -> list[str]:
        return self.also.split(",")

    def stored(self) -> dict[str, Any]:
        """What an artifact stores: the settings that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(Stored) if getattr(self, f.name) != f.default}


# What each recipe changes. 4b7l is the entry that this project started from, parameter-golf #927, its slips repaired.
RECIPES: dict[str, dict[str, Any]] = {
    "4b7l": {},
    "pocket": dict(
        # the challenge at 1/100: weights in 160,000 bytes, two minutes of two processor cores
        plan="a(b)*2c", model_dim=64, num_heads=1, num_kv_heads=1, head_dim=64, rope_dims=32, mlp_mult=4.0,
        parallel_passes="all", look_back=2, skip_gates=True, bigram_buckets=0, ve_passes="all", ve_dim=32,
        doc_attention=True, vocab_size=3072, seq_len=256, batch_tokens=2048, max_wallclock_seconds=120.0,
        byte_limit=160_000, code_reserve=0, embed_k=60.0, table_k=60.0, step_bits=3, row_steps="loss",
        qat_start=1.0, matrix_lr=0.02, table_lr=0.025, vector_lr=0.05, weight_decay=0.1, momentum=0.9, beta2=0.98,
        newton_schulz="polar_express", row_norm=True, canonical=True, recall_share=0.15,
        warmdown=0.5, final_lr=0.02, average="none", calibration_tokens=32768,
        score_mode="banded", score_documents=184, score_batch=16, eval_budget=120.0,
        text_sha256="40a1950b90fe8120fddb08831776461ec933e9e88f6265c1c1e1fca8a5058f49",
        data_path="data/local", checkpoint_every_s=30.0,
    ),
    "golf": dict(
        # our entry for the challenge: two blocks, a core of three that runs three times, two blocks, at the width that
        # fills 16 MB. Not trained at this size yet; records/studies/2026-11-30_Golf has what its parts are worth
        plan="ab(cde)*3fg", loop_start=0.35, model_dim=640, num_heads=10, num_kv_heads=5, mlp_mult=4.0, mlp_slope=0.5,
        q_gain=5.0, parallel_passes="all", look_back=3, skip_gates=True, head_gate=12,
        depth_scale=True, ve_passes="none", bigram_buckets=0, doc_attention=True, vocab_size=8192,
        data_path="data/fineweb_sp8192",
        # contexts that grow: parameter-golf #2014; loops from .35 on: #1420
        # rounded by GPTQ after training only, as in parameter-golf #1394 and after
        embed_bits=7, embed_k=15.0, step_bits=3, row_steps="loss", qat_start=1.0,
        seq_len=3072, contexts="1024:0.3", batch_tokens=786432,
        matrix_lr=0.024, momentum=0.97, weight_decay=0.09, beta2=0.99, warmdown=0.8, final_lr=0.1,
        newton_schulz="polar_express", row_norm=True,
        average="ema", average_start=0.5, average_every=1, ema_decay=0.9965,
        canonical=True, recall_share=0.02, score_mode="banded",
    ),
    "frontier": dict(
        # light sharing as in the record holders, parameter-golf #1394 and after: 11 blocks, three of them run 3 times
        plan="abc(def)*3ghijk", loop_start=0.35, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=4.0,
        ve_passes="none", smear=False, bigram_buckets=0,
        vocab_size=8192, batch_tokens=786432, data_path="data/fineweb_sp8192",
    ),
    "baseline9": dict(
        # the challenge's own baseline (github.com/openai/parameter-golf, train_gpt.py): nine blocks in a row
        plan="abcdefghi", model_dim=512, num_heads=8, num_kv_heads=4, rope_dims=64, seq_len=1024,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        matrix_lr=0.04, table_lr=0.05, vector_lr=0.04, momentum=0.95, momentum_warmup=0.036, weight_decay=0.0,
        grad_clip=0.0, warmdown=0.087, average="none", edge_bits=8, score_mode="plain",
    ),
    "recursive_d20": dict(
        # recursive nanochat (github.com/TrelisResearch/nanochat, branch recursive): a core of sampled depth
        plan="ab(^cdef)*rgh", sample_depth=True, max_r=16, bptt=4, skips="none", pass_scales=False,
        model_dim=1280, num_heads=10, num_kv_heads=10, rope_dims=128, mlp_mult=4.0, q_gain=0.0, softcap=15.0,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0, tied=False, vocab_size=65536,
        momentum=0.95, beta1=0.8, grad_clip=1.0, warmdown=0.2, table_lr=0.2, weight_decay=0.0, average="none",
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "looped_s20": dict(
        # looped nanochat (github.com/kschwethelm/LoopedLMs): the same with sandwich norms, a norm after each repetition
        # and attention windows
        plan="ab(^cdef~~)*rgh", sample_depth=True, max_r=16, bptt=4, skips="none", pass_scales=False,
        block_norm="sandwich", norm_weights=True, windows="LLSSSLLL",
        model_dim=1280, num_heads=10, num_kv_heads=10, rope_dims=128, mlp_mult=4.0, q_gain=0.0, softcap=15.0,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0, tied=False, vocab_size=65536,
        momentum=0.95, beta1=0.8, grad_clip=0.0, warmdown=0.5, table_lr=0.3, vector_lr=0.005, weight_decay=0.072,
        average="none", byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "osrt_v3": dict(
        # Nano-OSRT (github.com/CodeHalwell/nano-osrt-100m): all blocks repeated, an adapter for every pass
        plan="(ab~)*6", adapter_rank=16, norm_weights=True, embed_norm=False, qk_norm=False, skips="none",
        pass_scales=False, mlp="swiglu", mlp_mult=2.7, q_gain=0.0, softcap=0.0,
        model_dim=1280, num_heads=20, num_kv_heads=20, rope_dims=64, vocab_size=50304,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        optimizer="lion", matrix_lr=1e-4, table_lr=1e-4, vector_lr=1e-4, beta2=0.99, weight_decay=0.3, grad_clip=1.0,
        warmdown=1.0, final_lr=0.1, batch_tokens=131072, average="none",
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
    "osrt_v4": dict(
        # its successor: three blocks, each with a mixture of experts beside its MLP
        plan="(abc~)*6", adapter_rank=16, norm_weights=True, embed_norm=False, qk_norm=False, skips="none",
        pass_scales=False, mlp="swiglu", mlp_mult=8 / 3, moe_experts=11, q_gain=0.0, softcap=0.0,
        model_dim=1536, num_heads=24, num_kv_heads=24, rope_dims=64, vocab_size=65536,
        xsa_passes="none", ve_passes="none", smear=False, bigram_buckets=0,
        optimizer="lion", matrix_lr=6e-4, table_lr=6e-4, vector_lr=6e-4, beta2=0.99, weight_decay=0.3, grad_clip=1.0,
        warmdown=1.0, final_lr=0.1, batch_tokens=131072, average="none", checkpoint_passes=True,
        byte_limit=0, score_mode="plain", score_batch=4,
    ),
}  # fmt: skip


def list_choices(name: str) -> list[str]:
    """What a setting is chosen from, where that is one of the tables of this script."""
    tables = {
        "recipe": list(RECIPES),
        "optimizer": list(OPTIMIZERS),
        "newton_schulz": list(COEFFICIENTS),
        "score_mode": list(SCORERS),
        "also": ["trained", "averaged", *SCORERS, "none"],
    }
    return tables.get(name, [])


def parse_config(argv: list[str], environ: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """The config and where each value came from. Default < recipe (or the resumed run) < environment < command line."""
    defaults = {f.name: f.default for f in fields(Config)}
    from_env = parse_environment(environ, defaults)
    from_line = parse_command_line(argv, defaults)
    given = {**from_env, **from_line}
    if given.get("resume"):
        folder = Path(given["resume"])
        origin, base = "resume", load_started_config(folder, given)
        given["run_id"] = folder.name
    elif given.get("score"):
        origin, base = "file", settings_of_file(Path(given["score"]), given)
    else:
        recipe = given.get("recipe", "golf" if torch.cuda.is_available() else "pocket")
        origin, base = "recipe", settings_of_recipe(recipe)
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for layer, settings in (("default", defaults), (origin, base), ("env", from_env), ("cli", given)):
        values |= settings
        source |= dict.fromkeys(settings, layer)
    source |= dict.fromkeys(from_env.keys() - from_line.keys(), "env")
    return Config(**values), source


def settings_of_recipe(name: str) -> dict[str, Any]:
    check_choice("recipe", name, list_choices("recipe"))
    return {"recipe": name, **RECIPES[name]}


def load_started_config(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A resumed run keeps the config that it was started with; only what does not change its result may differ."""
    problem = f"resume={folder}: config.json there is missing, damaged or of another version"
    try:
        started = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(problem) from None
    if find_wrong_fields(started, Config) or not {"recipe", "seed", "plan", "data_path"} <= started.keys():
        raise ConfigError(problem)
    started = {**{f.name: f.default for f in fields(Config)}, **started}
    for name, value in given.items():
        if name not in ("resume", "run_id", "checkpoint_every_s", "log_every") and started[name] != value:
            raise ConfigError(f"{name}={value}: the run in {folder} was started with {started[name]}; leave it out")
    return started


def settings_of_file(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a finished file is scored with: its stored settings, and the text of its run where it still lies in the
    folder of that run, so that --score alone repeats the score. The machine decides nothing."""
    stored = asdict(config_from_stored(load_artifact(path).stored))
    base = settings_of_recipe(given["recipe"]) if "recipe" in given else {}
    base |= {f.name: stored[f.name] for f in fields(Stored)}
    base |= dict(batch_tokens=given.get("seq_len", stored["seq_len"]), contexts="")
    started = path.with_name("config.json")
    if started.is_file():
        config = load_started_config(path.parent, {})
        base |= {
            name: config[name] for name in ("data_path", "score_documents", "byte_limit", "code_reserve", "recipe")
        }
    return base


FIRST_OPTIONS = (
    *("recipe", "plan", "model_dim", "iterations", "max_wallclock_seconds", "seed", "data_path", "byte_limit"),
    *("score_mode", "run_id", "resume", "score", "dry_run", "device"),
)


def help_text(section: str = "") -> str:
    """What a newcomer needs; or the options of a section; or all of them."""
    by_name = {f.name: f for f in fields(Config)}
    if not section:
        title = "The options that matter first (--name value, --name=value, or NAME=value in the environment):"
        lines = [__doc__ or "", title]
        lines += [describe_option(by_name[name], list_choices(name)) for name in FIRST_OPTIONS]
        return "\n".join([*lines, "", f"More: --help {', --help '.join(SECTIONS)}; all of them: --help all."])
    check_choice("--help", section, [*SECTIONS, "all"])
    lines = []
    for title, owner in SECTIONS.items():
        if section in (title, "all"):
            lines += [f"{title}: {owner.__doc__ or ''}"]
            lines += [describe_option(f, list_choices(f.name)) for f in fields(owner)]
            lines += [""]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Data
# ----------------------------------------------------------------------------------------------------------------------
# Tokens come from memory-mapped shards. The batch of a step is a pure function of the seed and the tokens consumed
# before it, so that a resumed run, a warm-up or another number of ranks never moves the data.


class TrainingText:
    """The training text of a run and the order in which its windows are read. `shapes`: (batch_tokens, seq_len)."""

    def __init__(self, config: Config, shapes: list[tuple[int, int]]):
        self.stream = TokenStream(config.data_path, "train", config.vocab_size)
        lengths = [seq_len for _, seq_len in shapes]
        whole_steps = math.lcm(max(lengths), *(batch_tokens for batch_tokens, _ in shapes))
        round_tokens = whole_steps * (max(lengths) // min(lengths))
        self.order = WindowOrder(self.stream.total, max(lengths), round_tokens, config.seed)

    def read(self, consumed: int, count: int, length: int) -> Tensor:
        """(count, length + 1) tokens, the next ones after those consumed."""
        starts = self.order.starts(consumed, count, length)
        return torch.from_numpy(self.stream.read_windows(starts, length + 1))

    def ends_round(self, consumed: int) -> bool:
        """Whether batch and context may change now."""
        return consumed % self.order.round_tokens == 0


def load_batch(text: TrainingText, consumed: int, settings: Settings, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """This rank's sequences of a step and their targets, (sequences, T) each."""
    share = settings.batch_tokens // ctx.world
    tokens = text.read(consumed + ctx.rank * share, share // settings.seq_len, settings.seq_len)
    return split_tokens(tokens, ctx)


def split_tokens(tokens: Tensor, ctx: RunContext) -> tuple[Tensor, Tensor]:
    """(sequences, T + 1) tokens to inputs and targets on the device."""
    if ctx.device.type == "cuda":
        tokens = tokens.pin_memory().to(ctx.device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Tokenizer(NamedTuple):
    """The tokenizer, and what tells it apart in an artifact."""

    model: sentencepiece.SentencePieceProcessor
    identity: dict[str, Any]


def load_tokenizer(path: Path) -> Tokenizer:
    content = path.read_bytes()
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise DataError(f"{path}: not a SentencePiece model") from None
    return Tokenizer(model, dict(sha256=hashlib.sha256(content).hexdigest(), vocab=model.vocab_size()))


def load_run_tokenizer(config: Config) -> Tokenizer:
    path = config.tokenizer_file
    if not path.is_file():
        find_shards(config.data_path, "val")  # the folder itself may be what is missing
        raise DataError(f"{path}: no tokenizer there; set --tokenizer_path")
    tokenizer = load_tokenizer(path)
    size = tokenizer.model.vocab_size()
    if size != config.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: {path} has {size}; set --vocab_size")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# 3. Schedules
# ----------------------------------------------------------------------------------------------------------------------
# Pure functions of progress, the fraction of the budget that is used once the coming step is done. A slower machine
# follows the same curves.


@dataclass(frozen=True)
class Settings:
    """What may change over a run, for one step."""

    lr_scale: float
    momentum: float
    depth: Depth
    batch_tokens: int
    seq_len: int
    is_rounded: bool = True  # the weights after the step


def settings_at(config: Config, progress: float, step: int) -> Settings:
    left = min(1.0, (1.0 - progress) / config.warmdown) if config.warmdown else 1.0
    risen = min(1.0, progress / config.momentum_warmup) if config.momentum_warmup else 1.0
    return Settings(
        lr_scale=config.final_lr + (1.0 - config.final_lr) * left,
        momentum=config.momentum_start + (config.momentum - config.momentum_start) * risen,
        depth=ONCE if progress < config.loop_start else draw_depth(config, step),
        batch_tokens=config.batch_tokens,
        seq_len=context_at(config, progress),
        is_rounded=progress >= config.qat_start,
    )


def parse_contexts(text: str) -> list[tuple[int, float]]:
    """`512:0.1,1024:0.3`: contexts and the fractions of the budget to which they hold."""
    try:
        stages = [(int(length), float(end)) for length, end in (part.split(":") for part in text.split(",") if text)]
    except ValueError:
        raise ConfigError(f"contexts={text}: has the form 512:0.1,1024:0.3, a context and where it ends") from None
    ends = [end for _, end in stages]
    if ends != sorted(set(ends)) or not all(0 < end < 1 for end in ends):
        raise ConfigError(f"contexts={text}: their ends rise between 0 and 1")
    return stages


def context_at(config: Config, progress: float) -> int:
    return next((length for length, end in parse_contexts(config.contexts) if progress <= end), config.seq_len)


def draw_depth(config: Config, step: int) -> Depth:
    """The same on every rank."""
    if not config.sample_depth:
        return Depth(config.depth)
    key = (config.seed % 2**64, step)
    return Depth(int(draw_repetitions(config, np.random.default_rng(key), 1)[0]))


def draw_repetitions(config: Config, generator: np.random.Generator, count: int) -> np.ndarray:
    """r as Huginn samples it (Geiping et al. 2025, arXiv:2502.05171): its mean is about depth + 1."""
    sigma = 0.5
    rates = generator.lognormal(math.log(config.depth) - sigma**2 / 2, sigma, count)  # of mean depth
    return np.minimum(1 + generator.poisson(rates), config.table_repetitions)


def expect_repetitions(config: Config, most: float = math.inf) -> float:
    """E[min(r, most)], over a million draws."""
    if not config.sample_depth:
        return min(config.depth, most)
    return float(np.minimum(draw_repetitions(config, np.random.default_rng(0), 1 << 20), most).mean())


def list_depths(config: Config, compile_mode: str) -> list[Depth]:
    """Of each kind of forward with loops that is compiled: whole graphs are made for every depth, blocks for one."""
    depths = [Depth(config.depth)]
    if config.sample_depth and compile_mode == "full":
        depths = [Depth(r) for r in range(1, config.table_repetitions + 1)]
    elif config.sample_depth:
        depths = [Depth(1), Depth(config.table_repetitions)]
    return depths


def list_phases(config: Config) -> list[float]:
    """A moment of each part of the budget in which batch, context and loops stay as they are."""
    ends = sorted({0.0, config.loop_start, *(end for _, end in parse_contexts(config.contexts)), 1.0})
    return [*((start + end) / 2 for start, end in itertools.pairwise(ends)), 1.0]


def list_shapes(config: Config) -> list[tuple[int, int]]:
    """Each batch and context (batch_tokens, seq_len) that a run has."""
    over_run = [settings_at(config, progress, 0) for progress in list_phases(config)]
    return list(dict.fromkeys((s.batch_tokens, s.seq_len) for s in over_run))


def list_forwards(config: Config, compile_mode: str) -> list[Settings]:
    """One of each kind of step that a run compiles."""
    forwards: dict[tuple[int, int, Depth], Settings] = {}
    for progress in list_phases(config):
        settings = settings_at(config, progress, 0)
        for depth in [ONCE] if progress < config.loop_start else list_depths(config, compile_mode):
            key = (settings.batch_tokens, settings.seq_len, depth)
            forwards.setdefault(key, replace(settings, depth=depth))
    return list(forwards.values())


class Budget:
    """Decides before each step whether it may start and how far the run will be once it is done."""

    def __init__(self, config: Config, reserve: float = 0.0):
        self.iterations = config.iterations
        self.seconds = (1 - reserve) * config.max_wallclock_seconds
        self.recent: deque[float] = deque(maxlen=8)  # seconds of the latest steps

    @property
    def slowest_s(self) -> float:
        return max(self.recent, default=0.0)

    def add_step(self, seconds: float) -> None:
        self.recent.append(seconds)

    def progress(self, step: int, used_s: float) -> float | None:
        """None when the next step would pass the budget. The last step reaches 1, so that schedules end, unless it or
        the one before was slower than all recent ones."""
        if self.iterations:
            return (step + 1) / self.iterations if step < self.iterations else None
        if used_s + self.slowest_s > self.seconds:
            return None
        if used_s + 2 * self.slowest_s > self.seconds:
            return 1.0
        mean_s = sum(self.recent) / len(self.recent) if self.recent else 0.0
        return min(1.0, (used_s + mean_s) / self.seconds)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Model
# ----------------------------------------------------------------------------------------------------------------------
# Blocks own the big matrices; the plan says in which order they are applied; the pass table owns what differs between
# passes. One forward serves training, scoring, test-time training and generation.


class PassRow(NamedTuple):
    """What one pass has of its own; None where it has nothing."""

    mix: Tensor | None = None  # (2, D): of the stream and of the embedding
    scale: Tensor | None = None  # (2, D): of what attention and MLP add
    adapter: Tensor | None = None  # (2, D, R)
    value: Tensor | None = None  # (B, T, kv heads * K): the tokens' value embeddings, added to the values
    value_scale: Tensor | None = None  # (): of what is added
    is_xsa: bool = False
    is_parallel: bool = False  # the MLP reads what attention reads
    depth_scale: Tensor | None = None  # (): of what both read
    loop: Tensor | None = None  # (D,): what a mixture of experts knows of the visit
    back: Tensor | None = None  # (n, D): weights of what was read at the n positions before
    past: Kept | None = None  # of earlier positions
    keeps: bool = False  # all keys and values are returned
    lora: Mapping[str, Adapter] = {}  # by layer


class PassTable(DeclaringModule):
    """What differs between passes: a row for each, at the slot that the plan gives it."""

    mixes: nn.Parameter | None
    scales: nn.Parameter | None
    adapters: nn.Parameter | None
    skips: nn.Parameter | None
    skip_gates: nn.Parameter | None
    backs: nn.Parameter | None
    value_scales: nn.Parameter | None
    depth_scales: Tensor | None

    def __init__(self, config: Config, n_slots: int):
        super().__init__()
        P, D = n_slots, config.model_dim
        self.n_slots = n_slots
        self.xsa = parse_pass_set("xsa_passes", config.xsa_passes, P)
        self.parallel = parse_pass_set("parallel_passes", config.parallel_passes, P)
        self.value_slots = sorted(parse_pass_set("ve_passes", config.ve_passes, P))
        # mix of the embedding and scales per channel: modded-nanogpt's x0 lambdas, in the challenge's baseline
        stream_only = start_stacked(start_at(1.0), start_at(0.0))
        no_op = start_stacked(start_normal(0.01), start_at(0.0))
        self.declare("mixes", (P, 2, D), vector(stream_only), when=config.pass_scales)
        self.declare("scales", (P, 2, D), vector(start_at(1.0)), when=config.pass_scales)
        self.declare("adapters", (P, 2, D, config.adapter_rank), vector(no_op), when=config.adapter_rank > 0)
        has_skips = config.skips == "unet" and P > 1
        self.declare("skips", (P // 2, D), vector(start_at(1.0)), when=has_skips)
        # parameter-golf #1089
        self.declare("skip_gates", (P // 2, D), vector(start_at(0.0)), when=has_skips and config.skip_gates)
        # Canon layers: arXiv:2512.17351
        self.declare("backs", (P, config.look_back, D), vector(start_at(0.0)), when=config.look_back > 0)
        n_values = len(self.value_slots)
        self.declare("value_scales", (n_values,), vector(start_at(1.0)), when=n_values > 0)
        # parameter-golf #315
        depth_scales = torch.arange(1, P + 1).rsqrt() if config.depth_scale else None
        self.register_buffer("depth_scales", depth_scales, persistent=False)

    def rows(self, value: Tensor | None) -> list[PassRow]:
        """The row of every slot. `value`: the value embeddings, which some passes add."""
        value_scales = dict(zip(self.value_slots, list_rows(self.value_scales, len(self.value_slots))))
        columns = [list_rows(table, self.n_slots) for table in (self.mixes, self.scales, self.adapters, self.backs)]
        return [
            PassRow(
                mix=mix,
                scale=scale,
                adapter=adapter,
                back=back,
                value=value if slot in value_scales else None,
                value_scale=value_scales.get(slot),
                is_xsa=slot in self.xsa,
                is_parallel=slot in self.parallel,
                depth_scale=None if self.depth_scales is None else self.depth_scales[slot],
            )
            for slot, (mix, scale, adapter, back) in enumerate(zip(*columns))
        ]

    def joints(self) -> list[tuple[Tensor, Tensor | None]]:
        """How each pass of the first half joins its mirror image: the scale and the gate of what it left."""
        if self.skips is None:
            return []
        return list(zip(self.skips.unbind(), list_rows(self.skip_gates, len(self.skips))))


def list_rows(table: Tensor | None, n: int) -> Sequence[Tensor | None]:
    """All rows at once: their gradients are stacked once, not added up row by row."""
    return [None] * n if table is None else table.unbind()


def join(x: Tensor, left: Tensor, scale: Tensor, gate: Tensor | None) -> Tensor:
    """The stream and what a pass left for its mirror image in the second half."""
    left = scale.to(x.dtype) * left
    return x + left if gate is None else torch.lerp(left, x, torch.sigmoid(gate).to(x.dtype))


class Stream(NamedTuple):
    """What all passes of a forward share."""

    x0: Tensor  # (B, T, D): the embedding
    cos: Tensor  # (L, 1, half): rotations for all positions in sight
    sin: Tensor
    window: int  # positions that attention reaches
    docs: Tensor | None  # (B, L): numbers of documents, if they matter


def look_back(x: Tensor, weights: Tensor, past: Kept | None, docs: Tensor) -> tuple[Tensor, Tensor]:
    """Each position with the n before it in its document, per channel: a short causal convolution. x (B, T, D); weights
    (n, D); docs (B, L). And what the last n positions have read."""
    n, (B, T, D) = len(weights), x.shape
    earlier = past.read if past is not None else None
    line = torch.cat((x.new_zeros(B, n, D) if earlier is None else earlier, x), 1)
    docs = F.pad(docs, (n, 0), value=-1)[:, -T - n :]  # of no document
    for lag in range(1, n + 1):
        before = slice(n - lag, n - lag + T)  # the positions that are `lag` earlier
        is_same = docs[:, n:] == docs[:, before]
        x = x + weights[lag - 1].to(x.dtype) * torch.where(is_same[..., None], line[:, before], 0)
    return x, line[:, -n:].clone()  # a view would keep the whole line


def smear(x: Tensor, gate: Tensor, is_start: Tensor) -> Tensor:
    """(B, 1 + T, D) to (B, T, D): each embedding is mixed with the one before it, unless it starts a document
    (modded-nanogpt; parameter-golf #65)."""
    gate = torch.sigmoid(gate).to(x.dtype)
    return (1 - gate) * x[:, 1:] + gate * torch.where(is_start[..., None], 0, x[:, :-1])


class Attention(DeclaringModule):
    q_gain: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(self, config: Config, grid: str, dtype: torch.dtype, reach: int):
        super().__init__()
        D, K, heads, kv_heads = config.model_dim, config.head_width, config.num_heads, config.num_kv_heads
        self.head_dim = K
        self.kv_heads = kv_heads
        self.reach = reach  # positions that it looks back at most
        self.qk_norm = config.qk_norm
        self.stays_in_document = config.doc_attention
        parts = (heads * K, kv_heads * K, kv_heads * K)
        # a gain on normed queries: parameter-golf #1125
        self.declare("q_gain", (heads,), vector(start_at(config.q_gain)), when=config.q_gain != 0)
        # parameter-golf #1667, #1787
        self.declare("gate", (heads, config.head_gate), vector(start_at(0.0)), when=config.head_gate > 0)
        self.qkv = Linear(D, parts, dtype, grid, start_orthogonal(parts))
        self.out = Linear(heads * K, (D,), dtype, grid, start_at(0.0))

    def forward(self, x: Tensor, row: PassRow, stream: Stream) -> tuple[Tensor, KeysValues | None]:
        """(B, T, D) to the same, and all keys and values if they are kept."""
        T = x.shape[1]
        q, k, v = self.project(x, row)
        own_value = v[:, -T:]
        kept = (k, v) if row.keeps else None
        q = rotate(q, stream.cos[-T:], stream.sin[-T:])
        k = rotate(k, stream.cos, stream.sin)
        if self.q_gain is not None:
            q = q * self.q_gain.to(q.dtype)[:, None]
        docs = stream.docs if self.stays_in_document else None
        y = attend(q, k, v, min(stream.window, self.reach), docs)
        if row.is_xsa:
            y = self.exclude_own_value(y, own_value)
        if self.gate is not None:
            y = self.open_heads(y, x)
        return self.out(y, row.lora.get("out")), kept

    def project(self, x: Tensor, row: PassRow) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values of all positions in sight, (B, L, kv heads, K) each."""
        q, k, v = self.qkv(x, row.lora.get("qkv")).split(self.qkv.parts, -1)
        if row.value is not None:
            assert row.value_scale is not None
            v = v + row.value_scale.to(v.dtype) * row.value
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if row.past is not None:  # keys are kept unrotated: only distances matter, so a window rotates from 0 each time
            past_keys, past_values = row.past.keys_values
            k, v = torch.cat((past_keys, k), 1), torch.cat((past_values, v), 1)
        return q, k, v

    def exclude_own_value(self, y: Tensor, own_value: Tensor) -> Tensor:
        """Nothing along a position's own value (exclusive self attention, arXiv:2603.09078, parameter-golf #198)."""
        B, T, _ = y.shape
        y = y.view(B, T, self.kv_heads, -1, self.head_dim)
        unit = F.normalize(own_value, dim=-1).unsqueeze(3)
        return (y - (y * unit).sum(-1, keepdim=True) * unit).view(B, T, -1)

    def open_heads(self, y: Tensor, x: Tensor) -> Tensor:
        """Each head as far as the first channels of the stream open it; at the start just as it is."""
        assert self.gate is not None
        opening = 2 * torch.sigmoid(F.linear(x[..., : self.gate.shape[1]], self.gate.to(x.dtype)))
        return (y.unflatten(-1, (-1, self.head_dim)) * opening[..., None]).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: Config, grid: str, dtype: torch.dtype):
        super().__init__()
        self.is_gated = config.mlp == "swiglu"
        self.slope = config.mlp_slope
        parts = (config.mlp_dim, config.mlp_dim) if self.is_gated else (config.mlp_dim,)
        self.up = Linear(config.model_dim, parts, dtype, grid, start_orthogonal(parts))
        self.down = Linear(config.mlp_dim, (config.model_dim,), dtype, grid, start_at(0.0))

    def forward(self, x: Tensor, lora: Mapping[str, Adapter]) -> Tensor:
        y = self.up(x, lora.get("up"))
        if self.is_gated:
            gate, y = y.chunk(2, -1)
            y = F.silu(gate) * y
        else:
            y = F.leaky_relu(y, self.slope).square()  # parameter-golf #493
        return self.down(y, lora.get("down"))


class Block(DeclaringModule):
    """Attention and MLP of one physical block. Matrices that write to the stream start at zero, so that every block
    starts as a no-op. `visits`: rows of the per-pass tables that belong to it."""

    moe: Any  # a mixture of experts besides the MLP, or None

    def __init__(self, config: Config, dtype: torch.dtype, reach: int, visits: int):
        super().__init__()
        grid = "core" if visits > 1 else "edge"
        self.is_sandwich = config.block_norm == "sandwich"
        names = ["attention", "mlp"]
        if self.is_sandwich:
            names += ["attention_out", "mlp_out"]
        if config.moe_experts:
            names += ["moe"]
        self.norms = Norms(names, config.model_dim, config.norm_weights)
        self.attention = Attention(config, grid, dtype, reach)
        self.mlp = MLP(config, grid, dtype)
        self.moe = build_mixture(config, grid, dtype, visits) if config.moe_experts else None

    def forward(self, x: Tensor, row: PassRow, stream: Stream) -> tuple[Tensor, Kept | None, Tensor | None]:
        """The stream (B, T, D) after this pass; what is kept of it; the losses of the mixture."""
        if row.mix is not None:
            mix = row.mix.to(x.dtype)
            x = mix[0] * x + mix[1] * stream.x0
        if row.adapter is not None:
            down, up = row.adapter.to(x.dtype)
            x = x + x @ down @ up.T
        last_seen = None
        seen = self.read(x, "attention", row)
        if row.back is not None and stream.docs is not None:
            seen, last_seen = look_back(seen, row.back, row.past, stream.docs)
        y, keys_values = self.attention(seen, row, stream)
        x = add_scaled(x, y, row.scale, 0)
        if self.is_sandwich:
            x = self.norms(x, "attention_out")
        if not row.is_parallel:  # parameter-golf #1412
            seen = self.read(x, "mlp", row)
        losses = None
        y = self.mlp(seen, row.lora)
        if self.moe is not None:
            seen = seen if row.is_parallel else self.read(x, "moe", row)
            y, losses = self.moe.add_to(y, seen, row.loop)
        x = add_scaled(x, y, row.scale, 1)
        if self.is_sandwich:
            x = self.norms(x, "mlp_out")
        return x, None if keys_values is None else Kept(keys_values, last_seen), losses

    def read(self, x: Tensor, name: str, row: PassRow) -> Tensor:
        """The stream, normed, as attention or MLP reads it."""
        x = self.norms(x, name)
        return x if row.depth_scale is None else row.depth_scale.to(x.dtype) * x

    def loop_row(self, visit: int) -> Tensor | None:
        """What the mixture knows of a visit."""
        return None if self.moe is None else self.moe.loops[visit]

    def linears(self) -> dict[str, Linear]:
        """The layers that an adapter of test-time training can be put on."""
        return dict(qkv=self.attention.qkv, out=self.attention.out, up=self.mlp.up, down=self.mlp.down)

    def active_weights(self) -> int:
        """How many matrix entries a token is multiplied with."""
        routed = 0 if self.moe is None else self.moe.active_weights()
        return sum(linear.weight.numel() for linear in self.linears().values()) + routed


def add_scaled(x: Tensor, y: Tensor, scale: Tensor | None, part: int) -> Tensor:
    """The stream and what attention (part 0) or the MLP (part 1) made of it."""
    return x + (y if scale is None else scale[part].to(x.dtype) * y)


def build_mixture(config: Config, grid: str, dtype: torch.dtype, visits: int) -> Any:
    """Imported and packed only where a recipe has experts."""
    moe = import_when_used("loopgolf.moe", f"moe_experts={config.moe_experts}")
    shape = moe.MoEShape(config.moe_experts, config.moe_hidden, config.moe_top)
    return moe.MoE(config.model_dim, shape, visits, grid, dtype)


class Parts(NamedTuple):
    """What is compiled by itself in mode "block"."""

    block: Callable[..., Any]
    join: Callable[..., Tensor]
    smear: Callable[..., Tensor]


PLAIN_PARTS = Parts(Block.forward, join, smear)


class LoopedGPT(DeclaringModule):
    """Token, bigram and value embeddings, shared blocks applied as the plan says, a head."""

    smear_gate: nn.Parameter | None

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, compile_mode: str = "none"):
        super().__init__()
        self.config = config
        self.plan: Plan = parse_plan(config.plan)
        self.is_compiled = compile_mode != "none"
        D, V, kv_dim = config.model_dim, config.vocab_size, config.num_kv_heads * config.head_width
        owners = self.plan.slot_owners(config.table_repetitions)
        self.declare("smear_gate", (D,), vector(start_at(0.0)), when=config.smear)
        self.passes = PassTable(config, len(owners))
        self.embed = Table(V, D, dtype, "embed", start_normal(0.005 if config.tied else 1.0))
        self.unembed = None if config.tied else Table(V, D, dtype, "embed", start_at(0.0))
        self.blocks = nn.ModuleDict()
        for i, name in enumerate(self.plan.names):
            self.blocks[name] = Block(config, dtype, self.reach_of(i), visits=owners.count(i))
        if config.bigram_buckets:  # parameter-golf #162
            self.bigram = Table(config.bigram_buckets, config.bigram_dim, dtype, "table", start_normal(0.01))
            self.bigram_out = Linear(config.bigram_dim, (D,), dtype, "edge", start_at(0.0))
        if self.passes.value_slots:  # parameter-golf #374
            start = start_orthogonal((kv_dim,), 1 / math.sqrt(2 * len(owners)))
            self.value = Table(V, config.ve_dim, dtype, "table", start_normal(0.01))
            self.value_out = Linear(config.ve_dim, (kv_dim,), dtype, "edge", start)
        self.inject = nn.ModuleDict()
        if config.inject == "concat":
            for group in self.plan.injected:
                self.inject[str(group)] = Linear(2 * D, (D,), dtype, "edge", start_identity)
        names = ["final"]
        if config.embed_norm:
            names += ["embed"]
        if "~" in config.plan:
            names += ["loop"]
        self.norms = Norms(names, D, config.norm_weights)
        # the embeddings stay out of "block": compiled, their gradient is summed by two threads in no fixed order
        self.run_trunk = compile_in(("full",), compile_mode, LoopedGPT.trunk)
        self.parts = Parts(*(compile_in(("block",), compile_mode, part) for part in PLAIN_PARTS))
        self.run_loss = compile_in(("block", "full"), compile_mode, head_loss_torch)

    def reach_of(self, block: int) -> int:
        """Positions that a block looks back at most."""
        kinds = self.config.windows or "L"
        return (self.config.seq_len + 1) // 2 if kinds[block % len(kinds)] == "S" else MOST

    def forward(self, tokens: Tensor, targets: Tensor | None = None, depth: Depth | None = None) -> Tensor:
        """Logits (B, T, V); with targets (B, T) the mean loss."""
        x, routing = self.run(tokens, depth)
        if targets is None:
            return self.logits(x)
        loss = self.run_loss(x, self.head, targets, self.config.softcap)
        if routing and self.training:
            balance, z = torch.stack(routing).mean(0)
            loss = loss + 0.01 * balance + 0.001 * z
        return loss

    def hidden(
        self,
        tokens: Tensor,
        depth: Depth | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> Tensor:
        """(B, T) tokens to normalised states (B, T, D). With a cache the tokens continue its stream. `lora`: adapters
        by block and layer. `on_pass` sees the stream after every pass, before a norm of the plan, and returns the
        stream that goes on; then nothing is compiled."""
        return self.run(tokens, depth, cache, lora, on_pass)[0]

    def logits(self, states: Tensor) -> Tensor:
        return softcap_logits(states, self.head, self.config.softcap)

    @property
    def head_name(self) -> str:
        return "embed.weight" if self.unembed is None else "unembed.weight"

    @property
    def head(self) -> Tensor:
        return (self.embed if self.unembed is None else self.unembed).weight

    def run(
        self,
        tokens: Tensor,
        depth: Depth | None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        on_pass: OnPass | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        trunk = self.run_trunk if on_pass is None else LoopedGPT.trunk
        return trunk(self, tokens, depth or self.config.scoring_depth, cache, lora or {}, on_pass)

    def trunk(
        self, tokens: Tensor, depth: Depth, cache: Cache | None, lora: Lora, on_pass: OnPass | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The final states, and the losses of every pass with a mixture."""
        passes = self.plan.passes(depth, self.config.table_repetitions)
        slots = cache.slots(self.plan, depth) if cache else []
        n_skips = len(passes) // 2 if self.config.skips == "unet" else 0
        parts = self.parts if on_pass is None else PLAIN_PARTS
        stream = self.enter(tokens, cache, parts)
        x = stream.x0.clone()  # one tensor under two names would be a graph of its own to the compiler
        rows = self.passes.rows(self.value_out(self.value(tokens)) if self.passes.value_slots else None)
        joints = self.passes.joints()
        run_block = parts.block
        if self.config.checkpoint_passes:
            run_block = functools.partial(checkpoint, parts.block, use_reentrant=False)
        entered: dict[int, Tensor] = {}  # stream that entered a group with ^
        pushed: list[Tensor] = []  # streams of the first half of the passes that run, popped by the second
        routing: list[Tensor] = []
        for index, p in enumerate(passes):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns(p)):
                for group in p.enter:
                    entered[group] = x
                for group in p.inject:
                    x = self.mix_in(group, entered[group], x)
                if index >= n_skips and pushed:
                    left = pushed.pop()
                    x = parts.join(x, left, *joints[len(pushed)])
                name = self.plan.names[p.block]
                block = self.block(name)
                row = rows[p.slot]._replace(loop=block.loop_row(p.visit), lora=lora.get(name, {}))
                if cache:
                    is_last_of_slot = slots[index] not in slots[index + 1 :]
                    row = row._replace(past=cache.kept.get(slots[index]), keeps=is_last_of_slot)
                x, kept, losses = run_block(block, x, row, stream)
                if losses is not None:
                    routing.append(losses)
                if on_pass:
                    x = on_pass(p, x)
                if p.norm:
                    x = self.norms(x, "loop")
                if index < n_skips:
                    pushed.append(x)
                if cache and kept is not None:
                    cache.keep(slots[index], kept)
        if cache:
            cache.tokens = self.seen_tokens(tokens, cache)[:, -cache.window - 1 :]
        return self.norms(x, "final"), routing

    def learns(self, p: Pass) -> bool:
        """Whether the gradient reaches a pass: it ends some repetitions of the *r group before the last."""
        return self.config.bptt == 0 or p.repetitions_left is None or p.repetitions_left < self.config.bptt

    def mix_in(self, group: int, entered: Tensor, x: Tensor) -> Tensor:
        """The stream with the input of a repeated group mixed in."""
        if str(group) not in self.inject:
            return x + entered
        return self.inject[str(group)](torch.cat((entered, x), -1))

    def seen_tokens(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """The tokens after those that the cache remembers, or after two BOS."""
        if cache is not None and cache.tokens is not None:
            return torch.cat((cache.tokens, tokens), 1)
        return torch.cat((tokens.new_full((len(tokens), 2), self.config.bos_id), tokens), 1)

    def enter(self, tokens: Tensor, cache: Cache | None, parts: Parts) -> Stream:
        T = tokens.shape[1]
        past = cache.length if cache else 0
        seen = self.seen_tokens(tokens, cache)
        docs = None
        if self.config.doc_attention or self.config.look_back:
            docs = (seen[:, -past - T :] == self.config.bos_id).cumsum(1, dtype=torch.int32)
        cos, sin = build_rotation(past + T, self.config.rope_dims, self.config.rope_base, self.embed.weight)
        window = cache.window if cache else self.config.seq_len
        return Stream(self.embed_tokens(seen[:, -T - 2 :], parts), cos, sin, window, docs)

    def embed_tokens(self, tokens: Tensor, parts: Parts = PLAIN_PARTS) -> Tensor:
        """(B, 2 + T) tokens to (B, T, D): two are only looked back on. Nothing passes a BOS from left to right."""
        config = self.config
        is_start = tokens[:, 1:] == config.bos_id
        x = self.embed(tokens[:, 1:])
        if config.bigram_buckets:
            previous = torch.where(is_start, config.bos_id, tokens[:, :-1])
            x = x + self.bigram_out(self.bigram((92821 * previous + tokens[:, 1:]) % config.bigram_buckets))
        if config.embed_norm:
            x = self.norms(x, "embed")
        return x[:, 1:] if self.smear_gate is None else parts.smear(x, self.smear_gate, is_start[:, 1:])

    def linears(self) -> dict[str, dict[str, Linear]]:
        return {name: self.block(name).linears() for name in self.plan.names}

    def block(self, name: str) -> Block:
        block = self.blocks[name]
        assert isinstance(block, Block)
        return block

    def parameters_of_block(self, letter: str) -> list[nn.Parameter]:
        return list(self.block(letter).parameters())


def compile_in(modes: tuple[str, ...], mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if mode in modes else function


def build_model(config: Config, ctx: RunContext) -> LoopedGPT:
    if ctx.compile != "none":
        torch._dynamo.config.recompile_limit = 64  # depths, shapes and grad modes of one run; each is compiled once
    with ctx.device:
        return LoopedGPT(config, ctx.dtype, ctx.compile)


def build_meta_model(config: Config) -> LoopedGPT:
    """Shapes and declarations without weights."""
    with torch.device("meta"):
        return LoopedGPT(config)


def compute_flops(config: Config, mean_r: float, mean_learned_r: float | None = None) -> int:
    """Operations of one trained token, forward and backward, at a mean depth: 6 per weight and pass, 12 K per head,
    key and query; a third of it in repetitions of the *r group that no gradient reaches."""
    model = build_meta_model(config)
    D, T = config.model_dim, config.seq_len
    learned_r = mean_r if mean_learned_r is None else mean_learned_r
    weighed_r = learned_r + (mean_r - learned_r) / 3
    outside = sum(module.weight.numel() for module in model.children() if isinstance(module, Linear))
    total = 6.0 * (outside + model.head.numel())
    for p in model.plan.passes(Depth(1), config.table_repetitions):
        block = model.block(model.plan.names[p.block])
        weights = block.active_weights() + 2 * D * config.adapter_rank
        if config.inject == "concat":
            weights += 2 * D * D * len(p.inject)
        reach = min(T, block.attention.reach)
        keys = reach - reach**2 / (2 * T)  # that a query sees on average
        times = 1.0 if p.repetitions_left is None else weighed_r
        total += times * (6 * weights + 12 * config.num_heads * config.head_width * keys)
    return int(total)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Optimizers
# ----------------------------------------------------------------------------------------------------------------------
# They move float32 master weights (loopgolf/state.py). Every parameter declared its group: Muon takes matrices, Adam
# tables and vectors; or one optimizer takes all.


@dataclass(frozen=True)
class MuonRule:
    """What becomes of the gradients of a matrix."""

    coefficients: Coefficients
    row_norm: bool


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, github.com/KellerJordan/Muon). Matrices of one shape, either way
    up, form a batch, and ranks share the batch. A group has `parts`: for each weight the rows of its projections."""

    def __init__(self, groups: list[dict[str, Any]], rule: MuonRule, ctx: RunContext):
        super().__init__(groups, dict(lr=0.0, momentum=0.0))
        self.rule = rule
        self.ctx = ctx

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            moves = self.advance_momentum(group["params"], group["momentum"])
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            for weight, move, parts in zip(group["params"], moves, group["parts"]):
                for target, piece in zip(weight.split(parts), move.split(parts)):
                    if self.rule.row_norm:  # parameter-golf #1217
                        piece = F.normalize(piece, dim=1)
                    gain = max(1, len(piece) / piece.shape[1]) ** 0.5
                    if gain > 1:  # a tall matrix is the same problem as a wide one: larger batches, fewer idle ranks
                        target, piece = target.mT, piece.mT
                    by_shape.setdefault(piece.shape, []).append((target, piece, -group["lr"] * gain))
        for rows in by_shape.values():
            updates = self.orthogonalize_shared(torch.stack([piece for _, piece, _ in rows]))
            for (target, _, factor), update in zip(rows, updates):
                target.add_(update, alpha=factor)

    def advance_momentum(self, weights: list[Tensor], momentum: float) -> tuple[Tensor, ...]:
        """Nesterov's updates."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        means = [self.state[weight]["momentum"] for weight in weights]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        assert len(grads) == len(weights)
        torch._foreach_mul_(means, momentum)
        torch._foreach_add_(means, grads)
        return torch._foreach_add(grads, means, alpha=momentum)

    def orthogonalize_shared(self, batch: Tensor) -> Tensor:
        ctx, n = self.ctx, len(batch)
        share = math.ceil(n / ctx.world)
        batch = F.pad(batch, (0, 0, 0, 0, 0, share * ctx.world - n))
        mine = orthogonalize_ref(batch[ctx.rank * share : (ctx.rank + 1) * share], ctx.dtype, self.rule.coefficients)
        return torch.cat(ctx.gather(mine))[:n].float()


class Lion(torch.optim.Optimizer):
    """The sign of a gradient mixed with its momentum; every weight moves by the learning rate (arXiv:2302.06675)."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        super().__init__(groups, dict(lr=0.0, betas=betas))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                update = state["momentum"].lerp(weight.grad, 1 - beta1).sign()
                weight.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                state["momentum"].lerp_(weight.grad, 1 - beta2)


Groups = dict[str, list[dict[str, Any]]]  # torch's parameter groups by declared group


def build_muon(groups: Groups, config: Config, ctx: RunContext) -> dict[str, torch.optim.Optimizer]:
    others = [*groups["table"], *groups["vector"]]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(config.beta1, config.beta2), fused=True)
    rule = MuonRule(COEFFICIENTS[config.newton_schulz], config.row_norm)
    return {"muon": Muon(groups["matrix"], rule, ctx), "adam": adam}


def build_lion(groups: Groups, config: Config, ctx: RunContext) -> dict[str, torch.optim.Optimizer]:
    everything = [*groups["matrix"], *groups["table"], *groups["vector"]]
    return {"lion": Lion(everything, (config.beta1, config.beta2))}


OPTIMIZERS = {"muon": build_muon, "lion": build_lion}


def build_optimizers(
    model: LoopedGPT, weights: dict[str, Tensor], config: Config, ctx: RunContext
) -> dict[str, torch.optim.Optimizer]:
    """Every master weight in exactly one optimizer, by the group that its parameter declared."""
    specs = collect_specs(model)
    peaks = {"matrix": config.matrix_lr, "table": config.table_lr, "vector": config.vector_lr}
    groups: Groups = {group: [] for group in peaks}
    for group, peak in peaks.items():
        for decays in (True, False):
            names = [n for n in weights if specs[n].group == group and specs[n].decays == decays]
            params, parts = [weights[n] for n in names], [specs[n].parts for n in names]
            decay = config.weight_decay if decays else 0.0
            if names:
                groups[group].append(dict(params=params, parts=parts, peak=peak, weight_decay=decay))
    optimizers = OPTIMIZERS[config.optimizer](groups, config, ctx)
    held = [id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in weights.values())
    return optimizers


def build_formats(config: Config, model: LoopedGPT, k_scale: float) -> dict[str, Format]:
    """How every parameter is trained and stored, by the grid that it declared."""
    grids = {
        "core": RowGrid(config.core_bits, k_scale * config.core_k, config.step_bits),
        "edge": RowGrid(config.edge_bits, k_scale * config.edge_k, config.step_bits),
        "embed": RowGrid(config.embed_bits, k_scale * config.embed_k, config.step_bits),
        "table": RowGrid(config.table_bits, k_scale * config.table_k, config.step_bits),
    }
    return {name: grids[spec.grid] if spec.grid else Half() for name, spec in collect_specs(model).items()}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Training
# ----------------------------------------------------------------------------------------------------------------------
# The story of a run: warm up off the clock, then steps until the budget is used, with a checkpoint now and then.


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0  # consumed, over all ranks
    used_s: float = 0.0
    # of the latest step: how long the next one may take, and the shape that holds until the end of a round of windows
    step_s: float = 0.0
    batch_tokens: int = 0
    seq_len: int = 0


@dataclass(frozen=True)
class Trained:
    """What training hands on: averaged weights, what steers their rounding, and what it took."""

    averaged: dict[str, Tensor]
    curvatures: dict[str, Curvature]
    k_scale: float
    position: Position


def ignore_part(part: str) -> None:
    """Most callers do not want to know which part of a step has ended."""


def train_step(
    model: LoopedGPT,
    state: TrainState,
    batch: tuple[Tensor, Tensor],
    settings: Settings,
    ctx: RunContext,
    end_part: Callable[[str], None] = ignore_part,
) -> Tensor:
    """One optimizer step on this rank's sequences. Returns its mean loss, or NaN if the gradient is not finite."""
    inputs, targets = batch
    size = model.config.micro_batch or len(inputs)
    total = torch.zeros((), device=ctx.device)
    for x, y in zip(inputs.split(size), targets.split(size)):
        loss = model(x, y, settings.depth)
        end_part("forward")
        loss.backward()
        state.accumulate()
        total += loss.detach()
        end_part("backward")
    n_micro = len(inputs) // size
    norm = state.reduce(ctx.sum, 1 / (n_micro * ctx.world), model.config.grad_clip)
    end_part("communication")
    state.step(settings.lr_scale, settings.momentum, settings.is_rounded)
    end_part("optimizer")
    return torch.where(norm.isfinite(), total / n_micro, torch.nan)


def build_state(config: Config, ctx: RunContext, model: LoopedGPT, k_scale: float) -> TrainState:
    master = MasterWeights(dict(model.named_parameters()), build_formats(config, model, k_scale))
    optimizers = build_optimizers(model, master.weights, config, ctx)
    average = WeightAverage(config.average, config.average_start, config.average_every, config.ema_decay)
    return TrainState(master, optimizers, average, is_rounded=config.qat_start == 0)


def warm_up(model: LoopedGPT, state: TrainState, config: Config, ctx: RunContext) -> None:
    """Compiles every graph of the run on made-up tokens, then puts back weights, optimizer state and random state."""
    started = time.perf_counter()
    before = copy.deepcopy(state.state_dict())
    random_state = torch.get_rng_state()
    for settings in list_forwards(config, ctx.compile):
        shape = (settings.batch_tokens // settings.seq_len // ctx.world, settings.seq_len + 1)
        made_up = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        train_step(model, state, split_tokens(made_up, ctx), settings, ctx)
    state.load_state_dict(before)
    torch.set_rng_state(random_state)
    ctx.sync()
    ctx.log("warmup", compile=ctx.compile, seconds=time.perf_counter() - started)


def train(
    config: Config, ctx: RunContext, model: LoopedGPT, k_scale: float, text: TrainingText, folder: Path
) -> Trained:
    state = build_state(config, ctx, model, k_scale)
    at = resume_position(config, ctx, state, folder)
    warm_up(model, state, config, ctx)
    calibrates = config.calibration_tokens > 0 and is_limit_binding(config, k_scale)
    budget = Budget(config, config.export_reserve if calibrates else 0.0)
    if at.step:
        budget.add_step(at.step_s)
    clock = Clock(ctx, at.used_s)
    saved_at_s = at.used_s
    with StopSignals() as stop, ctx.log.progress_bar(1.0, "training") as bar:
        clock.start()
        while (progress := budget.progress(at.step, at.used_s)) is not None:
            settings = settings_at(config, progress, at.step)
            if not text.ends_round(at.tokens):  # mid-round the shape stays, or a window would be read twice
                settings = replace(settings, batch_tokens=at.batch_tokens, seq_len=at.seq_len)
            batch = load_batch(text, at.tokens, settings, ctx)
            step_loss = train_step(model, state, batch, settings, ctx)
            state.update_average(at.step, progress)
            loss = ctx.mean_loss(step_loss)  # sync: the only one of a step
            seconds, stops = ctx.gather_numbers(clock.read(), stop.seen)
            now_s, must_stop = max(seconds), any(stops)
            at = Position(
                step=at.step + 1,
                tokens=at.tokens + settings.batch_tokens,
                used_s=now_s,
                step_s=now_s - at.used_s,
                batch_tokens=settings.batch_tokens,
                seq_len=settings.seq_len,
            )
            budget.add_step(at.step_s)
            log_step(config, ctx, at, loss, settings, progress)
            if progress < 0.5 and is_power_of_two(at.step):
                log_telemetry(model, at.step, text.stream, ctx)
            bar.update(progress - bar.n)
            bar.set_postfix_str(f"step {at.step} loss {loss:.3f}", refresh=False)
            is_due = config.checkpoint_every_s > 0 and now_s - saved_at_s > config.checkpoint_every_s
            if is_due or must_stop or not math.isfinite(loss):
                write_checkpoint(ctx, state, at, folder)
                at.used_s = clock.read_slowest()  # writing takes time of the budget, but none of the next step's
                saved_at_s = at.used_s
            stop_if_needed(at, loss, must_stop, folder)
    write_checkpoint(ctx, state, at, folder)  # whatever happens from here on, a resumed run finds the trained weights
    averaged = state.averaged_weights()
    curvatures: dict[str, Curvature] = {}
    if calibrates:
        time_left = TimeForBatches(clock, config.max_wallclock_seconds, EAGER_STEPS * budget.slowest_s)
        wants_more = wants_tokens(config) if config.iterations else time_left.fits_another
        curvatures = calibrate(config, ctx, averaged, text, wants_more)
    at.used_s = clock.stop()
    log_telemetry(model, at.step, text.stream, ctx)
    return Trained(averaged, curvatures, k_scale, at)


def log_step(config: Config, ctx: RunContext, at: Position, loss: float, settings: Settings, progress: float) -> None:
    if at.step % config.log_every and at.step != 1 and progress < 1.0:
        return
    rate = round(settings.batch_tokens / at.step_s)
    ctx.log(
        "train",
        step=at.step,
        tokens=at.tokens,
        train_loss=loss,
        lr_scale=settings.lr_scale,
        train_s=at.used_s,
        step_ms=1000 * at.step_s,
        tokens_per_s=rate,
    )


def is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def stop_if_needed(at: Position, loss: float, must_stop: bool, folder: Path) -> None:
    """After the checkpoint: its weights are finite whatever the loss is."""
    if not math.isfinite(loss):
        saved = folder / "checkpoint.pt"
        raise NonFiniteLoss(f"loss {loss} at step {at.step}; lower a learning rate; {saved} has finite weights")
    if must_stop:
        raise Interrupted(f"stopped at step {at.step}; continue with --resume {folder}")


@torch.no_grad()
def log_telemetry(model: LoopedGPT, step: int, stream: TokenStream, ctx: RunContext) -> None:
    """The size of the stream at the end of each repetition, on the same text every time, and how much the adapter of
    each pass is like that of the first. Nothing for plans without groups."""
    if not model.plan.has_groups:
        return
    sizes: list[Tensor] = []

    def measure(p: Pass, x: Tensor) -> Tensor:
        if p.ends:
            sizes.append(x.float().square().mean().sqrt())
        return x

    tokens = torch.from_numpy(stream.read(0, model.config.seq_len)).to(ctx.device)
    model.hidden(tokens[None], on_pass=measure)
    values = {"rms": sizes}
    if model.passes.adapters is not None:
        unit = F.normalize(model.passes.adapters[:, 1].flatten(1), dim=1)
        values["adapter_cosines"] = list(unit[1:] @ unit[0])
    ctx.log("telemetry", step=step, **{name: ",".join(f"{v:.3f}" for v in row) for name, row in values.items()})


def write_checkpoint(ctx: RunContext, state: TrainState, at: Position, folder: Path) -> None:
    if ctx.rank == 0:
        save_checkpoint(folder / "checkpoint.pt", state, asdict(at))


def resume_position(config: Config, ctx: RunContext, state: TrainState, folder: Path) -> Position:
    if not config.resume:
        return Position()
    path = folder / "checkpoint.pt"
    if not path.is_file():
        ctx.log.line(f"# no checkpoint in {folder} yet: starting from the beginning")
        return Position()
    at = Position(**load_checkpoint(path, state, ctx.device))
    ctx.log("resume", step=at.step, used_s=at.used_s)
    return at


CALIBRATED_AT_ONCE = 16_384  # tokens: not compiled, they take more memory than in training
EAGER_STEPS = 5  # compiled steps that a batch may take that is not: 3.3 were measured on a CPU


class TimeForBatches:
    """Whether another batch would end in time, which all ranks answer alike. The first one is taken to need `first_s`,
    all others as much as the slowest before them."""

    def __init__(self, clock: Clock, end_s: float, first_s: float):
        self.clock, self.end_s, self.first_s = clock, end_s, first_s
        self.asked_s: list[float] = []

    def fits_another(self, consumed: int) -> bool:
        self.asked_s.append(self.clock.read_slowest())
        needed_s = max((b - a for a, b in itertools.pairwise(self.asked_s)), default=self.first_s)
        return self.asked_s[-1] + needed_s < self.end_s


def wants_tokens(config: Config) -> Callable[[int], bool]:
    """Whether so many tokens are fewer than the run calibrates on when no clock decides."""
    return lambda consumed: consumed < config.calibration_tokens


def calibrate(
    config: Config,
    ctx: RunContext,
    weights: dict[str, Tensor],
    text: TrainingText,
    wants_more: Callable[[int], bool],
) -> dict[str, Curvature]:
    """How sensitive the loss is to errors in matrices and tables, on training text. `wants_more` is asked before every
    batch, with the tokens read so far."""
    # the gradient reaches every pass; not compiled: hooks do not run in a graph
    model = LoopedGPT(replace(config, bptt=0), ctx.dtype).to(ctx.device)
    model.load_state_dict(weights)
    meter = CurvatureMeter(model)
    settings = settings_at(config, 1.0, 0)
    rows = max(1, CALIBRATED_AT_ONCE // settings.seq_len)
    if config.micro_batch:
        rows = min(rows, config.micro_batch)
    consumed = 0
    while wants_more(consumed):
        inputs, targets = load_batch(text, consumed, settings, ctx)
        for x, y in zip(inputs.split(rows), targets.split(rows)):
            states = model.hidden(x)
            logits = F.linear(states, model.head.detach())
            meter.watch_head(model.head_name, states, logits)
            capped = softcap(logits.float(), config.softcap)
            F.cross_entropy(capped.flatten(0, 1), y.flatten(), reduction="sum").backward()
        ctx.sync()
        consumed += settings.batch_tokens
    ctx.log("calibration", tokens=consumed)
    return meter.totals(ctx.sum)


# ----------------------------------------------------------------------------------------------------------------------
# 7. File
# ----------------------------------------------------------------------------------------------------------------------
# What goes into the artifact, how coarse its grids have to be, and how it comes back. Bits per weight depend on k
# alone, so the coarseness is solved from the byte limit before training, and moved a little at most in the final fit.

FINEST, COARSEST = 0.3, 5.0  # k_scale: below, codes clip before they get finer; above, less than 1.5 bits are left
HEADER_BYTES = 900  # settings that differ from the defaults, digest, compressed tables
FIT_ATTEMPTS = 6


def forecast_bytes(model: LoopedGPT, formats: dict[str, Format], weights: dict[str, Tensor] | None = None) -> int:
    """Size of the artifact without writing it: from the entropy of the weights' codes, or of Gaussian ones."""
    total = float(HEADER_BYTES)
    for name, p in model.named_parameters():
        total += formats[name].expected_bytes(tuple(p.shape), weights[name] if weights else None)
    return int(total)


def solve_k_scale(size_at: Callable[[float], int], room: int, config: Config) -> float:
    """The finest k_scale whose file leaves nothing over `room` bytes."""
    if size_at(FINEST) <= room:
        return FINEST
    least = size_at(COARSEST)
    if least > room:
        why = f"at least {least + config.code_reserve:,} bytes are needed, {config.code_reserve:,} of them for code"
        raise DoesNotFit(f"byte_limit={config.byte_limit:,}: {why}; take a smaller --model_dim or a shorter --plan")
    low, high = FINEST, COARSEST
    while high - low > 1e-4 * high:
        middle = math.sqrt(low * high)
        if size_at(middle) > room:
            low = middle
        else:
            high = middle
    return high


def plan_k_scale(config: Config, model: LoopedGPT) -> float:
    """The coarseness to train at: given, or solved from the byte limit with Gaussian weights."""
    if config.k_scale:
        return config.k_scale
    if not config.byte_limit:
        return FINEST
    room = config.byte_limit - config.code_reserve
    return solve_k_scale(lambda k_scale: forecast_bytes(model, build_formats(config, model, k_scale)), room, config)


def is_limit_binding(config: Config, k_scale: float) -> bool:
    """Whether the byte limit chose the grids."""
    return not config.k_scale and k_scale > FINEST


def fit_artifact(config: Config, model: LoopedGPT, trained: Trained, identity: dict[str, Any]) -> bytes:
    """The file at the coarseness that was trained, unless the byte limit decides: then one of 99.5% to 100% of it, or
    the largest below. Sizes are searched by entropy; what coder and feedback add is learned from each attempt."""
    largest = b""
    room = config.byte_limit - config.code_reserve if config.byte_limit else sys.maxsize
    overhead = 0  # bytes of the latest attempt over its forecast

    def forecast(k_scale: float) -> int:
        return forecast_bytes(model, build_formats(config, model, k_scale), trained.averaged) + overhead

    def encode(k_scale: float, curvatures: dict[str, Curvature]) -> bytes:
        formats = build_formats(config, model, k_scale)
        return encode_artifact(config, model, trained.averaged, formats, curvatures, identity)

    limit_chose_grid = is_limit_binding(config, trained.k_scale)
    if not limit_chose_grid and forecast(trained.k_scale) <= room:
        # on the very grid of training weights may have learned to be rounded plainly: there feedback only loses
        content = encode(trained.k_scale, {})
        if len(content) <= room:
            return content
        overhead += len(content) - forecast(trained.k_scale)
    for _ in range(FIT_ATTEMPTS):
        try:
            k_scale = solve_k_scale(forecast, int(0.998 * room), config)
        except DoesNotFit:
            if largest:
                break  # what the latest attempt was over its forecast was a jump
            raise
        content = encode(k_scale, trained.curvatures if k_scale != trained.k_scale else {})
        if len(content) <= room:
            largest = max(largest, content, key=len)
            if len(content) >= 0.995 * room or k_scale == FINEST:
                return content
        overhead += len(content) - forecast(k_scale)
    if not largest:
        why = f"each of {FIT_ATTEMPTS} files was larger; take a smaller --model_dim"
        raise DoesNotFit(f"byte_limit={config.byte_limit:,}: {why}")
    return largest


def encode_artifact(
    config: Config,
    model: LoopedGPT,
    weights: dict[str, Tensor],
    formats: dict[str, Format],
    curvatures: dict[str, Curvature],
    identity: dict[str, Any],
) -> bytes:
    raw: dict[str, Tensor] = {}
    layout = build_layout(model, formats)
    grids = {name: form for name, form in formats.items() if isinstance(form, RowGrid)}
    steps = choose_steps(weights, grids, curvatures) if config.row_steps == "loss" else {}
    for name, described in layout.items():
        tensors = described.format.quantize(weights[name], find_hessian(curvatures, name), steps.get(name))
        raw |= zip(described.stored(name), tensors)
    return pack_artifact(config.stored(), layout, raw, identity)


def build_layout(model: LoopedGPT, formats: dict[str, Format]) -> Layout:
    return {name: Described(tuple(p.shape), formats[name]) for name, p in model.named_parameters()}


def config_from_stored(stored: dict[str, Any]) -> Config:
    """The config of a stored artifact."""
    problem = find_wrong_fields(stored, Stored)
    if problem:
        raise ArtifactError(f"its config does not work: {problem}")
    seq_len = stored.get("seq_len", Config().seq_len)
    try:
        return Config(**stored, batch_tokens=seq_len)
    except ConfigError as error:
        raise ArtifactError(f"its config does not work: {error}") from None


def describe_stored(stored: dict[str, Any]) -> Layout:
    """The parameters of an artifact that stores these settings."""
    config = config_from_stored(stored)
    model = build_meta_model(config)
    return build_layout(model, build_formats(config, model, k_scale=1.0))


def load_artifact(path: str | Path) -> Artifact:
    try:
        return unpack_artifact(Path(path).read_bytes(), describe_stored)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def export(config: Config, ctx: RunContext, model: LoopedGPT, trained: Trained, val: Validation, path: Path) -> None:
    """Writes the artifact, unless it is over the limit. From here on only that file is used."""
    if ctx.rank == 0:
        try:
            content = fit_artifact(config, model, trained, val.identity)
        except DoesNotFit as error:
            raise DoesNotFit(f"{error}; the checkpoint is kept in {path.parent}") from None
        write_atomic(path, content)
    ctx.wait_for_all()


# ----------------------------------------------------------------------------------------------------------------------
# 8. Score
# ----------------------------------------------------------------------------------------------------------------------
# What is scored, with which model, in which mode; loopgolf/scoring.py and adapting.py are how.


class ScorerEntry(NamedTuple):
    """A score mode: the class is imported when it is used, so that what a recipe does not use is not packed."""

    module: str
    name: str
    help: str


SCORERS = {
    "plain": ScorerEntry("loopgolf.scoring", "PlainScorer", "windows that do not overlap"),
    "sliding": ScorerEntry("loopgolf.scoring", "SlidingScorer", "short strides, many times the work"),
    "banded": ScorerEntry("loopgolf.scoring", "BandedScorer", "long windows with a band of attention"),
    "sgd": ScorerEntry("loopgolf.adapting", "SgdScorer", "banded, and SGD on what is scored"),
    "lora": ScorerEntry("loopgolf.adapting", "LoraScorer", "adapters that learn within each document"),
}


def find_scorer(mode: str) -> Any:
    """The class of a score mode."""
    entry = SCORERS[mode]
    return getattr(import_when_used(entry.module, f"score_mode={mode}"), entry.name)


def build_scorer(
    mode: str, model: LoopedGPT, config: Scoring, ctx: RunContext, mask: Mask | None = None
) -> WindowScorer:
    """`mask`: what build_mask made for the tokenizer of the text."""
    assert config.canonical == (mask is not None)
    scorer: WindowScorer = find_scorer(mode)(model, config, ctx)
    scorer.mask = mask
    if config.recall_share:
        module = import_when_used("loopgolf.recall", f"recall_share={config.recall_share}")
        settings = config.recall_share, config.recall_sharpness, config.bos_id
        scorer.build_memory = functools.partial(module.Recall, *settings)
    return scorer


def build_mask(tokenizer: sentencepiece.SentencePieceProcessor, config: Scoring, ctx: RunContext) -> Mask | None:
    if not config.canonical:
        return None
    module = import_when_used("loopgolf.canonical", "canonical=1")
    mask: Mask = module.CanonicalMask(tokenizer, config.bos_id, ctx.device)
    return mask


def import_when_used(module: str, setting: str) -> Any:
    """A packed script holds the modules of its own recipe only."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ConfigError(f"{setting}: this script was packed without {module}; run the repository's") from None


def list_score_modes(config: Config) -> list[str]:
    """The modes that a run is scored in."""
    return [config.score_mode, *(word for word in config.diagnostics if word in SCORERS)]


def used_modules(config: Config) -> list[str]:
    """The modules that a config imports when they are used; all others are imported at the top."""
    modules = [SCORERS[mode].module for mode in list_score_modes(config)]
    if config.moe_experts:
        modules.append("loopgolf.moe")
    if config.canonical:
        modules.append("loopgolf.canonical")
    if config.recall_share:
        modules.append("loopgolf.recall")
    return sorted(set(modules))


def build_eval_model(config: Config, ctx: RunContext) -> LoopedGPT:
    """A model to score with. A CPU takes longer to compile the shapes of scoring than to score without."""
    return build_model(config, replace(ctx, compile="none") if ctx.device.type == "cpu" else ctx)


def load_eval_model(artifact: Artifact, config: Config, ctx: RunContext) -> LoopedGPT:
    """The model of an artifact, ready to be scored."""
    model = build_eval_model(config, ctx)
    model.load_state_dict(artifact.tensors)
    return model.eval()


@dataclass(frozen=True)
class Validation:
    """The tokens that are scored, how their bytes are counted, what tells their tokenizer apart, and what it rules
    out."""

    tokens: Tensor
    counter: ByteCounter
    identity: dict[str, Any]
    mask: Mask | None


def load_validation(config: Config, ctx: RunContext) -> Validation:
    tokenizer = load_run_tokenizer(config)
    stream = TokenStream(config.data_path, "val", config.vocab_size)
    tokens = stream.read(0, stream.total)
    facts: dict[str, int | str] = dict(tokens=stream.total)
    if config.score_documents:
        documents = split_documents(tokens, config.bos_id)[: config.score_documents]
        tokens = np.concatenate(documents)
        facts.update(documents=len(documents), text_sha256=hash_text(documents, tokenizer))
    if len(tokens) < config.seq_len + 1:
        count = f"{len(tokens)} validation tokens"
        raise DataError(f"{config.data_path}: {count} are fewer than one window of {config.seq_len}")
    sha256 = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    ctx.log("data", split="val", shards=len(stream.paths), **facts, scored=len(tokens), sha256=sha256)
    if config.text_sha256 and facts.get("text_sha256") != config.text_sha256:
        ctx.log.line(
            f"# warning: the text is not the one that {config.recipe} is scored on: its score compares with no other"
        )
    mask = build_mask(tokenizer.model, config, ctx)
    if mask is not None:
        mask.check_text(torch.from_numpy(tokens))
    return Validation(
        tokens=torch.from_numpy(tokens),
        counter=ByteCounter(tokenizer.model),
        identity=tokenizer.identity,
        mask=mask,
    )


def split_documents(tokens: np.ndarray, bos_id: int) -> list[np.ndarray]:
    """Every document starts with BOS; what comes before the first one belongs to it."""
    starts = np.flatnonzero(tokens == bos_id)
    return np.split(tokens, starts[1:])


def hash_text(documents: list[np.ndarray], tokenizer: Tokenizer) -> str:
    """sha256 of the text, whatever the vocabulary."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(decode_tokens(tokenizer.model, document.tolist()).encode() + b"\n")
    return digest.hexdigest()


class Evaluated(NamedTuple):
    score: Score
    updates: int  # of adaptation
    skipped: int  # updates that the time did not allow


def evaluate(
    mode: str, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation, name: str = ""
) -> Evaluated:
    """Score one mode and log it. `name` says which weights, where it is not the artifact. A finished file (--score) has
    all the time that it takes: a score belongs to the file, not to the machine."""
    started = time.perf_counter()
    scorer, meter = build_scorer(mode, model, config, ctx, val.mask), BpbMeter(val.counter)
    if model.is_compiled:
        scorer.warm_up()
    deadline = math.inf if config.score else started + config.eval_budget
    score_tokens(scorer, val.tokens, meter, name or mode, deadline)
    score = meter.total(ctx)
    updates, skipped = count_updates(scorer, ctx)
    ctx.log(
        "score", what=name or "artifact", mode=mode, val_loss=f"{score.loss:.8f}", val_bpb=f"{score.bpb:.8f}",
        tokens=score.tokens, bytes=score.bytes, updates=updates, skipped=skipped, eval_s=time.perf_counter() - started,
    )  # fmt: skip
    return Evaluated(score, updates, skipped)


def count_updates(scorer: WindowScorer, ctx: RunContext) -> tuple[int, int]:
    """Updates made and skipped. Ranks share every update, or the documents."""
    per_rank = ctx.gather_numbers(scorer.updates, scorer.skipped)
    total = [sum(counts) if scorer.is_per_document else counts[0] for counts in per_rank]
    return int(total[0]), int(total[1])


def log_scoring_forecast(mode: str, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation) -> None:
    """How long scoring will take, and whether even plain scoring is too much for its budget."""
    seconds = build_scorer(mode, model, config, ctx, val.mask).estimate_seconds(len(val.tokens))
    ctx.log("forecast", what="scoring", mode=mode, seconds=seconds)
    if seconds > config.eval_budget and not config.score:
        budget = f"eval_budget={config.eval_budget}"
        ctx.log.line(f"# warning: {mode} scoring alone is expected to take {seconds:.0f} s, more than {budget}")


def score_artifact(
    artifact: Artifact, model: LoopedGPT, config: Config, ctx: RunContext, val: Validation
) -> dict[str, Any]:
    """The score, from the file, in the mode that the config fixed; and the diagnostics that were asked for."""
    if artifact.tokenizer != val.identity:
        raise ConfigError(f"the artifact was made with another tokenizer than {config.tokenizer_file}")
    model.load_state_dict(artifact.tensors)
    started = time.perf_counter()
    final = evaluate(config.score_mode, model, config, ctx, val)
    eval_s = max(ctx.gather_numbers(time.perf_counter() - started)[0])
    result: dict[str, Any] = dict(val_bpb=final.score.bpb, val_loss=final.score.loss, score_mode=config.score_mode)
    result.update(updates=final.updates, skipped=final.skipped, eval_s=eval_s)
    if not config.score:
        result["eval_fits"] = yes_or_no(eval_s <= config.eval_budget)
    for mode in SCORERS:
        if mode in config.diagnostics:
            found = final if mode == config.score_mode else evaluate(mode, model, config, ctx, val)
            result[f"bpb_{mode}"] = found.score.bpb
    total, limit = artifact.size + ctx.code_bytes, config.byte_limit
    result.update(artifact_bytes=artifact.size, code_bytes=ctx.code_bytes, total_bytes=total, limit=limit)
    result.update(fits=yes_or_no(limit == 0 or total <= limit), artifact_sha256=artifact.sha256)
    return result


def yes_or_no(answer: bool) -> str:
    return "yes" if answer else "no"


def result_order() -> list[str]:
    """The fields of the result line, as far as a run has them."""
    diagnostics = [f"bpb_{word}" for word in list_choices("also") if word != "none"]
    return [
        *("val_bpb", "val_loss", "score_mode", "updates", "skipped", *diagnostics, "steps", "tokens", "train_s"),
        *("eval_s", "eval_fits", "artifact_bytes", "code_bytes", "total_bytes", "limit", "fits", "seed", "recipe"),
        "artifact_sha256",
    ]


def log_result(fields_found: dict[str, Any], ctx: RunContext) -> dict[str, Any]:
    """The last line of a run."""
    result = {name: fields_found[name] for name in result_order() if name in fields_found}
    for name, value in result.items():
        if name.startswith(("val_", "bpb_")):
            result[name] = f"{value:.8f}"
    ctx.log("result", **result)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# 9. Main
# ----------------------------------------------------------------------------------------------------------------------


def build_context(config: Config, environ: dict[str, str], code_bytes: int = 0) -> RunContext:
    """Rank, device, dtype and compile mode, once. Joins the process group that torchrun announces."""
    rank, world = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    has_gpu = torch.cuda.is_available()
    on_gpu = has_gpu if config.device == "auto" else config.device == "cuda"
    if on_gpu and not has_gpu:
        raise ConfigError("device=cuda: this machine has no usable CUDA device; use --device cpu")
    device = torch.device(f"cuda:{environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    host_group = join_process_group(on_gpu) if world > 1 else None
    log = Log(quiet=rank != 0)
    mode = choose_compile_mode(config, device, log)
    return RunContext(
        rank=rank,
        world=world,
        device=device,
        dtype=choose_dtype(config, on_gpu),
        compile=mode,
        log=log,
        code_bytes=code_bytes,
        host_group=host_group,
    )


def join_process_group(on_gpu: bool) -> dist.ProcessGroup | None:
    """Returns the group over which processors talk, where it is another one than that of the devices."""
    if not dist.is_initialized():
        _ = torch._dynamo  # loads it: beside a process group it would hold the group, and its threads would never end
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return dist.new_group(backend="gloo") if on_gpu else None


def choose_dtype(config: Config, on_gpu: bool) -> torch.dtype:
    """bfloat16 pays where the processor multiplies it in hardware; elsewhere it is emulated and slower than float32."""
    has_bf16 = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    by_itself = "bfloat16" if has_bf16 else "float32"
    return torch.bfloat16 if (by_itself if config.dtype == "auto" else config.dtype) == "bfloat16" else torch.float32


def choose_compile_mode(config: Config, device: torch.device, log: Log) -> str:
    """The whole graph fuses best, but takes a GPU's compiler minutes per depth; block by block it is compiled once."""
    mode = config.compile
    if mode == "auto":
        mode = "full" if device.type == "cuda" and not parse_plan(config.plan).is_variable else "block"
    if mode == "none" or config.dry_run:
        return mode
    if config.score and device.type == "cpu":
        return "none"  # as build_eval_model would
    fault = find_compiler_fault(device)
    if not fault:
        return mode
    if device.type == "cuda":  # too dear to go on at half the speed
        raise ConfigError(f"compile={config.compile}: {fault}; repair that, or --compile none")
    log.line(f"# running uncompiled, about half as fast: {fault}")
    return "none"


def log_head(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """What ran, where, on what: without it a log proves nothing."""
    code_sha256 = hash_counted_code(config)
    ctx.log("run", recipe=config.recipe, seed=config.seed, run_id=config.run_id, code_sha256=code_sha256)
    modules = (torch, np, zstandard, sentencepiece)
    ctx.log("versions", python=platform.python_version(), **{m.__name__: m.__version__ for m in modules})
    name = torch.cuda.get_device_name() if ctx.device.type == "cuda" else platform.processor() or platform.machine()
    threads, dtype = torch.get_num_threads(), str(ctx.dtype).removeprefix("torch.")
    ctx.log("hardware", device=ctx.device.type, name=name, world=ctx.world, threads=threads, dtype=dtype)
    for name, value in asdict(config).items():
        ctx.log("config", name=name, value=repr(value) if isinstance(value, float) else value, source=source[name])


def hash_counted_code(config: Config) -> str:
    """Of this script and what it imports for this config from the repository."""
    return hash_files(find_counted(Path(__file__).parent, used_modules(config)).values())


def log_plan(config: Config, k_scale: float, model: LoopedGPT, ctx: RunContext) -> None:
    """Sizes and forecasts, before anything is trained."""
    counts = dict.fromkeys(("core", "edge", "embed", "table", "vector"), 0)
    specs = collect_specs(model)
    for name, p in model.named_parameters():
        counts[specs[name].role] += p.numel()
    mean_r = expect_repetitions(config)
    sampled = dict(mean_r=mean_r) if model.plan.is_variable else {}
    passes = model.plan.count_passes(config.depth)
    ctx.log("model", params=sum(counts.values()), **counts, passes=passes, blocks=len(model.blocks), **sampled)
    log_size_forecast(config, k_scale, model, ctx)
    flops = compute_flops(config, mean_r, expect_repetitions(config, config.bptt or math.inf))
    # rough on purpose: 40% of an H100's bf16 peak, or what a recent processor's core gives this model
    core = 0.2e12 if ctx.dtype == torch.bfloat16 else 0.06e12
    rate = 400e12 if ctx.device.type == "cuda" else core * torch.get_num_threads()
    step_ms = 1000 * flops * config.batch_tokens / (rate * ctx.world)
    memory_mb = forecast_memory(config, model, ctx) / 1e6
    ctx.log("forecast", flops_per_token=flops, step_ms=step_ms, memory_mb=memory_mb, device=ctx.device.type)


def log_size_forecast(config: Config, k_scale: float, model: LoopedGPT, ctx: RunContext) -> None:
    artifact_bytes = forecast_bytes(model, build_formats(config, model, k_scale))
    total_bytes, limit = artifact_bytes + config.code_reserve, config.byte_limit
    if limit and total_bytes > 1.05 * limit:
        raise DoesNotFit(f"byte_limit={limit:,}: {total_bytes:,} bytes are expected; raise --k_scale or leave it at 0")
    core_bits = RowGrid(config.core_bits, config.core_k * k_scale).gaussian_bits()
    ctx.log("forecast", k_scale=k_scale, core_bits=core_bits, artifact_bytes=artifact_bytes, total_bytes=total_bytes)
    if config.k_scale and limit and total_bytes > 0.97 * limit:
        ctx.log.line(f"# warning: {total_bytes / limit:.1%} of byte_limit expected, the export may coarsen the grid")


def forecast_memory(config: Config, model: LoopedGPT, ctx: RunContext) -> float:
    """Bytes of a training step on one rank, roughly: what waits for its gradient, logits, weights and their state."""
    sequences = config.micro_batch or max(1, config.batch_tokens // config.seq_len // ctx.world)
    kept_passes = model.plan.count_passes(min(config.table_repetitions, config.bptt or config.table_repetitions))
    inside_pass = 10 * config.model_dim + 3 * config.mlp_dim
    values = kept_passes * inside_pass
    if config.checkpoint_passes:
        values = kept_passes * config.model_dim + inside_pass
    params = sum(p.numel() for p in model.parameters())
    return sequences * config.seq_len * (values * ctx.dtype.itemsize + 8 * config.vocab_size) + params * 24


def dry_run(config: Config, ctx: RunContext) -> None:
    check_split(config, ctx)
    model = build_meta_model(config)
    by_part: Counter[str] = Counter()
    for name, p in model.named_parameters():
        words = name.split(".")
        by_part[".".join(words[:2]) if words[0] == "blocks" else words[0]] += p.numel()
    ctx.log.line(f"params:{by_part.total()}")
    for part, count in by_part.items():
        ctx.log("part", name=part, params=count)
    log_plan(config, plan_k_scale(config, model), model, ctx)


def check_split(config: Config, ctx: RunContext) -> None:
    """Whether the sequences of a step split over ranks and micro batches."""
    size = config.micro_batch
    shapes = list_shapes(config)
    longest = max(seq_len for _, seq_len in shapes)
    for tokens, seq_len in shapes:
        sequences = tokens // seq_len
        if tokens % seq_len:
            raise ConfigError(f"batch_tokens={tokens}: must be divisible by seq_len={seq_len}")
        if longest % seq_len:
            raise ConfigError(f"seq_len={seq_len}: must divide {longest}, the longest context of the run")
        if sequences % ctx.world:
            raise ConfigError(f"batch_tokens={tokens}: {sequences} sequences do not split over {ctx.world} ranks")
        if size and sequences // ctx.world % size:
            raise ConfigError(f"micro_batch={size} does not divide the {sequences // ctx.world} sequences of a rank")


def score_only(config: Config, ctx: RunContext) -> None:
    """--score: the model comes from the file, how to score too unless said otherwise."""
    artifact = load_artifact(config.score)
    model = build_eval_model(config, ctx)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != {name: weight.shape for name, weight in artifact.tensors.items()}:
        raise ConfigError(f"score={config.score}: no model of the options given has its shapes; leave the model's out")
    model.load_state_dict(artifact.tensors)
    val = load_validation(config, ctx)
    log_scoring_forecast(config.score_mode, model, config, ctx, val)
    log_result(score_artifact(artifact, model, config, ctx, val), ctx)


def prepare_folder(config: Config, ctx: RunContext, folder: Path) -> None:
    if ctx.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for cut_off in folder.glob(".*.part"):
        cut_off.unlink()  # what a killed process was writing
    ctx.log.open(folder / "log.txt")
    write_atomic(folder / "config.json", json.dumps({**asdict(config), "resume": ""}, indent=1).encode())
    write_atomic(folder / "tokenizer.model", config.tokenizer_file.read_bytes())


def name_run(config: Config, ctx: RunContext) -> Config:
    """Ranks that start in different seconds would look for the artifact in different folders."""
    started = ctx.gather_numbers(time.time())[0][0]
    return replace(config, run_id=config.run_id or time.strftime("%Y%m%d-%H%M%S", time.localtime(started)))


def check_free(config: Config, ctx: RunContext, folder: Path) -> None:
    """All ranks stop, or those that do not would wait for the others."""
    is_taken = not config.resume and (folder / "config.json").exists()
    if any(ctx.gather_numbers(is_taken)[0]):
        raise ConfigError(f"run_id={config.run_id}: {folder} holds a run already; choose another or --resume {folder}")


def run(config: Config, source: dict[str, str], ctx: RunContext) -> None:
    """The whole run: data, model, training, artifact, score from the artifact."""
    check_split(config, ctx)
    for mode in list_score_modes(config):
        find_scorer(mode)  # a packed script that lacks one says so before it trains
    config = name_run(config, ctx)
    folder = Path(config.resume or f"runs/{config.run_id}")
    check_free(config, ctx, folder)
    val = load_validation(config, ctx)
    text = TrainingText(config, list_shapes(config))
    model = build_model(config, ctx)
    k_scale = plan_k_scale(config, model)
    start_weights(model, config.seed)
    prepare_folder(config, ctx, folder)
    log_head(config, source, ctx)
    shards, windows = len(text.stream.paths), text.order.n_blocks
    sha256 = text.stream.fingerprint()
    ctx.log("data", split="train", shards=shards, tokens=text.stream.total, windows=windows, sha256=sha256)
    log_plan(config, k_scale, model, ctx)
    eval_model = build_eval_model(config, ctx)
    eval_model.load_state_dict(model.state_dict())
    log_scoring_forecast("plain", eval_model, config, ctx, val)

    trained = train(config, ctx, model, k_scale, text, folder)
    at = trained.position
    found: dict[str, Any] = dict(steps=at.step, tokens=at.tokens, train_s=at.used_s)
    found.update(seed=config.seed, recipe=config.recipe)
    for name, weights in (("trained", model.state_dict()), ("averaged", trained.averaged)):
        if name in config.diagnostics:
            eval_model.load_state_dict(weights)
            found[f"bpb_{name}"] = evaluate("plain", eval_model, config, ctx, val, name).score.bpb

    path = folder / "artifact.lg"
    export(config, ctx, model, trained, val, path)
    found |= score_artifact(load_artifact(path), eval_model, config, ctx, val)
    result = log_result(found, ctx)
    if ctx.rank == 0:
        report = dict(result=result, config=asdict(config), source=source)
        write_atomic(folder / "result.json", json.dumps(report, indent=1).encode())


def wants_help(argv: list[str]) -> bool:
    return "--help" in argv or argv[:1] == ["-h"]


def find_help_section(argv: list[str]) -> str:
    """The word after --help, if it is no option; empty for the first page."""
    after = argv[argv.index("--help") + 1 :] if "--help" in argv else argv[1:]
    return after[0] if after and not after[0].startswith("-") else ""


def count_code(config: Config, packed_bytes: int) -> int:
    """Bytes that count as code: of the packed script; from source the reserve, which it has to fit."""
    if config.code_reserve == 0:
        return 0
    return packed_bytes or config.code_reserve


def main(argv: list[str], environ: dict[str, str], code_bytes: int = 0) -> int:
    """`code_bytes` is the size of the packed script, 0 where the source runs."""
    try:
        if wants_help(argv):
            print(help_text(find_help_section(argv)))
            return 0
        config, source = parse_config(argv, environ)
        ctx = build_context(config, environ, count_code(config, code_bytes))
        if config.dry_run:
            dry_run(config, ctx)
        elif config.score:
            score_only(config, ctx)
        else:
            run(config, source, ctx)
        if ctx.world > 1:
            dist.barrier()  # no rank takes the group from one that still uses it
            dist.destroy_process_group()
        return 0
    except BrokenPipeError:
        return 1  # whoever read the output has seen enough
    except (Stop, OSError) as error:
        if environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, TokenError):  # which one rank alone may read
            print_error(error)
        return getattr(error, "exit_code", 1)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; set --micro_batch to half of the sequences of a rank", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # nccl would wait for ranks that did not fail
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
