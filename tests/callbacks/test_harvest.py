"""Harvest: at which steps, on what boundaries, and what happens when writing fails or a run resumes."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import ExpertHarvest, harvest
from tests.conftest import every_step_checkpoints, make_module, make_trainer
from upit.pool import Pool


@pytest.mark.parametrize(
    ("settings", "until", "steps_per_epoch", "points"),
    [
        ({}, 40, 20, [5, 10, 15, 20, 25, 30, 35, 40]),
        ({}, 20, 10, [2, 5, 8, 10, 12, 15, 18, 20]),
        ({}, 39, 20, [5, 10, 15, 20, 25, 30, 35]),
        ({"every_n_epochs": 0.3}, 10, 10, [3, 6, 9]),
        ({"every_n_epochs": 0.1}, 10, 100, [10]),
        ({"every_n_epochs": 1 / 3}, 30, 10, [3, 7, 10, 13, 17, 20, 23, 27, 30]),
        ({"every_n_epochs": 0.25}, 4, 2, [1, 2, 3, 4]),
        ({"every_n_steps": 3}, 10, 20, [3, 6, 9]),
        ({"every_n_steps": 11}, 10, 20, []),
        ({"at_steps": [7, 3, 3, 50]}, 10, 20, [3, 7]),
    ],
)
def test_points(settings, until, steps_per_epoch, points):
    assert ExpertHarvest(**settings).points(until=until, steps_per_epoch=steps_per_epoch) == points


@pytest.mark.parametrize("interval", [0.1, 0.2, 0.25, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("steps_per_epoch", [10, 37, 1000])
def test_whole_epochs_lose_no_point_to_rounding(interval, steps_per_epoch):
    epochs = 3
    found = ExpertHarvest(every_n_epochs=interval).points(
        until=epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch
    )
    assert len(found) == int(round(epochs / interval, 6))
    assert found[-1] <= epochs * steps_per_epoch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_epochs": -0.5}, "every_n_epochs=-0.5"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"at_steps": []}, "at_steps="),
        ({"at_steps": [0, 3]}, "at_steps="),
        ({"at_steps": [3], "every_n_steps": 2}, "not both"),
    ],
)
def test_points_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExpertHarvest(**settings)


def fit(run, data, callback, *, ckpt_path=None, module=None, **kwargs):
    trainer = make_trainer(run, [callback, every_step_checkpoints(run)], logger=False, **{"max_steps": 6, **kwargs})
    trainer.fit(module or make_module(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights_at(run, step: int) -> dict[str, torch.Tensor]:
    """The dense weights of a checkpoint."""
    state = torch.load(run / f"checkpoints/step={step}.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("dense.model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_expert_is_the_model_after_its_optimizer_step(make_data, tmp_path, accumulate):
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=2), accumulate_grad_batches=accumulate)
    pool = Pool.load(tmp_path / "experts")
    pool.verify()
    assert [expert.step for expert in pool.experts] == [2, 4, 6]
    for expert in pool.experts:
        weights = weights_at(tmp_path, expert.step)
        for name in expert.shapes:
            assert torch.equal(expert.read(name), weights[name]), (expert.step, name)
    assert not torch.equal(pool.base.read(name), pool.experts[0].read(name))


def test_the_base_is_the_model_before_training(make_data, tmp_path):
    module = make_module(lr=1e-3)
    started = {}
    harvesting = ExpertHarvest(every_n_steps=6)

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            started.update({name: param.detach().clone() for name, param in pl_module.lm.named_parameters()})

    trainer = make_trainer(tmp_path, [harvesting, Start()], logger=False, max_steps=6)
    trainer.fit(module, datamodule=make_data())
    base = Pool.load(tmp_path / "experts").base
    assert all(torch.equal(base.read(name), started[name]) for name in base.shapes)


def test_files_may_be_half_precision(make_data, tmp_path):
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=3, dtype="bfloat16"))
    pool = Pool.load(tmp_path / "experts")
    pool.verify()
    weights = weights_at(tmp_path, 3)
    for name in pool.base.shapes:
        assert torch.equal(pool.experts[0].read(name), weights[name].bfloat16())


def test_metrics_and_epochs_are_recorded(make_data, tmp_path):
    trainer = fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=3))
    entry = json.loads((tmp_path / "experts/manifest.json").read_text())["experts"][-1]
    assert entry["metrics"]["train/loss"] > 0
    assert entry["epoch"] == pytest.approx(6 / trainer.lightning_module.steps_per_epoch())


def test_metrics_that_are_no_numbers_are_left_out(make_data, tmp_path):
    """A reader other than Python's would refuse the manifest."""

    class Broken(ExpertHarvest):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.log_dict({"mine/nan": float("nan"), "mine/inf": float("inf"), "mine/one": 1.0})

    fit(tmp_path, make_data(), Broken(every_n_steps=3))
    text = (tmp_path / "experts/manifest.json").read_text()
    entry = json.loads(text, parse_constant=pytest.fail)["experts"][-1]
    assert entry["metrics"]["mine/one"] == 1.0
    assert not {"mine/nan", "mine/inf"} & entry["metrics"].keys()


