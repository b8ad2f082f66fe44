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
