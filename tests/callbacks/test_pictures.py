"""The pictures' callbacks: what a run's event files hold, and that watching changes nothing."""

import csv
import json
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import (
    CurvesPicture,
    DiversityPicture,
    LineagePicture,
    PilotPicture,
    RoutingPicture,
    SeedDataPicture,
    SwapPicture,
)
from lightning_modules import MoEModule
from tests.conftest import make_callbacks, make_module, make_trainer
from upit.report.pictures import PICTURES
from upit.report.run import Run

GROUPS = {"dense", "harvest", "experts", "router", "moe", "eval", "train", "val"}


@pytest.fixture(scope="module")
def events(pictured) -> EventAccumulator:
    return EventAccumulator(str(pictured), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_scalars_are_grouped_and_few(events):
    tags = events.Tags()["scalars"]
    assert len(tags) == 27 + 2 * 2, "two a domain; the quickstart has 5, and 2 more tags of LearningRateMonitor"
    assert {tag.split("/")[0] for tag in tags} - {"epoch", "lr-AdamW"} <= GROUPS
    assert {"harvest/specialist_gain_loss", "router/mutual_information", "moe/phase", "eval/final/loss"} <= set(tags)


def test_every_tag_is_documented(events):
    text = (Path(__file__).parents[2] / "docs/tensorboard.md").read_text()
    table = text.split("## Scalars")[1].split("## What it costs")[0]
    names = re.findall("`([^`]+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("|")))
    known = re.compile("|".join(re.sub("<[a-z]+>", "[^/]+", name) for name in names))
    assert [tag for tag in events.Tags()["scalars"] if not known.fullmatch(tag)] == []
    for tag in PICTURES:
        assert f"### `{tag}`" in text
        assert (Path(__file__).parents[2] / f"docs/images/{tag.replace('/', '_')}.png").exists()


def test_every_picture_is_there_and_is_one(events):
    assert set(events.Tags()["images"]) == set(PICTURES)
    for tag in PICTURES:
        pixels = np.asarray(Image.open(BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("L"))
        assert min(pixels.shape) > 150, tag
        assert pixels.std() > 10, tag


def test_phase_is_a_step_at_the_swap(events):
    assert [(event.step, event.value) for event in events.Scalars("moe/phase")] == [(0, 0.0), (4, 0.0), (4, 1.0)]
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(12)), "one curve over both phases"
    by_phase = [[event.step for event in events.Scalars(f"{phase}/lm_loss")] for phase in ("dense", "moe")]
    assert by_phase == [[0, 1, 2, 3], list(range(4, 12))], "each phase's own curve ends or starts at the swap"


def test_routing_is_snapped_at_the_swap_and_at_each_validation(events):
    assert [event.step for event in events.Scalars("router/load_entropy")] == [4, 7, 11]
    assert [event.step for event in events.Images("router/domains")] == [4, 12]


def test_hparams_name_every_class_and_argument(events, pictured):
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.moe.num_experts"].number_value == 4
    assert found["model"].string_value == "UpITModule"
    assert found["upcycling.merge"].string_value == "Dare", "a strategy left to its default"
    assert found["upcycling.merge.drop_rate"].number_value == 0.2
    config = yaml.safe_load((pictured / "config.yaml").read_text())
    assert set(config["model"]["init_args"]["dense"]["init_args"]) <= {
        name.removeprefix("model.dense.") for name in found if name.startswith("model.dense.")
    }


def test_final_table_as_text(events, pictured):
    text = events.Tensors("eval/scores/text_summary")[-1].tensor_proto.string_val[0].decode()
    final = json.loads((pictured / "report.json").read_text())["stages"]["final"]["average"]
    assert "| letters |" in text
    assert f"{final['loss']:.3f}, {final['exact_match']:.1%}" in text


def test_the_token_view_is_a_text_too(events):
    texts = events.Tensors("router/tokens/text_summary")
    assert [event.step for event in texts] == [4, 12], "when its picture is drawn"
    assert "**letters, layer 1**" in texts[-1].tensor_proto.string_val[0].decode()


def test_artefacts_agree_with_the_run(pictured):
    run = Run(pictured)
    assert [point["step"] for point in run.pilot] == [2, 4]
    # the last checkpoint is the model at the swap, so its scores are the dense model's
    dense = run.report["stages"]["dense"]["domains"]
    for domain, scores in run.pilot[-1]["domains"].items():
        assert scores["loss"] == pytest.approx(dense[domain]["loss"], rel=1e-5)
        assert scores["exact_match"] == dense[domain]["exact_match"]
        assert run.swap["before"][domain] == pytest.approx(dense[domain]["loss"], rel=1e-5)
        after = run.report["stages"]["swap"]["domains"][domain]["loss"]
        assert run.swap["after"][domain] == pytest.approx(after, rel=1e-5)
    assert run.swap["kl"] == run.report["swap_drift_kl"]
    counts = [snapshot["counts_DEC"] for snapshot in run.routing]
    assert all((c.sum((1, 2)) == counts[0][0].sum()).all() for c in counts), "every layer routes every token"
    assert {len(example["experts"]) for example in run.routing[0]["tokens"]["examples"]} == {2}


def watchers() -> list:
    return [
        PilotPicture(), DiversityPicture(), LineagePicture(), SeedDataPicture(), SwapPicture(), RoutingPicture(),
        CurvesPicture(),
    ]  # fmt: skip


@pytest.mark.parametrize("watcher", watchers(), ids=lambda watcher: type(watcher).__name__)
def test_nothing_is_done_in_a_training_step(watcher):
    hooks = [name for name in dir(Callback) if "batch" in name and "train" in name] + ["on_after_backward"]
    hooks += ["on_before_backward", "on_before_optimizer_step", "on_before_zero_grad"]
    assert len(hooks) == 6
    for hook in hooks:
        assert getattr(type(watcher), hook) is getattr(Callback, hook)


def test_watching_changes_no_bit(finished, make_data, tmp_path):
    module = make_module()
    trainer = make_trainer(tmp_path, [*watchers(), *make_callbacks()])
    trainer.fit(module, datamodule=make_data())
    for (name, ours), theirs in zip(module.state_dict().items(), finished[2].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-true"}, {"fast_dev_run": True}, {"limit_val_batches": 0}], ids=str
)
def test_watching_under_other_settings(make_data, tmp_path, settings):
    module = make_module()
    trainer = make_trainer(tmp_path, [*watchers(), *make_callbacks(report=False)], max_steps=7, **settings)
    trainer.fit(module, datamodule=make_data())
    assert module.phase == "moe"
    assert Run(tmp_path).swap["step"] == Run(tmp_path).routing[0]["step"]


def test_routing_of_a_moe_post_trained_alone(finished, make_data, tmp_path):
    module = MoEModule(model=str(finished[0] / "export"))
    trainer = make_trainer(tmp_path, [RoutingPicture()], max_steps=2, val_check_interval=1)
    trainer.fit(module, datamodule=make_data())
    assert [snapshot["step"] for snapshot in Run(tmp_path).routing] == [1, 2]


def test_validate_counts_routing_but_leaves_the_run_alone(finished, make_data, tmp_path):
    run, _, _ = finished
    trainer = make_trainer(tmp_path, [RoutingPicture()], logger=False)
    scores = trainer.validate(
        make_module(), datamodule=make_data(), ckpt_path=run / "checkpoints/step=9.ckpt", verbose=False
    )
    assert 0.0 < scores[0]["router/load_entropy"] <= 1.0
    assert not (tmp_path / "routing").exists()


def test_pilot_without_answers(make_data, tmp_path):
    trainer = make_trainer(tmp_path, [PilotPicture(exact_match=False), *make_callbacks(report=False)], max_steps=7)
    trainer.fit(make_module(), datamodule=make_data())
    assert set(Run(tmp_path).pilot[0]["domains"]["letters"]) == {"loss"}
    header = next(csv.reader((tmp_path / "metrics.csv").open()))
    assert "harvest/specialist_gain_loss" in header
    assert "harvest/specialist_gain_exact_match" not in header


def test_every_picture_is_switched_on_in_the_quickstart():
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text())
    chosen = {callback["class_path"] for callback in config["trainer"]["callbacks"]}
    assert {f"callbacks.{type(watcher).__name__}" for watcher in watchers()} | {"callbacks.HParams"} <= chosen


@pytest.mark.parametrize(("resumed", "steps"), [(4, [6]), (9, [3, 9])])
def test_routing_of_an_abandoned_future_is_forgotten(finished, make_data, tmp_path, resumed, steps):
    """The swap is at step 6; a dense model has no routing in its past."""
    shutil.copytree(finished[0], tmp_path / "run")
    run = Run(tmp_path / "run")
    for step in (3, 9, 11):
        counts = {"counts_DEC": torch.ones(2, 4, 2), "shuffled_D": torch.zeros(2)}
        run.save_routing(step, ["arithmetic", "letters"], counts, {})
    trainer = make_trainer(run.directory, [*make_callbacks(report=False), RoutingPicture()], limit_val_batches=0)
    checkpoint = run.directory / f"checkpoints/step={resumed}.ckpt"
    trainer.fit(make_module(), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert [snapshot["step"] for snapshot in run.routing] == steps
