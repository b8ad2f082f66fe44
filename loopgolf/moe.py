"""A mixture of SwiGLU experts, next to the dense MLP of a block that several passes share.

    logits = router [h ; loop]                                          loop: the pass's row of a learned table
    y = shared(h) + sum over the `top` largest logits of sigmoid(logit) * expert(h)
    shared(h), expert(h) = down (silu(gate h) * up h)

    dispatch(h, chosen, share, up, down)     h (N, D) -> (N, D), each expert on the tokens that chose it
    dense_ref(h, chosen, share, up, down)    the definition: every expert on every token

N tokens of D dimensions, E experts of H hidden units, `top` of them for a token. The shares are raw sigmoids and need
not sum to 1. No token is dropped. No step of it waits for the device: shapes depend on N, D, E, H and `top` alone, and
how many tokens an expert has stays a tensor. Matrices are float32 or bfloat16, D and H multiples of 8.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopgolf.layers import Linear
from loopgolf.params import DeclaringModule, start_at, start_normal, start_orthogonal, vector


class MoEShape(NamedTuple):
    experts: int
    hidden: int  # of an expert
    top: int  # experts that each token is sent to


@torch.library.custom_op(
    "loopgolf::grouped_mm", mutates_args=(), schema="(Tensor left, Tensor right, Tensor ends) -> Tensor"
)
def grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The library's product over groups, which has no shape for float32 that torch.compile could ask for. Group e is
    the R rows from ends[e - 1] to ends[e]. left (R, I) and right (E, I, O): (R, O), each row times its group's matrix.
    left (I, R) and right (R, O): (E, I, O), the products of each group's rows alone."""
    return F.grouped_mm(left, right, offs=ends)


@grouped_mm.register_fake
def grouped_mm_shape(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    groups = ends.shape if right.dim() == 2 else ()
    return left.new_empty(*groups, len(left), right.shape[-1])


def grouped_mm_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, right.mT, ends), grouped_mm(left.mT, grad, ends), None


grouped_mm.register_autograd(grouped_mm_backward, setup_context=grouped_mm_setup)


def swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def choose(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Numbers of each token's experts and their shares, (N, top) both."""
    best, chosen = logits.topk(top, -1)
    return chosen, best.sigmoid()


def count_tokens(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert, (E,)."""
    return (chosen.flatten()[:, None] == torch.arange(experts, device=chosen.device)).sum(0)


def balance_losses(logits: Tensor, chosen: Tensor) -> Tensor:
    """(2,): E sum over experts of (share of the assignments) x (mean probability), which is 1 when both are even and
    has its gradient through the probabilities alone (Switch Transformer); the mean squared log of the partition
    function, which keeps logits small (ST-MoE)."""
    experts = logits.shape[-1]
    assigned = count_tokens(chosen, experts) / chosen.numel()
    balance = experts * (assigned * logits.softmax(-1).mean(0)).sum()
    return torch.stack((balance, logits.logsumexp(-1).square().mean()))


def dense_ref(h: Tensor, chosen: Tensor, share: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """h (N, D); chosen, share (N, top); up (E, 2H, D): an expert's gate above its up; down (E, D, H)."""
    weight = share.new_zeros(len(h), len(up)).scatter(1, chosen, share)  # 0 for an expert that was not chosen
    y = torch.einsum("nei,edi->ned", swiglu(torch.einsum("nd,eid->nei", h, up)), down)
    return torch.einsum("ned,ne->nd", y, weight.to(y.dtype))


def dispatch(h: Tensor, chosen: Tensor, share: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same by one product over groups of rows: every token stands once for each of its experts, sorted by expert.
    Both moves are permutations, so that their gradients add nothing to one row twice and repeat bit by bit."""
    (N, D), top = h.shape, chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    ends = count_tokens(chosen, len(up)).cumsum(0).int()  # row after the last one of each expert
    rows = h[:, None].expand(N, top, D).reshape(N * top, D).index_select(0, order)
    y: Tensor = grouped_mm(swiglu(grouped_mm(rows, up.mT, ends)), down.mT, ends)
    y = y.index_select(0, order.argsort()).view(N, top, D)
    return (y * share.to(y.dtype)[..., None]).sum(1)


class MoE(DeclaringModule):
    """One shared expert and `experts` routed ones. Their matrices are 2-D and lie one below the other. Router and loop
    table are vectors, apart from what is quantized and decayed: a routing decision is a comparison, and it flips where
    an output would only blur. `visits`: how often the plan's tables have this block, each with a row of `loops`."""

    mlp_gate: nn.Parameter
    moe_gate: nn.Parameter
    router: nn.Parameter
    loops: nn.Parameter

    def __init__(self, dim: int, shape: MoEShape, visits: int, grid: str, dtype: torch.dtype):
        super().__init__()
        hidden, experts = shape.hidden, shape.experts
        if dim % 8 or hidden % 8 or not 1 <= shape.top <= experts:
            raise ValueError(f"{dim=} and {hidden=} must be multiples of 8, and top={shape.top} from 1 to {experts=}")
        self.experts = experts
        self.top = shape.top
        self.declare("mlp_gate", (1,), vector(start_at(0.5)))
        self.declare("moe_gate", (1,), vector(start_at(0.5)))
        self.declare("router", (experts, 2 * dim), vector(start_normal(0.02)))
        self.declare("loops", (visits, dim), vector(start_normal(0.02)))
        gate_and_up, every_gate_and_up = (hidden, hidden), (hidden, hidden) * experts  # gate, up, gate, up, ...
        self.shared_up = Linear(dim, gate_and_up, dtype, grid, start_orthogonal(gate_and_up))
        self.shared_down = Linear(hidden, (dim,), dtype, grid, start_at(0.0))
        self.up = Linear(dim, every_gate_and_up, dtype, grid, start_orthogonal(every_gate_and_up))
        self.down = Linear(hidden, (dim,) * experts, dtype, grid, start_at(0.0))

    def add_to(self, y: Tensor, h: Tensor, loop: Tensor) -> tuple[Tensor, Tensor]:
        """What the dense MLP made of the stream, gated, and what the experts make of h, gated; and their losses."""
        mixed, losses = self(h, loop)
        return self.mlp_gate.to(y.dtype) * y + self.moe_gate.to(y.dtype) * mixed, losses

    def forward(self, h: Tensor, loop: Tensor) -> tuple[Tensor, Tensor]:
        """h (..., D), loop (D,): this pass's row of `loops`, handed in because a compiled graph would be made anew for
        every number of a row. Returns the output and the two losses of this pass."""
        tokens = h.flatten(0, -2)
        logits = self.route(tokens, loop)
        chosen, share = choose(logits, self.top)
        # outside bf16, PyTorch's product over groups reads the ends of the groups back from a GPU
        run = dispatch if h.dtype == torch.bfloat16 or not h.is_cuda else dense_ref
        up, down = (m.weight.view(self.experts, -1, m.weight.shape[1]) for m in (self.up, self.down))
        y = self.shared_down(swiglu(self.shared_up(tokens))) + run(tokens, chosen, share, up, down)
        return y.view_as(h), balance_losses(logits, chosen)

    def route(self, tokens: Tensor, loop: Tensor) -> Tensor:
        """router [h ; loop], (N, E) in float32: the half that reads the loop is the same for all tokens."""
        of_token, of_loop = self.router.chunk(2, -1)
        return F.linear(tokens.float(), of_token, of_loop @ loop)

    def active_weights(self) -> int:
        """How many matrix entries a token is multiplied with."""
        routed = (self.up.weight.numel() + self.down.weight.numel()) * self.top // self.experts
        return routed + self.shared_up.weight.numel() + self.shared_down.weight.numel() + self.router.numel()
