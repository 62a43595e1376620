"""The swap: what is refused before training, on which boundary it happens, and whom it tells."""

import csv
import json
import shutil
import warnings
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file

from callbacks import ExpertGrowth, ExpertHarvest, Upcycling
from callbacks.event import MissedEventError
from lightning_modules import DenseModule
from tests.conftest import TINY, make_callbacks, make_module, make_trainer
from tests.upit.pools import make_pool
from tests.upit.tiny import dense_model
from upit.expansion.merging import Linear, Merge
from upit.expansion.selection import BestParents, LastCheckpoints, Parents
from upit.preparation.pool import Pool
from upit.preparation.sources import Checkpoints
from upit.router_init import FromFile, RoutingVectors, WithoutData
from upit.router_init.seeds import Assignment, LowestPerplexity
from upit.upcycling.non_experts import NamedNonExperts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of at_epoch and at_step"),
        ({"at_epoch": 1.0, "at_step": 3}, "one of at_epoch and at_step"),
        ({"at_step": 3, "seed_fraction": 0.0}, "seed_fraction=0.0"),
        ({"at_step": 3, "seed_fraction": 1.5}, "seed_fraction=1.5"),
        ({"at_step": 3, "drift_examples": 0}, "drift_examples=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Upcycling(**settings)


def fit(run, data, callbacks, *, module=None, **kwargs):
    settings = {"logger": False, "enable_checkpointing": False, **kwargs}
    trainer = make_trainer(run, callbacks, **settings)
    trainer.fit(module or make_module(), datamodule=data)
    return trainer


def test_experts_must_be_harvested(make_data, tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.ExpertHarvest"):
        fit(tmp_path, make_data(), [Upcycling(at_step=4)])


def test_a_module_that_cannot_upcycle_is_refused(make_data, tmp_path):
    with pytest.raises(TypeError, match=r"needs a module that passes from dense to MoE.*DenseModule"):
        fit(tmp_path, make_data(), [Upcycling(at_step=4), ExpertHarvest()], module=DenseModule(config=TINY))


def test_a_dense_model_that_cannot_be_upcycled_is_refused_before_training(make_data, tmp_path):
    module = make_module()
    module.dense.config = TINY | {"attention_bias": True}
    with pytest.raises(ValueError, match="attention_bias"):
        fit(tmp_path, make_data(), make_callbacks(report=False), module=module)
    assert not (tmp_path / "experts").exists()


def other_model(tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def other_router(tmp_path):
    save_file({"router": torch.zeros(2, 9, 32)}, tmp_path / "router.safetensors")
    return FromFile(str(tmp_path / "router.safetensors"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: {"source": Checkpoints([other_model(path)])}, r"other/config\.json: vocab_size=64"),
        (lambda path: {"non_experts": NamedNonExperts(other_model(path))}, r"NamedNonExperts\.path=.*other'"),
        (lambda path: {"router": other_router(path)}, r"FromFile\.path=.* of shape \(2, 9, 32\)"),
        (lambda path: {"expansion_device": "tpu"}, r"Upcycling\.expansion_device='tpu' is no device"),
    ],
    ids=["source", "non_experts", "router", "expansion_device"],
)
def test_choices_that_do_not_fit_the_model_are_refused_before_training(make_data, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "run", make_data(), make_callbacks(upcycling=make(tmp_path), report=False))
    assert not (tmp_path / "run/experts").exists()


class Wrong:
    """Choices of a user's, each of which would fail at the swap, hours later."""

    class HoldsATensor(Linear):
        def __init__(self):
            self.mask = torch.ones(2)

    class Halves(Merge):
        def __call__(self, tensors, weights, base, generators):
            return tensors[0][: len(base) // 2]

    class Beyond(Assignment):
        def __call__(self, perplexity_SN, generator):
            return torch.full((len(perplexity_SN),), perplexity_SN.shape[1])

    class Broadcast(WithoutData):
        def weights(self, dense, num_experts, *, seed=0):
            return torch.ones(dense.num_hidden_layers, 1, dense.hidden_size)

    class Same(Parents):
        def cost(self, similarity, experts, generator):
            return similarity

        def choose(self, similarity, experts, *, used=frozenset(), generator):
            return 0, 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": Wrong.Halves()}, r"Wrong\.Halves returned for tensor .*gate_proj"),
        ({"assignment": Wrong.Beyond()}, r"Wrong\.Beyond assigned examples to experts \[4\]"),
        ({"router": Wrong.Broadcast()}, r"Wrong\.Broadcast returned .*\(2, 1, 32\), expected \(2, 4, 32\)"),
        ({"parents": Wrong.Same()}, r"Wrong\.Same chose the parents \(0, 0\)"),
    ],
    ids=["merge", "assignment", "router", "parents"],
)
def test_choices_that_would_fail_at_the_swap_are_refused_before_training(make_data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "run", make_data(), make_callbacks(upcycling=settings, report=False))
    assert not (tmp_path / "run/experts").exists()


def test_a_choice_that_holds_a_tensor_is_refused_when_it_is_set():
    with pytest.raises(ValueError, match=r"Upcycling\.merge=.*Wrong\.HoldsATensor: its mask can't be written"):
        Upcycling(at_step=3, merge=Wrong.HoldsATensor())
    with pytest.raises(ValueError, match=r"ExpertGrowth\.merge=.*Wrong\.HoldsATensor: its mask can't be written"):
        ExpertGrowth(at_step=3, merge=Wrong.HoldsATensor())


@pytest.mark.parametrize(("said", "taken"), [("cuda:99", "cuda:99"), (None, "cuda:98")])
def test_experts_are_expanded_on_the_device_that_is_said_or_on_the_one_that_trains(tmp_path, monkeypatch, said, taken):
    pool = make_pool(tmp_path / "pool", 2)
    event = Upcycling(at_step=3, expansion_device=said)
    monkeypatch.setattr("callbacks.event.usual_device", lambda training_on, *_: str(training_on))
    with pytest.raises(ValueError, match=f"device='{taken}'"):
        event.expand(pool.experts, pool.base, 3, tmp_path, training_on=torch.device("cuda:98"))


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("val/los", {}, r"BestParents\.metric='val/los': .* 'val/loss'"),
        ("moe/val_loss", {}, r"BestParents\.metric='moe/val_loss'"),
        (
            "val/loss",
            {"val_check_interval": 6},
            r"BestParents\.metric='val/loss': .* only with \['dense/lm_loss', 'train/loss'\]",
        ),
        ("val/loss", {"val_check_interval": "00:10:00:00"}, r"BestParents\.metric='val/loss'"),
        ("val/loss", {"val_check_interval": 5}, r"BestParents\.metric='val/loss': only 1 of 2 experts comes with it"),
        ("train/loss", {"log_every_n_steps": 7}, r"BestParents\.metric='train/loss': .* only with .*'val/loss'"),
    ],
)
def test_parents_by_a_metric_that_no_harvest_notes_are_refused_before_training(
    make_data, tmp_path, metric, settings, message
):
    callbacks = make_callbacks({"every_n_steps": 3}, {"at_step": 6, "parents": BestParents(metric)}, report=False)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_data(), callbacks, **{"val_check_interval": 2, **settings})
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize(("step", "refused"), [(4, True), (9, False)], ids=["dense", "moe"])
def test_a_run_resumed_after_its_swap_has_no_more_choices_to_check(
    finished, make_data, tmp_path, monkeypatch, step, refused
):
    def check(*_):
        raise ValueError("the files that it came from are gone")

    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr("callbacks.upcycling.check_choices", check)
    trainer = make_trainer(tmp_path / "run", make_callbacks(report=False), logger=False)
    trainer.ckpt_path = tmp_path / f"run/checkpoints/step={step}.ckpt"  # as the command line does
    with pytest.raises(ValueError, match="are gone") if refused else nullcontext():
        trainer.fit(make_module(), datamodule=make_data(), weights_only=True)


