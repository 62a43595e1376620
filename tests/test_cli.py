"""The command line: quick help, run directories, every subcommand on both kinds of checkpoint, what it refuses."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_modules import DenseModule
from tests.integration.test_two_processes import small_config
from upit.cli import RUN_DIR, keep_records, main, run_directory

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in (RUN_DIR, "RANK", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "")  # so that what main sets is undone
        monkeypatch.delenv(name)


def upit(*args, monkeypatch) -> None:
    """One command; each has its run directory to choose."""
    monkeypatch.delenv(RUN_DIR, raising=False)
    monkeypatch.setattr(sys, "argv", ["upit", *map(str, args)])
    main()


@pytest.fixture(scope="module")
def cli_run(tmp_path_factory, cache):
    """A run of the whole method by the command line, a checkpoint at each step; its config and directory."""
    folder = tmp_path_factory.mktemp("cli")
    config = small_config(folder / "run", cache)
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
    }
    config["trainer"]["callbacks"].append(checkpoint)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        upit("fit", "-c", folder / "config.yaml", monkeypatch=patch)
        patch.delenv(RUN_DIR)
    return folder / "run"


def records(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


# --- help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["export", "--help"], []])
def test_help_imports_no_torch(args):
    script = (
        "import sys\nfrom upit.cli import main\n"
        f"try:\n    main({args})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules), 'slow help'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "upit" in result.stdout


def test_an_unknown_subcommand_is_named_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2
    assert "'frobnicate'" in (error := capsys.readouterr().err)
    assert "validate" in error


# --- run directories ----------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_refused_before_anything_is_made(cli_run, tmp_path, monkeypatch, capsys):
    options = ["--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", tmp_path / "none.ckpt"]
    with pytest.raises(SystemExit):
        upit("fit", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert "none.ckpt' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_second_run_goes_beside_the_first(tmp_path, monkeypatch):
    names = []
    for _ in range(3):
        monkeypatch.delenv(RUN_DIR, raising=False)
        run = run_directory(tmp_path / "quickstart", None)
        names.append(run.name)
        run.mkdir()
        (run / "config.yaml").write_text("")
    assert names == ["quickstart", "quickstart-2", "quickstart-3"]


@pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
def test_under_a_launcher_a_taken_directory_is_refused(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")  # rank 0 was faster
    assert run_directory(tmp_path / "run", None) == tmp_path / "run"
    monkeypatch.delenv(RUN_DIR)
    (tmp_path / "run/experts").mkdir()
    with pytest.raises(ValueError, match=r"default_root_dir=.* holds a run already"):
        run_directory(tmp_path / "run", None)


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert run_directory(tmp_path / "run", None) == tmp_path / "run"


def test_a_resumed_run_goes_on_in_the_directory_of_its_checkpoint(tmp_path, monkeypatch):
    for ckpt_path in (tmp_path / "old/checkpoints/a.ckpt", tmp_path / "old/checkpoints/sharded.ckpt"):
        monkeypatch.delenv(RUN_DIR, raising=False)
        assert run_directory(tmp_path / "new", str(ckpt_path)) == tmp_path / "old"
    monkeypatch.delenv(RUN_DIR)
    assert run_directory(tmp_path / "new", str(tmp_path / "loose.ckpt")) == tmp_path / "new"


def test_processes_that_a_run_starts_share_its_directory(tmp_path):
    run = run_directory(tmp_path / "run", None)
    run.mkdir()
    (run / "config.yaml").write_text("")
    assert os.environ[RUN_DIR] == str(run)
    assert run_directory(tmp_path / "run", None) == run


def test_records_are_put_beside(tmp_path):
    for content in ("a", "b"):
        (tmp_path / "metrics.csv").write_text(content)
        keep_records(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"metrics-1.csv": "a", "metrics-2.csv": "b"}


# --- subcommands --------------------------------------------------------------------------------------


def test_a_run_leaves_its_records(cli_run):
    rows = list(csv.DictReader((cli_run / "metrics.csv").open()))
    assert any(row["moe/load_balancing_loss"] for row in rows)
    assert list(cli_run.glob("events.out.tfevents.*"))
    assert (cli_run / "config.yaml").exists()


@pytest.mark.parametrize("step", [3, 6], ids=["dense", "moe"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_scores_of_a_checkpoint_leave_the_run_as_it_was(cli_run, monkeypatch, capsys, command, step):
    before = records(cli_run)
    checkpoint = cli_run / f"checkpoints/step={step}.ckpt"
    upit(command, "-c", cli_run / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "loss/letters" in shown
    assert ("exact_match/letters" in shown) == (command == "test")
    assert records(cli_run) == before


def test_a_checkpoint_is_loaded_without_the_model_that_training_began_with(cli_run, monkeypatch):
    def load(_):
        raise AssertionError("loaded for nothing")

    monkeypatch.setattr(DenseModule, "load", load)
    checkpoint = cli_run / "checkpoints/step=6.ckpt"
    upit("validate", "-c", cli_run / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)


@pytest.mark.parametrize("step", [3, 6], ids=["dense", "moe"])
def test_predict_answers_the_prompts_of_a_file(cli_run, tmp_path, monkeypatch, step):
    rows = [{"prompt": "What is 3 + 4?", "mine": 1}, {"messages": [{"role": "user", "content": "Hi"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    upit(
        "predict", "-c", cli_run / "config.yaml", "--ckpt_path", cli_run / f"checkpoints/step={step}.ckpt",
        "--data.init_args.predict_file", tmp_path / "prompts.jsonl", monkeypatch=monkeypatch,
    )  # fmt: skip
    answers = [json.loads(line) for line in (cli_run / "predictions.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "answer"} for row in answers] == rows
    assert all(isinstance(row["answer"], str) for row in answers)


def test_predict_keeps_a_row_s_own_answer_and_earlier_files_and_says_where_it_writes(
    cli_run, tmp_path, monkeypatch, capsys
):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "What is 3 + 4?", "answer": "7"}) + "\n")
    folder = tmp_path / "copy"
    shutil.copytree(cli_run / "tokenizer", folder / "tokenizer")
    (folder / "checkpoints").mkdir()
    shutil.copy(cli_run / "checkpoints/step=6.ckpt", folder / "checkpoints")
    data = {"tokenizer": str(folder / "tokenizer"), "train_files": ["gone.jsonl"]}
    config = yaml.safe_load((cli_run / "config.yaml").read_text())
    config["data"] = {"class_path": "datamodules.InstructionDataModule", "init_args": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("predictions.jsonl", "predictions-2.jsonl"):
        upit(
            "predict", "-c", tmp_path / "config.yaml", "--ckpt_path", folder / "checkpoints/step=6.ckpt",
            "--data.init_args.predict_file", tmp_path / "prompts.jsonl", monkeypatch=monkeypatch,
        )  # fmt: skip
        assert f"Wrote 1 answers to {folder / name}, column 'answer-2'" in capsys.readouterr().out
        (row,) = map(json.loads, (folder / name).read_text().splitlines())
        assert row["answer"] == "7"
        assert isinstance(row["answer-2"], str)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_untrained_base_is_used_only_on_request(cli_run, tmp_path, monkeypatch, capsys, command):
    options = ["-c", cli_run / "config.yaml", "--trainer.default_root_dir", tmp_path / "run"]
    with pytest.raises(SystemExit):
        upit(command, *options, monkeypatch=monkeypatch)
    assert "name the checkpoint with --ckpt_path; --base uses" in capsys.readouterr().err
    checkpoint = cli_run / "checkpoints/step=6.ckpt"
    with pytest.raises(SystemExit):
        upit(command, *options, "--base", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    assert "--base and --ckpt_path exclude one another" in capsys.readouterr().err


def test_the_base_on_request(cli_run, tmp_path, monkeypatch, capsys):
    options = ["-c", cli_run / "config.yaml", "--trainer.default_root_dir", tmp_path / "run"]
    upit("validate", *options, "--base", monkeypatch=monkeypatch)
    assert "loss/letters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        upit("fit", *options, "--base", monkeypatch=monkeypatch)
    assert "--base is for validate, test and predict" in capsys.readouterr().err


def test_verifiers_are_chosen_by_domain_in_a_config(cli_run, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((cli_run / "config.yaml").read_text())
    number = {"class_path": "upit.verifiers.Number", "init_args": {"tolerance": 0.5}}
    config["data"]["init_args"] |= {"verifiers": {"letters": number, "arithmetic": None}, "score_examples": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = cli_run / "checkpoints/step=6.ckpt"
    upit("test", "-c", tmp_path / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "exact_match/letters" in shown
    assert "exact_match/arithmetic" not in shown
    config["data"]["init_args"]["verifiers"] = {"letters": {"class_path": "upit.verifiers.Code"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        upit("test", "-c", tmp_path / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    assert "set enabled: true" in capsys.readouterr().err


def test_data_is_prepared_and_shown_without_a_model_or_a_run(cli_run, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((cli_run / "config.yaml").read_text())
    # a trainer of these would not be built here
    config["trainer"] |= {"accelerator": "gpu", "devices": 64, "default_root_dir": str(tmp_path / "run")}
    config["data"]["init_args"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--harvest.every_n_steps", "2", "--upcycling.at_step", "5"]
    upit("data", "-c", tmp_path / "config.yaml", *options, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "harvest points: 2, 4\n" in shown
    assert re.search(r"steps an epoch: \d+ \(\d+ batches of 4 rows\)", shown)
    assert "letters" in shown
    assert "trained in green" in shown
    assert "<|im_start|>assistant" in shown
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "cache").iterdir()), "the fit finds it prepared"


def test_data_that_is_wrong_is_named_by_the_preview(cli_run, tmp_path, monkeypatch, capsys):
    options = ["--data.init_args.train_domains", "[music]"]
    with pytest.raises(SystemExit):
        upit("data", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert "data.train_domains=['music'] must name" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_records_and_ends_with_the_same_weights(cli_run, tmp_path, monkeypatch):
    run = tmp_path / "copy"
    shutil.copytree(cli_run, run)
    before = records(run)
    expected = torch.load(run / "checkpoints/step=8.ckpt", weights_only=True)["state_dict"]
    moved = []
    monkeypatch.setattr(L.LightningModule, "cpu", lambda module: moved.append(module) or module)
    (run / "checkpoints/step=8.ckpt").unlink()
    monkeypatch.delattr(DenseModule, "architecture")  # what training began with may be gone by now
    upit("fit", "-c", cli_run / "config.yaml", "--ckpt_path", run / "checkpoints/step=3.ckpt", monkeypatch=monkeypatch)
    after = records(run)
    assert after["metrics-1.csv"] == before["metrics.csv"]
    assert after["config-1.yaml"] == before["config.yaml"]
    assert after["metrics.csv"]
    found = torch.load(run / "checkpoints/step=8.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not moved, "the command moved the model to the host, where nothing needs it"


def test_the_same_config_again_touches_nothing_of_the_first_run(cli_run, monkeypatch):
    before = records(cli_run)
    upit("fit", "-c", cli_run / "config.yaml", "--trainer.max_steps", 5, monkeypatch=monkeypatch)
    assert records(cli_run) == before
    assert (cli_run.with_name("run-2") / "metrics.csv").exists()


@pytest.mark.parametrize(("step", "kind"), [(3, "llama"), (6, "mixtral")])
def test_export(cli_run, tmp_path, step, kind, capsys):
    main(["export", "--ckpt_path", str(cli_run / f"checkpoints/step={step}.ckpt"), "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == kind
    assert f"Exported to {tmp_path / 'out'}" in capsys.readouterr().out


def test_export_says_what_is_wrong(cli_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    good, output = cli_run / "checkpoints/step=3.ckpt", tmp_path / "out"
    for options, message in (
        (["--output", output], "--ckpt_path"),
        (["--ckpt_path", tmp_path / "nowhere.ckpt", "--output", output], "nowhere.ckpt' does not exist"),
        (["--ckpt_path", tmp_path / "text.ckpt", "--output", output], "text.ckpt' is no checkpoint"),
        (["--ckpt_path", good, "--output", tmp_path / "full"], "full' is not empty"),
        (["--ckpt_path", good, "--output", output, "--tokenizer", tmp_path / "none"], "no tokenizer at"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, options)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
