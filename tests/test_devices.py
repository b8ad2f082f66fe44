"""Training and scoring on a device that is not the CPU, without having one: tensors that only know their
shape, dtype and device, on a made-up accelerator. PyTorch refuses an operation that mixes devices, as a GPU would."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parent.parent
# together they have every part; with fewer passes of each block
RECIPES = {"pocket": "a(b)*2c", "frontier": "a(bc)*2d", "looped_s20": "a(^bc~~)*rd", "osrt_v4": "(ab~)*2"}
SIZE = dict(model_dim=64, num_heads=4, rope_dims=16, seq_len=64, vocab_size=256, batch_tokens=256, moe_hidden=32,
            depth=1, checkpoint_passes=False, compile="none",
            canonical=False, recall_share=0.0)  # fmt: skip  # one needs a tokenizer, the other sizes that follow from values
PLAY = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
torch.utils.backend_registration._setup_privateuseone_for_python_backend("made_up")
import train_gpt
from train_gpt import Config, RunContext, Settings
from tests.test_devices import RECIPES, SIZE

device = torch.device("made_up:0")
ctx = RunContext(0, 1, device, torch.bfloat16, "none", train_gpt.Log(quiet=True))
for recipe, plan in RECIPES.items():
    given = train_gpt.RECIPES[recipe] | dict(plan=plan)
    same = given.get("num_heads", 32) == given.get("num_kv_heads", 8)
    config = Config(**given | SIZE | dict(num_kv_heads=4 if same else 2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = train_gpt.LoopedGPT(config, ctx.dtype)
        state = train_gpt.build_state(config, ctx, model, 1.0)
        batch = torch.zeros(2, 4, 64, dtype=torch.long, device=device)
        settings = Settings(1.0, 0.9, train_gpt.Depth(config.depth), 256, 64)
        loss = train_gpt.train_step(model, state, batch, settings, ctx)
        assert loss.device == device and all(w.device == device for w in state.master.weights.values())
        state.update_average(0, 1.0)
        tokens = torch.zeros(100, dtype=torch.long)  # a window of two blocks, the second with keys of the first
        for mode in ("banded", "lora"):
            scorer = train_gpt.build_scorer(mode, model, config, ctx)
            for positions, log_probs in scorer.log_probs(tokens, scorer.windows(100)[:1]):
                assert log_probs.device == device and positions.device.type == "cpu"
    print(recipe)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot make one up",
)
def test_no_operation_mixes_devices():
    """In a process of its own: a device that was made up once stays."""
    found = subprocess.run([sys.executable, "-c", PLAY], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == list(RECIPES), found.stderr[-2000:]
