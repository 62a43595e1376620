"""A real sweep over the command line: what a run leaves, and going on after it was cut off."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.integration.test_two_processes import ROOT, small_config


@pytest.mark.slow
def test_a_sweep_resumes_and_skips(tmp_path, cache):
    config = small_config(tmp_path / "unused", cache)
    keep_all = {"save_top_k": -1, "every_n_train_steps": 3, "filename": "{step}"}
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.RunReport", "init_args": {"export": "none"}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep_all},
    ]
    config["harvest"] = {"every_n_steps": 2}
    config["upcycling"] = {
        "at_step": 4,
        "seed_fraction": 0.1,
        "router": {"class_path": "upit.router_init.RandomRouter"},
    }
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config))

    def sweep():
        command = [sys.executable, "-m", "upit", "sweep", "-c", str(base), "--output", str(tmp_path / "out")]
        command += ["--configs", str(ROOT / "configs/baselines/dense_full.yaml"), "--seeds", "3"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    first = sweep()
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [entry["runs"] for entry in summary.values()] == [1, 1]
    runs = {name: tmp_path / f"out/{name}/seed_3" for name in ("base", "dense_full")}
    assert list(json.loads((runs["dense_full"] / "report.json").read_text())["stages"]) == ["base", "dense"]
    assert yaml.safe_load((runs["base"] / "config.yaml").read_text())["seed_everything"] == 3

    (runs["base"] / "report.json").unlink()  # as if it had been cut off after its last checkpoint
    untouched = (runs["dense_full"] / "report.json").stat().st_mtime_ns
    again = sweep()
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "base, seed 3: resumed" in again.stdout
    assert "dense_full, seed 3: finished before" in again.stdout
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    assert (runs["dense_full"] / "report.json").stat().st_mtime_ns == untouched
