"""Strategies that would train something else, or were never tried, are refused before anything is built."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_modules import DenseModule
from lightning_modules.strategies import check_strategy
from tests.conftest import TINY, make_trainer


def trainer_with(kind, split=1):
    """A trainer in its setup, as if on two devices."""
    strategy = kind.__new__(kind)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: split)}
    return SimpleNamespace(strategy=strategy, world_size=2)


class Mine(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, Mine])
def test_other_strategies_are_refused_by_name_with_the_alternatives(kind):
    said = (
        rf"trainer\.strategy={kind.__name__} is not supported.*ModelParallelStrategy with data_parallel_size=2 and "
        r"tensor_parallel_size=1.*strategy=ddp"
    )
    with pytest.raises(ValueError, match=said):
        check_strategy(trainer_with(kind))


def test_split_tensors_are_refused():
    with pytest.raises(ValueError, match=r"has tensor_parallel_size=2, .* and tensor_parallel_size=1"):
        check_strategy(trainer_with(ModelParallelStrategy, split=2))


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
def test_the_others_are_taken(kind):
    check_strategy(trainer_with(kind))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_trainer_refuses_before_the_model_is_built(make_data, tmp_path, stage):
    module = DenseModule(config=TINY)
    trainer = make_trainer(tmp_path, [], logger=False, strategy=Mine("cpu"), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.strategy=Mine is not supported"):
        getattr(trainer, stage)(module, datamodule=make_data())
    assert module.model is None
