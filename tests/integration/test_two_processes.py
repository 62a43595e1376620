"""FSDP2 over two CPU processes (gloo): the same method, the same experts and curves as one process."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES, TINY
from upit.report.run import Run

ROOT = Path(__file__).parents[2]


def small_config(run: Path, cache: Path) -> dict:
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 8,
            "max_epochs": 3,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "gradient_clip_val": 1.0,
            "default_root_dir": str(run),
            "callbacks": [
                {"class_path": "callbacks.ExpertHarvest", "init_args": {"every_n_steps": 2}},
                {
                    "class_path": "callbacks.Upcycling",
                    "init_args": {
                        "at_step": 4,
                        "seed_fraction": 0.1,
                        "router": {
                            "class_path": "upit.router_init.RoutingVectors",
                            "init_args": {"epochs": 1, "expert_lr": 1e-4},
                        },
                    },
                },
                {"class_path": "callbacks.RunReport"},
                {"class_path": "callbacks.PilotPicture"},
                {"class_path": "callbacks.DiversityPicture"},
                {"class_path": "callbacks.SwapPicture"},
                {"class_path": "callbacks.RoutingPicture"},
            ],
        },
        "model": {
            "class_path": "lightning_modules.UpITModule",
            "init_args": {
                "dense": {"class_path": "lightning_modules.DenseModule", "init_args": {"config": TINY, "lr": 1e-3}},
                "moe": {
                    "class_path": "lightning_modules.MoEModule",
                    "init_args": {"num_experts": 4, "top_k": 2, "lr": 1e-3},
                },
            },
        },
        "data": {
            "class_path": "datamodules.ReasoningGymDataModule",
            "init_args": {
                "families": FAMILIES,
                "train_size": 120,
                "heldout_size": 8,
                "vocab_size": 320,
                "max_length": 128,
                "batch_size": 4,
                "cache_dir": str(cache),
            },
        },
    }


def fit(run: Path, cache: Path, *configs: Path) -> Path:
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(small_config(run, cache)))
    command = [sys.executable, "-m", "upit", "fit", "-c", str(file)]
    for config in configs:
        command += ["-c", str(config)]
    environment = {key: value for key, value in os.environ.items() if key != "UPIT_RUN_DIR"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return run


# every strategy with a collective of its own
HARVEST = {"every_n_steps": 1, "min_distance": 0.008}
UPCYCLING = {
    "at_step": 4,
    "seed_fraction": 0.1,
    "source": {"class_path": "upit.preparation.Harvested", "init_args": {"base": True}},
    "similarity": {"class_path": "upit.expansion.Functional"},
    "non_experts": {"class_path": "upit.upcycling.MeanNonExperts"},
    "router": {"class_path": "upit.router_init.Ridge"},
}
GROWTH = {"class_path": "callbacks.ExpertGrowth", "init_args": {"at_step": 6, "num_experts": 9}}
GUARD = {"class_path": "callbacks.CollapseGuard", "init_args": {"window": 2, "action": "raise_weight"}}


def others(config: dict) -> dict:
    """The same run with other strategies, two micro-batches a step, and three more experts later."""
    harvest, upcycling, *rest = config["trainer"]["callbacks"]
    callbacks = [harvest | {"init_args": HARVEST}, upcycling | {"init_args": UPCYCLING}, *rest, GUARD, GROWTH]
    moe = {"num_experts": 6, "router_z_loss_weight": 0.01}
    trainer = {"callbacks": callbacks, "accumulate_grad_batches": 2}
    return {"trainer": trainer, "model": {"init_args": {"moe": {"init_args": moe}}}}


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda _: {}, others], ids=["defaults", "others"])
def test_two_processes_equal_one(tmp_path, cache, change):
    changes = tmp_path / "change.yaml"
    changes.write_text(yaml.safe_dump(change(small_config(tmp_path / "one", cache))))
    one = fit(tmp_path / "one", cache, changes)
    two = fit(tmp_path / "two", cache, changes, ROOT / "configs/strategy/fsdp.yaml")

    def lineages(run):
        about = ("kind", "parents", "alpha", "step", "trained_to")
        return [[[entry.get(key) for key in about] for entry in lineage] for lineage in Run(run).lineages]

    assert lineages(one) == lineages(two)
    grown = [str(file.relative_to(one)) for file in one.glob("growth/experts/*.safetensors")]
    assert bool(grown) == (change is others)
    for file in ("experts/step_0000004.safetensors", "upcycling/experts/merged_00.safetensors", *grown):
        ours, theirs = load_file(two / file), load_file(one / file)
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name} {m}"
            )
    for metric in (
        "train/loss", "moe/load_balancing_loss", "val/loss", "harvest/specialist_gain_loss", "harvest/from_base",
        "router/load_entropy", "router/mutual_information", "router/mutual_information_shuffled",
    ):  # fmt: skip
        ours, theirs = curve(two, metric), curve(one, metric)
        assert len(theirs) == len(ours) > 0
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4, msg=lambda m, metric=metric: f"{metric} {m}")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run / "export").state_dict() for run in (two, one))
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-2, atol=2e-4, msg=lambda m, name=name: f"{name} {m}"
        )


def curve(run: Path, metric: str) -> torch.Tensor:
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return torch.tensor([float(row[metric]) for row in rows if row.get(metric)])
