"""A weight matrix to the nearest points of its grid, in the dtype that the model computes in.

    round_to_grid(weight, out, largest, k)     weight (rows, columns) float32; `out` of the same shape is written

The grid of a row is that of training and export (section 5 of train_gpt.py): k standard deviations over the largest
code, as float16. One kernel reads a row once and writes it once, where PyTorch makes a dozen passes.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


def round_to_grid_ref(weight: Tensor, out: Tensor, largest: int, k: float) -> None:
    step = (weight.square().mean(1).sqrt() * (k / largest)).clamp(max=65504).half().float()[:, None]
    codes = (weight / torch.where(step > 0, step, torch.inf)).round().clamp(-largest, largest)
    out.copy_(codes * step)


def round_to_grid(weight: Tensor, out: Tensor, largest: int, k: float) -> None:
    (round_to_grid_triton if triton and weight.is_cuda else round_to_grid_ref)(weight, out, largest, k)


if triton:

    @triton.jit
    def round_kernel(weight, out, columns, largest, scale, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        inside = offsets < columns
        offsets += tl.program_id(0).to(tl.int64) * columns
        w = tl.load(weight + offsets, mask=inside, other=0.0)
        spread = tl.sqrt_rn(tl.div_rn(tl.sum(w * w, 0), columns.to(tl.float32)))
        step = tl.minimum(spread * scale, 65504.0).to(tl.float16).to(tl.float32)
        # exact division: an approximate quotient would send ties to another code than the exporter's
        codes = tl.div_rn(w, step + tl.zeros_like(w))
        # the maximum of a number and 0 / 0 is the number: a row of zeros has finite codes, and a step of 0 times them
        codes = tl.minimum(tl.maximum(codes, -largest), largest)
        codes = codes + 12582912.0 - 12582912.0  # to the nearest integer, ties to even: 1.5 * 2^23 leaves no fraction
        tl.store(out + offsets, (codes * step).to(out.dtype.element_ty), mask=inside)

    def round_to_grid_triton(weight: Tensor, out: Tensor, largest: int, k: float) -> None:
        block = triton.next_power_of_2(weight.shape[1])
        round_kernel[(len(weight),)](
            weight, out, weight.shape[1], float(largest), k / largest, BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
