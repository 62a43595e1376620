"""Learning rates over each phase's own horizon, decay groups, and the counts of steps they rest on."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from callbacks import ExpertGrowth
from lightning_modules import DenseModule
from tests.conftest import TINY, make_callbacks, make_module, make_trainer


class Rates(Callback):
    """The learning rate of each optimizer step, by phase."""

    def __init__(self):
        self.seen = {"dense": [], "moe": []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen[pl_module.active.phase].append(optimizer.param_groups[0]["lr"])


def fit(module, data, run, callbacks, **kwargs):
    rates = Rates()
    trainer = make_trainer(run, [*callbacks, rates], logger=False, enable_checkpointing=False, **kwargs)
    trainer.fit(module, datamodule=data)
    return trainer, rates.seen


def test_each_phase_has_a_whole_schedule_of_its_own(make_data, tmp_path):
    module = make_module(schedule="linear", warmup_fraction=0.25, lr=2e-3)
    module.dense.schedule, module.dense.warmup_fraction = "linear", 0.5
    _, rates = fit(module, make_data(), tmp_path, make_callbacks(report=False))
    assert rates["dense"] == pytest.approx([1e-3 * f for f in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])
    assert rates["moe"] == pytest.approx([2e-3 * f for f in (0, 1, 2 / 3, 1 / 3)])


def test_a_growth_starts_a_schedule_of_its_own(make_data, tmp_path):
    module = make_module(schedule="linear", warmup_fraction=0.25, lr=2e-3)
    callbacks = [ExpertGrowth(at_step=8, num_experts=5), *make_callbacks(report=False)]
    _, rates = fit(module, make_data(), tmp_path, callbacks, max_steps=12)
    assert rates["moe"] == pytest.approx([2e-3 * f for f in (1, 1 / 2, 0, 1, 2 / 3, 1 / 3)])


def test_a_dense_module_alone_spends_the_whole_fit(make_data, tmp_path):
    module = DenseModule(config=TINY, lr=1.0, schedule="linear", warmup_fraction=0.0)
    _, rates = fit(module, make_data(), tmp_path, [], max_steps=4)
    assert rates["dense"] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 4),
        ({"max_steps": 5, "max_epochs": 2, "limit_train_batches": 3}, 5),
        ({"max_steps": 5, "max_epochs": -1, "limit_train_batches": 3}, 5),
        ({"max_steps": -1, "max_epochs": 1, "limit_train_batches": 0.2}, None),
    ],
)
def test_the_steps_that_are_planned_are_the_steps_that_are_made(make_data, tmp_path, kwargs, steps):
    module = DenseModule(config=TINY)
    trainer, _ = fit(module, make_data(), tmp_path, [], **kwargs)
    assert trainer.global_step == module.total_steps() == (steps or module.steps_per_epoch())


def test_a_fit_without_an_end_is_refused(make_data, tmp_path):
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        fit(DenseModule(config=TINY), make_data(), tmp_path, [], max_steps=-1, max_epochs=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches=0 must be at least 1"),
        ({"accumulate_grad_batches": -2}, r"trainer\.accumulate_grad_batches=-2 must be"),
        ({"limit_train_batches": 0}, r"trainer\.limit_train_batches=0 leaves none of the epoch's 27 batches"),
        ({"limit_train_batches": 0.01}, r"trainer\.limit_train_batches=0\.01 leaves none"),
        ({"val_check_interval": 0}, r"trainer\.val_check_interval=0 must be positive"),
    ],
    ids=str,
)
def test_counts_that_cannot_be_are_refused(make_data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(make_module(), make_data(), tmp_path, make_callbacks(report=False), **settings)
    with pytest.raises(ValueError, match=message):
        fit(DenseModule(config=TINY), make_data(), tmp_path, [], **settings)


def test_steps_that_grow_within_a_fit_are_refused(make_data, tmp_path):
    with pytest.raises(ValueError, match="GradientAccumulationScheduler gives each epoch another number of steps"):
        fit(DenseModule(config=TINY), make_data(), tmp_path, [GradientAccumulationScheduler({0: 1, 1: 2})])


def test_matrices_decay_and_norms_do_not(make_data, tmp_path):
    module = DenseModule(config=TINY, weight_decay=0.3)
    trainer, _ = fit(module, make_data(), tmp_path, [], max_steps=1)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    names = {id(param): name for name, param in module.named_parameters()}
    assert all("norm" in names[id(param)] for param in groups[1]["params"])
    assert not any("norm" in names[id(param)] for param in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_experts_and_router_of_the_moe_decay_as_matrices(make_data, tmp_path):
    module = make_module(weight_decay=0.3)
    trainer, _ = fit(module, make_data(), tmp_path, make_callbacks(report=False))
    decayed, plain = trainer.optimizers[0].param_groups
    assert {param.ndim for param in plain["params"]} == {1}
    assert {param.ndim for param in decayed["params"]} == {2, 3}
    optimised = {id(param) for group in (decayed, plain) for param in group["params"]}
    assert optimised == {id(param) for param in module.parameters()}, "nothing of the dense model is left behind"
    assert torch.equal(module.lm.get_input_embeddings().weight, module.lm.get_output_embeddings().weight)
