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
