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
