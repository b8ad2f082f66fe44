"""A mixture of SwiGLU experts, to stand beside the dense MLP of a block that several passes share.

    logits = router [h ; loop]                                          loop: the pass's row of a learned table
    y = shared(h) + sum over the `top` largest logits of sigmoid(logit) * expert(h)
    shared(h), expert(h) = down (silu(gate h) * up h)

    dispatch(h, chosen, share, up, down)     h (N, D) -> (N, D), each expert on the tokens that chose it
    dense_ref(h, chosen, share, up, down)    the definition: every expert on every token

N tokens of D dimensions, E experts of H hidden units, `top` of them for a token. The shares are raw sigmoids and need
not sum to 1. No token is dropped. No step of it waits for the device: shapes depend on N, D, E, H and `top` alone, and
how many tokens an expert has stays a tensor. Matrices are float32 or bfloat16, D and H multiples of 8.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_grouped_mm():
    """An op of our own around the library's, which has no shape for float32 that torch.compile could ask for. Its
    schema is written out because packing strips hints; it is built in a function because packing keeps that whole."""

    @torch.library.custom_op(
        "loopgolf::grouped_mm", mutates_args=(), schema="(Tensor left, Tensor right, Tensor ends) -> Tensor"
    )
    def grouped_mm(left, right, ends):
        """Group e is the R rows from ends[e - 1] to ends[e]. left (R, I) and right (E, I, O): (R, O), each row times
        its group's matrix. left (I, R) and right (R, O): (E, I, O), the products of each group's rows alone."""
        return F.grouped_mm(left, right, offs=ends)

    @grouped_mm.register_fake
    def shape(left, right, ends):
        groups = ends.shape if right.dim() == 2 else ()
        return left.new_empty(*groups, len(left), right.shape[-1])

    def backward(ctx, grad):
        left, right, ends = ctx.saved_tensors
        grad = grad.contiguous()
        return grouped_mm(grad, right.mT, ends), grouped_mm(left.mT, grad, ends), None

    def keep_factors(**given):  # PyTorch names what it hands over, and packing would shorten the names
        given["ctx"].save_for_backward(*given["inputs"])

    grouped_mm.register_autograd(backward, setup_context=keep_factors)
    return grouped_mm


grouped_mm = build_grouped_mm()


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
    ends = count_tokens(chosen, len(up)).cumsum(0).int()  # row behind the last one of each expert
    rows = h[:, None].expand(N, top, D).reshape(N * top, D).index_select(0, order)
    y = grouped_mm(swiglu(grouped_mm(rows, up.mT, ends)), down.mT, ends)
    y = y.index_select(0, order.argsort()).view(N, top, D)
    return (y * share.to(y.dtype)[..., None]).sum(1)


class MoE(nn.Module):
    """One shared expert and `experts` routed ones. Their matrices are 2-D and lie one below the other; `linear` makes
    them, from fan-in, the rows of each part and dtype. Router and loop table stay plain parameters, apart from what is
    quantized and decayed: a routing decision is a comparison, and it flips where an output would only blur."""

    def __init__(self, dim: int, hidden: int, experts: int, top: int, loops: int, linear: Callable, dtype: torch.dtype):
        super().__init__()
        if dim % 8 or hidden % 8 or not 1 <= top <= experts:
            raise ValueError(f"{dim=} and {hidden=} have to be multiples of 8, and {top=} from 1 to {experts=}")
        self.experts, self.top = experts, top
        self.shared_up = linear(dim, (hidden, hidden), dtype)
        self.shared_down = linear(hidden, (dim,), dtype)
        self.up = linear(dim, (hidden, hidden) * experts, dtype)  # gate, up, gate, up, ...
        self.down = linear(hidden, (dim,) * experts, dtype)
        self.router = nn.Parameter(torch.empty(experts, 2 * dim))
        self.loops = nn.Parameter(torch.empty(loops, dim))

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
