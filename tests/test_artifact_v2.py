"""Files that version 2 of the artifact wrote load, and score what they scored when commit dab7f1d wrote them: the norms
and gates of their blocks were rows of one tensor, and they told bits in a table of tensors.

The files hold random weights; the committed record is real. CPU: pytest tests/test_artifact_v2.py
"""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from helpers import tiny_context

import train_gpt
from loopgolf.artifact import unpack_artifact
from loopgolf.errors import ArtifactError
from loopgolf.scoring import score_tokens

FOLDER = Path(__file__).parent / "data"
WRITTEN = json.loads((FOLDER / "version2.json").read_text())


class NatsMeter:
    nats = 0.0

    def add(self, tokens, positions, log_probs) -> None:
        self.nats -= log_probs.gather(1, tokens[positions][:, None]).double().sum().item()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_version_2_scores_as_it_did(name):
    artifact = train_gpt.load_artifact(FOLDER / f"version2_{name}.lg")
    assert artifact.version == 2 and artifact.size == WRITTEN[name]["bytes"]
    config = train_gpt.config_from_stored(artifact.stored)
    tokens = torch.randint(2, 384, (200,), generator=torch.Generator().manual_seed(0))
    tokens[0] = tokens[77] = 1
    for mode, nats in WRITTEN[name]["nats"].items():
        model = train_gpt.LoopedGPT(config)
        model.load_state_dict(artifact.tensors)
        meter = NatsMeter()
        score_tokens(train_gpt.build_scorer(mode, model, config, tiny_context()), tokens, meter)
        assert meter.nats == pytest.approx(nats, rel=1e-5), mode


def reseal(content: bytes, change) -> bytes:
    (length,) = struct.unpack("<I", content[12:16])
    header = json.loads(content[16 : 16 + length])
    change(header)
    raw = json.dumps(header).encode()
    body = content[:12] + struct.pack("<I", len(raw)) + raw + content[16 + length : -32]
    return body + hashlib.sha256(body).digest()


WRONG = {
    "another shape": lambda header: header["tensors"][0].update(shape=[1]),
    "a shape of text": lambda header: header["tensors"][0].update(shape=["1"]),
    "another name": lambda header: header["tensors"][0].update(name="other"),
    "bits that no grid has": lambda header: [entry.update(bits=9) for entry in header["tensors"]],
    "bits too few for its codes": lambda header: [entry.update(bits=2) for entry in header["tensors"]],
    "a tensor less": lambda header: header["tensors"].pop(),
    "a tensor twice": lambda header: header["tensors"].append(header["tensors"][0]),
    "another order": lambda header: header["tensors"].reverse(),
    "no table": lambda header: header.pop("tensors"),
    "a table of numbers": lambda header: header.update(tensors=[1]),
    "an unknown setting": lambda header: header["config"].update(color="red"),
}


def test_a_damaged_table_is_refused():
    content = (FOLDER / "version2_sandwich.lg").read_bytes()
    assert unpack_artifact(reseal(content, lambda header: None), train_gpt.describe_stored).version == 2
    for name, change in WRONG.items():
        with pytest.raises(ArtifactError) as error:
            unpack_artifact(reseal(content, change), train_gpt.describe_stored)
        assert str(error.value) and "\n" not in str(error.value), name
