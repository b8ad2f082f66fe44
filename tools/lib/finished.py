"""A finished run taken up again from its folder: its float weights, its text, and what steers the rounding."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import train_gpt
from loopgolf.curvature import Curvature
from loopgolf.runtime import Log, RunContext
from tools.lib.runlog import RunError


@dataclass(frozen=True)
class FinishedRun:
    """`consumed`: training tokens that the run has read."""

    config: train_gpt.Config
    ctx: RunContext
    model: train_gpt.LoopedGPT
    text: train_gpt.TrainingText
    tokenizer: train_gpt.Tokenizer
    weights: dict[str, Tensor]
    curvatures: dict[str, Curvature]
    consumed: int

    def fit(self, config: train_gpt.Config) -> bytes:
        """The file that the exporter makes with the byte limit and the k's of this config."""
        k_scale = train_gpt.plan_k_scale(config, self.model)
        trained = train_gpt.Trained(self.weights, self.curvatures, k_scale, train_gpt.Position())
        return train_gpt.fit_artifact(config, self.model, trained, self.tokenizer.identity)


def load_finished(folder: Path) -> FinishedRun:
    try:
        config = train_gpt.Config(**json.loads((folder / "config.json").read_text()))
        content = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        saved, consumed = content["state"], int(content["position"]["tokens"])
        averaged = saved["average"]["mean"] or saved["weights"]
        shapes = {name: p.shape for name, p in train_gpt.build_meta_model(config).named_parameters()}
        averaged = {name: averaged[name].reshape(shape) for name, shape in shapes.items()}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunError(f"{folder}: not a finished run ({error.__class__.__name__}: {error})") from None
    ctx = replace(train_gpt.build_context(replace(config, compile="none"), {}), log=Log(quiet=True))
    tokenizer = train_gpt.load_run_tokenizer(config)
    text = train_gpt.TrainingText(config, train_gpt.list_shapes(config))
    weights = {name: weight.to(ctx.device) for name, weight in averaged.items()}
    return FinishedRun(
        config=config,
        ctx=ctx,
        model=train_gpt.build_model(config, ctx),
        text=text,
        tokenizer=tokenizer,
        weights=weights,
        curvatures=train_gpt.calibrate(config, ctx, weights, text, train_gpt.wants_tokens(config)),
        consumed=consumed,
    )
