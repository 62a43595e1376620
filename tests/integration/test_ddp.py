"""DDP over two CPU processes (gloo): a whole fit and its answers, beside one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.integration.test_two_processes import ROOT, curve, fit, small_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache) -> dict[str, Path]:
    """The same fit by one and by two processes, without the pictures."""
    folder = tmp_path_factory.mktemp("ddp")
    harvest, upcycling, *_ = small_config(folder, cache)["trainer"]["callbacks"]
    keep = {"class_path": "tests.integration.ranks.KeepRanks"}
    last = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "last"}}
    trainer = {"callbacks": [harvest, upcycling, keep, last]}
    made = {}
    for name, own in {"one": {}, "two": {"devices": 2, "strategy": "ddp"}}.items():
        changes = folder / f"{name}.change.yaml"
        changes.write_text(yaml.safe_dump({"trainer": trainer | own}))
        made[name] = fit(folder / name, cache, changes)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("when", ["swap", "end"])
def test_two_ranks_hold_what_one_process_does(runs, when):
    one, *two = (
        torch.load(runs[name] / f"{when}_rank{rank}.pt", weights_only=True)
        for name, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    assert any("experts" in name for name in one)
    for name in one:
        assert torch.equal(two[0][name], two[1][name]), f"the ranks' {name} went apart"
        torch.testing.assert_close(two[0][name], one[name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name} {m}")


@pytest.mark.slow
def test_the_curves_are_those_of_one_process(runs):
    for metric in ("train/loss", "moe/load_balancing_loss", "val/loss"):
        ours, theirs = curve(runs["two"], metric), curve(runs["one"], metric)
        assert len(theirs) == len(ours) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, metric=metric: f"{metric} {m}")


@pytest.mark.slow
def test_two_processes_answer_every_prompt_once_in_order(runs, tmp_path):
    rows = [{"prompt": f"What is {i} + {i}?", "mine": i} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "upit", "predict", "-c", runs["two"] / "config.yaml"]
    command += ["--ckpt_path", runs["two"] / "checkpoints/last.ckpt", "--model.moe.max_new_tokens", "4"]
    command += ["--data.predict_file", tmp_path / "prompts.jsonl"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = [json.loads(line) for line in (runs["two"] / "predictions.jsonl").read_text().splitlines()]
    assert [{"prompt": row["prompt"], "mine": row["mine"]} for row in answers] == rows
    assert sorted(file.name for file in runs["two"].glob("predictions*")) == ["predictions.jsonl"]
