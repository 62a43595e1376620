"""Clipping within the optimizer's step, and what is done with optimizer and model when a fit is over."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lightning_modules import DenseModule
from lightning_modules.optimizers import clip_in_step, clips_in_step
from tests.conftest import TINY, make_trainer


def trained(model: nn.Module, scale: float, clip) -> nn.Module:
    """A copy of a model after three steps of fused AdamW on gradients of one direction."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(3):
        states = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        (scale * model(states).square().sum()).backward()
        clip(optimizer, model)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_a_step_that_clips_is_that_of_clipped_gradients(scale):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    norms = []
    ours = trained(model, scale, lambda optimizer, _: norms.append(clip_in_step(optimizer, 0.5)))
    expected = []
    theirs = trained(model, scale, lambda _, model: expected.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_only_fused_adamw_clips_in_its_step():
    params = [nn.Parameter(torch.ones(2))]
    assert clips_in_step(torch.optim.AdamW(params, fused=True))
    assert not clips_in_step(torch.optim.AdamW(params))
    assert not clips_in_step(torch.optim.SGD(params, lr=0.1, fused=True))


class Fused(DenseModule):
    """With the optimizer that a GPU's module has."""

    def optimizers_for(self, steps):
        optimizers = super().optimizers_for(steps)
        for group in optimizers["optimizer"].param_groups:
            group["fused"] = True
        return optimizers


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fit_clips_the_same_either_way(make_data, tmp_path, algorithm, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lightning_modules.base.clip_in_step", lambda *args: (seen.append(args[1]), clip_in_step(*args))
    )

    def fit(kind) -> dict:
        torch.manual_seed(0)
        module = kind(config=TINY, lr=1e-2)
        clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
        trainer = make_trainer(tmp_path, [], logger=False, enable_checkpointing=False, max_steps=3, **clipping)
        trainer.fit(module, datamodule=make_data())
        return module.state_dict()

    torch.testing.assert_close(fit(Fused), fit(DenseModule), rtol=1e-4, atol=1e-6)
    assert seen == ([0.05] * 3 if algorithm == "norm" else [])


@pytest.mark.parametrize("last_fit", [False, True])
def test_nothing_is_moved_to_the_host_after_the_last_fit(make_data, tmp_path, last_fit, monkeypatch):
    moved = []
    monkeypatch.setattr(L.LightningModule, "cpu", lambda self: moved.append(self) or self)
    module = DenseModule(config=TINY)
    module.last_fit = last_fit
    trainer = make_trainer(tmp_path, [], logger=False, max_steps=2)
    trainer.checkpoint_callback.save_last = True
    trainer.fit(module, datamodule=make_data())
    assert (len(moved), len(trainer.optimizers)) == ((0, 0) if last_fit else (1, 1))
    last = torch.load(trainer.checkpoint_callback.last_model_path, weights_only=True)
    assert last["optimizer_states"][0]["state"]
