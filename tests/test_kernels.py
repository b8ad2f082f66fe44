"""Kernels against their PyTorch forms in float64: every output and every gradient, at powers of two and odd shapes.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported: this file runs
itself again in a process of its own. What the interpreter cannot see, whether they compile for a GPU and fit its shared
memory, is asked from Triton's compiler, which needs no GPU either. On one: python -m kernels.check

CPU, float32: pytest tests/test_kernels.py
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT, clean_environment

import kernels.check
import kernels.head as head
import kernels.mlp as mlp
import kernels.newton_schulz as newton_schulz
import tools.pack
import tools.submission.script
from kernels import rounding
from kernels.rounding import dequantize_rows, find_steps, quantize_rows

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER_SHARED_BYTES = 227 << 10
PUBLIC = {head: "head_loss", mlp: "mlp", newton_schulz: "orthogonalize", rounding: "round_to_grid"}

needs_triton = pytest.mark.skipif(
    not head.triton,
    reason="triton is not installed (requirements.txt has it on Linux x86_64), so only the PyTorch forms exist",
)
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the process that the first test starts")
outside = pytest.mark.skipif(IS_INTERPRETED, reason="runs outside the interpreter")


@pytest.mark.slow
@needs_triton
@outside
def test_the_kernels_compute_what_pytorch_computes_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compute_all(function, inputs: list[torch.Tensor], *rest) -> list[torch.Tensor]:
    """Output and the gradient of each input, for an incoming gradient that is not 1."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves, *rest)
    grad = 1.7 * torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float = 5e-6) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        error = (a.double() - b).norm() / b.norm()
        assert a.shape == b.shape and error < limit, f"output {i} is off by {error:.1e}"


def head_inputs(rows: int, width: int, vocab: int, scale: float = 1.0):
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    return [draw(rows, width, scale=scale), draw(vocab, width, seed=1)], targets


@needs_triton
@interpreted
@pytest.mark.parametrize("rows, width, vocab", [(16, 32, 64), (7, 13, 37), (5, 24, 1030), (1, 3, 2)])
@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_head(rows, width, vocab, cap):
    inputs, targets = head_inputs(rows, width, vocab)
    expected = compute_all(head_loss_float64, inputs, targets, cap)
    assert_near(compute_all(head.head_loss_triton, inputs, targets, cap), expected)


def head_loss_float64(x, weight, targets, cap):
    """The reference takes logits to float32, so the truth is written out here."""
    logits = cap * torch.tanh(x.double() @ weight.double().mT / cap)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@outside
@pytest.mark.parametrize("rows, width, vocab", [(7, 13, 37), (512, 8, 20), (1300, 8, 20)])
@pytest.mark.parametrize("cap", [2.0, 30.0, 0.0])
def test_head_in_blocks(rows, width, vocab, cap):
    inputs, targets = head_inputs(rows, width, vocab)
    expected = compute_all(head_loss_float64, inputs, targets, cap or 1e6)
    assert_near(compute_all(head.head_loss_in_blocks, inputs, targets, cap), expected)


@outside
def test_head_in_blocks_where_the_loss_is_large():
    """A probability below the smallest float32."""
    inputs, targets = head_inputs(6, 8, 20, scale=1e4)
    expected = compute_all(head_loss_float64, inputs, targets, 1e9)
    assert_near(compute_all(head.head_loss_in_blocks, inputs, targets, 0.0), expected)


@needs_triton
@interpreted
def test_head_where_tanh_has_reached_its_ends():
    inputs, targets = head_inputs(6, 8, 20, scale=1e4)
    expected = compute_all(head_loss_float64, inputs, targets, 5.0)
    found = compute_all(head.head_loss_triton, inputs, targets, 5.0)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=0)
    assert found[2].abs().max() < 1e-3  # x is 1e4, so this bounds the slopes by 1e-7: none is left


@needs_triton
@interpreted
def test_head_says_that_a_target_is_no_token():
    (x, weight), targets = head_inputs(6, 8, 20)
    assert head.head_loss_triton(x, weight, targets, 5.0).isfinite()
    for wrong in (-1, 20, 31):
        assert head.head_loss_triton(x, weight, torch.where(targets == targets[0], wrong, targets), 5.0) == torch.inf


@needs_triton
@interpreted
@pytest.mark.parametrize("n, rows, columns", [(2, 64, 128), (3, 70, 45), (1, 130, 37), (2, 33, 33), (1, 1, 9)])
def test_orthogonalize(n, rows, columns):
    batch = draw(n, rows, columns)
    for coefficients in newton_schulz.COEFFICIENTS.values():
        expected = newton_schulz.orthogonalize_ref(batch, torch.float64, coefficients)
        found = newton_schulz.orthogonalize_ref(batch, torch.float32, coefficients, newton_schulz.advance_triton)
        assert_near([found], [expected])


