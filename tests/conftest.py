"""A tiny model and a tiny data set, made once, and fits over them."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.pop("PL_GLOBAL_SEED", None)

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks import ExpertHarvest, RunReport, Upcycling
from datamodules import ReasoningGymDataModule
from lightning_modules import DenseModule, MoEModule, UpITModule
from upit.router_init import RoutingVectors

torch.set_num_threads(1)  # the models are so small that a second thread only waits

FAMILIES = {
    "letters": {"letter_counting": {"min_words": 2, "max_words": 3}},
    "arithmetic": {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}},
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def own_seed():
    """A command of an earlier test in this process leaves its seed behind; weights and order of the data follow it."""
    torch.manual_seed(0)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_data(cache: Path, **kwargs) -> ReasoningGymDataModule:
    settings = {"train_size": 120, "heldout_size": 8, "vocab_size": 320, "max_length": 128, "batch_size": 4}
    return ReasoningGymDataModule(families=FAMILIES, cache_dir=str(cache), **{**settings, **kwargs})


@pytest.fixture
def make_data(cache):
    return partial(tiny_data, cache)


@pytest.fixture
def data(make_data):
    module = make_data()
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture
def own_port(monkeypatch):
    """For a fit that forks its processes: it would leave its port to the fits of later tests."""
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))


def make_module(**moe) -> UpITModule:
    L.seed_everything(0)
    settings = {"num_experts": 4, "top_k": 2, "lr": 1e-3}
    return UpITModule(DenseModule(config=TINY, lr=1e-3), MoEModule(**{**settings, **moe}))


def make_callbacks(harvest=None, upcycling=None, report=True) -> list:
    chosen = [
        ExpertHarvest(**(harvest or {"every_n_steps": 3})),
        Upcycling(
            **{
                "at_step": 6,
                "seed_fraction": 0.1,
                "router": RoutingVectors(epochs=1),
                "drift_examples": 4,
                **(upcycling or {}),
            }
        ),
    ]
    return [*chosen, RunReport()] if report else chosen


def make_trainer(run: Path, callbacks: list, **kwargs) -> L.Trainer:
    settings = {
        "max_steps": 10,
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(run, name="", version=""),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "deterministic": True,
    }
    return L.Trainer(default_root_dir=run, callbacks=callbacks, **{**settings, **kwargs})


def every_step_checkpoints(run: Path) -> ModelCheckpoint:
    return ModelCheckpoint(run / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache):
    """One whole fit over the four stages, with a checkpoint at every step."""
    run = tmp_path_factory.mktemp("finished")
    module = make_module()
    trainer = make_trainer(run, [*make_callbacks(), every_step_checkpoints(run)])
    trainer.fit(module, datamodule=tiny_data(cache))
    return run, trainer, module


@pytest.fixture(scope="session")
def pictured(tmp_path_factory, cache) -> Path:
    """The folder of a run from the command line, with every callback of pictures and both loggers."""
    import yaml

    from tests.integration.test_two_processes import small_config
    from upit.cli.main import main

    run = tmp_path_factory.mktemp("pictured")
    config = small_config(run, cache)
    config["trainer"]["max_steps"] = 12
    config["trainer"]["callbacks"] += [
        {"class_path": f"callbacks.{name}"}
        for name in (
            "HParams", "LineagePicture", "SeedDataPicture", "CurvesPicture",  # the others are on in small_config
        )
    ]  # fmt: skip
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPIT_RUN_DIR", str(run))
        for variable in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TOKENIZERS_PARALLELISM"):
            patch.setenv(variable, "1")
        main(["fit", "-c", str(file)])
    return run
