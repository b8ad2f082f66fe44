"""Checks every kernel on this machine's GPU, in bfloat16, plain and inside torch.compile, and times it.

Truth is the PyTorch form in float32. An output or gradient passes when its error is at most twice that of the PyTorch
form in bfloat16. Times are medians at the shape of recipe 4b7l on one of eight GPUs, forward and backward together,
against the PyTorch form as train_gpt.py would run it (compiled where it is part of a compiled graph). Attention is
PyTorch's own: it is checked against plain products, as the library chooses by itself and with each of its kernels
alone, in training's shape and with the mask of a scoring window; a kernel that does not take a shape says so.

Example:
    python -m kernels.check
    kernel name:head error:2.1e-03 error_pytorch:2.2e-03 kernel_ms:0.70 pytorch_ms:0.80 ratio:0.88 ok:yes
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention, head, mlp, newton_schulz, rounding

MOST = 2.0  # times the error of PyTorch in bfloat16
FLOOR = 1e-5  # errors below are luck: a mean over many rows is nearly exact in any dtype
ROUNDS = 30


@dataclass
class Case:
    """A kernel and its PyTorch form; both take the tensors of a shape, in any dtype."""

    name: str
    kernel: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]  # the first is timed
    draw: Callable[..., list[Tensor]]
    has_gradients: bool  # then it is part of a compiled graph, too


def draw_head(rows: int, width: int, vocab: int) -> list[Tensor]:
    x, weight = torch.randn(rows, width), 0.1 * torch.randn(vocab, width)
    return [x.bfloat16(), weight.bfloat16(), torch.randint(vocab, (rows,))]


def draw_mlp(rows: int, width: int, hidden: int) -> list[Tensor]:
    up, down = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    return [torch.randn(rows, width).bfloat16(), up.bfloat16(), down.bfloat16()]


def draw_matrices(*shape: int) -> list[Tensor]:
    return [torch.randn(shape).bfloat16()]


def draw_weights(*shape: int) -> list[Tensor]:
    """Master weights are float32 in every run; what is written has the dtype of the model."""
    return [torch.randn(shape), torch.empty(shape, dtype=torch.bfloat16)]


def round_with(function: Callable) -> Callable[..., Tensor]:
    def rounded(weight: Tensor, out: Tensor) -> Tensor:
        function(weight, out, 31, 12.85)
        return out

    return rounded


def head_with(function: Callable) -> Callable[..., Tensor]:
    return lambda x, weight, targets: function(x, weight, targets, 30.0)


def build_cases() -> list[Case]:
    def advance_with(advance):
        coefficients = newton_schulz.COEFFICIENTS["polar_express"]  # all iterations differ
        return lambda batch: newton_schulz.orthogonalize_ref(batch, batch.dtype, coefficients, advance)

    cases = [
        Case("head", head_with(head.head_loss_triton), head_with(head.head_loss_ref),
             ((65536, 1024, 1024), (1001, 136, 1003)), draw_head, True),
        # eight matrices to a batch, as on one GPU; the odd ones are tall, and many enough for the large tiles
        Case("newton_schulz", advance_with(newton_schulz.advance_triton), advance_with(newton_schulz.advance_ref),
             ((8, 1024, 2048), (3, 1024, 1024), (66, 391, 261)), draw_matrices, False),
        Case("rounding", round_with(rounding.round_to_grid_triton), round_with(rounding.round_to_grid_ref),
             ((2048, 1024), (77, 131)), draw_weights, False),
    ]  # fmt: skip
    if mlp.has_room(torch.device("cuda")):
        cases += [Case("mlp", mlp.mlp_triton, mlp.mlp_ref, ((65536, 1024, 2048), (1001, 136, 1000)), draw_mlp, True)]
    else:
        print("# mlp: this GPU has too little shared memory for its tiles, so the PyTorch form serves")
    return cases


def draw_heads(batch: int, queries: int, keys: int) -> list[Tensor]:
    """32 heads of 32, four to a key-value head, as recipe 4b7l has them."""
    return [torch.randn(batch, n, heads, 32).bfloat16() for n, heads in ((queries, 32), (keys, 8), (keys, 8))]


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    (queries, heads), (keys, shared) = q.shape[1:3], k.shape[1:3]
    k, v = (t.repeat_interleave(heads // shared, 2) for t in (k, v))
    lag = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores = torch.einsum("bqhk,blhk->bhql", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill((lag < 0) | (lag >= window), -torch.inf).softmax(-1)
    return torch.einsum("bhql,blhk->bqhk", weights, v).flatten(2)


def check_attention() -> bool:
    """Of the kernels only the one that the library chooses by itself has to be right."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(q, k, v, 2048, None)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_plainly(q, k, v, 2048)

    is_right = True
    for name, keys, has_gradients in (("training", 2048, True), ("window", 4096, False)):
        case = Case(f"attention_{name}", attend, plain, ((4, 2048, keys),), draw_heads, has_gradients)
        is_right &= check(case)
        for backend in ("CUDNN", "FLASH", "EFFICIENT"):
            torch.compiler.reset()  # or the graph of another kernel would serve
            try:
                with sdpa_kernel(getattr(SDPBackend, f"{backend}_ATTENTION")):
                    check(replace(case, name=f"{case.name}_{backend.lower()}"))
            except RuntimeError as error:
                print(f"# {case.name}_{backend.lower()}: {str(error).splitlines()[0]}")
        torch.compiler.reset()
    return is_right


