"""One fit over the four stages: what it leaves behind, its export, resume, and what users rely on across the swap."""

import copy
import csv
import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, StochasticWeightAveraging, WeightAveraging
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM

from tests.conftest import every_step_checkpoints, make_callbacks, make_module, make_trainer
from upit.core.batches import collate
from upit.model.forward import response_logits
from upit.offline.export_checkpoint import export_checkpoint
from upit.report.run import Run, read_lineage
from upit.router_init import RoutingVectors


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_leaves_its_artefacts(finished):
    run, _, module = finished
    manifest = json.loads((run / "experts/manifest.json").read_text())
    assert [entry["step"] for entry in manifest["experts"]] == [3, 6]
    assert {entry["base"] for entry in manifest["experts"]} == {manifest["base"]["sha256"]}
    lineage = read_lineage(run / "upcycling/lineage.json")
    assert [entry["kind"] for entry in lineage] == ["harvested", "harvested", "merged", "merged"]
    assert len(json.loads((run / "upcycling/similarity.json").read_text())) == 4
    seeds = json.loads((run / "upcycling/seed_perplexity.json").read_text())
    assert all(len(example["perplexity"]) == 4 for example in seeds["examples"])
    report = json.loads((run / "report.json").read_text())
    assert list(report["stages"]) == ["base", "dense", "swap", "final"]
    assert set(report["stages"]["final"]["domains"]) == {"letters", "arithmetic"}
    assert sum(report["seed_counts"]) == len(seeds["examples"])
    assert isinstance(module.lm, MixtralForCausalLM)


def test_training_goes_on_after_the_swap(finished):
    run, _, _ = finished
    before, after = (weights(run / f"checkpoints/step={step}.ckpt") for step in (7, 10))
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert set(moved) == set(after), "a parameter of the MoE got no update"


def test_export_is_stock_and_equal(finished, data):
    run, _, module = finished
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert isinstance(model, MixtralForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    batch = collate([[0], [1]], data.heldout_set, pad_id=data.tokenizer.pad_token_id)
    module.lm.eval()
    with torch.no_grad():
        ours, theirs = response_logits(module.lm, batch)[0], response_logits(model.eval(), batch)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.chat_template == data.tokenizer.chat_template
    assert "checkpoint of step 3" in (run / "export/README.md").read_text()


@pytest.mark.parametrize(("step", "kind"), [(4, LlamaForCausalLM), (9, MixtralForCausalLM)])
def test_export_of_a_checkpoint(finished, tmp_path, step, kind):
    run, _, _ = finished
    output = export_checkpoint(run / f"checkpoints/step={step}.ckpt", tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert isinstance(model, kind)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("step", [2, 6, 8])
def test_resume_is_bitwise(finished, make_data, tmp_path, step):
    """Mid-epoch in the dense phase, at the swap's own step, and mid-epoch after it."""
    run, _, module = finished
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    resumed = make_module()
    trainer = make_trainer(copied, [*make_callbacks(), every_step_checkpoints(copied)])
    trainer.fit(resumed, datamodule=make_data(), ckpt_path=copied / f"checkpoints/step={step}.ckpt", weights_only=True)
    assert trainer.global_step == 10
    for (name, ours), theirs in zip(resumed.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_logged_curve_of_a_resumed_run_is_the_same(make_data, tmp_path):
    """Also where it was stopped between two logged steps, whose mean takes in the steps before."""
    whole = tmp_path / "whole"
    settings = {"log_every_n_steps": 4, "limit_val_batches": 0}
    callbacks = [*make_callbacks(report=False), every_step_checkpoints(whole)]
    make_trainer(whole, callbacks, **settings).fit(make_module(), datamodule=make_data())
    for step in (2, 7):
        copied = tmp_path / f"from_{step}"
        shutil.copytree(whole, copied)
        trainer = make_trainer(copied, make_callbacks(report=False), **settings)
        checkpoint = copied / f"checkpoints/step={step}.ckpt"
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
        for name in ("train/loss", "moe/load_balancing_loss"):
            (steps, values), (all_steps, all_values) = (Run(run).curves[name] for run in (copied, whole))
            assert steps == all_steps[-len(steps) :]
            assert values == all_values[-len(steps) :]
    assert Run(whole).curves["train/loss"][0] == [3, 7]


def test_killed_during_expansion_reuses_what_is_finished(finished, make_data, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RoutingVectors, "__call__", killed)
        trainer = make_trainer(run, [*make_callbacks(report=False), every_step_checkpoints(run)])
        with pytest.raises(BaseException):  # noqa: B017, PT011
            trainer.fit(make_module(), datamodule=make_data())
    merged = sorted((run / "upcycling/experts").glob("merged_*.safetensors"))
    assert len(merged) == 2
    before = [file.stat().st_mtime_ns for file in merged]
    scored = []
    import upit.router_init.scoring

    original = upit.router_init.scoring.score_examples
    monkeypatch.setattr(
        upit.router_init.scoring, "score_examples", lambda *a, **k: scored.append(1) or original(*a, **k)
    )
    resumed = make_module()
    trainer = make_trainer(run, make_callbacks(report=False))
    trainer.fit(resumed, datamodule=make_data(), ckpt_path=run / "checkpoints/step=6.ckpt", weights_only=True)
    assert [file.stat().st_mtime_ns for file in merged] == before
    assert not scored
    _, _, module = finished
    for (name, ours), theirs in zip(resumed.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"val_check_interval": 2, "limit_val_batches": 1},
        {"limit_train_batches": 4, "max_steps": -1},
    ],
    ids=lambda settings: next(iter(settings)) + "_" + str(next(iter(settings.values()))),
)
def test_trainer_settings_across_the_swap(make_data, tmp_path, settings):
    module = make_module()
    watch = [LearningRateMonitor(), EarlyStopping("moe/val_loss", strict=False, patience=99)]
    callbacks = make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False)
    trainer = make_trainer(tmp_path, [*callbacks, *watch], **{"max_steps": 7, **settings})
    trainer.fit(module, datamodule=make_data())
    assert module.phase == "moe"
    assert trainer.global_step == (12 if settings.get("max_steps") == -1 else 7)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert any(row.get("dense/lm_loss") for row in rows)
    assert any(row.get("moe/load_balancing_loss") for row in rows)
    assert any(row[key] for row in rows for key in row if key.startswith("lr-AdamW"))


