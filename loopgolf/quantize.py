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