def test_parents_by_a_metric_of_the_validations(make_data, tmp_path):
    callbacks = make_callbacks({"every_n_steps": 3}, {"at_step": 6, "parents": BestParents("val/loss")}, report=False)
    trainer = fit(tmp_path, make_data(), callbacks, val_check_interval=2, max_steps=7)
    assert trainer.lightning_module.phase == "moe"


def test_parents_by_a_metric_of_the_training_steps(make_data, tmp_path):
    callbacks = make_callbacks(
        {"every_n_steps": 3}, {"at_step": 6, "parents": BestParents("train/loss")}, report=False
    )
    trainer = fit(tmp_path, make_data(), callbacks, log_every_n_steps=2, max_steps=7)
    assert trainer.lightning_module.phase == "moe"


def test_a_fit_that_ends_before_its_swap_fails(make_data, tmp_path):
    stop = EarlyStopping("val/loss", patience=0, min_delta=99.0)
    save = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [*make_callbacks({"every_n_steps": 2}, {"at_step": 5}), stop, save]
    settings = {"limit_train_batches": 2, "max_epochs": 6, "max_steps": -1, "enable_checkpointing": True}
    message = (
        r"ended at optimizer step 4, before the upcycling at step 5\..* EarlyStopping: let it watch .*"
        r"To go on: --ckpt_path .*checkpoints/step=4\.ckpt"
    )
    with pytest.raises(MissedEventError, match=message):
        fit(tmp_path, make_data(), callbacks, **settings)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["base"]
    assert "finished" not in report
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("due", ["upcycling", "growth"])
def test_a_fit_that_is_stopped_before_an_event_fails(make_data, tmp_path, due):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == (3 if due == "upcycling" else 7)

    growth = [ExpertGrowth(at_step=8)] if due == "growth" else [Timer("00:00:10:00")]
    callbacks = [Stop(), *growth, *make_callbacks(report=False)]
    hint = r"a callback that sets trainer\.should_stop" if due == "growth" else r"trainer\.max_time: raise it"
    with pytest.raises(
        MissedEventError, match=rf"before the {due} at step \d\. .*: {hint}\. No checkpoint was written"
    ):
        fit(tmp_path, make_data(), callbacks)