def compute_all(function: Callable[..., Tensor], inputs: list[Tensor], has_gradients: bool) -> list[Tensor]:
    """The output, and the gradient of every input that can have one."""
    if not has_gradients:
        return [function(*inputs)]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad)]


def compute_errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, truth)]


def time_ms(function: Callable[..., Tensor], inputs: list[Tensor], has_gradients: bool) -> float:
    times = []
    for _ in range(ROUNDS + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compute_all(function, inputs, has_gradients)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[5:])


def check(case: Case) -> bool:
    """Prints the line of a kernel, with the errors of its worst output."""
    worst = (0.0, 0.0, 0.0)
    # what runs between graphs, in the optimizer, may break one
    compiled = torch.compile(case.kernel, fullgraph=case.has_gradients, dynamic=False)
    for shape in case.shapes:
        inputs = case.draw(*shape)
        exact = [t.float() if t.is_floating_point() else t for t in inputs]
        truth = compute_all(case.plain, exact, case.has_gradients)
        plain = compute_errors(compute_all(case.plain, inputs, case.has_gradients), truth)
        for function in (case.kernel, compiled):
            ours = compute_errors(compute_all(function, inputs, case.has_gradients), truth)
            # an error that is not a number has to win this comparison
            worst = max(worst, *((a / max(b, FLOOR) if a == a else float("inf"), a, b) for a, b in zip(ours, plain)))
    inputs = case.draw(*case.shapes[0])
    pair = (compiled, torch.compile(case.plain, dynamic=False)) if case.has_gradients else (case.kernel, case.plain)
    ours_ms, plain_ms = (time_ms(function, inputs, case.has_gradients) for function in pair)
    factor, error, error_pytorch = worst
    print(
        f"kernel name:{case.name} error:{error:.1e} error_pytorch:{error_pytorch:.1e} kernel_ms:{ours_ms:.3f} "
        f"pytorch_ms:{plain_ms:.3f} ratio:{ours_ms / plain_ms:.2f} ok:{'yes' if factor <= MOST else 'no'}",
        flush=True,
    )
    return factor <= MOST


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    fault = "no usable CUDA device" if not torch.cuda.is_available() else "" if head.triton else "no triton"
    if fault:
        print(
            f"error: {fault} on this machine, and kernels are checked on a GPU with CUDA and triton; without one "
            f"run python -m pytest tests/test_kernels.py",
            file=sys.stderr,
        )
        return 2
    torch.set_float32_matmul_precision("highest")  # truth is not computed with 10 bits
    torch.manual_seed(0)
    with torch.device("cuda"):
        passed = [check(case) for case in build_cases()] + [check_attention()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