@needs_triton
@interpreted
@pytest.mark.parametrize("n, rows, columns, size", [(1, 192, 64, 64), (2, 65, 70, 64), (16, 520, 8, 128)])
def test_symmetric_products(n, rows, columns, size):
    x = draw(n, rows, columns)
    gram = newton_schulz.symmetric_product(x, 1.0)
    tile = torch.arange(rows) // size
    mirrored = (
        tile[:, None] != tile
    )  # what a tile on the diagonal holds twice, the interpreter's product may round twice
    assert torch.equal(gram[:, mirrored], gram.mT[:, mirrored])
    assert_near([gram], [x.double() @ x.double().mT])
    small = gram[:, :65, :65].contiguous()
    expected = 0.5 * small.double() @ small.double() - 3 * small.double()
    assert_near([newton_schulz.symmetric_product(small, 0.5, -3.0)], [expected])


@needs_triton
@interpreted
@pytest.mark.parametrize("rows, width, hidden", [((128,), 64, 256), ((3, 47), 36, 268), ((5,), 4, 8), ((300,), 72, 4)])
def test_mlp(rows, width, hidden):
    inputs = [draw(*rows, width), draw(hidden, width, seed=1), draw(width, hidden, seed=2)]
    expected = compute_all(mlp.mlp_ref, [t.double() for t in inputs])
    assert_near(compute_all(mlp.mlp_triton, inputs), expected)


@needs_triton
@interpreted
def test_torch_compile_takes_them_without_a_graph_break():
    """Through the tracing of forward and backward; the generated code is the GPU's business."""
    inputs, targets = head_inputs(6, 8, 20)
    traced = torch.compile(head.head_loss_triton, backend="aot_eager", fullgraph=True)
    plain = compute_all(head.head_loss_triton, inputs, targets, 5.0)
    assert all(torch.equal(a, b) for a, b in zip(compute_all(traced, inputs, targets, 5.0), plain))
    inputs = [draw(2, 3, 8), draw(16, 8, seed=1), draw(8, 16, seed=2)]
    traced = torch.compile(mlp.mlp_triton, backend="aot_eager", fullgraph=True)
    plain = compute_all(mlp.mlp_triton, inputs)
    assert all(torch.equal(a, b) for a, b in zip(compute_all(traced, inputs), plain))


def there_and_back(weight: torch.Tensor, largest: int, k: float, step_bits: int) -> torch.Tensor:
    step = find_steps(weight, largest, k, step_bits)
    return dequantize_rows(quantize_rows(weight, step, largest), step)


@needs_triton
@interpreted
@pytest.mark.parametrize("rows, columns", [(8, 64), (5, 130), (3, 1), (2, 2048)])
@pytest.mark.parametrize("bits, k", [(6, 12.85), (8, 20.0), (2, 1.0)])
def test_rounding_is_that_of_the_exporter(rows, columns, bits, k):
    largest = 2 ** (bits - 1) - 1
    weight = draw(rows, columns) * draw(rows, 1, seed=1).exp()
    weight[0] = 0
    weight[-1] *= 1e9  # its step would pass the largest float16
    found = torch.empty_like(weight)
    for step_bits in (10, 3, 0):
        rounding.round_to_grid_triton(weight, found, largest, k, step_bits)
        assert torch.equal(found, there_and_back(weight, largest, k, step_bits))


@needs_triton
@interpreted
def test_rounding_sends_ties_to_the_even_code():
    """The middle between two codes: with k at the largest code the step is the spread, here 1."""
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.5, -0.5] + [1.0] * 4])
    weight[0, 6:] = ((10 - weight[0, :6].square().sum()) / 4).sqrt()
    largest, k = 31, 31.0
    assert find_steps(weight, largest, k, 10).item() == 1.0
    found = torch.empty_like(weight)
    rounding.round_to_grid_triton(weight, found, largest, k)
    assert found[0, :6].tolist() == [0, 0, 2, -2, 0, 0]


@outside
@pytest.mark.parametrize("bits, k", [(6, 12.85), (8, 20.0)])
def test_the_plain_rounding_is_that_of_the_exporter(bits, k):
    largest, weight = 2 ** (bits - 1) - 1, draw(40, 33)
    weight[3] = 0
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(weight.shape, dtype=dtype)
        rounding.round_to_grid(weight, found, largest, k, 3)
        assert torch.equal(found, there_and_back(weight, largest, k, 3).to(dtype))