def test_early_stopping_on_a_metric_of_the_moe(make_data, tmp_path):
    stop = EarlyStopping("moe/val_loss", strict=False, patience=0, min_delta=99.0)
    callbacks = [*make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False), stop]
    trainer = fit(tmp_path, make_data(), callbacks, limit_train_batches=2, max_epochs=6, max_steps=-1)
    assert trainer.lightning_module.phase == "moe"
    assert trainer.global_step == 8


def test_the_drift_is_logged_once_at_the_swap(make_data, tmp_path):
    callbacks = make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, make_data(), callbacks, max_steps=6, logger=logger, log_every_n_steps=50)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["moe/swap_drift_kl"]] == ["4"]


class Watch(Callback):
    """The phase at each batch and validation, and the hooks called."""

    def __init__(self):
        self.batches, self.validations, self.hooks = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.global_step, pl_module.phase))

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(pl_module.phase)

    def on_upcycling_start(self, trainer, module, upcycling):
        self.hooks.append(("start", module.phase, trainer.global_step))

    def on_upcycling_end(self, trainer, module, upcycling):
        self.hooks.append(("end", module.phase, trainer.global_step))
        assert module.training
        assert all(part.training for part in module.lm.modules())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_swap_is_between_two_optimizer_steps(make_data, tmp_path, accumulate):
    watch = Watch()
    callbacks = [*make_callbacks({"every_n_steps": 1}, {"at_step": 2, "seed_fraction": 0.1}, report=False), watch]
    fit(tmp_path, make_data(), callbacks, max_steps=4, accumulate_grad_batches=accumulate)
    assert watch.hooks == [("start", "dense", 2), ("end", "moe", 2)]
    assert [phase for _, phase in watch.batches] == ["dense"] * 2 * accumulate + ["moe"] * 2 * accumulate


def test_a_fraction_of_an_epoch_and_its_validation(make_data, tmp_path):
    """The swap comes before the first batch after its point, so an epoch's validation sees the dense model."""
    watch = Watch()
    callbacks = [*make_callbacks({"every_n_steps": 2}, {"at_epoch": 1.0, "at_step": None}, report=False), watch]
    fit(tmp_path, make_data(), callbacks, max_epochs=2, max_steps=-1, limit_train_batches=4)
    assert watch.hooks[0] == ("start", "dense", 4)
    assert watch.validations == ["dense", "moe"]


