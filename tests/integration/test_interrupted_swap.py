"""A swap that fails, or is saved in its midst, leaves a checkpoint that resumes to the same end, bit for bit."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint

import callbacks.event
import lightning_modules.upit
import upit.router_init.routing_vectors
import upit.router_init.scoring
from callbacks import ExpertGrowth
from tests.conftest import make_callbacks, make_module, make_trainer, tiny_data
from tests.integration.test_resume import ROOT, same, write_config
from upit.cli.run_directory import RUN_DIR
from upit.model.loading.identity import read_weights
from upit.router_init import RoutingVectors
from upit.upcycling.non_experts import MeanNonExperts

SWAP, GROWTH, END = 3, 4, 5


def fit(make_data, run, *others, ckpt_path=None):
    """A fit whose stages overwrite all of the dense model: experts train along, other weights become a mean."""
    choices = {"at_step": SWAP, "non_experts": MeanNonExperts(), "router": RoutingVectors(epochs=1, expert_lr=1e-3)}
    chosen = [*others, *make_callbacks({"every_n_steps": 1}, choices, report=False), ExpertGrowth(at_step=GROWTH)]
    module, data = make_module(), make_data()
    trainer = make_trainer(run, chosen, max_steps=END, logger=False)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    return fit(partial(tiny_data, cache), tmp_path_factory.mktemp("whole"))


class Watch(Callback):
    """The dense weights before the event, and how the module is when it failed."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == SWAP and pl_module.phase == "dense":
            self.before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}

    def on_exception(self, trainer, pl_module, exception):
        self.training = all(module.training for module in pl_module.modules())
        self.trainable = all(param.requires_grad for param in pl_module.parameters())


MOMENTS = {
    "expansion": (callbacks.event.UpcyclingEvent, "expand", 1),
    "scoring": (upit.router_init.scoring, "score_examples", 2),
    "router": (upit.router_init.routing_vectors, "_joint_loss", 3),
    "assembly": (lightning_modules.upit, "upcycle", 1),
    "optimizer": (lightning_modules.UpITModule, "configure_optimizers", 2),
    "drift": (callbacks.event, "drift", 1),
    "growth": (lightning_modules.upit, "upcycle", 2),
}


def at(monkeypatch, moment: str, act) -> None:
    """Act at a moment of the events, after what happens there."""
    owner, name, number = MOMENTS[moment]
    calls = []
    original = getattr(owner, name)

    def acting(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        if len(calls) == number:
            act()
        return result

    monkeypatch.setattr(owner, name, acting)


def preempt():
    raise InterruptedError("preempted")


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_exception(make_data, tmp_path, monkeypatch, whole, moment):
    watch = Watch()
    with monkeypatch.context() as patch:
        at(patch, moment, preempt)
        with pytest.raises(InterruptedError, match="preempted"):
            fit(make_data, tmp_path, watch, OnExceptionCheckpoint(tmp_path))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    if saved["upit"]["phase"] == "dense":
        assert same(saved["state_dict"], watch.before)
    assert (saved["upit"]["phase"] == "dense") == (moment not in ("optimizer", "drift", "growth"))
    assert watch.training
    assert watch.trainable
    assert same(fit(make_data, tmp_path, ckpt_path=tmp_path / "on_exception.ckpt"), whole)


@pytest.mark.parametrize("moment", ["scoring", "router", "assembly", "growth"])
def test_a_handler_that_saves_and_lets_the_fit_go_on(make_data, tmp_path, monkeypatch, whole, moment):
    watch, trainers = Watch(), []
    watch.setup = lambda trainer, pl_module, stage: trainers.append(trainer)
    with monkeypatch.context() as patch:
        at(patch, moment, lambda: trainers[0].save_checkpoint(tmp_path / "handler.ckpt"))
        assert same(fit(make_data, tmp_path, watch), whole)
    saved = torch.load(tmp_path / "handler.ckpt", weights_only=True)
    if moment != "growth":
        assert same(saved["state_dict"], watch.before)
    assert same(fit(make_data, tmp_path, ckpt_path=tmp_path / "handler.ckpt"), whole)


@pytest.mark.slow
def test_two_processes_with_a_sharded_model(cache, tmp_path):
    config = write_config(tmp_path / "run", cache, {"class_path": "tests.integration.ranks.FailWhileScoring"})
    command = [sys.executable, "-m", "upit", "fit", "-c", config, "-c", ROOT / "configs/strategy/fsdp.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != RUN_DIR} | {"OMP_NUM_THREADS": "1"}
    settings = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 240}
    result = subprocess.run(list(map(str, command)), **settings)
    assert "failed in the middle of a pass" in result.stderr
    dense = read_weights(tmp_path / "run/checkpoints/step=4.ckpt")
    for name in ("handler", "exception"):
        assert same(read_weights(tmp_path / f"run/checkpoints/{name}.ckpt"), dense), name
