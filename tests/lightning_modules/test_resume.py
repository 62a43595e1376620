"""Resuming under other settings: taken and said, or refused by name; never ignored."""

import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from callbacks import ExpertGrowth
from lightning_modules import DenseModule
from lightning_modules.resume import Change, Point, _flat, changes, check, settings_of
from tests.conftest import TINY, make_callbacks, make_module, make_trainer
from upit.expansion.merging import Dare, Ties
from upit.upcycling.non_experts import MeanNonExperts


class Rates(Callback):
    """Settings of the optimizer at each of its steps."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay", "betas")})


def go_on(run, data, step, *, module=None, callbacks=None, seed=0, early=False, **trainer):
    """Resume a copy of the finished run at a step, as the command line does (early) or as a script does."""
    path = run / f"checkpoints/step={step}.ckpt"
    rates, chosen = Rates(), make_callbacks(report=False) if callbacks is None else callbacks
    module = module or make_module()
    L.seed_everything(seed, verbose=False)
    fit = make_trainer(run, [*chosen, rates], logger=False, enable_checkpointing=False, **trainer)
    if early:
        fit.ckpt_path = path
    fit.fit(module, datamodule=data, ckpt_path=None if early else path, weights_only=True)
    return module, rates.seen


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def said(caplog) -> list[str]:
    lines = [record.message for record in caplog.records if record.message.startswith("resumed with")]
    return [line for line in lines if "Rates" not in line and "RunReport" not in line]


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    return caplog


# --- taken --------------------------------------------------------------------------------------------


def test_the_same_settings_say_nothing_and_end_the_same(run, make_data, log):
    module, _ = go_on(run, make_data(), 8)
    expected = torch.load(run / "checkpoints/step=10.ckpt", weights_only=True)["state_dict"]
    assert not said(log)
    assert all(torch.equal(module.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("early", [False, True], ids=["script", "command line"])
def test_optimizer_settings_of_now_count(run, make_data, log, early):
    module = make_module(lr=5e-3, weight_decay=0.3, betas=(0.8, 0.9), schedule="linear", warmup_fraction=0.0)
    _, seen = go_on(run, make_data(), 8, module=module, early=early)
    assert [entry["lr"] for entry in seen] == pytest.approx([5e-3 * 2 / 4, 5e-3 * 1 / 4])  # of steps 6 to 10
    assert {(entry["weight_decay"], entry["betas"]) for entry in seen} == {(0.3, (0.8, 0.9))}
    assert said(log) == [
        "resumed with model.moe.lr=0.005 (checkpoint: 0.001)",
        "resumed with model.moe.weight_decay=0.3 (checkpoint: 0.0)",
        "resumed with model.moe.betas=[0.8, 0.9] (checkpoint: [0.9, 0.95])",
        "resumed with model.moe.schedule=linear (checkpoint: cosine)",
        "resumed with model.moe.warmup_fraction=0.0 (checkpoint: 0.03)",
    ]


def test_norms_still_have_no_decay(run, make_data):
    module, _ = go_on(run, make_data(), 8, module=make_module(weight_decay=0.3))
    assert [group["weight_decay"] for group in module.trainer.optimizers[0].param_groups] == [0.3, 0.0]


def test_more_steps_lengthen_the_schedule_from_here(run, make_data, log):
    module = make_module(schedule="linear", warmup_fraction=0.0)
    module, seen = go_on(run, make_data(), 8, module=module, max_steps=12, log_every_n_steps=2)
    assert [entry["lr"] for entry in seen] == pytest.approx([1e-3 * f for f in (4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert module.trainer.global_step == 12
    lines = {
        "resumed with trainer.max_steps=12 (checkpoint: 10)",
        "resumed with trainer.log_every_n_steps=2 (checkpoint: 1)",
    }
    assert lines < set(said(log))


def test_choices_of_a_swap_that_is_yet_to_come(run, make_data, log):
    callbacks = make_callbacks(upcycling={"at_step": 7, "merge": Ties()}, report=False)
    growth = ExpertGrowth(at_step=9)
    module, _ = go_on(run, make_data(), 4, callbacks=[growth, *callbacks])
    assert (module.swap_step, module.growth_step) == (7, 9)
    lines = said(log)
    assert "resumed with Upcycling.at_step=7 (checkpoint: 6)" in lines
    assert any(line.startswith("resumed with Upcycling.merge=Ties(density=") for line in lines)
    assert [line for line in lines if "Growth" in line] == ["resumed with ExpertGrowth=present (checkpoint: absent)"]


def test_patience_of_now_counts(make_data, tmp_path, log):
    """EarlyStopping itself goes back to the patience of its state."""

    def fit(patience, ckpt_path=None, steps=4):
        stop = EarlyStopping("val/loss", patience=patience)
        settings = {"max_steps": steps, "max_epochs": 3, "val_check_interval": 2, "logger": False}
        trainer = make_trainer(tmp_path, [stop], **settings)
        L.seed_everything(0, verbose=False)
        trainer.fit(DenseModule(config=TINY), datamodule=make_data(), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "stop.ckpt")
        return stop

    fit(2)
    assert fit(7, tmp_path / "stop.ckpt", steps=5).patience == 7
    assert "resumed with EarlyStopping.patience=7 (checkpoint: 2)" in said(log)


# --- refused ------------------------------------------------------------------------------------------


REFUSED = [
    (4, {"data": {"batch_size": 2}}, r"data\.batch_size=2 \(checkpoint: 4\): the order of the data"),
    (8, {"data": {"train_size": 60}}, r"data\.content=\w+ \(checkpoint: \w+\)"),
    (8, {"data": {"packing": False}}, r"data\.packing=False"),
    (8, {"data": {"max_length": 96}}, r"data\.max_length=96"),
    (8, {"data": {"order_seed": 3}}, r"data\.order_seed=3 \(checkpoint: 0\)"),
    (4, {"seed": 1}, r"seed_everything=1 \(checkpoint: 0\): weights, order of the data"),
    (8, {"trainer": {"max_steps": 8}}, r"trainer\.max_steps=8 \(checkpoint: 10\): .* would end at optimizer step 8,"),
    (8, {"trainer": {"accumulate_grad_batches": 2}}, r"trainer\.accumulate_grad_batches=2"),
    (8, {"trainer": {"limit_train_batches": 5}}, r"trainer\.limit_train_batches=5"),
    (8, {"trainer": {"precision": "bf16-true"}}, r"trainer\.precision=bf16-true"),
    (8, {"dense": {"lr": 0.5}}, r"model\.dense\.lr=0\.5 \(checkpoint: 0\.001\): the dense phase is over"),
    (4, {"dense": {"config": TINY | {"rms_norm_eps": 1e-3}}}, r"model\.dense\.config\.rms_norm_eps=0\.001"),
    (8, {"upcycling": {"merge": Ties()}}, r"Upcycling\.merge=Ties\(.*\) \(checkpoint: Dare\(drop_rate=0\.2"),
    (8, {"upcycling": {"at_step": 5}}, r"Upcycling\.at_step=5 \(checkpoint: 6\): the dense model has been upcycled"),
    (4, {"harvest": {"every_n_steps": 2}}, r"ExpertHarvest\.every_n_steps=2 \(checkpoint: 3\)"),
    (4, {"upcycling": {"non_experts": MeanNonExperts()}}, r"ExpertHarvest\.keep_rest=True \(checkpoint: False\)"),
]


@pytest.mark.parametrize(("step", "settings", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_changed_is_refused_by_name(finished, make_data, step, settings, message):
    module = make_module()
    for name, value in settings.get("dense", {}).items():
        setattr(module.dense, name, value)
    callbacks = make_callbacks(settings.get("harvest"), settings.get("upcycling"), report=False)
    more = {"module": module, "callbacks": callbacks, "seed": settings.get("seed", 0), **settings.get("trainer", {})}
    files = sorted(finished[0].rglob("*"))
    with pytest.raises(ValueError, match=message):
        go_on(finished[0], make_data(**settings.get("data", {})), step, early=True, **more)
    assert sorted(finished[0].rglob("*")) == files


def test_a_refusal_names_all_that_changed(finished, make_data):
    with pytest.raises(ValueError, match=r"(?s)batch_size=2.*order_seed=1.*Set them back"):
        go_on(finished[0], make_data(batch_size=2, order_seed=1), 8)


def test_other_data_can_be_validated(finished, make_data, tmp_path):
    trainer = make_trainer(tmp_path, make_callbacks(report=False), logger=False)
    checkpoint = finished[0] / "checkpoints/step=8.ckpt"
    scores = trainer.validate(make_module(), make_data(max_length=96), ckpt_path=checkpoint, verbose=False)
    assert scores[0]["val/loss"] > 0


# --- the rules ----------------------------------------------------------------------------------------

DENSE = Point(4, "dense", False, 10, 6, None, frozenset({"data.anything"}))
MOE, GROWN = DENSE._replace(step=8, phase="moe"), DENSE._replace(step=9, phase="moe", grown=True)


@pytest.mark.parametrize(
    ("name", "dense", "moe", "grown"),
    [
        ("trainer.world_size", True, True, True),
        ("trainer.val_check_interval", True, True, True),
        ("trainer.overfit_batches", False, False, False),
        ("data.anything", False, False, False),  # of the data module's identity
        ("data.eval_batch_tokens", True, True, True),
        ("data.num_workers", True, True, True),
        ("model.moe.model", False, False, False),
        ("model.moe.num_experts", True, False, False),
        ("model.moe.load_balancing_weight", True, True, True),
        ("model.dense.compile", True, True, True),
        ("model.dense.schedule", True, False, False),
        ("model.lr", True, True, True),
        ("Upcycling.router", True, False, False),
        ("Upcycling.drift_examples", True, True, True),
        ("ExpertGrowth", True, True, False),
        ("ExpertGrowth.parents", True, True, False),
        ("ExpertHarvest", False, False, False),
        ("OwnCallback.anything", True, True, True),
    ],
)
def test_a_change_is_taken_until_it_is_too_late(name, dense, moe, grown):
    for point, taken in ((DENSE, dense), (MOE, moe), (GROWN, grown)):
        with nullcontext() if taken else pytest.raises(ValueError, match=name.replace(".", r"\.")):
            check([Change(name, [1], 2)], point)


@pytest.mark.parametrize(("event", "point"), [("Upcycling", DENSE), ("ExpertGrowth", MOE)])
def test_an_event_may_move_to_a_step_that_is_still_to_come(event, point):
    for step, taken in ((point.step - 1, False), (point.step, True)):
        point = point._replace(swap_step=step, growth_step=step)
        with (
            nullcontext() if taken else pytest.raises(ValueError, match=rf"{event}\.at_step=.*that is .* step {step},")
        ):
            check([Change(f"{event}.at_step", step, 9)], point)


@pytest.mark.parametrize(
    ("now", "then", "taken"),
    [("bf16-mixed", "32-true", True), ("32-true", "16-mixed", True), ("bf16-true", "32-true", False)],
)
def test_precision_may_change_while_the_parameters_keep_their_dtype(now, then, taken):
    with nullcontext() if taken else pytest.raises(ValueError, match="precision"):
        check([Change("trainer.precision", now, then)], DENSE)


def test_a_field_that_only_one_side_has_is_a_change():
    assert changes({"data.a": 1}, {"data.b": 2}) == [Change("data.a", 1, None), Change("data.b", None, 2)]


def test_what_is_recorded_is_plain_and_tells_values_apart():
    class Owner:
        def __init__(self, folder, dtype, nested, merge):
            self.folder, self.dtype, self.nested, self.merge = folder, dtype, nested, merge

    def recorded(*values):
        return dict(_flat("data", settings_of(Owner(*values))))

    values = [Path("a"), torch.float32, [{"b": Path("c")}], Dare(0.2)]
    others = [Path("x"), torch.bfloat16, [{"b": Path("y")}], Dare(0.3)]
    found = recorded(*values)
    assert found == {
        "data.folder": "a",
        "data.dtype": "torch.float32",
        "data.nested": [{"b": "c"}],
        "data.merge": "Dare(drop_rate=0.2)",
    }
    for i, other in enumerate(others):
        assert recorded(*values[:i], other, *values[i + 1 :]) != found
