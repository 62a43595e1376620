"""The command line: quick help, run directories, every subcommand on both kinds of checkpoint, what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_modules import DenseModule
from tests.conftest import TINY
from tests.integration.test_two_processes import small_config
from upit.cli.main import main
from upit.cli.run_directory import LOCK, RUN_DIR, Lock

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in (RUN_DIR, "RANK", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "")  # so that what main sets is undone
        monkeypatch.delenv(name)


def upit(*args, monkeypatch) -> None:
    """One command, as from a shell."""
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
    return folder / "run"


def records(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


# --- help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["export", "--help"], []])
def test_help_imports_no_torch(args):
    script = (
        "import sys\nfrom upit.cli.main import main\n"
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


# --- modules of one's own -----------------------------------------------------------------------------


def upit_in(folder: Path, *args: str) -> subprocess.CompletedProcess:
    """One command as the installed script runs it: the working directory is not on the path."""
    command = [sys.executable, "-P", "-c", "from upit.cli.main import main; main()", *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_modules_in_the_working_directory_are_found_last(tmp_path):
    (tmp_path / "mine.py").write_text("from callbacks import CollapseGuard\nclass Guard(CollapseGuard): pass\n")
    (tmp_path / "yaml.py").write_text("raise ImportError('hides an installed package')\n")
    (tmp_path / "callbacks").mkdir()  # without modules it hides nothing
    config = small_config(tmp_path / "run", tmp_path)
    config["trainer"]["callbacks"] += [
        {"class_path": "mine.Guard", "init_args": {"window": 7}},
        {"class_path": "lightning.pytorch.callbacks.Timer"},
    ]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = upit_in(tmp_path, "fit", "-c", "config.yml", "--print_config")
    assert result.returncode == 0, result.stderr
    guard, timer = yaml.safe_load(result.stdout)["trainer"]["callbacks"][-2:]
    assert guard["init_args"]["window"] == 7
    assert timer["init_args"]["interval"] == "step", "a text enum, which YAML does not know"


@pytest.mark.parametrize("taken", ["callbacks/mine.py", "datamodules/__init__.py", "lightning_modules.py"])
def test_a_module_with_the_name_of_one_of_upit_is_refused(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("")
    result = upit_in(tmp_path, "fit", "--print_config")
    assert result.returncode == 1
    assert f"upit fit: error: '{tmp_path}/{taken.split('/')[0]}' has the name of a package of upit's" in result.stderr


# --- run directories ----------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_refused_before_anything_is_made(cli_run, tmp_path, monkeypatch, capsys):
    options = ["--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", tmp_path / "none.ckpt"]
    with pytest.raises(SystemExit):
        upit("fit", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert "none.ckpt' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.moe.top_k": 9}, "top_k"),  # when the classes are made
        ({"data.max_length": 8}, "max_length=8"),  # when the data is prepared
        ({"trainer.limit_train_batches": 1}, "at_step=4"),  # in setup
    ],
)
def test_a_failed_start_leaves_no_directory_behind(cli_run, tmp_path, monkeypatch, capsys, change, message):
    options = ["--trainer.default_root_dir", tmp_path / "runs/run", "--trainer.max_epochs", 1]
    for name, value in change.items():
        section, *fields = name.split(".")
        inner = ".init_args." if section != "trainer" else "."
        options += [f"--{section}{inner}{inner.join(fields)}", value]
    with pytest.raises((SystemExit, ValueError)) as stop:
        upit("fit", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert message in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.iterdir())
    assert RUN_DIR not in os.environ


def test_a_refused_resume_leaves_the_run_as_it_was(cli_run, monkeypatch):
    before = records(cli_run)
    options = ["--ckpt_path", cli_run / "checkpoints/step=3.ckpt", "--data.init_args.batch_size", 2]
    with pytest.raises(ValueError, match=r"data\.batch_size=2 \(checkpoint: 4\)"):
        upit("fit", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert records(cli_run) == before


def test_a_run_in_progress_is_left_alone(cli_run, tmp_path, monkeypatch, capsys):
    """A fit with the same config goes beside it, a second resume is refused; it can be looked at."""
    run = shutil.copytree(cli_run, tmp_path / "run")
    checkpoint = run / "checkpoints/step=6.ckpt"
    lock = Lock(run)
    try:
        before = records(run)
        with pytest.raises(SystemExit) as stop:
            upit("fit", "-c", run / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
        assert stop.value.code == 2
        assert f"/run' is in use by a running fit, process {os.getpid()} on " in capsys.readouterr().err
        upit("validate", "-c", run / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
        assert "val/loss" in capsys.readouterr().out
        assert records(run) == before
    finally:
        lock.release()


class Terminate(L.Callback):
    """What a scheduler does at the end of a job's time."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.max_time=00:00:00:00", r"upit fit: error: .* before the upcycling at step 4.*max_time: raise it"),
        ('--trainer.callbacks+={"class_path": "tests.test_cli.Terminate"}', str(128 + signal.SIGTERM)),
    ],
    ids=["max_time", "SIGTERM"],
)
def test_a_fit_that_owes_its_swap_does_not_exit_with_0(cli_run, tmp_path, monkeypatch, option, said):
    options = ["--trainer.default_root_dir", tmp_path / "run", option]
    with pytest.raises(SystemExit) as stop:
        upit("fit", "-c", cli_run / "config.yaml", *options, monkeypatch=monkeypatch)
    assert re.match(said, str(stop.value.code))


