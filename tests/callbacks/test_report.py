"""The report and the export at the end, and the answers of predict."""

import json
import shutil

import torch
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
    assert "Held-out loss" in capsys.readouterr().out


def test_the_export_can_be_left_out(make_data, tmp_path):
    trainer = make_trainer(tmp_path, [RunReport(export=False)], max_steps=1, logger=False)
    trainer.fit(DenseModule(config=TINY), datamodule=make_data())
    assert not (tmp_path / "export").exists()


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
