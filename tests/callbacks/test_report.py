"""The report and the export at the end, and the answers of predict."""

import json
import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from callbacks import RunReport
from lightning_modules import DenseModule
from tests.conftest import TINY, make_callbacks, make_module, make_trainer


def test_a_dense_fit_alone_reports_base_and_dense_and_exports(make_data, tmp_path, capsys):
    module = DenseModule(config=TINY, lr=1e-3)
    make_trainer(tmp_path, [RunReport()], max_steps=2, logger=False).fit(module, datamodule=make_data())
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["base", "dense"]
    assert set(report["stages"]["dense"]["domains"]) == {"letters", "arithmetic"}
    assert [scores["step"] for scores in report["stages"].values()] == [0, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in module.lm.state_dict().items())
    said = "The weights are the last ones of the run, of step 2"
    out = capsys.readouterr().out
    assert "Held-out loss" in out
    assert f"export: {said}\n" in out
    assert f"{said}.\n" in (tmp_path / "export/README.md").read_text()
    assert report["export"] == {"directory": "export", "weights": "last", "step": 2}


def test_the_export_can_be_left_out(make_data, tmp_path):
    trainer = make_trainer(tmp_path, [RunReport(export="none")], max_steps=1, logger=False)
    trainer.fit(DenseModule(config=TINY), datamodule=make_data())
    assert not (tmp_path / "export").exists()


def test_the_best_checkpoint_is_exported(make_data, tmp_path, capsys):
    """The loss falls, so the first validation after the swap is the best where a high loss is wanted."""
    ranked = ModelCheckpoint(tmp_path / "elsewhere", monitor="moe/val_loss", mode="max", save_top_k=1)
    harvest, upcycling = make_callbacks({"every_n_steps": 1}, {"at_step": 2}, report=False)
    module = make_module(lr=1e-2)
    settings = {"max_steps": 6, "val_check_interval": 3, "logger": False}
    chosen = [harvest, upcycling, RunReport(export="best"), ranked]
    make_trainer(tmp_path, chosen, **settings).fit(module, datamodule=make_data())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["export"] == {
        "directory": "export",
        "weights": "best",
        "step": 3,
        "checkpoint": ranked.best_model_path,
        "monitor": "moe/val_loss",
        "value": float(ranked.best_model_score),
    }
    state = torch.load(ranked.best_model_path, weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(tensor, state[f"moe.model.{name}"]) for name, tensor in model.items())
    assert not torch.equal(model["model.norm.weight"], module.lm.model.norm.weight), "the last weights are others"
    said = f"The weights are those of step 3, the best checkpoint by moe/val_loss ({ranked.best_model_score:.4f})"
    assert said in (tmp_path / "export/README.md").read_text()
    assert "| final |" not in (tmp_path / "export/README.md").read_text(), "the scores of other weights"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"monitor": "val/loss"}, {}, {"monitor": "moe/val_loss", "save_top_k": 0}])
def test_the_best_needs_a_checkpoint_callback_that_ranks_moes(make_data, tmp_path, settings):
    chosen = [*make_callbacks(report=False), RunReport(export="best"), ModelCheckpoint(tmp_path, **settings)]
    with pytest.raises(
        ValueError, match=r"RunReport\.export=best .* add one with monitor: moe/val_loss, or set export"
    ):
        make_trainer(tmp_path, chosen, logger=False).fit(make_module(), datamodule=make_data())
    assert not (tmp_path / "experts").exists()


def test_without_a_best_checkpoint_the_last_weights_are_exported(make_data, tmp_path):
    ranked = ModelCheckpoint(tmp_path, monitor="dense/val_loss")
    trainer = make_trainer(tmp_path, [RunReport(export="best"), ranked], max_steps=1, logger=False)
    with pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='dense/val_loss'\) has saved no checkpoint"):
        trainer.fit(DenseModule(config=TINY), datamodule=make_data())
    assert json.loads((tmp_path / "report.json").read_text())["export"]["weights"] == "last"
    assert (tmp_path / "export/config.json").exists()


def test_another_export_is_refused():
    with pytest.raises(ValueError, match=r"RunReport\.export=True must be last, best or none"):
        RunReport(export=True)


def test_the_report_of_a_resumed_run_has_all_its_stages_and_its_export_goes_beside(
    finished, make_data, tmp_path, capsys
):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "run")
    whole = json.loads((run / "report.json").read_text())
    for step in (4, 9):
        trainer = make_trainer(tmp_path / "run", make_callbacks(), logger=False)
        checkpoint = tmp_path / f"run/checkpoints/step={step}.ckpt"
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
        report = json.loads((tmp_path / "run/report.json").read_text())
        assert report["stages"] == whole["stages"]
        assert report["seed_counts"] == whole["seed_counts"]
        assert (report["num_experts"], report["top_k"]) == (4, 2)
    assert (tmp_path / "run/export-2/config.json").exists()
    assert (tmp_path / "run/export-3/config.json").exists()
    assert str(tmp_path / "run/export-3\n") in capsys.readouterr().out
    assert 'from_pretrained("export-3")' in (tmp_path / "run/export-3/README.md").read_text()
    for file in run.glob("export/*"):
        assert (tmp_path / "run/export" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("checkpoint", ["checkpoints/step=9.ckpt", "end.ckpt"])
def test_a_run_that_is_resumed_is_not_finished_until_its_end(finished, make_data, tmp_path, checkpoint):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            raise RuntimeError("on purpose")

    run, trainer, _ = finished
    shutil.copytree(run, tmp_path / "run")
    assert json.loads((run / "report.json").read_text())["finished"]
    trainer.save_checkpoint(tmp_path / "run/end.ckpt")
    trainer = make_trainer(tmp_path / "run", [*make_callbacks(), Fails()], logger=False, max_steps=12)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=tmp_path / "run" / checkpoint, weights_only=True)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert "finished" not in report
    assert list(report["stages"])[:3] == ["base", "dense", "swap"]


def test_resuming_the_last_checkpoint_of_a_run_finishes_it(finished, make_data, tmp_path):
    """The run may have been stopped within its final scores or its export."""
    run, _, module = finished
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "report.json"))
    trainer, again = make_trainer(tmp_path / "run", make_callbacks(), logger=False), make_module()
    checkpoint = tmp_path / "run/checkpoints/step=10.ckpt"
    trainer.fit(again, datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 10
    report, whole = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "run", run))
    assert report["finished"]
    assert report["stages"] == whole["stages"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in module.lm.state_dict().items())