def test_a_harvest_at_the_swaps_own_epoch_is_at_its_step_and_the_first_lines_say_so(make_data, tmp_path, capsys):
    """Half of 5 steps rounds up for the harvest and the swap alike."""
    chosen = make_callbacks({"every_n_epochs": 0.25}, {"at_epoch": 0.5, "at_step": None}, report=False)
    chosen += [ExpertGrowth(at_epoch=0.7)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ask for .* harvests")
        trainer = fit(tmp_path, make_data(), chosen, max_epochs=1, max_steps=-1, limit_train_batches=5)
    assert [expert.step for expert in Pool.load(tmp_path / "experts").experts] == [1, 3]
    module, data = trainer.lightning_module, trainer.datamodule
    rows = f"{len(data.train_set)} training examples, {len(data.rows)} packed rows"
    assert (module.swap_step, module.growth_step) == (3, 4)
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"{rows}, 5 optimizer steps an epoch, 5 optimizer steps in all",
        "2 harvest points, after steps 1, 3",
        "swap after step 3",
        "growth after step 4",
    ]


def test_harvests_that_fall_on_one_step_are_counted_before_training(make_data, tmp_path, capsys):
    settings = {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}
    callbacks = make_callbacks({"every_n_epochs": 0.125}, {"at_epoch": 1.0, "at_step": None}, report=False)
    module = make_module(num_experts=2)
    with (
        pytest.raises(RuntimeError, match="stopped here"),
        pytest.warns(UserWarning, match=r"ask for 8 harvests, but they fall on 3 different .* An epoch has 3 steps"),
    ):
        fit(tmp_path, make_data(), [*callbacks, StopAt("on_train_start")], module=module, **settings)
    assert "3 harvest points, after steps 1, 2, 3\n" in capsys.readouterr().out


class StopAt(Callback):
    """Interrupt the fit at a hook."""

    def __init__(self, hook):
        setattr(self, hook, self.stop)

    def stop(self, *args):
        raise RuntimeError("stopped here")


def test_the_new_parameters_are_those_that_the_optimizer_moves(make_data, tmp_path):
    callbacks = make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False)
    trainer = fit(tmp_path, make_data(), callbacks, max_steps=6)
    ours = {id(param) for param in trainer.lightning_module.parameters()}
    theirs = {id(param) for group in trainer.optimizers[0].param_groups for param in group["params"]}
    assert ours == theirs
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {2}


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_expert_stops_the_swap_and_is_named(make_data, tmp_path, damage):
    class Damage(Callback):
        def on_upcycling_start(self, trainer, module, upcycling):
            upcycling.harvest.drain()
            file = tmp_path / "experts/step_0000002.safetensors"
            content = file.read_bytes()
            file.unlink()
            if damage == "truncated":
                file.write_bytes(content[:-10])
            elif damage == "changed":
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    callbacks = [*make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False), Damage()]
    with pytest.raises(ValueError, match=r"step_0000002\.safetensors"):
        fit(tmp_path, make_data(), callbacks, max_steps=6)


def test_any_expert_rate_and_router_gives_a_moe_that_trains(make_data, tmp_path):
    choices = (
        {"router": RoutingVectors(epochs=1, expert_lr=1e-3)},
        {"assignment": LowestPerplexity(capacity_factor=None)},
        {"selection": LastCheckpoints()},
    )
    for number, settings in enumerate(choices):
        run = tmp_path / str(number)
        callbacks = make_callbacks({"every_n_steps": 1}, {"at_step": 5, **settings}, report=False)
        trainer = fit(run, make_data(), callbacks, max_steps=7)
        assert trainer.lightning_module.phase == "moe"
        assert all(torch.isfinite(param).all() for param in trainer.lightning_module.parameters())


def test_seeds_are_those_of_the_run_that_starts_and_not_of_the_constructors(make_data, tmp_path):
    class Started(Exception):  # noqa: N818
        pass

    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            raise Started

    L.seed_everything(1, verbose=False)
    events = [
        ExpertGrowth(at_step=8),
        Upcycling(at_step=6, seed_fraction=0.1),
        Upcycling(at_step=6, seed_fraction=0.1, seed=5),
    ]
    for seed in (2, 3):
        for upcycling, drawn in ((events[1], seed), (events[2], 5)):
            module = make_module()
            L.seed_everything(seed, verbose=False)
            callbacks = [events[0], upcycling, ExpertHarvest(every_n_steps=3), Stop()]
            with pytest.raises(Started):
                fit(tmp_path, make_data(), callbacks, module=module)
            assert (upcycling.seed, events[0].seed) == (drawn, seed + 1)
