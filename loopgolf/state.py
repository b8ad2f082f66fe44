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
