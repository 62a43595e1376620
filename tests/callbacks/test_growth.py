"""The growth of a MoE: what is refused before training, and a fit that ends before it."""

import shutil

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from callbacks import ExpertGrowth
from callbacks.event import MissedEventError
from lightning_modules import DenseModule
from tests.conftest import TINY, make_callbacks, make_module, make_trainer
from upit.expansion.merging import Merge
from upit.expansion.selection import BestParents
from upit.expansion.similarity import Functional
from upit.upcycling.growth import NewRows


def fit(run, data, callbacks, *, module=None, **kwargs):
    trainer = make_trainer(run, callbacks, logger=False, enable_checkpointing=False, **kwargs)
    try:
        trainer.fit(module or make_module(), datamodule=data)
    finally:
        assert trainer.global_step == 0 or trainer.global_step >= 4
    return trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of at_epoch and at_step"),
        ({"at_epoch": 1.0, "at_step": 3}, "one of at_epoch and at_step"),
        (
            {"at_step": 8, "similarity": Functional()},
            r"ExpertGrowth\.similarity=Functional.*use upit\.expansion\.Cosine",
        ),
        (
            {"at_step": 8, "parents": BestParents("val/loss")},
            r"ExpertGrowth\.parents: BestParents\.metric='val/loss': .*use upit\.expansion\.MostDissimilar",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExpertGrowth(**settings)


class AllRows(NewRows):
    """Returns the trained experts' rows too."""

    def __call__(self, router_DNH, lineage, config, *, seed=0):
        return router_DNH


class InPlace(Merge):
    def __call__(self, tensors, weights, base, generators):
        return tensors[0].add_(tensors[1])


@pytest.mark.parametrize(
    ("growth", "moe", "message"),
    [
        ({"at_step": 10}, {}, r"ExpertGrowth\.at_step=10 is optimizer step 10, but the fit has 10 steps"),
        ({"at_epoch": 9.0}, {}, r"ExpertGrowth\.at_epoch=9\.0 is optimizer step \d+, but the fit has 10 steps"),
        ({"at_step": 6}, {}, r"ExpertGrowth\.at_step=6 is .*, but the swap is at step 6: grow after it"),
        ({"at_step": 3}, {}, r"the swap is at step 6: grow after it"),
        ({"at_step": 8, "num_experts": 4}, {}, r"ExpertGrowth\.num_experts=4 must be above the MoE's 4; raise it"),
        ({"at_step": 8}, {"num_experts": 1, "top_k": 1}, r"num_experts=1 of the MoE; give it at least 2"),
        ({"at_step": 8, "expansion_device": "tpu"}, {}, r"ExpertGrowth\.expansion_device='tpu' is no device"),
        (
            {"at_step": 8, "num_experts": 6, "router": AllRows()},
            {},
            r"AllRows returned rows of the router of shape \(2, 4, 32\), expected \(2, 2, 32\)",
        ),
        ({"at_step": 8, "merge": InPlace()}, {}, r"InPlace changed a tensor that it was given"),
    ],
)
def test_refused_before_training(make_data, tmp_path, growth, moe, message):
    chosen = [ExpertGrowth(**growth), *make_callbacks(report=False)]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make_data(), chosen, module=make_module(**moe))


def test_it_needs_an_upcycling_and_happens_once(make_data, tmp_path):
    with pytest.raises(ValueError, match=r"made by callbacks\.Upcycling: add it"):
        fit(tmp_path, make_data(), [ExpertGrowth(at_step=8)])
    with pytest.raises(ValueError, match="ExpertGrowth twice"):
        fit(tmp_path, make_data(), [ExpertGrowth(at_step=8), ExpertGrowth(at_step=9), *make_callbacks(report=False)])


def test_a_module_that_cannot_grow_is_refused(make_data, tmp_path):
    with pytest.raises(TypeError, match=r"ExpertGrowth needs a module that passes from dense to MoE.*DenseModule"):
        fit(tmp_path, make_data(), [ExpertGrowth(at_step=8)], module=DenseModule(config=TINY))


def test_a_run_resumed_without_its_harvest_is_refused_before_it_trains(finished, make_data, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/experts")
    chosen = [ExpertGrowth(at_step=9), *make_callbacks(report=False)]
    trainer = make_trainer(tmp_path / "run", chosen, logger=False)
    checkpoint = tmp_path / "run/checkpoints/step=7.ckpt"
    with pytest.raises(ValueError, match=r"no harvested experts in .*experts.*manifest\.json is missing"):
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"merge": InPlace()}, "InPlace changed a tensor"), ({}, r"lineage\.json' has no format version")],
    ids=["merge", "lineage"],
)
def test_what_a_growth_needs_is_checked_when_a_run_is_resumed_after_its_swap(
    finished, make_data, tmp_path, settings, message
):
    shutil.copytree(finished[0], tmp_path / "run")
    if not settings:
        (tmp_path / "run/upcycling/lineage.json").write_text("[]")
    chosen = [ExpertGrowth(at_step=9, **settings), *make_callbacks(report=False)]
    trainer = make_trainer(tmp_path / "run", chosen, logger=False)
    trainer.ckpt_path = tmp_path / "run/checkpoints/step=7.ckpt"  # as the command line does
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(), datamodule=make_data(), weights_only=True)
    assert trainer.global_step == 7


def test_a_fit_that_ends_before_its_growth_fails(make_data, tmp_path):
    stop = EarlyStopping("moe/val_loss", strict=False, patience=0, min_delta=99.0)
    others = make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False)
    settings = {"limit_train_batches": 2, "max_epochs": 6, "max_steps": -1}
    with pytest.raises(
        MissedEventError, match=r"ended at optimizer step 8, before the growth at step 9\..*raise its patience"
    ):
        fit(tmp_path, make_data(), [ExpertGrowth(at_step=9, num_experts=5), *others, stop], **settings)
