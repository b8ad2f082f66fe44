"""The head: logits, squashed into plus or minus `cap` unless that is 0, and their mean cross entropy.

    logits = softcap_logits(x, weight, cap)       x (..., D), weight (V, D)
    loss = head_loss(x, weight, targets, cap)     targets (...): tokens below V; cap above 0

Three products of cuBLAS and one pass over the logits: a row of them fits in registers, so the kernel computes its loss
and, in place, its gradient. Nothing in float32 of that size exists, nothing is recomputed, and the backward pass has
only products left. README.md says why this beats one kernel for everything.

A CPU does the same in blocks of rows: 28 ms instead of 45 for 2,048 tokens and 2,048 pieces on two AVX2 cores. With
many more tokens a block leaves the cache, and what is saved is the second pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


def softcap_logits(x: Tensor, weight: Tensor, cap: float) -> Tensor:
    return softcap(F.linear(x, weight).float(), cap)


def softcap(logits: Tensor, cap: float) -> Tensor:
    return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits  # cap * tanh(logits / cap), faster


def head_loss_ref(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return F.cross_entropy(softcap_logits(x, weight, cap).flatten(0, -2), targets.flatten())


class LossInBlocks(torch.autograd.Function):
    """The mean loss of (N, D) states. Its gradient is computed on the way, while the logits of a block are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        block = max(512, math.ceil(len(x) / 4))  # a compiler unrolls the loop
        x_grads, losses = [], []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for rows, wanted in zip(x.split(block), targets[:, None].split(block)):
            logits = softcap_logits(rows, weight, cap)
            losses.append(logits.logsumexp(-1, keepdim=True) - logits.gather(-1, wanted))
            slopes = logits.softmax(-1) - (torch.arange(len(weight), device=x.device) == wanted).float()
            if cap:
                slopes = slopes * (1 - (logits * (1 / cap)).square())  # of the softcap
            slopes = (slopes * (1 / len(x))).to(x.dtype)
            x_grads.append(slopes @ weight)
            weight_grad = weight_grad + slopes.mT @ rows
        ctx.save_for_backward(torch.cat(x_grads), weight_grad)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad, (weight_grad * grad).to(x_grad.dtype), None, None


def head_loss_in_blocks(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    loss: Tensor = LossInBlocks.apply(x.flatten(0, -2), weight, targets.flatten(), cap)
    return loss


def head_loss_torch(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """What PyTorch alone does best, compiled or not."""
    in_blocks = x.device.type == "cpu" and torch.is_grad_enabled()
    return (head_loss_in_blocks if in_blocks else head_loss_ref)(x, weight, targets, cap)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    return (head_loss_triton if triton and x.is_cuda else head_loss_torch)(x, weight, targets, cap)


if triton:

    @triton.jit
    def head_kernel(logits, targets, losses, vocab, cap, share, BLOCK: tl.constexpr):
        """A row: its loss, and in place of the logits `share` times the gradient of the loss with respect to them."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < vocab
        at = logits + row * vocab + columns
        z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        squashed = 1 - 2 / (tl.exp(2 * z / cap) + 1)  # tanh; right at both ends, where exp is 0 or infinite
        capped = tl.where(inside, cap * squashed, float("-inf"))
        top = tl.max(capped, 0)
        shares = tl.exp(capped - top)
        total = tl.sum(shares, 0)
        is_target = columns == tl.load(targets + row)
        # a target outside the vocabulary is nowhere in the row: the loss is infinite, and the run stops
        tl.store(losses + row, top + tl.log(total) - tl.max(tl.where(is_target, capped, float("-inf")), 0))
        slopes = (shares / total - is_target.to(tl.float32)) * (1 - squashed * squashed) * share
        tl.store(at, slopes.to(logits.dtype.element_ty), mask=inside)

    # opaque to torch.compile, which then needs no graph break; the schema is written out because packing strips hints
    @torch.library.custom_op(
        "loopgolf::head",
        mutates_args=(),
        schema="(Tensor x, Tensor weight, Tensor targets, float cap) -> (Tensor, Tensor)",
    )
    def head_op(x, weight, targets, cap):
        """Mean loss of (N, D) states, and its gradient with respect to the (N, V) products of x and weight."""
        slopes = x @ weight.mT
        rows, vocab = slopes.shape
        losses = torch.empty(rows, device=x.device)
        block = triton.next_power_of_2(vocab)
        head_kernel[(rows,)](
            slopes, targets, losses, vocab, cap, 1 / rows, BLOCK=block, num_warps=min(max(block // 256, 1), 16)
        )
        return losses.mean(), slopes

    @head_op.register_fake
    def head_shapes(x, weight, targets, cap):
        return x.new_empty((), dtype=torch.float32), x.new_empty(len(x), len(weight))

    def keep_slopes(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # or zeros as large as the slopes would stand for their own gradient
        ctx.save_for_backward(*inputs[:2], output[1])

    def head_backward(ctx, grad, _):
        x, weight, slopes = ctx.saved_tensors
        # the incoming gradient goes into the small factor: scaling the slopes would be one more pass over them
        return slopes @ (weight * grad), slopes.mT @ x * grad, None, None

    head_op.register_autograd(head_backward, setup_context=keep_slopes)

    def head_loss_triton(x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        return head_op(x.flatten(0, -2), weight, targets.flatten(), cap)[0]