@outside
@pytest.mark.parametrize("has_triton", [True, False])
def test_without_triton_and_on_a_cpu_the_plain_forms_serve(has_triton, monkeypatch):
    found = PUBLIC
    if not has_triton:
        monkeypatch.setitem(sys.modules, "triton", None)
        found = [load(module.__name__.replace(".", "_"), Path(module.__file__)) for module in PUBLIC]
        assert all(module.triton is None for module in found)
    head, mlp, newton_schulz, rounding = found
    x, w, t = draw(5, 8), draw(16, 8, seed=1), torch.arange(5)
    assert torch.equal(head.head_loss(x, w, t, 9.0), head.head_loss_ref(x, w, t, 9.0))
    assert torch.equal(mlp.mlp(x, w, w.mT), mlp.mlp_ref(x, w, w.mT))
    orthogonal = newton_schulz.orthogonalize(w[None], torch.bfloat16)
    assert torch.equal(orthogonal, newton_schulz.orthogonalize_ref(w[None], torch.bfloat16))
    rounding.round_to_grid(w, torch.empty_like(w), 31, 12.85)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hopper_cases():
    """Kernel, types of its arguments (a bare value is a constant), warps, and what the recipe 4b7l asks of it."""
    n, f = "i32", "fp32"
    yield "head", head, "head_kernel", ["*bf16", "*i64", "*fp32", n, f, f, 1024], 4
    # the last one is of a tall matrix, which is read transposed
    for size, addend, strides in ((64, True, (n, 1)), (128, True, (n, 1)), (128, False, (1, n))):
        types = ["*bf16", "*bf16", n, n, n, *strides, f, f, size, 64, addend]
        yield f"symmetric {size} {strides}", newton_schulz, "symmetric_kernel", types, size // 16
    tile, left = "tensordesc<bf16[{},{}]>", "tensordesc<bf16[128,64]>"
    half, shape = tile.format(128, 128), [n, n, n]
    yield "mlp", mlp, "mlp_kernel", [left, tile.format(256, 64), None, half, *shape, False, 128, 256, 64], 8
    yield "mlp back", mlp, "mlp_kernel", [left, tile.format(64, 256), half, half, *shape, True, 128, 256, 64], 8
    yield "round", rounding, "round_kernel", ["*fp32", "*bf16", n, f, f, 7, 1024], 4


@pytest.fixture(scope="module")
def packed_kernels(tmp_path_factory):
    """The kernels as a packed script would hold them, by name."""
    uses = [f"from {module.__name__} import {name}" for module, name in PUBLIC.items()]
    sources = {f"{module.__name__.replace('.', '/')}.py": inspect.getsource(module) for module in PUBLIC}
    sources["train_gpt.py"] = "\n".join([*uses, f"def main(): return {', '.join(PUBLIC.values())}"])
    folder = tmp_path_factory.mktemp("packed")
    kernels = {}
    for place, text in tools.pack.shorten(sources, "4b7l").items():
        if place.startswith("kernels/"):
            path = folder / Path(place).name
            path.write_text(text)
            found = vars(load(f"packed_{path.stem}", path)).items()
            kernels |= {name: value for name, value in found if isinstance(value, head.triton.JITFunction)}
    return kernels


def compile_for_hopper(function, types: list, warps: int):
    import triton
    from triton.backends.compiler import GPUTarget

    constants = {(i,): kind for i, kind in enumerate(types) if not isinstance(kind, str)}
    kinds = [kind if isinstance(kind, str) else "constexpr" for kind in types]
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if str(kind)[0] in "*i"}
    signature = dict(zip(function.arg_names, kinds, strict=True))
    source = triton.compiler.ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=3))


@pytest.mark.slow
@needs_triton
@outside
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("module, kernel, types, warps", [pytest.param(*c[1:], id=c[0]) for c in hopper_cases()])
def test_it_compiles_for_hopper_and_fits_and_so_does_what_is_packed(
    module, kernel, types, warps, packed_kernels, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compile_for_hopper(getattr(module, kernel), types, warps)
    assert made.asm["cubin"] and made.metadata.shared <= HOPPER_SHARED_BYTES
    if "dot" in made.asm["ttir"]:
        assert "wgmma" in made.asm["ptx"], "the products do not run on Hopper's tensor cores"
    packed = compile_for_hopper(packed_kernels[kernel], types, warps)
    assert without_places(packed.asm["ttir"]) == without_places(made.asm["ttir"])


def without_places(ttir: str) -> list[str]:
    """Operations without the names and lines of the source that they came from."""
    body = re.sub(r"loc\(.*\)", "", "\n".join(line for line in ttir.splitlines() if not line.startswith("#")))
    return re.sub(r"%\w+", "%", body).split()


@outside
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_check_asks_for_a_gpu_in_one_line(capsys):
    assert kernels.check.main([]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert not told.out and line.startswith("error: ") and "CUDA" in line


@outside
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_check_passes_on_this_gpu():
    done = subprocess.run([sys.executable, "-m", "kernels.check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
