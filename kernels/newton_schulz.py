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
