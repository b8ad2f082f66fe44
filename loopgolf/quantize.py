"""The quantizer, one for training and export: integer codes on a grid per row of a weight matrix.

    codes, step = quantize_tensor(weight, grid)               weight (rows, columns): int8 codes, fp16 step per row
    codes, step = round_with_feedback(weight, hessian, grid)  GPTQ: the same grid, other points of it
    weight = dequantize_tensor(codes, step)
    round_to_grid(weight, out, grid)                          there and back, written to `out`
    latents = Latents(model, grids); latents.publish()        what learns, in float32; its rounding to the model

The step of a row's grid is k standard deviations over the largest code, without a floor. For round_to_grid, of all
weights in every step, one kernel reads a row once and writes it once, where PyTorch makes a dozen passes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.rounding import dequantize_rows, quantize_rows, round_to_grid_ref


@dataclass(frozen=True)
class Grid:
    bits: int
    k: float

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def gaussian_bits(self) -> float:
        """Entropy of a code in bits when weights are Gaussian: no distribution of the same spread needs more."""
        edges = (torch.arange(-self.largest, self.largest, dtype=torch.float64) + 0.5) * (self.k / self.largest)
        return compute_bits(torch.special.ndtr(edges).diff(prepend=torch.zeros(1), append=torch.ones(1)))


def quantize_tensor(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    return quantize_rows(weight, grid.largest, grid.k)


dequantize_tensor = dequantize_rows


def compute_entropy(codes: Tensor) -> float:
    """Bits per code of an order-0 coder for these int8 codes."""
    return compute_bits(torch.bincount(codes.flatten().long() + 128, minlength=256).double())


def compute_bits(weights: Tensor) -> float:
    """Bits per symbol of an order-0 code for symbols that occur in these proportions."""
    shares = weights[weights > 0] / weights.sum()
    return -(shares * shares.log2()).sum().item()


def round_with_feedback(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """GPTQ: the same grid, but each column's rounding error moves the columns that are still open so that the outputs
    change least. `hessian` is the sum of x x^T over the inputs x of all passes. Columns go by falling energy."""
    _, step = quantize_tensor(weight, grid)
    order = hessian.diagonal().argsort(descending=True)
    open_weight, hessian = weight.float()[:, order], hessian[order][:, order].float()
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
            codes[:, i] = (open_weight[:, i] * inverse_step).round().clamp(-grid.largest, grid.largest)
            errors[:, i - start] = (open_weight[:, i] - codes[:, i] * step.float()) / spread[i, i]
            open_weight[:, i:stop] -= errors[:, i - start, None] * spread[i, i:stop]
        open_weight[:, stop:] -= errors @ spread[start:stop, stop:]
    return torch.zeros_like(codes).index_copy(1, order, codes).to(torch.int8), step


class Latents:
    """float32 truth behind the working weights of a model, with one flat gradient that ranks reduce at once."""

    def __init__(self, model: nn.Module, grids: dict[str, Grid | None] | None = None, frozen: tuple[str, ...] = ()):
        named = {n: p for n, p in model.named_parameters() if not n.startswith(frozen)}
        self.working, self.grids = named, grids or dict.fromkeys(named)
        self.weights = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
        self.flat_grad = next(iter(self.weights.values())).new_zeros(sum(w.numel() for w in self.weights.values()))
        views = self.flat_grad.split([w.numel() for w in self.weights.values()])
        for weight, view in zip(self.weights.values(), views):
            weight.grad = view.view_as(weight)

    def collect(self) -> None:
        """Moves the gradients of the working weights into the float32 sum: a bf16 sum would drop small terms."""
        for name, p in self.working.items():
            if p.grad is not None:
                self.weights[name].grad.add_(p.grad)
                p.grad = None

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor], share: float, clip: float) -> Tensor:
        """Sums over ranks, scales by `share`, clips the norm and returns it. A gradient that is not finite becomes
        zero, so that a run which stops at such a norm has weights that are still good."""
        grad = sum_over_ranks(self.flat_grad).mul_(share)
        norm = grad.norm()
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones_like(norm)
        grad.copy_(torch.where(norm.isfinite(), grad * factor, 0.0))
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the latents to the working weights, on the grid where there is one."""
        for name, weight in self.weights.items():
            if grid := self.grids[name]:
                round_to_grid_ref(weight, self.working[name], grid.largest, grid.k)
            else:
                self.working[name].copy_(weight)
