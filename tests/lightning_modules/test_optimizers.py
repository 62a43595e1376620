"""Clipping within the optimizer's step, and what is done with optimizer and model when a fit is over."""

import copy
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from lightning_modules import DenseModule
from lightning_modules.optimizers import AdamW, adamw
from tests.conftest import TINY, make_trainer


def trained(model: nn.Module, scale: float, clip, *, clipped=(0, 1, 2)) -> nn.Module:
    """A copy of a model after three steps of fused AdamW, clipped or not."""
    model = copy.deepcopy(model)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(3):
        states = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        (scale * model(states).square().sum()).backward()
        if step in clipped:
            clip(optimizer, model)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [(0, 1, 2), (0,)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_a_step_that_clips_is_that_of_clipped_gradients(scale, clipped, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    norms = []
    ours = trained(model, scale, lambda optimizer, _: norms.append(optimizer.clip(0.5)), clipped=clipped)
    expected = []

    def theirs_clips(_, model):
        expected.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))

    theirs = trained(model, scale, theirs_clips, clipped=clipped)
    torch.testing.assert_close(norms, expected)
    near = {} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 2e-3}  # theirs rounds the clipped gradients
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **near)


def test_only_a_fused_one_clips_in_its_step():
    params = [nn.Parameter(torch.ones(2))]
    assert AdamW(params, fused=True).clips
    assert not AdamW(params).clips


class Fused(DenseModule):
    """With the optimizer that a GPU's module has."""

    def optimizers_for(self, steps):
        optimizers = super().optimizers_for(steps)
        for group in optimizers["optimizer"].param_groups:
            group["fused"] = True
        return optimizers


class Theirs(DenseModule):
    """With a user's own."""

    def optimizers_for(self, steps):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=self.betas, weight_decay=0.0, fused=True)


@pytest.mark.parametrize(
    ("kind", "algorithm", "count", "precision"),
    [
        (Fused, "norm", 3, "32-true"),
        (Fused, "norm", 3, "bf16-mixed"),
        (Fused, "norm", 3, "bf16-true"),
        (Fused, "value", 0, "32-true"),
        (DenseModule, "norm", 0, "32-true"),
        (Theirs, "norm", 0, "32-true"),
    ],
)
def test_a_fit_clips_the_same_whoever_does_it(make_data, tmp_path, kind, algorithm, count, precision, monkeypatch):
    seen, clip = [], AdamW.clip
    monkeypatch.setattr(AdamW, "clip", lambda self, norm: seen.append(norm) or clip(self, norm))

    def fit(kind) -> dict:
        torch.manual_seed(0)
        module = kind(config=TINY, lr=1e-2, schedule="constant_with_warmup", warmup_fraction=0.0)
        clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
        bare = {"logger": False, "enable_checkpointing": False, "max_steps": 3, "precision": precision}
        trainer = make_trainer(tmp_path, [], **bare, **clipping)
        trainer.fit(module, datamodule=make_data())
        return module.state_dict()

    found = fit(kind)
    assert seen == [0.05] * count
    stock = fit(DenseModule)
    if precision == "32-true":
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-6)
    else:  # a gradient near 0 may round to the other sign, and Adam's step with it
        near = [torch.isclose(found[name], stock[name], rtol=1.6e-2, atol=5e-3).flatten() for name in stock]
        assert torch.cat(near).float().mean() > 0.999


def lost_updates(lr: float, dtype: torch.dtype, steps: int = 20) -> tuple[float, list[str]]:
    """Share of the updates that change nothing, counted by hand over all weights, and the warnings."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(dtype)
    optimizer, scheduler = adamw(
        model.parameters(), steps, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), schedule="constant_with_warmup",
        warmup_fraction=0.5,
    )  # fmt: skip
    lost = []
    with warnings.catch_warnings(record=True, action="always") as told:
        for step in range(steps):
            model.weight.grad = torch.randn_like(model.weight)
            before = model.weight.detach().clone()
            optimizer.step()
            scheduler.step()
            lost += [(before == model.weight).float().mean()] if step >= steps // 2 else []
    return float(sum(lost) / len(lost)), [str(warning.message) for warning in told]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_that_rounding_swallows_are_told_with_the_figure_and_the_remedy(dtype):
    share, (told,) = lost_updates(2e-5 if dtype == torch.bfloat16 else 1e-6, dtype)
    assert share > 0.7
    assert (
        f"{share:.0%} of the updates of {str(dtype)[6:]} weights were lost to rounding in 10 optimizer steps" in told
    )
    assert "a sample of 4096 weights" in told
    assert "Set trainer.precision=bf16-mixed, which keeps them in float32, or raise lr" in told


@pytest.mark.parametrize(("lr", "dtype"), [(1e-3, torch.bfloat16), (2e-5, torch.float32), (0.0, torch.bfloat16)])
def test_weights_that_move_are_no_warning(lr, dtype):
    assert lost_updates(lr, dtype)[1] == []


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), ModelParallelStrategy(), FSDPStrategy()])
def test_shards_are_clipped_by_their_strategy(strategy, monkeypatch):
    done = []
    monkeypatch.setattr(AdamW, "clip", lambda *_: done.append("step") or torch.tensor(1.0))
    monkeypatch.setattr(L.LightningModule, "configure_gradient_clipping", lambda *_: done.append("strategy"))
    module = DenseModule(config=TINY)
    module._trainer = SimpleNamespace(strategy=strategy, precision_plugin=None, global_step=0)
    optimizer = AdamW([nn.Parameter(torch.ones(2))], fused=True)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    assert done == ["step" if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) else "strategy"]


@pytest.mark.parametrize("last_fit", [False, True])
def test_nothing_is_moved_to_the_host_after_the_last_fit(make_data, tmp_path, last_fit, monkeypatch):
    moved, states_moved = [], []
    monkeypatch.setattr(L.LightningModule, "cpu", lambda self: moved.append(self) or self)
    to_device = "lightning.pytorch.strategies.strategy._optimizers_to_device"
    monkeypatch.setattr(to_device, lambda optimizers, _: states_moved.append(len(optimizers)))
    module = DenseModule(config=TINY)
    module.last_fit = last_fit
    trainer = make_trainer(tmp_path, [], logger=False, max_steps=2)
    trainer.checkpoint_callback.save_last = True
    trainer.fit(module, datamodule=make_data())
    assert (moved, states_moved[-1]) == (([], 0) if last_fit else ([module], 1))
    assert len(trainer.optimizers) == 1
    last = torch.load(trainer.checkpoint_callback.last_model_path, weights_only=True)
    assert last["optimizer_states"][0]["state"]
