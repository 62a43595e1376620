"""Harvest: at which steps, on what boundaries, and what happens when writing fails or a run resumes."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from callbacks import ExpertGrowth, ExpertHarvest, harvest
from tests.conftest import every_step_checkpoints, make_callbacks, make_module, make_trainer
from upit.preparation.pool import Pool
from upit.report.inspection import inspect


@pytest.mark.parametrize(
    ("settings", "epochs", "steps_per_epoch", "points"),
    [
        ({}, 2, 20, [5, 10, 15, 20, 25, 30, 35, 40]),
        ({}, 2, 10, [3, 5, 8, 10, 13, 15, 18, 20]),
        ({}, 39 / 20, 20, [5, 10, 15, 20, 25, 30, 35]),
        ({"every_n_epochs": 0.3}, 1, 10, [3, 6, 9]),
        ({"every_n_epochs": 0.34}, 1, 10, [3, 7]),  # the third, at 1.02 epochs, would round to step 10 too
        ({"every_n_epochs": 0.1}, 0.1, 100, [10]),
        ({"every_n_epochs": 1 / 3}, 3, 10, [3, 7, 10, 13, 17, 20, 23, 27, 30]),
        ({"every_n_epochs": 0.25}, 2, 2, [1, 1, 2, 2, 3, 3, 4, 4]),
        ({"every_n_steps": 3}, 0.5, 20, [3, 6, 9]),
        ({"every_n_steps": 5}, 0.5, 20, [5, 10]),
        ({"every_n_steps": 11}, 0.5, 20, []),
        ({"at_steps": [7, 3, 3, 50]}, 0.5, 20, [3, 3, 7]),
    ],
)
def test_points(settings, epochs, steps_per_epoch, points):
    assert ExpertHarvest(**settings).points(epochs, steps_per_epoch=steps_per_epoch) == points


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


class SavesAt(Callback):
    """Saves a checkpoint as soon as an optimizer step is done, before callbacks that come later in the list."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/early.ckpt")


def test_a_checkpoint_written_before_the_harvest_of_its_step_resumes_with_that_harvest(make_data, tmp_path):
    def harvested(*callbacks, **kwargs):
        trainer = make_trainer(
            tmp_path, [*callbacks, ExpertHarvest(every_n_steps=2)], max_steps=5, enable_checkpointing=False
        )
        trainer.fit(make_module(), datamodule=make_data(), weights_only=True, **kwargs)
        return [(expert.step, expert.sha256) for expert in Pool.load(tmp_path / "experts").experts]

    whole = harvested(SavesAt(2))
    assert [step for step, _ in whole] == [2, 4]
    assert harvested(ckpt_path=tmp_path / "early.ckpt") == whole


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


class StepsAtGrowth(Callback):
    def on_growth_start(self, trainer, module, growth):
        self.steps = [expert.step for expert in Pool.load(Path(trainer.default_root_dir) / "experts").experts]


def fit_with_swap(run, data, keep, *, saves=True, **kwargs):
    """Three harvests, of which the last two become the experts; a swap, and a growth in the next epoch."""
    watch = StepsAtGrowth()
    callbacks = make_callbacks({"every_n_steps": 1, "keep": keep}, {"at_step": 3}, report=False)
    saving = every_step_checkpoints(run)
    if not saves:
        saving = ModelCheckpoint(run / "checkpoints", every_n_train_steps=100)
    settings = {"logger": False, "limit_train_batches": 4, "max_steps": 6}
    trainer = make_trainer(run, [*callbacks, ExpertGrowth(at_step=5), watch, saving], **settings)
    trainer.fit(make_module(num_experts=2), datamodule=data, weights_only=True, **kwargs)
    return trainer.lightning_module.state_dict(), watch.steps


@pytest.mark.parametrize(("keep", "kept"), [("used", [2, 3]), ("none", [])])
def test_experts_are_pruned_once_a_checkpoint_does_without_them(make_data, tmp_path, keep, kept, capsys, caplog):
    run = tmp_path / "run"
    lost = r"step=1\.ckpt, step=2\.ckpt, step=3\.ckpt$"
    with pytest.warns(UserWarning, match=rf"keep={keep} removed experts that the swap needs, .* {lost}"):
        weights, at_growth = fit_with_swap(run, make_data(), keep)
    assert at_growth == kept, "the growth does without them"
    pool = Pool.load(run / "experts")
    pool.verify()
    pruned = [step for step in (1, 2, 3) if step not in kept]
    assert ([expert.step for expert in pool.experts], pool.pruned) == (kept, pruned)
    freed = len(pruned) * (run / "experts/base.safetensors").stat().st_size / 1e6
    assert f"removed the experts harvested at steps {pruned}, {freed:,.1f} MB freed" in caplog.text
    names = {"manifest.json", "base.safetensors", *(f"step_{step:07d}.safetensors" for step in kept)}
    assert {file.name for file in (run / "experts").iterdir()} == names
    inspect(run, Console(width=200))
    assert (
        f"Pruned after the swap: the experts harvested at steps {', '.join(map(str, pruned))}"
        in capsys.readouterr().out
    )

    again, _ = fit_with_swap(run, make_data(), keep, ckpt_path=run / "checkpoints/step=5.ckpt")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(ValueError, match=r"harvested at steps \[1.*\] were pruned, and the swap needs them: resume a"):
        fit_with_swap(run, make_data(), keep, ckpt_path=run / "checkpoints/step=3.ckpt")


def test_all_experts_stay_by_default_or_while_no_checkpoint_does_without_them(make_data, tmp_path):
    fit_with_swap(tmp_path / "all", make_data(), "all")
    assert [expert.step for expert in Pool.load(tmp_path / "all/experts").experts] == [1, 2, 3]
    with pytest.warns(
        UserWarning, match="keep=none removed nothing: the fit has left no checkpoint from after the swap"
    ):
        _, at_growth = fit_with_swap(tmp_path / "none", make_data(), "none", saves=False)
    assert at_growth == [1, 2, 3]
    assert [expert.step for expert in Pool.load(tmp_path / "none/experts").experts] == [1, 2, 3]


def test_a_checkpoint_of_an_abandoned_swap_does_not_count(make_data, tmp_path):
    """It holds another MoE than the run's."""
    fit_with_swap(tmp_path, make_data(), "all")
    for step in (1, 2, 3):
        (tmp_path / f"checkpoints/step={step}.ckpt").unlink()
    with pytest.warns(UserWarning, match="removed nothing"):
        fit_with_swap(tmp_path, make_data(), "none", saves=False)


def test_pruning_that_was_interrupted_is_completed(make_data, tmp_path, monkeypatch):
    fit(tmp_path, make_data(), ExpertHarvest(every_n_steps=2))
    pool = Pool.load(tmp_path / "experts")
    size = (tmp_path / "experts/step_0000002.safetensors").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", no)
        with pytest.raises(OSError, match="no"):
            pool.prune([2])
    pool.verify()
    assert [expert.step for expert in pool.experts] == [4, 6]
    assert pool.prune([4]) == 2 * size
    assert sorted(file.name for file in (tmp_path / "experts").glob("step*")) == ["step_0000006.safetensors"]


def no(*args):
    raise OSError("no")


def test_another_keep_is_refused():
    with pytest.raises(ValueError, match=r"ExpertHarvest\.keep=2 must be all, used or none"):
        ExpertHarvest(keep=2)
