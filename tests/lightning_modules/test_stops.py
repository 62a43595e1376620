"""A fit stops at the first loss, gradient or weight that is not finite, and makes nothing of it."""

import json
import math
import re
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from callbacks import RunReport
from lightning_modules import DenseModule
from tests.conftest import TINY, every_step_checkpoints, make_callbacks, make_module, make_trainer
from tests.integration.test_two_processes import small_config
from tests.lightning_modules.test_optimizers import Fused
from upit.cli.main import main
from upit.cli.run_directory import RUN_DIR
from upit.core.finite import NotFiniteError
from upit.upcycling.assemble import upcycle


class Break(L.Callback):
    """Calls ``how(module)`` once ``step`` optimizer steps are done."""

    def __init__(self, step: int, how) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.how(pl_module)


def break_loss(module) -> None:
    objective = module.active.objective

    def broken(batch):
        loss, terms, tokens = objective(batch)
        return loss * math.nan, terms, tokens

    module.active.objective = broken


@torch.no_grad()
def break_weight(module) -> None:
    module.lm.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf


def nan_in_json(run) -> list:
    return [file for file in run.rglob("*.json") if re.search(r"\bNaN\b|Infinity", file.read_text())]


@pytest.mark.parametrize(("step", "phase"), [(4, "dense"), (8, "moe")])
def test_the_first_loss_that_is_nan_ends_the_fit(make_data, tmp_path, step, phase):
    callbacks = [*make_callbacks(), Break(step, break_loss), every_step_checkpoints(tmp_path)]
    trainer = make_trainer(tmp_path, callbacks, val_check_interval=2)
    last = tmp_path / f"checkpoints/step={step}.ckpt"
    said = rf"the loss of optimizer step {step + 1} \({phase} phase\) is NaN .*checkpoint: {re.escape(str(last))}"
    module = make_module()
    with pytest.raises(NotFiniteError, match=said + r"\. Remedies: a lower lr \(now 0\.001\)"):
        trainer.fit(module, datamodule=make_data())
    assert trainer.global_step == step
    assert len(list((tmp_path / "checkpoints").iterdir())) == step
    assert "finished" not in json.loads((tmp_path / "report.json").read_text())
    assert not (tmp_path / "export").exists()
    assert not nan_in_json(tmp_path)
    with pytest.raises(NotFiniteError, match=said):
        trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert not (tmp_path / "later.ckpt").exists()


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({"harvest": {"every_n_steps": 2}}, "experts/step_0000002.safetensors"),
        ({"upcycling": {"at_step": 2}, "harvest": {"every_n_steps": 1}}, "upcycling/lineage.json"),
        ({"max_steps": 2, "upcycling": None}, "export"),
    ],
)
def test_nothing_is_made_of_weights_that_are_not_finite(make_data, tmp_path, settings, made):
    """Even though no loss says so: harvest, swap, and the export at the end."""
    callbacks = make_callbacks(settings.get("harvest"), settings.get("upcycling"), report=False)
    plain = settings.get("upcycling", {}) is None
    module = DenseModule(config=TINY) if plain else make_module()
    callbacks = [Break(2, break_weight), *([RunReport()] if plain else callbacks)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=settings.get("max_steps", 10), limit_val_batches=0)
    named = r"the weight 'model\.layers\.1\.mlp\.down_proj\.weight' at the end of optimizer step 2 \(dense phase\)"
    with pytest.raises(NotFiniteError, match=named + ".*No checkpoint was saved before"):
        trainer.fit(module, datamodule=make_data())
    assert not (tmp_path / made).exists()


def test_a_new_model_that_is_not_finite_is_not_trained(make_data, tmp_path, monkeypatch):
    def broken(moe, *args):
        upcycle(moe, *args)
        moe.model.layers[0].mlp.experts.down_proj.data[0, 0, 0] = math.nan

    monkeypatch.setattr("lightning_modules.upit.upcycle", broken)
    trainer = make_trainer(tmp_path, [*make_callbacks(report=False), every_step_checkpoints(tmp_path)], logger=False)
    named = r"the weight 'model\.layers\.0\.mlp\.experts\.down_proj' at the end of optimizer step 6 \(moe phase\)"
    with pytest.raises(NotFiniteError, match=named + ".*step=6.ckpt"):
        trainer.fit(make_module(), datamodule=make_data())
    assert trainer.global_step == 6


def test_gradients_that_are_not_finite_are_found_where_their_norm_is_known(make_data, tmp_path):
    def break_gradients(module):
        param = module.lm.model.norm.weight
        param.register_hook(lambda grad: grad * math.inf)

    module = Fused(config=TINY)
    trainer = make_trainer(
        tmp_path, [Break(2, break_gradients)], logger=False, enable_checkpointing=False, gradient_clip_val=1.0
    )
    with pytest.raises(NotFiniteError, match=r"the gradients' norm of optimizer step 3 \(dense phase\)"):
        trainer.fit(module, datamodule=make_data())
    assert all(param.isfinite().all() for param in module.parameters())


def break_head(module) -> None:
    module.lm.lm_head.register_forward_hook(lambda *args: args[-1] * math.nan)


class Half(DenseModule):
    """The second process's losses are broken; each waits until the other has failed too, or is killed."""

    folder: Path

    def on_train_start(self) -> None:
        if self.trainer.global_rank == 1:
            break_head(self)

    def training_step(self, batch, batch_idx):
        try:
            return super().training_step(batch, batch_idx)
        except NotFiniteError as error:
            own, other = (self.folder / f"rank{rank}" for rank in (self.global_rank, 1 - self.global_rank))
            own.write_text(str(error))
            end = time.monotonic() + 5
            while time.monotonic() < end and not other.exists():
                time.sleep(0.01)
            raise


@pytest.mark.usefixtures("own_port")
def test_one_rank_with_a_broken_loss_stops_all(make_data, tmp_path):
    data = make_data()
    data.prepare_data()  # before the fork
    settings = {"devices": 2, "strategy": "ddp_fork", "logger": False, "enable_checkpointing": False}
    module = Half(config=TINY)
    module.folder = tmp_path
    with pytest.raises(Exception, match="NotFiniteError: the loss of optimizer step 1"):
        make_trainer(tmp_path, [], **settings).fit(module, datamodule=data)
    for rank in range(2):
        assert "the loss of optimizer step 1 (dense phase)" in (tmp_path / f"rank{rank}").read_text()


def test_a_run_from_the_command_line_that_diverges_fails(cache, tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = small_config(run, cache)
    config["trainer"] |= {"callbacks": config["trainer"]["callbacks"][:3], "val_check_interval": 8}
    config["model"]["init_args"]["moe"]["init_args"] |= {"lr": 1e30, "warmup_fraction": 0.0}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setenv(RUN_DIR, str(run))
    for variable in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "1")
    with pytest.raises(NotFiniteError, match=r"of optimizer step [67] \(moe phase\)"):
        main(["fit", "-c", str(file)])
    assert "finished" not in json.loads((run / "report.json").read_text())
    assert not (run / "export").exists()
    assert not nan_in_json(run)
