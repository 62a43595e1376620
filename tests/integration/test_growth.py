"""N to M experts in one fit: what it leaves behind, resume around it, its export, and what its readers show."""

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from callbacks import (
    CollapseGuard,
    CurvesPicture,
    DiversityPicture,
    ExpertGrowth,
    LineagePicture,
    RoutingPicture,
    SeedDataPicture,
    SwapPicture,
)
from lightning_modules import UpITModule
from tests.conftest import every_step_checkpoints, make_callbacks, make_module, make_trainer, tiny_data
from tests.integration.test_resume import ROOT, final_weights, fit, write_config
from upit.cli.run_directory import RUN_DIR
from upit.offline.export_checkpoint import export_checkpoint
from upit.preparation.pool import Pool
from upit.report.inspection import inspect
from upit.report.page import page
from upit.report.pictures import PICTURES
from upit.report.run import Run

SWAP, GROWTH, END = 4, 7, 10


class Watch(Callback):
    """The model's state right before and right after the growth."""

    def on_growth_start(self, trainer, module, growth):
        self.before = copy.deepcopy(module.lm.state_dict())

    def on_growth_end(self, trainer, module, growth):
        self.after = copy.deepcopy(module.lm.state_dict())
        self.at = trainer.global_step
        assert all(part.training for part in module.lm.modules())


def callbacks(growth=None, **kwargs) -> list:
    """The growth comes first, as the command line has it: planned before the swap is."""
    others = make_callbacks({"every_n_steps": 2}, {"at_step": SWAP}, **kwargs)
    return [ExpertGrowth(**{"at_step": GROWTH, **(growth or {})}), *others]


def watchers() -> list:
    return [
        SwapPicture(), LineagePicture(), SeedDataPicture(), DiversityPicture(), RoutingPicture(), CurvesPicture(),
        CollapseGuard(window=2),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory, cache):
    """A whole fit from 4 to 8 experts with everything that watches, a checkpoint at every step."""
    run, watch, module = tmp_path_factory.mktemp("grown"), Watch(), make_module()
    loggers = [CSVLogger(run, name="", version=""), TensorBoardLogger(run, name="", version="")]
    chosen = [*watchers(), watch, *callbacks(), every_step_checkpoints(run)]
    trainer = make_trainer(run, chosen, logger=loggers, max_steps=END, val_check_interval=5)
    trainer.fit(module, datamodule=tiny_data(cache))
    return run, module, watch


def test_the_trained_experts_are_kept_and_the_new_ones_are_merged_from_them(grown):
    run, module, watch = grown
    assert watch.at == GROWTH
    lineage = Run(run).lineage
    assert [entry["kind"] for entry in lineage] == ["harvested", "harvested", *["merged"] * 6]
    assert [entry.get("trained_to") for entry in lineage] == [GROWTH] * 4 + [None] * 4
    for name, tensor in watch.after.items():
        old = watch.before[name]
        assert torch.equal(tensor[: len(old)], old), name
        if "gate.weight" in name:
            for e in range(4, 8):
                (j, k), alpha = lineage[e]["parents"], lineage[e]["alpha"]
                torch.testing.assert_close(tensor[e], alpha * tensor[j] + (1 - alpha) * tensor[k])
    moved = [name for name, tensor in module.lm.state_dict().items() if not torch.equal(tensor, watch.after[name])]
    assert set(moved) == set(watch.after), "a parameter got no update after the growth"


def test_it_draws_otherwise_than_the_first_upcycling_and_writes_beside_it(grown):
    run = grown[0]
    first, second = Run(run).lineages
    assert [len(first), len(second)] == [4, 8]
    assert {entry["alpha"] for entry in first[2:]}.isdisjoint(entry["alpha"] for entry in second[4:])
    assert first[2]["seed"] == 0
    assert sorted(file.name for file in run.glob("upcycling/experts/*.safetensors")) == [
        f"merged_0{i}.safetensors" for i in (0, 1)
    ]
    manifest = json.loads((run / "growth/experts/manifest.json").read_text())
    assert [entry["sha256"] for entry in manifest["experts"]] == [entry["sha256"] for entry in second]
    pools = [Pool.load(run / folder) for folder in ("growth/experts", "experts")]
    pools[0].verify()
    ours, theirs = ([pool.base.read(name) for name in pool.base.shapes] for pool in pools)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(json.loads((run / "growth/similarity.json").read_text())) == 8


