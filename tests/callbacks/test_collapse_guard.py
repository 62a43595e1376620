"""The guard looks every window, does what it is told, and goes on the same after a resume."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from callbacks import CollapseGuard
from lightning_modules import DenseModule
from tests.conftest import TINY, every_step_checkpoints, make_callbacks, make_module, make_trainer
from upit.router_init import RandomRouter

STRICT = {"window": 2, "min_share": 1.0, "min_entropy": 1.0}  # any imbalance is a collapse


@pytest.fixture
def fit(make_data, tmp_path):
    def fit(guard, ckpt_path=None, **moe):
        callbacks = make_callbacks({"every_n_steps": 1}, {"at_step": 2, "router": RandomRouter()}, report=False)
        trainer = make_trainer(tmp_path, [*callbacks, guard, every_step_checkpoints(tmp_path)], max_steps=9)
        module = make_module(**moe)
        trainer.fit(module, datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        return trainer, module

    return fit


def test_warns_every_window_after_the_swap(fit):
    with pytest.warns(UserWarning, match="the router collapses") as caught:
        fit(CollapseGuard(**STRICT))
    steps = [str(w.message).split(":")[0] for w in caught if "collapses" in str(w.message)]
    assert steps == ["step 4", "step 6", "step 8"]
    assert "layer 1: load entropy 0." in str([str(w.message) for w in caught])


def test_says_nothing_where_all_is_well(fit):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the router collapses.*")
        fit(CollapseGuard(window=2, min_share=0.0, min_entropy=0.0))


@pytest.mark.filterwarnings("ignore:.*the router collapses.*")
def test_raises_the_weight_up_to_its_limit(fit):
    _, module = fit(CollapseGuard(**STRICT, action="raise_weight", max_weight=0.05))
    assert module.moe.load_balancing_weight == 0.05
    _, module = fit(CollapseGuard(**STRICT, action="raise_weight", factor=3, max_weight=9))
    assert module.moe.load_balancing_weight == pytest.approx(0.01 * 3**3)


@pytest.mark.filterwarnings("ignore:.*the router collapses.*")
def test_stops(fit):
    trainer, _ = fit(CollapseGuard(**STRICT, action="stop"))
    assert trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:.*the router collapses.*")
def test_resumes_within_a_window(fit, tmp_path):
    settings = {**STRICT, "window": 3, "action": "raise_weight", "max_weight": 9.0}
    whole = CollapseGuard(**settings)
    _, module = fit(whole)
    again = CollapseGuard(**settings)
    _, resumed = fit(again, ckpt_path=tmp_path / "checkpoints/step=6.ckpt")
    assert again.weight == whole.weight == pytest.approx(0.04)
    assert again.looked_at == whole.looked_at == 8
    assert torch.equal(again.load.counts_DE, whole.load.counts_DE)
    for ours, theirs in zip(resumed.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    anew, module = fit(CollapseGuard(**settings), tmp_path / "checkpoints/step=7.ckpt", load_balancing_weight=0.3)
    assert module.moe.load_balancing_weight == pytest.approx(0.6), "raised from the weight of now"
    assert anew.global_step == 9


def test_refuses_to_raise_nothing(fit):
    with pytest.raises(ValueError, match="load_balancing_weight, which is 0"):
        fit(CollapseGuard(action="raise_weight"), load_balancing_weight=0.0)
    with pytest.raises(ValueError, match=r"max_weight=0.1 must be above load_balancing_weight=0.2"):
        fit(CollapseGuard(action="raise_weight"), load_balancing_weight=0.2)


def test_a_guard_that_joins_a_run_begins_there(fit, tmp_path):
    fit(CollapseGuard(window=50))
    state = torch.load(tmp_path / "checkpoints/step=7.ckpt", weights_only=True)
    del state["callbacks"]["CollapseGuard"]
    torch.save(state, tmp_path / "checkpoints/unguarded.ckpt")
    guard = CollapseGuard(window=3)
    fit(guard, ckpt_path=tmp_path / "checkpoints/unguarded.ckpt")
    assert guard.looked_at == 7


def test_a_dense_run_has_nothing_to_guard(make_data, tmp_path):
    trainer = make_trainer(tmp_path, [CollapseGuard(action="raise_weight")], logger=False, max_steps=1)
    trainer.fit(DenseModule(config=TINY), datamodule=make_data())
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"min_share": 1.5}, {"min_entropy": -0.1}, {"factor": 1.0}], ids=lambda w: next(iter(w))
)
def test_refuses(wrong):
    field, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"CollapseGuard.{field}={value}"):
        CollapseGuard(**wrong)


def test_a_window_does_not_reach_back_before_a_growth():
    guard = CollapseGuard()
    guard.load_state_dict({"looked_at": 0, "counts_DE": torch.ones(2, 4), "weight": None, "raised_from": None})
    guard.on_growth_end(SimpleNamespace(global_step=7), None, None)
    assert guard.state_dict() == {"looked_at": 7, "counts_DE": None, "weight": None, "raised_from": None}
