"""The compiled blocks against the same model uncompiled, and against themselves: a run has to repeat bit by bit.

CPU with two threads, float32: pytest tests/test_compile.py
"""

import pytest
import torch
from helpers import tiny_config, tiny_model

from loopgolf.runtime import find_compiler_fault
from train_gpt import LoopedGPT


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def compute_gradients(model: LoopedGPT, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, tokens.roll(-1, 1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(bool(find_compiler_fault(torch.device("cpu"))), reason="torch.compile does not work here")
def test_compiled_gradients_are_those_of_the_model_and_repeat(two_threads):
    config = tiny_config(plan="aba", seq_len=256, batch_tokens=4096, model_dim=64, ve_passes="last1")
    plain = tiny_model(config)
    compiled = LoopedGPT(config, compile_mode="block")
    compiled.load_state_dict(plain.state_dict())
    # few different tokens, so that many rows of a gradient are added to one row of the table
    tokens = torch.randint(2, 12, (16, 256), generator=torch.Generator().manual_seed(0))
    expected, first = compute_gradients(plain, tokens), compute_gradients(compiled, tokens)
    for name, grad in expected.items():
        torch.testing.assert_close(first[name], grad, rtol=2e-3, atol=2e-3 * grad.abs().max().item(), msg=name)
    for _ in range(15):
        again = compute_gradients(compiled, tokens)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