def test_fast_dev_run_does_all_stages(make_data, tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, make_callbacks(), fast_dev_run=True, logger=False)
    trainer.fit(module, datamodule=make_data())
    assert module.phase == "moe"
    assert trainer.global_step == 4


def test_test_and_validate_take_both_kinds(finished, make_data):
    run, _, _ = finished
    for step in (4, 9):
        trainer = make_trainer(run, [], logger=False)
        module = make_module()
        scores = trainer.test(
            module, datamodule=make_data(), ckpt_path=run / f"checkpoints/step={step}.ckpt", verbose=False
        )[0]
        assert 0.0 <= scores["test/exact_match/letters"] <= 1.0
        assert module.phase == ("dense" if step == 4 else "moe")
        assert trainer.validate(module, datamodule=make_data(), verbose=False)[0]["val/loss"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upcycling": {"at_step": 10}}, "the fit has 10 steps"),
        ({"harvest": {"every_n_steps": 7}}, "before the first harvest"),
        ({"harvest": {"every_n_steps": 6}}, "at least 2 checkpoints"),
        ({"upcycling": {"seed_fraction": 0.001}}, "fewer than the 4 experts"),
        ({"extra": StochasticWeightAveraging(1e-2)}, "keeps copies of the dense weights"),
        ({"extra": WeightAveraging()}, "keeps copies of the dense weights"),
    ],
)
def test_refused_before_training(make_data, tmp_path, change, message):
    callbacks = make_callbacks(change.get("harvest"), change.get("upcycling"), report=False)
    if "extra" in change:
        callbacks.append(copy.copy(change["extra"]))
    trainer = make_trainer(tmp_path, callbacks)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(), datamodule=make_data())
    assert trainer.global_step == 0


def test_top_k_above_num_experts_is_refused():
    with pytest.raises(ValueError, match="top_k=5 must lie between 1 and num_experts=4"):
        make_module(top_k=5)


def test_dense_and_moe_modules_work_alone(finished, make_data, tmp_path):
    from lightning_modules import DenseModule, MoEModule
    from tests.conftest import TINY

    run, _, _ = finished
    for module in (DenseModule(config=TINY), MoEModule(model=str(run / "export"))):
        trainer = make_trainer(tmp_path / module.phase, [], max_steps=2)
        trainer.fit(module, datamodule=make_data())
        assert trainer.global_step == 2
