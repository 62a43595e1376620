"""The sweep's plan, its resume and its statistics; the runs themselves are stood in for."""

import json
import statistics
import threading

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from upit.cli import sweep as module
from upit.cli.sweep import final_scores, last_checkpoint, plan, summarise, sweep
from upit.core.files import write_json


@pytest.fixture
def configs(tmp_path):
    files = [tmp_path / f"{name}.yaml" for name in ("base", "first", "second")]
    for file in files:
        file.write_text("")
    return files


@pytest.fixture
def cells(configs, tmp_path):
    return plan(configs[:1], configs[1:], [0, 1], tmp_path / "out")


def report(run, loss, finished=True):
    scores = {"average": {"loss": loss, "exact_match": 1 - loss}}
    content = {"stages": {"base": {"average": {"loss": 9.0, "exact_match": 0.0}}, "final": scores}}
    write_json(run / "report.json", {**content, "finished": True} if finished else content)


def loss_of(cell):
    return {"base": 0.5, "first": 0.4, "second": 0.3}[cell.config] + 0.1 * cell.seed


def stand_in(done, failing=()):
    def run(cell, log=None):
        done.append((cell.config, cell.seed))
        if (cell.config, cell.seed) in failing:
            return False
        report(cell.run, loss_of(cell))
        return True

    return run


def test_plan_stacks_each_config_on_the_base(cells, configs, tmp_path):
    assert [(cell.config, cell.seed) for cell in cells] == [
        (name, seed) for name in ("base", "first", "second") for seed in (0, 1)
    ]
    assert cells[0].arguments == ("-c", str(configs[0]))
    assert cells[2].arguments == ("-c", str(configs[0]), "-c", str(configs[1]))
    assert cells[3].run == tmp_path / "out/first/seed_1"


def test_goes_on_where_it_was_stopped(cells, tmp_path):
    done = []
    report(cells[0].run, 0.5)
    report(cells[1].run, 0.5, finished=False)
    assert sweep(cells, tmp_path / "out", run=stand_in(done), console=Console(quiet=True)) == []
    assert done == [(cell.config, cell.seed) for cell in cells[1:]]
    again = []
    sweep(cells, tmp_path / "out", run=stand_in(again), console=Console(quiet=True))
    assert again == []


def test_mean_and_deviation_per_config(cells, tmp_path):
    console = Console(record=True, width=100)
    sweep(cells, tmp_path / "out", run=stand_in([]), console=console)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["first"]["runs"] == 2
    assert summary["first"]["loss"]["mean"] == pytest.approx(0.45)
    assert summary["first"]["loss"]["std"] == pytest.approx(statistics.stdev([0.4, 0.5]))
    text = console.export_text()
    assert "0.450 ± 0.071" in text
    assert "55.0% ± 7.1%" in text
    events = EventAccumulator(str(tmp_path / "out/hparams/first"))
    events.Reload()
    assert events.Scalars("sweep/loss_mean")[0].value == pytest.approx(0.45)


def test_a_failure_leaves_the_others_alone(cells, tmp_path):
    console = Console(record=True, width=100)
    failed = sweep(cells, tmp_path / "out", run=stand_in([], failing=[("first", 0), ("first", 1)]), console=console)
    assert [cell.config for cell in failed] == ["first", "first"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["first"] == {"runs": 0}
    assert summary["second"]["runs"] == 2
    assert "first, seed 0, failed" in console.export_text()


def test_several_runs_at_a_time_each_with_its_own_log(cells, tmp_path):
    together, logs = threading.Barrier(3, timeout=20), []

    def run(cell, log):
        together.wait()  # passes only when three runs are under way
        logs.append(log)
        report(cell.run, loss_of(cell))
        return True

    assert sweep(cells, tmp_path / "out", jobs=3, run=run, console=Console(quiet=True)) == []
    assert sorted(logs) == sorted(cell.run.with_suffix(".log") for cell in cells)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert all(entry["runs"] == 2 for entry in summary.values())


def test_one_run_has_no_deviation(cells):
    report(cells[0].run, 0.5)
    assert summarise(cells)["base"]["loss"] == {"mean": 0.5, "std": None}


def test_other_arguments_change_the_base_and_a_config_has_the_last_word(configs, tmp_path):
    cells = plan(configs[:2], configs[2:], [0], tmp_path, extra=["--trainer.max_steps", "3"])
    base = ("-c", str(configs[0]), "-c", str(configs[1]), "--trainer.max_steps", "3")
    assert [cell.arguments for cell in cells] == [base, (*base, "-c", str(configs[2]))]


def test_the_command_resumes_the_last_checkpoint(cells, monkeypatch):
    calls = []
    monkeypatch.setenv("UPIT_RUN_DIR", "elsewhere")
    monkeypatch.setattr(module.subprocess, "run", lambda command, env, **_: calls.append((command, env)))
    run = cells[3].run
    run.mkdir(parents=True)
    (run / "left_over").write_text("")
    assert not module.fit(cells[3])
    assert not run.exists(), "an interrupted run without a checkpoint starts anew"
    command, env = calls[0]
    assert command[3:] == [
        "fit", *cells[3].arguments, "--seed_everything", "1", "--trainer.default_root_dir", str(run),
    ]  # fmt: skip
    assert "UPIT_RUN_DIR" not in env, "a run of another's directory keeps no records"
    for i, name in enumerate(("epoch=1-step=9", "epoch=0-step=4")):
        file = run / f"checkpoints/{name}.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        import os

        os.utime(file, (i, 10 - i))
    module.fit(cells[3])
    assert calls[1][0][-2:] == ["--ckpt_path", str(run / "checkpoints/epoch=1-step=9.ckpt")]


def test_nothing_there_is_unfinished(tmp_path):
    assert final_scores(tmp_path) is None
    assert last_checkpoint(tmp_path) is None


def test_refuses(configs, tmp_path):
    with pytest.raises(ValueError, match=r"config '.*none.yaml' does not exist"):
        plan(configs[:1], [tmp_path / "none.yaml"], [0], tmp_path)
    with pytest.raises(ValueError, match="two configs are named 'first'"):
        plan(configs[:1], [configs[1], configs[1]], [0], tmp_path)
    with pytest.raises(ValueError, match=r"seeds=\[0, 0\] holds one twice"):
        plan(configs[:1], [], [0, 0], tmp_path)
    with pytest.raises(ValueError, match=r"seeds=\[1, -1\] must not be negative"):
        plan(configs[:1], [], [1, -1], tmp_path)
