"""Every YAML under configs/ goes through the real command line, up to the point where training would start."""

import functools
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

from callbacks import ExpertHarvest, Upcycling
from lightning_modules import UpITModule
from upit.cli.main import main
from upit.cli.run_directory import RUN_DIR

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = sorted(CONFIGS.glob("*.yaml"))
EXTRAS = sorted(set(CONFIGS.rglob("*.yaml")) - set(BASES))


def instantiate(monkeypatch, run: Path, *files: Path) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule]:
    """What ``upit fit`` builds from these configs."""
    fits = []

    @functools.wraps(L.Trainer.fit)
    def fit(self, model, *_, datamodule, **__):
        fits.append((self, model, datamodule))

    with monkeypatch.context() as patch:
        patch.setenv(RUN_DIR, str(run))
        patch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        patch.setattr(L.Trainer, "fit", fit)
        patch.setattr(sys, "argv", ["upit", "fit", *[part for file in files for part in ("-c", str(file))]])
        main()
    return fits[0]


def test_there_are_configs():
    assert {"quickstart.yaml", "smollm2.yaml"} <= {file.name for file in BASES}
    assert any(file.parent.name == "ablations" for file in EXTRAS)
    assert any(file.parent.name == "strategy" for file in EXTRAS)


@pytest.mark.parametrize("base", BASES, ids=lambda file: file.stem)
def test_a_base_is_the_whole_method(monkeypatch, tmp_path, base):
    trainer, module, _ = instantiate(monkeypatch, tmp_path, base)
    assert isinstance(module, UpITModule)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert ExpertHarvest in kinds
    assert Upcycling in kinds
    assert len(trainer.loggers) == 2


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda file: f"{file.parent.name}/{file.stem}")
@pytest.mark.parametrize("base", BASES, ids=lambda file: file.stem)
def test_a_difference_stacks_on_every_base(monkeypatch, tmp_path, base, extra):
    monkeypatch.chdir(tmp_path)
    domain_expert = tmp_path / "runs/domain_experts/letters/export"  # what branch_train_mix asks for
    domain_expert.mkdir(parents=True)
    save_file({"weight": torch.ones(1)}, domain_expert / "model.safetensors")
    trainer, module, _ = instantiate(monkeypatch, tmp_path, base, extra)
    assert isinstance(module, UpITModule)
    if extra.stem == "compiled":
        assert all(phase.compile_layers and phase.cuda_graphs for phase in module.phases)
    elif extra.parent.name == "strategy":
        assert trainer.world_size > 1
    else:
        upcycles = any(isinstance(callback, Upcycling) for callback in trainer.callbacks)
        assert upcycles == (extra.stem not in ("dense_full", "domain_expert"))


def test_differences_stack_on_one_another(monkeypatch, tmp_path):
    """Arguments of a class that an earlier file chose stay; another class starts from its own defaults."""
    ablations = [CONFIGS / f"ablations/{name}.yaml" for name in ("train_experts", "first_half", "keep_base")]
    trainer, _, _ = instantiate(monkeypatch, tmp_path, CONFIGS / "quickstart.yaml", *ablations)
    upcycling = next(callback for callback in trainer.callbacks if isinstance(callback, Upcycling))
    assert repr(upcycling.source) == "Harvested(keep='first_half', base=True)"
    assert upcycling.router.expert_lr == 1e-5
    ablations.append(CONFIGS / "ablations/ridge_router.yaml")
    trainer, _, _ = instantiate(monkeypatch, tmp_path, CONFIGS / "quickstart.yaml", *ablations)
    upcycling = next(callback for callback in trainer.callbacks if isinstance(callback, Upcycling))
    assert repr(upcycling.router) == "Ridge(strength=0.001)"
