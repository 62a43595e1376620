"""What is said of metrics before a fit: it is true, and a callback that would wait for one in vain is refused."""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)

from callbacks import RoutingPicture
from lightning_modules import DenseModule
from lightning_modules.horizon import first_validation
from lightning_modules.monitors import logged
from tests.conftest import TINY, make_callbacks, make_module, make_trainer


def fit(run, data, callbacks, *, module=None, ckpt_path=None, **kwargs):
    settings = {"logger": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    trainer = make_trainer(run, callbacks, **settings, **kwargs)
    trainer.fit(module or make_module(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Seen(Callback):
    """The metrics there are at the end of each phase, and the step of each validation."""

    def __init__(self):
        self.names, self.validations = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names[pl_module.active.phase] = set(trainer.callback_metrics)

    def on_validation_start(self, trainer, pl_module):
        self.validations.append(trainer.global_step)


def test_the_names_are_those_of_what_is_logged(make_data, tmp_path):
    seen = Seen()
    callbacks = [*make_callbacks({"every_n_steps": 2}, {"at_step": 5}, report=False), RoutingPicture(), seen]
    module = make_module(router_z_loss_weight=0.01)
    trainer = fit(tmp_path, make_data(), callbacks, module=module, max_steps=10, val_check_interval=2)
    phases = logged(module, trainer)
    assert list(phases) == ["dense", "moe"]
    assert phases["dense"] == seen.names["dense"]
    assert phases["moe"] | phases["dense"] == set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"val_check_interval": 2}, 2),
        ({"val_check_interval": 0.5}, 2),
        ({}, 4),
        ({"check_val_every_n_epoch": 2}, 8),
        ({"check_val_every_n_epoch": None, "val_check_interval": 6}, 6),
        ({"accumulate_grad_batches": 2}, 2),
        ({"limit_val_batches": 0}, math.inf),
        ({"val_check_interval": "00:10:00:00"}, math.inf),
    ],
    ids=str,
)
def test_the_first_validation_is_where_lightning_has_it(make_data, tmp_path, settings, step):
    seen, limits = Seen(), {"limit_train_batches": 4, "max_epochs": 2, "max_steps": -1}
    trainer = fit(tmp_path, make_data(), [seen], module=DenseModule(config=TINY), **limits, **settings)
    assert first_validation(trainer) == step
    assert seen.validations[:1] == ([] if math.isinf(step) else [step])


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (EarlyStopping("val_loss"), r"EarlyStopping\.monitor='val_loss': nothing logs it, only \['dense/lm_loss', "),
        (EarlyStopping("val_loss", strict=False), r"EarlyStopping\.monitor='val_loss'"),
        (ModelCheckpoint(monitor="val/los"), r"ModelCheckpoint\.monitor='val/los'"),
        (
            EarlyStopping("moe/val_loss"),
            r"logged in the moe phase alone: set its strict to false, or monitor val/loss",
        ),
        (EarlyStopping("dense/val_loss"), r"in the dense phase alone, and its last value would stop the MoE's"),
    ],
)
def test_a_metric_that_nothing_logs_is_refused_before_training(make_data, tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_data(), [*make_callbacks(report=False), callback])
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize("metric", ["moe/val_loss", "router/dead_experts"])
def test_a_dense_run_has_no_metrics_of_a_moe(make_data, tmp_path, metric):
    callbacks = [RoutingPicture(), EarlyStopping(metric, strict=False)]
    with pytest.raises(ValueError, match=f"monitor='{metric}': nothing logs it"):
        fit(tmp_path, make_data(), callbacks, module=DenseModule(config=TINY))


@pytest.mark.parametrize(
    ("metric", "settings"), [("val/loss", {"limit_val_batches": 0}), ("train/loss", {"log_every_n_steps": 0})]
)
def test_a_metric_that_the_trainer_turns_off_is_refused(make_data, tmp_path, metric, settings):
    with pytest.raises(ValueError, match=f"monitor='{metric}': nothing logs it"):
        fit(tmp_path, make_data(), [EarlyStopping(metric)], module=DenseModule(config=TINY), **settings)


@pytest.mark.parametrize(
    ("step", "metric", "refused"),
    [(4, "moe/val_loss", "moe"), (9, "dense/val_loss", "dense"), (9, "moe/val_loss", None)],
)
def test_what_a_resumed_run_monitors(finished, make_data, tmp_path, step, metric, refused):
    shutil.copytree(finished[0], tmp_path / "run")
    callbacks = [*make_callbacks(report=False), EarlyStopping(metric)]
    trainer = make_trainer(tmp_path / "run", callbacks, logger=False, val_check_interval=10)
    trainer.ckpt_path = tmp_path / f"run/checkpoints/step={step}.ckpt"  # as the command line does
    with pytest.raises(ValueError, match=f"in the {refused} phase alone") if refused else nullcontext():
        trainer.fit(make_module(), datamodule=make_data(), weights_only=True)