@pytest.mark.parametrize("step", [3, 6, GROWTH, 9])
def test_resume_is_bitwise(grown, make_data, tmp_path, step):
    """In the dense phase, before the growth, at its own step, and after it."""
    run, module, _ = grown
    shutil.copytree(run, tmp_path / "run")
    lineage, resumed = Run(run).lineage, make_module()
    trainer = make_trainer(tmp_path / "run", callbacks(), max_steps=END, val_check_interval=5, logger=False)
    checkpoint = tmp_path / f"run/checkpoints/step={step}.ckpt"
    trainer.fit(resumed, datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == END
    assert resumed.growth_step == GROWTH
    for (name, ours), theirs in zip(resumed.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    again = Run(tmp_path / "run").lineage
    assert [entry["sha256"] for entry in again] == [entry["sha256"] for entry in lineage]
    scores = [json.loads((folder / "report.json").read_text())["stages"] for folder in (run, tmp_path / "run")]
    assert scores[0] == scores[1]


def test_a_growth_of_an_abandoned_future_is_forgotten(grown, make_data, tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if not pl_module.grown:
                self.seen = len(Run(tmp_path / "run").lineages), Run(tmp_path / "run").growth

    shutil.copytree(grown[0], tmp_path / "run")
    look, checkpoint = Look(), tmp_path / "run/checkpoints/step=6.ckpt"
    trainer = make_trainer(tmp_path / "run", [*callbacks({"at_step": 9}, report=False), look], logger=False)
    trainer.fit(make_module(), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert look.seen == (1, None)
    assert {entry.get("trained_to", 9) for entry in Run(tmp_path / "run").lineage} == {9}


def test_report_and_export(grown, tmp_path, capsys):
    run, module, _ = grown
    report = json.loads((run / "report.json").read_text())
    steps = {"base": 0, "dense": SWAP, "swap": SWAP, "moe": GROWTH, "growth": GROWTH, "final": END}
    assert {stage: scores["step"] for stage, scores in report["stages"].items()} == steps
    assert list(report["stages"]) == list(steps)
    assert (report["num_experts"], len(report["seed_counts"])) == (8, 4)
    assert report["wall_seconds"].keys() >= {"growth", "post_training"}
    stock, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    for name, tensor in module.lm.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    card = (run / "export/README.md").read_text()
    assert "| 0 | checkpoint of step 2 (epoch 0.07), post-trained to step 7 |" in card
    assert "| 7 | " in card
    early = export_checkpoint(run / f"checkpoints/step={GROWTH}.ckpt", tmp_path / "early")
    card = (early / "README.md").read_text()
    assert "4 experts, top-2" in card
    assert "| moe |" in card
    assert not any(later in card for later in ("| growth |", "| final |", "| 4 | ", "post-trained"))
    inspect(run, Console(width=200))
    shown = capsys.readouterr().out
    assert "8 experts, top-2" in shown
    assert "post-trained to step 7" in shown


def test_pictures_and_page(grown):
    run = grown[0]
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("experts/lineage")] == [SWAP, GROWTH]
    assert [event.step for event in events.Images("moe/swap")] == [SWAP, GROWTH]
    assert [event.value for event in events.Scalars("moe/phase")] == [0.0, 0.0, 1.0, 1.0, 2.0]
    assert "moe/growth_loss_change/letters" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("moe/growth_drift_kl")] == [GROWTH]
    routing = Run(run).routing
    assert [(snapshot["step"], snapshot["counts_DEC"].shape[1]) for snapshot in routing][:2] == [(SWAP, 4), (5, 4)]
    assert routing[-1]["counts_DEC"].shape[1] == 8
    assert next(snapshot["step"] for snapshot in routing if snapshot["counts_DEC"].shape[1] == 8) == GROWTH
    text = page([Run(run)])
    shown = set(PICTURES) - {"harvest/pilot"}  # its callback was off
    assert all(f'alt="{PICTURES[tag].title}, {run.name}" src' in text for tag in shown)
    assert "held out, before the MoE grew" in text


def test_the_optimizer_moves_the_parameters_of_now_only(make_data, tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks(report=False), max_steps=END, logger=False)
    trainer.fit(module, datamodule=make_data())
    theirs = {id(param) for group in trainer.optimizers[0].param_groups for param in group["params"]}
    assert theirs == {id(param) for param in module.parameters()}
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {END - GROWTH}


class Dropped(Callback):
    """How many parameters of earlier models are left, at each model's first step."""

    def __init__(self):
        self.earlier, self.now, self.left = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        params = list(pl_module.parameters())
        if not self.now or self.now[0]() is not params[0]:
            self.earlier, self.now = self.earlier + self.now, [weakref.ref(param) for param in params]
            self.left.append(sum(param() is not None for param in self.earlier))


@pytest.mark.parametrize("compiled", [False, True])
def test_earlier_models_are_gone(make_data, tmp_path, compiled, monkeypatch):
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: compile_layer(layer, backend="eager"))
    module, dropped = make_module(compile=compiled), Dropped()
    module.dense.compile_layers = compiled
    settings = {"max_steps": END, "logger": False, "enable_checkpointing": False}
    trainer = make_trainer(tmp_path, [*callbacks(report=False), dropped], **settings)
    gc.collect()
    gc.disable()
    try:
        trainer.fit(module, datamodule=make_data())
    finally:
        gc.enable()
        torch.compiler.set_stance("default")
    assert dropped.left == [0, 0, 0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_growth_is_between_two_optimizer_steps(make_data, tmp_path, accumulate):
    experts = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            experts.append(pl_module.lm.config.num_experts if pl_module.phase == "moe" else 0)

    chosen = [ExpertGrowth(at_step=3, num_experts=5), *make_callbacks({"every_n_steps": 1}, {"at_step": 2}, False)]
    settings = {"max_steps": 4, "accumulate_grad_batches": accumulate, "logger": False}
    make_trainer(tmp_path, [*chosen, Count()], **settings).fit(make_module(), datamodule=make_data())
    assert experts == [0] * 2 * accumulate + [4] * accumulate + [5] * accumulate


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"precision": "bf16-true"}], ids=str)
def test_other_trainer_settings(make_data, tmp_path, settings):
    module = make_module()
    chosen = [*watchers(), *callbacks(report=False)]
    make_trainer(tmp_path, chosen, max_steps=END, **{"logger": False, **settings}).fit(module, datamodule=make_data())
    assert (module.phase, module.lm.config.num_experts) == ("moe", 8)
    assert Run(tmp_path).growth["step"] == (3 if "fast_dev_run" in settings else GROWTH)