def test_an_error_of_the_background_writer_ends_the_run(make_data, tmp_path, monkeypatch):
    original = Pool.add

    def full(self, tensors, *, step, **kwargs):
        if step == 2:
            raise OSError("no space left on device")
        return original(self, tensors, step=step, **kwargs)

    monkeypatch.setattr(harvest.Pool, "add", full)
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=2))
    assert not (tmp_path / "checkpoints/step=4.ckpt").exists(), "no checkpoint vouches for an expert that is not there"


def test_a_resumed_run_harvests_what_is_still_to_come(make_data, tmp_path):
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=2))
    whole = [(expert.step, expert.sha256) for expert in Pool.load(tmp_path / "experts").experts]
    before = (tmp_path / "experts/step_0000002.safetensors").stat().st_mtime_ns
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=2), ckpt_path=tmp_path / "checkpoints/step=3.ckpt")
    assert [(expert.step, expert.sha256) for expert in Pool.load(tmp_path / "experts").experts] == whole
    assert (tmp_path / "experts/step_0000002.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_still_knows_the_metrics_of_before(make_data, tmp_path):
    """A validation before the checkpoint is the last one that later experts have."""

    def metrics(ckpt_path=None):
        settings = {"val_check_interval": 3, "log_every_n_steps": 2, "max_steps": 5}
        fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=5), ckpt_path=ckpt_path, **settings)
        return Pool.load(tmp_path / "experts").experts[0].metrics

    whole = metrics()
    assert {"val/loss", "train/loss"} <= whole.keys()
    assert metrics(tmp_path / "checkpoints/step=4.ckpt") == whole


def test_experts_of_an_abandoned_future_are_forgotten(make_data, tmp_path):
    """A resumed run that ends earlier must not upcycle experts that its own past never had."""
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=1))
    resumed = {"ckpt_path": tmp_path / "checkpoints/step=2.ckpt", "max_steps": 4}
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=1), **resumed)
    assert [expert.step for expert in Pool.load(tmp_path / "experts").experts] == [1, 2, 3, 4]


def test_a_run_resumed_away_from_its_experts_is_refused(make_data, tmp_path):
    fit(tmp_path / "old", make_data(), ExpertHarvest(every_n_steps=2))
    checkpoint = tmp_path / "old/checkpoints/step=3.ckpt"
    with pytest.raises(ValueError, match=r"no harvested experts in .*new.*manifest\.json is missing"):
        fit(tmp_path / "new", make_data(), ExpertHarvest(every_n_steps=2), ckpt_path=checkpoint)


def test_a_module_that_cannot_upcycle_is_refused(make_data, tmp_path):
    from lightning_modules import DenseModule
    from tests.conftest import TINY

    with pytest.raises(TypeError, match=r"ExpertHarvest needs a module that passes from dense to MoE.*DenseModule"):
        fit(tmp_path, make_data(), ExpertHarvest(), module=DenseModule(config=TINY))
