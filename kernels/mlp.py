"""The MLP with squared ReLU: y = relu(x up^T)^2 down^T.

    y = mlp(x, up, down)     x (..., D), up (H, D), down (D, H)

The square is taken where the first product leaves its registers, so the product itself is never written. Nor is it
needed again: the slope of h = relu(u)^2 is 2 relu(u) = 2 sqrt(h), and h is kept for the gradient of `down` anyway. The
backward pass multiplies by it where the gradient of h leaves its registers. The other products are cuBLAS's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no wheel for this platform: the PyTorch form serves
    triton = None


def mlp_ref(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up)).square(), down)


@torch.compiler.assume_constant_result
def has_room(device: torch.device) -> bool:
    """Whether the tiles fit: Hopper and the large Blackwells have 227 KiB of shared memory, others 99 or 163."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= 227 << 10


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The hardware's tile copy needs rows of a multiple of 16 bytes."""
    suits = triton and x.is_cuda and x.dtype.itemsize == 2 and not (up.shape[0] % 8 or up.shape[1] % 8)
    return (mlp_triton if suits and has_room(x.device) else mlp_ref)(x, up, down)


if triton:

    @triton.jit
    def mlp_kernel(
        left,
        right,
        hidden,
        out,
        rows,
        columns,
        depth,
        BACKWARD: tl.constexpr,
        HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        """relu(left right^T)^2, or backward left right * 2 sqrt(hidden); a program computes every n-th tile."""
        across = tl.cdiv(columns, WIDTH)
        tiles = across * tl.cdiv(rows, HEIGHT)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row, column = tile // across * HEIGHT, tile % across * WIDTH
            total = tl.zeros((HEIGHT, WIDTH), tl.float32)
            for k in range(0, depth, DEPTH):
                if BACKWARD:
                    factor = right.load([k, column])
                else:
                    factor = right.load([column, k]).T
                total = tl.dot(left.load([row, k]), factor, total, input_precision="ieee")
            # in halves, or the tiles on their way out and in would not fit into shared memory with those of the loop
            halves = tl.split(total.reshape(HEIGHT, 2, WIDTH // 2).permute(0, 2, 1))
            for side in tl.static_range(2):
                half, at = halves[side], [row, column + side * (WIDTH // 2)]
                if BACKWARD:
                    half *= 2 * tl.sqrt(hidden.load(at).to(tl.float32))
                else:
                    half = tl.maximum(half, 0.0)
                    half *= half
                out.store(at, half.to(out.dtype))

    def launch(left: Tensor, right: Tensor, hidden: Tensor | None) -> Tensor:
        """(rows, depth) and, forward, (columns, depth) or, backward, (depth, columns) and (rows, columns)."""
        rows, depth = left.shape
        columns = right.shape[hidden is not None]
        out = left.new_empty(rows, columns)
        height, width, deep = 128, 256, 64  # three stages of these tiles fill the shared memory of a Hopper processor
        right_tile = [width, deep] if hidden is None else [deep, width]
        half = [height, width // 2]
        tiles = (left, [height, deep]), (right, right_tile), (hidden, half), (out, half)
        described = [None if t is None else TensorDescriptor.from_tensor(t, tile) for t, tile in tiles]
        programs = torch.cuda.get_device_properties(left.device).multi_processor_count if left.is_cuda else 2
        mlp_kernel[(min(programs, triton.cdiv(rows, height) * triton.cdiv(columns, width)),)](
            *described,
            rows,
            columns,
            depth,
            BACKWARD=hidden is not None,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=deep,
            num_warps=8,
            num_stages=3,
        )
        return out

    # opaque to torch.compile; the schemas are written out because packing strips hints
    @torch.library.custom_op(
        "loopgolf::mlp", mutates_args=(), schema="(Tensor x, Tensor up, Tensor down) -> (Tensor, Tensor)"
    )
    def mlp_op(x, up, down):
        """Output and hidden layer of (N, D) states."""
        hidden = launch(x, up, None)
        return hidden @ down.mT, hidden

    @mlp_op.register_fake
    def mlp_shapes(x, up, down):
        return x.new_empty(len(x), len(down)), x.new_empty(len(x), len(up))

    @torch.library.custom_op(
        "loopgolf::mlp_hidden_grad", mutates_args=(), schema="(Tensor grad, Tensor down, Tensor hidden) -> Tensor"
    )
    def hidden_grad_op(grad, down, hidden):
        return launch(grad, down, hidden)

    @hidden_grad_op.register_fake
    def hidden_grad_shape(grad, down, hidden):
        return torch.empty_like(hidden)

    def keep_hidden(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # or zeros as large as the hidden layer would stand for its own gradient
        ctx.save_for_backward(*inputs, output[1])

    def mlp_backward(ctx, grad, _):
        x, up, down, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        slopes = hidden_grad_op(grad, down, hidden)
        return slopes @ up, slopes.mT @ x, grad.mT @ hidden

    mlp_op.register_autograd(mlp_backward, setup_context=keep_hidden)

    def mlp_triton(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp_op(x.flatten(0, -2).contiguous(), up, down)[0].view(x.shape)