def test_validate_and_load_a_grown_checkpoint(grown, make_data, tmp_path):
    run, _, _ = grown
    after, before = (run / f"checkpoints/step={step}.ckpt" for step in (9, 6))
    module = make_module()
    trainer = make_trainer(tmp_path, callbacks(report=False), logger=False)
    for checkpoint, count in ((after, 8), (before, 4), (after, 8)):
        assert trainer.validate(module, make_data(), ckpt_path=checkpoint, verbose=False)[0]["val/loss"] > 0
        assert module.lm.config.num_experts == count
    fresh = make_module(num_experts=8)
    loaded = UpITModule.load_from_checkpoint(after, dense=fresh.dense, moe=fresh.moe, weights_only=True)
    assert loaded.lm.config.num_experts == 8


@pytest.mark.parametrize(
    ("step", "moe", "growth", "message"),
    [
        (9, {}, None, r"has 8 experts but num_experts=4; it grew at step 7: add callbacks.ExpertGrowth"),
        (9, {}, {"num_experts": 6}, r"has 8 experts but ExpertGrowth\.num_experts=6"),
        (6, {"num_experts": 8}, None, "has 4 experts but num_experts=8"),
        (6, {"num_experts": 3}, {"num_experts": 4}, "has 4 experts but num_experts=3"),
        (9, {"top_k": 1}, {}, "routes to 2 experts but top_k=1"),
    ],
)
def test_a_checkpoint_of_other_counts_is_refused(grown, make_data, tmp_path, step, moe, growth, message):
    chosen = callbacks(growth, report=False)[0 if growth is not None else 1 :]
    trainer = make_trainer(tmp_path, chosen, logger=False)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(**moe), datamodule=make_data(), ckpt_path=grown[0] / f"checkpoints/step={step}.ckpt")


@pytest.mark.slow
def test_ddp_follows_the_growth(cache, tmp_path):
    """Two processes train on together: the wrapper of DDP would go on with the parameters of before."""
    growth = {"class_path": "callbacks.ExpertGrowth", "init_args": {"at_step": 6, "num_experts": 7}}
    configs = [write_config(tmp_path / name, cache, growth) for name in ("one", "two")]
    fit("-c", configs[0])
    environment = {key: value for key, value in os.environ.items() if key != RUN_DIR} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "upit", "fit", "-c", str(configs[1]), "--trainer.devices", "2"]
    command += ["--trainer.strategy", "ddp"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (final_weights(tmp_path / name) for name in ("one", "two"))
    assert len(one["moe.model.model.layers.0.mlp.gate.weight"]) == 7
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}")