def test_a_callback_says_what_it_logs(make_data, tmp_path):
    class Own(Callback):
        metrics = {"dense": ("own/score",)}  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("own/score", float(batch_idx))

    stop = EarlyStopping("own/score", check_on_train_epoch_end=True)
    trainer = fit(tmp_path, make_data(), [Own(), stop], module=DenseModule(config=TINY), max_steps=2)
    assert trainer.global_step == 2


@pytest.mark.parametrize("metrics", [["own/score"], {"dense": 3, 7: ("a",)}, {"dense": [1]}, "own", 5], ids=str)
def test_an_attribute_metrics_of_another_kind_means_nothing(make_data, tmp_path, metrics):
    own = Callback()
    own.metrics, own.monitor, own.strict, own.name, own.drift = metrics, ["val/loss"], "yes", 3, None
    trainer = fit(tmp_path, make_data(), [own], module=DenseModule(config=TINY), max_steps=1)
    assert logged(trainer.lightning_module, trainer)["dense"] == logged_alone(trainer)


@pytest.mark.parametrize(
    "callback",
    [BackboneFinetuning(), BatchSizeFinder(), LearningRateFinder(), ModelPruning("l1_unstructured")],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_cannot_work_are_refused_with_the_reason(make_data, tmp_path, callback):
    with pytest.raises(ValueError, match=rf"^{type(callback).__name__} .* Remove it from trainer\.callbacks"):
        fit(tmp_path, make_data(), [callback], module=DenseModule(config=TINY))


def logged_alone(trainer) -> set[str]:
    module = trainer.lightning_module
    return module.training_metrics() | module.validation_metrics()


# --- ModelCheckpoint in two phases --------------------------------------------------------------------

PHASES = {"limit_train_batches": 4, "max_epochs": 5, "max_steps": -1, "val_check_interval": 2}


def best(run, metric, **kwargs) -> ModelCheckpoint:
    name = "{step}"
    return ModelCheckpoint(run / "checkpoints" / metric.partition("/")[0], filename=name, monitor=metric, **kwargs)


def steps(checkpoint: ModelCheckpoint) -> list[int]:
    return sorted(
        int(path.stem.removeprefix("step=").partition("-")[0]) for path in Path(checkpoint.dirpath).glob("*.ckpt")
    )


def test_checkpoints_by_a_metric_of_one_phase_and_a_resume(make_data, tmp_path, recwarn):
    """The swap is at step 6, in the middle of an epoch; validations at 2, 4, and so on to 20."""

    def run(ckpt_path=None, folder=tmp_path / "run"):
        every = ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        saves = [
            best(folder, "moe/val_loss", save_top_k=3),
            best(folder, "dense/val_loss", save_top_k=-1),
            best(folder, "router/dead_experts", save_top_k=-1, save_on_train_epoch_end=True),
        ]
        callbacks = [*make_callbacks(report=False), RoutingPicture(), *saves, every]
        fit(folder, make_data(), callbacks, ckpt_path=ckpt_path, **PHASES)
        return saves

    moe, dense, router = run()
    assert steps(dense) == [2, 4, 6]
    assert steps(router) == [8, 12, 16, 20]
    assert len(moe.best_k_models) == len(steps(moe)) == 3
    assert min(steps(moe)) > 6
    assert moe.save_top_k == 3
    assert not [warning for warning in recwarn if "could not find the monitored key" in str(warning.message)]
    # goes on from the middle of the MoE's phase, in a folder that was moved meanwhile
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    again, dense, _ = run(moved / "checkpoints/step=17.ckpt", moved)
    assert sorted(map(float, again.best_k_models.values())) == sorted(map(float, moe.best_k_models.values()))
    assert {Path(name) for name in again.best_k_models} <= set((moved / "checkpoints/moe").iterdir())
    assert again.best_model_path in again.best_k_models
    assert steps(dense) == [2, 4, 6]


def test_a_checkpoint_by_a_metric_that_a_callback_logs_in_training(make_data, tmp_path):
    class Own(Callback):
        metrics = {"dense": "own/score"}  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("own/score", -float(batch_idx))

    save = best(tmp_path, "own/score", every_n_train_steps=1, save_top_k=2)
    settings = {"max_steps": 4, "limit_val_batches": 0}
    fit(tmp_path, make_data(), [Own(), save], module=DenseModule(config=TINY), **settings)
    assert steps(save) == [3, 4]
