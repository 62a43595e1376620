"""Resume after a real SIGKILL in each stage of the upcycling, and in the middle of an epoch with loader processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import every_step_checkpoints, make_callbacks, make_module, make_trainer
from tests.integration.test_two_processes import small_config
from upit.cli.main import main
from upit.cli.run_directory import RUN_DIR
from upit.model.loading.identity import read_weights

ROOT = Path(__file__).parents[2]
# Kills its own process as soon as a file of the stage appears in the run's directory.
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path

upcycling, stage = Path(sys.argv[1]) / "upcycling", sys.argv[2]
del sys.argv[1:3]
sys.path[0] = os.getcwd()  # absolute: reading a config changes the directory

def appeared():
    files = {str(file.relative_to(upcycling)) for file in upcycling.rglob("*") if file.is_file()}
    if stage == "expansion":
        return any(name.startswith("experts") for name in files)
    if stage == "scoring":
        return "seed_perplexity.json" in files
    known = ("experts", "lineage.json", "similarity.json", "seed_perplexity.json")
    return any(not name.startswith(known) for name in files)

def watch():
    while not appeared():
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
from upit.cli.main import main
main()
"""


def write_config(run: Path, cache: Path, *callbacks: dict) -> Path:
    config = small_config(run, cache)
    harvest, upcycling = config["trainer"]["callbacks"][:2]  # without the report and the pictures
    upcycling["init_args"]["router"]["init_args"]["epochs"] = 3
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
    }
    config["trainer"]["callbacks"] = [harvest, upcycling, checkpoint, *callbacks]
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return file


def fit(*args) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in (RUN_DIR, "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setattr(sys, "argv", ["upit", "fit", *map(str, args)])
        main()


def fit_until_killed(run: Path, stage: str, config: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != RUN_DIR}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums as this process does
    command = [sys.executable, "-c", SCRIPT, str(run), stage, "fit", "-c", str(config)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/step=8.ckpt", weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit("-c", write_config(run, cache))
    return final_weights(run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["expansion", "scoring", "router"])
def test_killed_then_resumed_ends_with_the_same_weights(uninterrupted, cache, tmp_path, stage):
    run = tmp_path / "run"
    config = write_config(run, cache)
    killed = fit_until_killed(run, stage, config)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(file.name for file in run.glob("checkpoints/*")) == [f"step={step}.ckpt" for step in range(1, 5)]
    fit("-c", config, "--ckpt_path", run / "checkpoints/step=4.ckpt")
    assert same(final_weights(run), uninterrupted)


@pytest.mark.parametrize("step", [3, 6], ids=["dense", "moe"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "grouped"])
def test_mid_epoch_with_loader_processes(make_data, tmp_path, step, packing):
    def weights(ckpt_path=None):
        module = make_module()
        callbacks = make_callbacks({"every_n_steps": 2}, {"at_step": 4}, report=False)
        trainer = make_trainer(tmp_path, [*callbacks, every_step_checkpoints(tmp_path)], max_steps=8, logger=False)
        data = make_data(num_workers=2, packing=packing)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module.state_dict()

    whole = weights()
    assert same(weights(tmp_path / f"checkpoints/step={step}.ckpt"), whole)


@pytest.mark.slow
def test_two_processes_resume_after_swap_and_growth(cache, tmp_path):
    """The sharded MoE is built as the checkpoint says before its weights are read."""
    growth = {"class_path": "callbacks.ExpertGrowth", "init_args": {"at_step": 5}}
    config, strategy = write_config(tmp_path / "run", cache, growth), ROOT / "configs/strategy/fsdp.yaml"
    command = [sys.executable, "-m", "upit", "fit", "-c", str(config), "-c", str(strategy)]
    environment = {key: value for key, value in os.environ.items() if key != RUN_DIR} | {"OMP_NUM_THREADS": "1"}

    def weights(*options: str) -> dict[str, torch.Tensor]:
        result = subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return read_weights(tmp_path / "run/checkpoints/step=8.ckpt")

    whole = weights()
    assert same(weights("--ckpt_path", str(tmp_path / "run/checkpoints/step=6.ckpt")), whole)