def test_hyper_parameters_of_a_checkpoint_are_ignored_and_named(cli_run, tmp_path, monkeypatch):
    """Lightning would import the class, and replace the model section."""
    content = torch.load(cli_run / "checkpoints/step=6.ckpt", weights_only=True)
    content["hyper_parameters"] = {"_class_path": "evil.Module", "trust_remote_code": True}
    torch.save(content, tmp_path / "step=6.ckpt")
    with pytest.warns(UserWarning, match="checkpoint's hyper_parameters are ignored"):
        upit(
            "validate", "-c", cli_run / "config.yaml", "--ckpt_path", tmp_path / "step=6.ckpt", monkeypatch=monkeypatch
        )


# --- subcommands --------------------------------------------------------------------------------------


def test_a_run_leaves_its_records(cli_run):
    rows = list(csv.DictReader((cli_run / "metrics.csv").open()))
    assert any(row["moe/load_balancing_loss"] for row in rows)
    assert not (cli_run / LOCK).exists()
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


def test_the_files_that_were_trained_on_may_be_gone_if_their_data_is_in_the_cache(
    cli_run, tmp_path, monkeypatch, capsys
):
    rows = [{"prompt": f"What is {i} + {i}?", "response": f"{2 * i}"} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((cli_run / "config.yaml").read_text())
    init = {"tokenizer": str(cli_run / "tokenizer"), "train_files": [str(tmp_path / "sums.jsonl")], "batch_size": 4}
    init |= {"cache_dir": str(tmp_path / "cache"), "max_length": 128, "packing": False}
    config["data"] = {"class_path": "datamodules.InstructionDataModule", "init_args": init}
    config["model"] = {"class_path": "lightning_modules.DenseModule", "init_args": {"config": TINY}}
    config |= {"harvest": None, "upcycling": None}
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}
    config["trainer"] |= {"max_steps": 2, "callbacks": [checkpoint], "default_root_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    upit("fit", "-c", tmp_path / "config.yaml", monkeypatch=monkeypatch)
    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    (tmp_path / "sums.jsonl").unlink()
    with pytest.warns(
        UserWarning, match=r"sums\.jsonl does not exist; the scores are of the data that the checkpoint"
    ):
        upit("test", "-c", tmp_path / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    assert "exact_match/sums" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"data\.train_files: .*sums\.jsonl does not exist"):
        upit("test", "-c", tmp_path / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)


def test_the_base_on_request(cli_run, tmp_path, monkeypatch, capsys):
    options = ["-c", cli_run / "config.yaml", "--trainer.default_root_dir", tmp_path / "run"]
    upit("validate", *options, "--base", monkeypatch=monkeypatch)
    assert "loss/letters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        upit("fit", *options, "--base", monkeypatch=monkeypatch)
    assert "--base is for validate, test and predict" in capsys.readouterr().err


def test_verifiers_are_chosen_by_domain_in_a_config(cli_run, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((cli_run / "config.yaml").read_text())
    number = {"class_path": "upit.evaluation.verifiers.Number", "init_args": {"tolerance": 0.5}}
    config["data"]["init_args"] |= {"verifiers": {"letters": number, "arithmetic": None}, "score_examples": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = cli_run / "checkpoints/step=6.ckpt"
    upit("test", "-c", tmp_path / "config.yaml", "--ckpt_path", checkpoint, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "exact_match/letters" in shown
    assert "exact_match/arithmetic" not in shown
    config["data"]["init_args"]["verifiers"] = {"letters": {"class_path": "upit.evaluation.verifiers.Code"}}
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


def test_the_same_config_again_in_the_same_process_touches_nothing_of_the_first_run(cli_run, monkeypatch):
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
    lacking = torch.load(good, weights_only=True)
    del lacking["state_dict"]["dense.model.model.norm.weight"]
    torch.save(lacking, tmp_path / "lacking.ckpt")
    own = ["--tokenizer", cli_run / "tokenizer"]
    for options, message in (
        (["--ckpt_path", tmp_path / "lacking.ckpt", "--output", output, *own], "lacking.ckpt': the weights don't fit"),
        (["--output", output], "--ckpt_path"),
        (["--ckpt_path", tmp_path / "nowhere.ckpt", "--output", output], "nowhere.ckpt' does not exist"),
        (["--ckpt_path", tmp_path / "text.ckpt", "--output", output], "text.ckpt' is damaged, or not a checkpoint"),
        (["--ckpt_path", good, "--output", tmp_path / "full"], "full' is not empty"),
        (["--ckpt_path", good, "--output", output, "--tokenizer", tmp_path / "none"], "no tokenizer at"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, options)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
